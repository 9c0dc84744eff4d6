"""`prt-hf bench`: what decoding, classifying and tuning cost, on this machine."""

import argparse
import json

from ..errors import PRTValueError
from .arguments import positive

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


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench",
        help="speed and memory, side by side in one run",
        description="Time and measure PRT and what it is compared with, in turn in one run.",
    )
    kinds = parser.add_subparsers(title="what to time", dest="kind", required=True, metavar="kind")
    decode = kinds.add_parser(
        "decode",
        help="greedy decoding, one text at a time",
        description="Greedy decoding, one text at a time: bare backbone, PRT, PRT with speculation, EFT. Without "
        "models of your own, small ones are trained on the spot, and the new one is grown to 25 million parameters "
        "without changing its function; the whole takes about five minutes on two cores.",
    )
    decode.add_argument("--new-tokens", type=positive(int), default=64, help="default: %(default)s")
    own = decode.add_argument_group("models of your own", "all of them")
    own.add_argument("--reward", help="a reward adapter: folder or Hub id")
    own.add_argument("--backbone", help="the backbone to decode with")
    own.add_argument("--prompt", nargs="+", help="texts to go on with")
    train = kinds.add_parser(
        "train",
        help="a step of tuning, against plain LoRA fine-tuning",
        description="Step time and peak memory of LoRA rewards, against plain LoRA fine-tuning by TRL's SFTTrainer. "
        "The models are random Llamas, which take as long as trained ones.",
    )
    train.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    train.add_argument("--vocab-size", type=positive(int), default=50_000, help="default: %(default)s")
    train.add_argument("--hidden-size", type=positive(int), default=512, help="default: %(default)s")
    train.add_argument("--layers", type=positive(int), default=8, help="default: %(default)s")
    train.add_argument("--batch-size", type=positive(int), default=2, help="default: %(default)s")
    train.add_argument("--length", type=positive(int), default=256, help="tokens a row; default: %(default)s")
    train.add_argument(
        "--growth", action="store_true", help="time twice the length, vocabulary and batch as well, each by itself"
    )
    vision = kinds.add_parser(
        "vision",
        help="image classification, a batch at a time",
        description="Classify a batch of images: bare backbone, PRT, EFT. Without models of your own, random ones of "
        "the shapes of ViT-B/16 and, for the reward, ViT-S/16, which take as long as trained ones; the whole takes a "
        "minute or two.",
    )
    vision.add_argument("--batch-size", type=positive(int), default=4, help="images; default: %(default)s")
    own = vision.add_argument_group("models of your own", "both of them; random images, in each one's own pixels")
    own.add_argument("--reward", help="a reward for images: folder or Hub id")
    own.add_argument("--backbone", help="the backbone to classify with: folder or Hub id")
    for kind in (decode, vision):
        kind.add_argument(
            "--dtype", nargs="+", choices=("bfloat16", "float32", "float16"), default=["bfloat16", "float32"]
        )
    for kind, function in ((decode, _decode), (train, _train), (vision, _vision)):
        kind.add_argument("--rounds", type=positive(int), default=5, help="default: %(default)s")
        kind.add_argument("--device", default="cpu", help="default: %(default)s")
        kind.add_argument("--seed", type=int, default=0, help="of the models made here; default: %(default)s")
        kind.add_argument("--json", action="store_true", help="print one object with every raw timing")
        kind.set_defaults(measure=function)
    serve = kinds.add_parser(
        "serve",
        help="batches of requests in vLLM",
        description="Answer a batch of requests in vLLM's engine: the recipe's backbone, the PRT model, and, if the "
        "rewards are adapters of one base, the backbone with rewards that requests name.",
    )
    serve.add_argument("recipe", help="folder of a saved PRT model")
    serve.add_argument("--requests", type=positive(int), default=64, help="at a time; default: %(default)s")
    serve.add_argument("--new-tokens", type=positive(int), default=64, help="of each; default: %(default)s")
    serve.add_argument("--dtype", default="auto", help="default: as the backbone is stored")
    serve.add_argument("--rounds", type=positive(int), default=3, help="default: %(default)s")
    serve.add_argument("--json", action="store_true", help="print one object")
    serve.set_defaults(measure=_serve)
    return parser


def run(args: argparse.Namespace) -> None:
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
    lines = [", ".join(f"{name} {value}" for name, value in (record["hardware"] | record["versions"]).items())]
    lines += [", ".join(f"{name} {value}" for name, value in record["settings"].items())]
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

    logging.set_verbosity_error()  # every row would say the same things again
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


def _models(args):
    if args.reward or args.backbone or args.prompt:
        if not (args.reward and args.backbone and args.prompt):
            raise PRTValueError(
                "Models of your own are incomplete.",
                expected="--reward, --backbone and --prompt",
                found=str(vars(args)),
            )
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
    hardware, settings = record["hardware"], record["settings"]
    lines = [
        ", ".join(f"{name} {value}" for name, value in (hardware | record["versions"]).items()),
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
    print(", ".join(f"{name} {value}" for name, value in (record["hardware"] | record["versions"]).items()))
    print(f"{args.requests} requests of {args.new_tokens} tokens, fastest of {args.rounds} rounds\n")
    print(f"{'':<16}{'tokens/s':>10}{'/ bare':>9}")
    for row, speed in speeds.items():
        print(f"{row:<16}{speed:>10.1f}{speed / speeds[BARE]:>9.2f}")


def _image_model(args):
    from ..benchmark.vision import random_model
    from ..inference import PRTForImageClassification

    if not (args.reward or args.backbone):
        return random_model(args.seed)
    if not (args.reward and args.backbone):
        raise PRTValueError(
            "Models of your own are incomplete.", expected="--reward and --backbone", found=str(vars(args))
        )
    return PRTForImageClassification.from_parts(args.backbone, [args.reward])


def _describe_vision(record: dict, found: list) -> str:
    hardware, settings = record["hardware"], record["settings"]
    pixels = ", ".join(f"{name} {' x '.join(map(str, shape))}" for name, shape in settings["pixels"].items())
    lines = [
        ", ".join(f"{name} {value}" for name, value in (hardware | record["versions"]).items()),
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
