"""`prt-hf demo`."""

import argparse

from ..errors import PRTValueError
from .arguments import positive

TASKS = ("text", "images")


def add_parser(commands) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        "demo",
        help="tune a reward on an old model and port it to a new one, here and now",
        description="Pretrain an old and a new model, tune a reward on the old one, add it to the new one, compare; "
        "offline, within about five minutes on two cores. Or do the same with models and data of your own.",
    )
    parser.add_argument("--task", choices=("all", *TASKS), default="all", help="default: %(default)s")
    parser.add_argument("--output-dir", default="prt_demo", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    own = parser.add_argument_group("models and data of your own", "all three, with --task")
    own.add_argument("--source", help="old model: Hub id or path")
    own.add_argument("--target", help="new model with the same vocabulary or labels")
    own.add_argument("--dataset", help="Hub id, folder or file; columns: text, or image and label")
    own.add_argument("--steps", type=positive(int), default=200, help="of tuning; default: %(default)s")
    own.add_argument("--learning-rate", type=positive(float), default=2e-4, help="default: %(default)s")
    own.add_argument("--batch-size", type=positive(int), default=8, help="default: %(default)s")
    return parser


def run(args: argparse.Namespace) -> None:
    from ..demo import OwnModels, run_demo  # training libraries: not needed to show help
    from ..demo.report import describe
    from ..demo.training import Steps

    own = None
    if args.source or args.target or args.dataset:
        tuning = Steps(args.steps, args.learning_rate, args.batch_size)
        own = OwnModels(args.source, args.target, args.dataset, tuning)
        if args.task == "all":
            raise PRTValueError("What the models do is not told.", expected="--task text or --task images", found="all")
    for task in TASKS if args.task == "all" else (args.task,):
        print(describe(run_demo(task, args.output_dir, args.seed, own)), flush=True)
