"""`prt-hf demo`."""

import argparse
import sys

from ..errors import PRTValueError
from .arguments import add_counts, add_option, positive, seed, with_default

TASKS = ("text", "images")


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = commands.add_parser(
        "demo",
        help="tune a reward on an old model and port it to a new one, here and now",
        description="Pretrain an old and a new model, tune a reward on the old one, add it to the new one, and "
        "compare, with three seeds; offline, in about three minutes on two quiet cores. Or do the same with your own "
        "models and data.",
    )
    add_option(parser, "task", choices=("all", *TASKS), default="all", help=with_default("kind of models"))
    add_option(parser, "output_dir", default="prt_demo", help=with_default("folder for models, table and chart"))
    add_option(parser, "seed", type=seed, default=0, help=with_default("seed of data and models"))
    own = parser.add_argument_group("your own models and data", "give all three, and --task")
    add_option(own, "source", help="old model: Hub id or folder")
    add_option(
        own, "target", help="new model of the same vocabulary, an update of it, or the same labels: Hub id or folder"
    )
    add_option(own, "dataset", help="Hub id, folder or file; columns: text, or image and label")
    add_counts(own, steps=(200, "steps of tuning"), batch_size=(8, "rows in a step"))
    add_option(own, "learning_rate", type=positive(float), default=2e-4, help="default: %(default)s")
    return parser


def run(args: argparse.Namespace) -> None:
    """Run the demo and print its tables."""
    tasks = "text and images" if args.task == "all" else args.task
    extent = "your own models" if args.source else "about three minutes on two quiet cores"
    print(f"prt-hf demo: {tasks}, {extent}; loading the libraries first", file=sys.stderr, flush=True)
    from ..demo import OwnModels, run_demo
    from ..demo.report import describe
    from ..demo.training import Steps

    own = None
    if args.source or args.target or args.dataset:
        tuning = Steps(args.steps, args.learning_rate, args.batch_size)
        own = OwnModels(args.source, args.target, args.dataset, tuning)
        if args.task == "all":
            raise PRTValueError(
                "`--task` is required with your own models.", expected="--task text or --task images", found="all"
            )
    for task in TASKS if args.task == "all" else (args.task,):
        print(describe(run_demo(task, args.output_dir, args.seed, own)), flush=True)
