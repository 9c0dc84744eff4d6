"""The command `prt-hf`: one module for each sub-command, all of which only call the package and print."""

import argparse
import os
import sys
import warnings

from .._version import __version__
from ..errors import PRTError
from . import bench, check, demo, evaluate, generate, playground, push, train
from .arguments import StrictParser

COMMANDS = (demo, train, generate, playground, evaluate, check, push, bench)


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command; return the exit status: 0 after success, 1 after an error, 130 after an interrupt.

    Wrong arguments raise `SystemExit` with status 2, `--help` and `--version` with 0.
    """
    parser = argparse.ArgumentParser(
        prog="prt-hf",
        description="Portable Reward Tuning: tune a reward once, add it to the logits of any newer model.",
    )
    parser.add_argument("--version", action="version", version=f"prt-hf {__version__}")
    commands = parser.add_subparsers(
        title="commands", dest="command", required=True, metavar="command", parser_class=StrictParser
    )
    for command in COMMANDS:
        command.add_parser(commands).set_defaults(run=command.run)
    args, args.rest = parser.parse_known_args(argv)
    if args.rest and args.run is not train.run:
        parser.error(f"unrecognized arguments: {' '.join(args.rest)}")
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:  # which `python -W` and PYTHONWARNINGS set
                warnings.simplefilter("ignore", FutureWarning)  # meant for the developers of libraries
            status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader (`| head`) has closed the pipe; even the flush at exit would fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"prt-hf {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"prt-hf {args.command}: {error}", file=sys.stderr)
        return 1


def _is_expected(error: Exception) -> bool:
    """Return whether users can mend the error, so that its message is enough."""
    if isinstance(error, PRTError | OSError) or _is_missing_extra(error):
        return True
    from huggingface_hub.errors import HFValidationError
    from safetensors import SafetensorError

    from ..hub.client import is_of_hub

    return isinstance(error, HFValidationError | SafetensorError) or is_of_hub(error)


def _is_missing_extra(error: Exception) -> bool:
    """Return whether an option needs a library that is not installed; a missing part of this package is a bug."""
    return isinstance(error, ImportError) and (error.name or "").partition(".")[0] != __package__.partition(".")[0]
