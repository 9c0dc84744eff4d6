"""The command `prt-hf`: one module for each sub-command, all of which only call the package and print."""

import argparse
import os
import sys

from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from .._version import __version__
from ..errors import PRTError
from ..hub.client import is_of_hub
from . import bench, check, demo, evaluate, generate, push, train

COMMANDS = (demo, train, generate, evaluate, check, push, bench)
_OF_THE_USER = (PRTError, OSError, SafetensorError, HFValidationError)


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
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader (`| head`) has enough; nothing more is written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"prt-hf {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not (isinstance(error, _OF_THE_USER) or _is_of_an_extra(error) or is_of_hub(error)):
            raise
        print(f"prt-hf {args.command}: {error}", file=sys.stderr)
        return 1


def _is_of_an_extra(error: Exception) -> bool:
    """Whether a library is missing that an option asked for, rather than a part of this one."""
    return isinstance(error, ImportError) and (error.name or "").partition(".")[0] != __package__.partition(".")[0]
