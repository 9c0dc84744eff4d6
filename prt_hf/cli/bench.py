"""`prt-hf bench`: speed and memory of decoding, classifying, tuning and serving on this machine."""

import argparse
import json
from collections.abc import Callable

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
VISION_FIGURES = {
    "prt_of_limit": "PRT / bare, of its limit t_b / (t_b + t_r)",
    "prt_vs_eft": "PRT / EFT",
}


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
    """Measure and print the figures of one kind.

    Raises:
        PRTValueError: only some of the user's own models are given.
    """
    args.measure(args)


def _train(args: argparse.Namespace) -> None:
    from dataclasses import asdict, replace

    from tqdm.auto import tqdm
    from transformers.utils import logging

    from ..benchmark.train import ROWS, TrainSettings, peak_memory, time_training
    from ..evaluation.machine import hardware, versions

    logging.set_verbosity_error()
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
    if args.growth:
        shapes |= {
            f"{name} x 2": replace(settings, **{name: 2 * getattr(settings, name)})
            for name in ("length", "vocab_size", "batch_size")
        }
    found = {
        name: time_training(
            shape, rounds=args.rounds, progress=lambda rounds, name=name: tqdm(rounds, f"timing {name}", unit="round")
        )
        for name, shape in shapes.items()
    }
    timings = found[""]
    for row in tqdm(ROWS, "measuring memory", unit="row"):
        timings.memory[row] = peak_memory(row, settings)
    record = {"hardware": hardware(), "versions": versions(), "settings": asdict(settings)}
    if args.json:
        raw = {name: {"rows": each.rows, "figures": each.figures} for name, each in found.items()}
        print(json.dumps(record | {"timings": raw, "memory": timings.memory, "figures": timings.figures}))
        return
    lines = [_machine(record), ", ".join(f"{name} {value}" for name, value in record["settings"].items())]
    lines += ["", f"{'':<46}{'s/step':>8}{'/ plain':>9}{'peak MB':>9}{'/ plain':>9}"]
    lines += [
        f"{row:<46}{timings.seconds(row):>8.3f}{timings.ratio(row):>9.2f}"
        f"{timings.memory[row] / 1e6:>9.0f}{timings.memory_ratio(row):>9.2f}"
        for row in ROWS
    ]
    lines += [f"{text:<63}{timings.figures[name]:>9.2f}" for name, text in TRAIN_FIGURES.items()]
    for name, each in list(found.items())[1:]:
        lines += ["", f"{name:<46}{'s/step':>8}{'/ plain':>9}"]
        lines += [f"{row:<46}{each.seconds(row):>8.3f}{each.ratio(row):>9.2f}" for row in ROWS]
    print("\n".join(lines))


def _decode(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm
    from transformers.utils import logging

    from ..benchmark.decode import time_decoding
    from ..evaluation.machine import hardware, versions

    logging.set_verbosity_error()  # the same warnings in every row
    backbone, source, reward, tokenizer, prompts = _models(args)
    found = []
    for name in args.dtype:
        where = {"dtype": getattr(torch, name), "device": args.device}
        for part in (backbone, source, reward):
            part.to(**where)
        found.append(
            time_decoding(
                backbone,
                source,
                reward,
                tokenizer,
                [prompt.to(args.device) for prompt in prompts],
                new_tokens=args.new_tokens,
                rounds=args.rounds,
                progress=lambda rounds, name=name: tqdm(rounds, desc=f"timing in {name}", unit="round"),
            )
        )
    settings = {
        "backbone_parameters": backbone.num_parameters(),
        "source_parameters": source.num_parameters(),
        "new_tokens": args.new_tokens,
        "prompts": len(prompts),
        "rounds": args.rounds,
        "device": args.device,
    }
    record = {"hardware": hardware(), "versions": versions(), "settings": settings}
    if args.json:
        timings = [vars(timing) | {"c": timing.c, "limit": timing.limit, "figures": timing.figures} for timing in found]
        print(json.dumps(record | {"timings": timings, "figures": found[0].figures}))
    else:
        print(_describe(record, found))


def _machine(record: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in (record["hardware"] | record["versions"]).items())


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


def _describe(record: dict, found: list) -> str:
    settings = record["settings"]
    lines = [
        _machine(record),
        f"backbone {settings['backbone_parameters'] / 1e6:.1f} M parameters, source and reward base "
        f"{settings['source_parameters'] / 1e6:.1f} M; {settings['new_tokens']} new tokens, "
        f"{settings['prompts']} prompts, fastest of {settings['rounds']} rounds",
    ]
    for timing in found:
        lines += [
            "",
            f"{timing.dtype}: c = t_reward / t_backbone = {timing.c:.3f}, limit of sequential PRT 1 / (1 + c) = "
            f"{timing.limit:.3f}; {timing.acceptance:.0%} of the drafts accepted, text "
            f"{'identical' if timing.is_same_text else 'NOT identical'}",
            f"{'':<44}{'tokens/s':>10}{'/ bare':>9}",
        ]
        lines += [f"{row:<44}{timing.speed(row):>10.1f}{timing.ratio(row):>9.2f}" for row in timing.rows]
        lines += [f"{text:<53}{timing.figures[name]:>10.2f}" for name, text in DECODE_FIGURES.items()]
    return "\n".join(lines)


def _vision(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm
    from transformers.utils import logging

    from ..benchmark.vision import pixels_for, time_vision
    from ..evaluation.machine import hardware, versions

    logging.set_verbosity_error()
    model = _image_model(args)
    inputs = pixels_for(model, args.batch_size, args.seed)
    found = []
    for name in args.dtype:
        found.append(
            time_vision(
                model.to(dtype=getattr(torch, name), device=args.device),
                inputs,
                rounds=args.rounds,
                progress=lambda rounds, name=name: tqdm(rounds, desc=f"timing in {name}", unit="round"),
            )
        )
    settings = {
        "backbone_parameters": model.backbone.num_parameters(),
        "reward_parameters": model.reward_networks[0].num_parameters(),
        "batch_size": args.batch_size,
        "pixels": {name: list(pixels.shape[1:]) for name, pixels in inputs.items()},
        "rounds": args.rounds,
        "device": args.device,
    }
    record = {"hardware": hardware(), "versions": versions(), "settings": settings}
    if args.json:
        timings = [vars(timing) | {"limit": timing.limit, "figures": timing.figures} for timing in found]
        print(json.dumps(record | {"timings": timings, "figures": found[0].figures}))
    else:
        print(_describe_vision(record, found))


def _serve(args: argparse.Namespace) -> None:
    from ..benchmark.serve import BARE, NAMED, PRT, time_serving
    from ..evaluation.machine import hardware, versions

    settings = {name: getattr(args, name) for name in ("requests", "new_tokens", "rounds", "dtype")}
    speeds = time_serving(args.recipe, **settings)
    from vllm import __version__  # its distribution has several names

    record = {"hardware": hardware(), "versions": versions() | {"vllm": __version__}, "settings": settings}
    if args.json:
        keys = {PRT: "prt_vs_bare", NAMED: "prt_named_vs_bare"}
        figures = {key: speeds[row] / speeds[BARE] for row, key in keys.items() if row in speeds}
        print(json.dumps(record | {"tokens_per_second": speeds, "figures": figures}))
        return
    print(_machine(record))
    print(f"{args.requests} requests of {args.new_tokens} tokens, fastest of {args.rounds} rounds\n")
    print(f"{'':<16}{'tokens/s':>10}{'/ bare':>9}")
    for row, speed in speeds.items():
        print(f"{row:<16}{speed:>10.1f}{speed / speeds[BARE]:>9.2f}")


def _image_model(args: argparse.Namespace):
    from ..benchmark.vision import random_model
    from ..inference import PRTForImageClassification

    if not _has_own_models(args, "reward", "backbone"):
        return random_model(args.seed)
    return PRTForImageClassification.from_parts(args.backbone, [args.reward])


def _describe_vision(record: dict, found: list) -> str:
    settings = record["settings"]
    pixels = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in settings["pixels"].items())
    lines = [
        _machine(record),
        f"backbone {settings['backbone_parameters'] / 1e6:.1f} M parameters, reward "
        f"{settings['reward_parameters'] / 1e6:.1f} M; {settings['batch_size']} images, {pixels}, "
        f"fastest of {settings['rounds']} rounds",
    ]
    for timing in found:
        lines += [
            "",
            f"{timing.dtype}: limits of PRT t_b / (t_b + t_r) = {timing.limit:.3f}, of EFT {timing.eft_limit:.3f}",
            f"{'':<24}{'images/s':>10}{'/ bare':>9}",
        ]
        lines += [f"{row:<24}{timing.speed(row):>10.2f}{timing.ratio(row):>9.3f}" for row in timing.rows]
        lines += [f"{text:<34}{timing.figures[name]:>9.3f}" for name, text in VISION_FIGURES.items()]
    return "\n".join(lines)
