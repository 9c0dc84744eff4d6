"""`prt-hf bench`: what decoding costs, on this machine."""

import argparse
import json

from ..errors import PRTValueError
from .demo import positive

FIGURES = {
    "sequential_of_limit": "PRT / bare, of its limit 1 / (1 + c)",
    "vs_eft_of_limit": "PRT / EFT, of its limit",
    "speculative_vs_sequential": "PRT, speculative / PRT",
    "speculative_vs_bare": "PRT, speculative / bare",
    "same_base_vs_bare": "PRT, reward on the backbone's own weights / bare",
}


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "bench",
        help="speed, side by side in one run",
        description="Time bare backbone, PRT, PRT with speculation and EFT side by side.",
    )
    kinds = parser.add_subparsers(title="what to time", dest="kind", required=True, metavar="kind")
    decode = kinds.add_parser(
        "decode",
        help="greedy decoding, one text at a time",
        description="Greedy decoding, one text at a time. Without models of your own, small ones are trained on the "
        "spot, and the new one is grown to 25 million parameters without changing its function; the whole takes about "
        "five minutes on two cores.",
    )
    decode.add_argument(
        "--dtype", nargs="+", choices=("bfloat16", "float32", "float16"), default=["bfloat16", "float32"]
    )
    decode.add_argument("--new-tokens", type=positive(int), default=64, help="default: %(default)s")
    decode.add_argument("--rounds", type=positive(int), default=5, help="default: %(default)s")
    decode.add_argument("--device", default="cpu", help="default: %(default)s")
    decode.add_argument("--seed", type=int, default=0, help="of the models made here; default: %(default)s")
    decode.add_argument("--json", action="store_true", help="print one object with every raw timing")
    own = decode.add_argument_group("models of your own", "all of them")
    own.add_argument("--reward", help="a reward adapter: folder or Hub id")
    own.add_argument("--backbone", help="the backbone to decode with")
    own.add_argument("--prompt", nargs="+", help="texts to go on with")
    return parser


def run(args: argparse.Namespace) -> None:
    import torch
    from tqdm.auto import tqdm
    from transformers.utils import logging

    from ..benchmark import hardware, time_decoding, versions

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

        from ..pretrained import load_pretrained
        from ..reward_model import RewardModel, load_base

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
        lines += [f"{text:<53}{timing.figures[name]:>10.2f}" for name, text in FIGURES.items()]
    return "\n".join(lines)
