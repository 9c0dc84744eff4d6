"""`prt-hf bench`: speed and memory of decoding, classifying, tuning and serving on this machine."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence

from ..errors import PRTValueError
from .arguments import DTYPES, StrictParser, add_counts, add_json, add_option, seed, with_default

DECODE_FIGURES = {
    "sequential_of_limit": "PRT / bare, of its limit 1 / (1 + c)",
    "vs_eft_of_limit": "PRT / EFT, of its limit",
    "speculative_vs_sequential": "PRT, speculative / PRT",
    "speculative_vs_bare": "PRT, speculative / bare",
    "same_base_vs_bare": "PRT, reward on the backbone's own weights / bare",
}
TRAIN_FIGURES = {
    "step_other_base": "step, another backbone of the same size / plain",
    "step_same_base": "step, own base / plain",
    "step_shared_trunk": "step, own base, top quarter of the layers / plain, the same",
    "step_cached_second_epoch": "step, own base, states stored / plain",
    "memory_vs_plain": "peak memory of the step, another backbone / plain",
}
VISION_FIGURES = {"prt_of_limit": "PRT / bare, of its limit t_b / (t_b + t_r)", "prt_vs_eft": "PRT / EFT"}


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's parser, with one of its own for each kind of measurement."""
    parser = commands.add_parser(
        "bench",
        help="measure speed and memory, side by side in one run",
        description="Measure the speed and memory of PRT and of its alternatives, in turn and in one run.",
    )
    kinds = parser.add_subparsers(
        title="what to measure", dest="kind", required=True, metavar="kind", parser_class=StrictParser
    )
    decode = kinds.add_parser(
        "decode",
        help="greedy decoding, one text at a time",
        description="Measure greedy decoding, one text at a time: bare backbone, PRT, PRT with speculation, EFT. "
        "Without your own models, small ones are trained on the spot, and the new one is grown to 25 million "
        "parameters without changing its function; all this takes about five minutes on two cores.",
    )
    add_counts(decode, new_tokens=(64, "tokens of each text"))
    own = _add_own_models(decode, "give all three", "decode")
    add_option(own, "prompt", nargs="+", help="texts to continue")
    train = kinds.add_parser(
        "train",
        help="a step of tuning, against plain LoRA fine-tuning",
        description="Measure time and peak memory of a step of LoRA rewards, against plain LoRA fine-tuning by TRL's "
        "SFTTrainer. The models are random Llamas, which take as long as trained ones.",
    )
    add_option(train, "dtype", choices=DTYPES, default="bfloat16", help=with_default("type of the weights"))
    add_counts(
        train,
        vocab_size=(50_000, "tokens of the vocabulary"),
        hidden_size=(512, "width of the models"),
        layers=(8, "layers of the models"),
        batch_size=(2, "rows in a step"),
        length=(256, "tokens in a row"),
    )
    add_option(
        train, "growth", action="store_true", help="also double length, vocabulary and batch size, one at a time"
    )
    vision = kinds.add_parser(
        "vision",
        help="image classification, a batch at a time",
        description="Measure the classification of a batch of images: bare backbone, PRT, EFT. Without your own "
        "models, random ones are used, which take as long as trained ones: ViT-B/16 and, for the reward, ViT-S/16; "
        "all this takes a minute or two.",
    )
    add_counts(vision, batch_size=(4, "images in a batch"))
    _add_own_models(vision, "give both; images are random, with the pixels that each model needs", "classify")
    for kind in (decode, vision):
        add_option(
            kind,
            "dtype",
            nargs="+",
            choices=DTYPES,
            default=["bfloat16", "float32"],
            help="types of the weights, measured one after another; default: bfloat16 float32",
        )
    for kind, measure in ((decode, _decode), (train, _train), (vision, _vision)):
        add_option(kind, "device", default="cpu", help=with_default("cpu, cuda, ..."))
        add_option(kind, "seed", type=seed, default=0, help=with_default("seed of models that are made here"))
        _add_common(kind, measure, rounds=5)
    serve = kinds.add_parser(
        "serve",
        help="batches of requests in vLLM",
        description="Measure the answers to a batch of requests in vLLM's engine: the recipe's backbone, the PRT "
        "model, and, if the rewards are adapters of one base, the backbone with rewards that requests name.",
    )
    serve.add_argument("recipe", help="folder of a saved PRT model")
    add_counts(serve, requests=(64, "requests at a time"), new_tokens=(64, "tokens of each answer"))
    add_option(serve, "dtype", default="auto", help="type of the weights; default: as the backbone is stored")
    _add_common(serve, _serve, rounds=3)
    return parser


def _add_own_models(parser: argparse.ArgumentParser, which: str, verb: str) -> argparse._ArgumentGroup:
    own = parser.add_argument_group("your own models", which)
    add_option(own, "reward", help="reward: folder or Hub id")
    add_option(own, "backbone", help=f"backbone to {verb} with: folder or Hub id")
    return own


def _add_common(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], None], rounds: int) -> None:
    add_counts(parser, rounds=(rounds, "rounds, of which the fastest counts"))
    add_json(parser, "print one JSON object with all figures")
    parser.set_defaults(measure=measure)


def run(args: argparse.Namespace) -> None:
    """Measure and print the figures of one kind."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # the same warnings in every row
    args.measure(args)


def _decode(args: argparse.Namespace) -> None:
    import torch

    from ..benchmark.decode import time_decoding

    backbone, source, reward, tokenizer, prompts = _models(args)
    found = []
    for name in args.dtype:
        for part in (backbone, source, reward):
            part.to(dtype=getattr(torch, name), device=args.device)
        prompts = [prompt.to(args.device) for prompt in prompts]
        lengths = {"new_tokens": args.new_tokens, "rounds": args.rounds}
        found.append(time_decoding(backbone, source, reward, tokenizer, prompts, **lengths, progress=_bar(name)))
    settings = {
        "backbone_parameters": backbone.num_parameters(),
        "source_parameters": source.num_parameters(),
        "new_tokens": args.new_tokens,
        "prompts": len(prompts),
        "rounds": args.rounds,
        "device": args.device,
    }
    timings = [vars(timing) | {"c": timing.c, "limit": timing.limit, "figures": timing.figures} for timing in found]
    lines = [
        f"backbone {settings['backbone_parameters'] / 1e6:.1f} M parameters, source and reward base "
        f"{settings['source_parameters'] / 1e6:.1f} M; {args.new_tokens} new tokens, {len(prompts)} prompts, "
        f"fastest of {args.rounds} rounds"
    ]
    for timing in found:
        lines += [
            "",
            f"{timing.dtype}: c = t_reward / t_backbone = {timing.c:.3f}, limit of sequential PRT 1 / (1 + c) = "
            f"{timing.limit:.3f}; {timing.acceptance:.0%} of the drafts accepted, text "
            f"{'identical' if timing.is_same_text else 'NOT identical'}",
            *_table(
                [("tokens/s", ".1f"), ("/ bare", ".2f")],
                {row: (timing.speed(row), timing.ratio(row)) for row in timing.rows},
                {text: timing.figures[name] for name, text in DECODE_FIGURES.items()},
            ),
        ]
    _print(args, settings, {"timings": timings, "figures": found[0].figures}, lines)


def _train(args: argparse.Namespace) -> None:
    from dataclasses import asdict, replace

    from tqdm.auto import tqdm

    from ..benchmark.train import ROWS, TrainSettings, peak_memory, time_training

    settings = TrainSettings(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.layers,
        vocab_size=args.vocab_size,
        batch_size=args.batch_size,
        length=args.length,
        dtype=args.dtype,
        device=args.device,
        seed=args.seed,
    )
    shapes = {"": settings}
    for name in ("length", "vocab_size", "batch_size") if args.growth else ():
        shapes[f"{name} x 2"] = replace(settings, **{name: 2 * getattr(settings, name)})
    found = {name: time_training(shape, rounds=args.rounds, progress=_bar(name)) for name, shape in shapes.items()}
    timings = found[""]
    for row in tqdm(ROWS, "measuring memory", unit="row"):
        timings.memory[row] = peak_memory(row, settings)
    steps = [("s/step", ".3f"), ("/ plain", ".2f")]
    lines = [
        ", ".join(f"{name} {value}" for name, value in vars(settings).items()),
        "",
        *_table(
            [*steps, ("peak MB", ".0f"), ("/ plain", ".2f")],
            {
                row: (timings.seconds(row), timings.ratio(row), timings.memory[row] / 1e6, timings.memory_ratio(row))
                for row in ROWS
            },
            {text: timings.figures[name] for name, text in TRAIN_FIGURES.items()},
        ),
    ]
    for name, each in list(found.items())[1:]:
        lines += ["", name, *_table(steps, {row: (each.seconds(row), each.ratio(row)) for row in ROWS})]
    raw = {name: {"rows": each.rows, "figures": each.figures} for name, each in found.items()}
    _print(args, asdict(settings), {"timings": raw, "memory": timings.memory, "figures": timings.figures}, lines)


def _vision(args: argparse.Namespace) -> None:
    import torch

    from ..benchmark.vision import pixels_for, random_model, time_vision
    from ..inference import PRTForImageClassification

    if _has_own_models(args, "reward", "backbone"):
        model = PRTForImageClassification.from_parts(args.backbone, [args.reward])
    else:
        model = random_model(args.seed)
    inputs = pixels_for(model, args.batch_size, args.seed)
    found = []
    for name in args.dtype:
        model.to(dtype=getattr(torch, name), device=args.device)
        found.append(time_vision(model, inputs, rounds=args.rounds, progress=_bar(name)))
    settings = {
        "backbone_parameters": model.backbone.num_parameters(),
        "reward_parameters": model.reward_networks[0].num_parameters(),
        "batch_size": args.batch_size,
        "pixels": {name: list(pixels.shape[1:]) for name, pixels in inputs.items()},
        "rounds": args.rounds,
        "device": args.device,
    }
    timings = [vars(timing) | {"limit": timing.limit, "figures": timing.figures} for timing in found]
    pixels = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in settings["pixels"].items())
    lines = [
        f"backbone {settings['backbone_parameters'] / 1e6:.1f} M parameters, reward "
        f"{settings['reward_parameters'] / 1e6:.1f} M; {args.batch_size} images, {pixels}, "
        f"fastest of {args.rounds} rounds"
    ]
    for timing in found:
        lines += [
            "",
            f"{timing.dtype}: limits of PRT t_b / (t_b + t_r) = {timing.limit:.3f}, of EFT {timing.eft_limit:.3f}",
            *_table(
                [("images/s", ".2f"), ("/ bare", ".3f")],
                {row: (timing.speed(row), timing.ratio(row)) for row in timing.rows},
                {text: timing.figures[name] for name, text in VISION_FIGURES.items()},
            ),
        ]
    _print(args, settings, {"timings": timings, "figures": found[0].figures}, lines)


def _serve(args: argparse.Namespace) -> None:
    from ..benchmark.serve import BARE, NAMED, PRT, time_serving

    settings = {name: getattr(args, name) for name in ("requests", "new_tokens", "rounds", "dtype")}
    speeds = time_serving(args.recipe, **settings)
    from vllm import __version__  # its distribution has several names

    ratios = {row: speed / speeds[BARE] for row, speed in speeds.items()}
    keys = {PRT: "prt_vs_bare", NAMED: "prt_named_vs_bare"}
    figures = {key: ratios[row] for row, key in keys.items() if row in speeds}
    lines = [
        f"{args.requests} requests of {args.new_tokens} tokens, fastest of {args.rounds} rounds",
        "",
        *_table([("tokens/s", ".1f"), ("/ bare", ".2f")], {row: (speeds[row], ratios[row]) for row in speeds}),
    ]
    _print(args, settings, {"tokens_per_second": speeds, "figures": figures}, lines, vllm=__version__)


def _bar(name: str) -> Callable[[Iterable], Iterable]:
    """Return a function that shows the progress of rounds."""
    from tqdm.auto import tqdm

    return lambda rounds: tqdm(rounds, f"timing {name}", unit="round")


def _print(args: argparse.Namespace, settings: dict, figures: dict, lines: list[str], **packages: str) -> None:
    """Print everything as one JSON object, or the lines below a description of the machine."""
    from ..evaluation.machine import hardware, versions

    machine = {"hardware": hardware(), "versions": versions() | packages}
    if args.json:
        print(json.dumps(machine | {"settings": settings} | figures))
    else:
        described = machine["hardware"] | machine["versions"]
        print(", ".join(f"{name} {value}" for name, value in described.items()), *lines, sep="\n")


def _table(
    heads: list[tuple[str, str]], rows: dict[str, Sequence[float]], ratios: dict[str, float] | None = None
) -> list[str]:
    """Return a table with a head and a format for each column; `ratios` have a number in the last one only."""
    names, formats = zip(*heads, strict=True)
    cells = {"": names}
    for name, values in (rows | {name: [ratio] for name, ratio in (ratios or {}).items()}).items():
        cells[name] = [f"{value:{form}}" for value, form in zip(values, formats[-len(values) :], strict=True)]
    width = max(len(name) + 10 * len(row) for name, row in cells.items())
    return [name + "".join(f"{cell:>10}" for cell in row).rjust(width - len(name)) for name, row in cells.items()]


def _has_own_models(args: argparse.Namespace, *names: str) -> bool:
    """Return whether the user gives models; raise `PRTValueError` if only some of the options are given."""
    given = [f"--{name}" for name in names if getattr(args, name)]
    if 0 < len(given) < len(names):
        *others, last = (f"--{name}" for name in names)
        expected = f"{', '.join(others)} and {last}"
        raise PRTValueError("Some options of your own models are missing.", expected=expected, found=", ".join(given))
    return bool(given)


def _models(args: argparse.Namespace) -> tuple:
    """Return backbone, source backbone, reward, tokenizer, and token ids of prompts."""
    if _has_own_models(args, "reward", "backbone", "prompt"):
        from transformers import AutoTokenizer

        from ..networks.auto import load_base, load_pretrained
        from ..reward.model import RewardModel

        tokenizer = AutoTokenizer.from_pretrained(args.backbone)
        reward = RewardModel.from_pretrained(args.reward)
        prompts = [tokenizer(text, return_tensors="pt").input_ids for text in args.prompt]
        source = load_base(reward.config.reward_base)
        return load_pretrained(args.backbone), source, reward, tokenizer, prompts
    from ..demo.timing import TimingSettings, timing_task

    task = timing_task(TimingSettings(), args.seed)
    return task.backbone, task.source, task.reward, task.tokenizer, task.prompts
