"""The command `prt-hf`: one module for each sub-command, all of which only call the package and print."""

import argparse
import sys

from .._version import __version__
from ..errors import PRTError
from . import bench, demo, push, train

COMMANDS = (demo, train, push, bench)


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; 0 if it went well, 1 after an error, 130 if interrupted. Bad arguments leave with 2."""
    parser = argparse.ArgumentParser(prog="prt-hf", description="Portable Reward Tuning.")
    parser.add_argument("--version", action="version", version=f"prt-hf {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.run is not train.run:
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    try:
        args.run(args)
    except PRTError as error:
        print(f"prt-hf {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"prt-hf {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0
