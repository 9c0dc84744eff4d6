"""The command `prt-hf`: one module for each sub-command, all of which only call the package and print."""

import argparse
import os
import sys
import warnings

from .._version import __version__
from ..errors import PRTError
from . import bake, bench, chat, check, demo, env, evaluate, generate, playground, push, train
from .arguments import StrictParser

COMMANDS = (demo, train, generate, chat, playground, evaluate, check, bake, push, bench, env)
_SMALLER = {
    "train": "--per_device_train_batch_size 1 with --gradient_accumulation_steps, a shorter --max_length, "
    "--gradient_checkpointing true, --dtype bfloat16, or --precompute_backbone",
}
_SMALLER_MODELS = "--dtype bfloat16, --device auto, a smaller --batch_size, or shorter texts"


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
    if args.rest and args.run not in (train.run, bake.run):
        args.parser.refuse(args.rest)
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
        if _is_out_of_memory(error):
            error = PRTError(
                "There is not enough memory.",
                found=str(error).strip().split("\n")[0],
                remedy=_SMALLER.get(args.command, _SMALLER_MODELS),
            )
        elif not _is_expected(error):
            raise
        print(f"prt-hf {args.command}: {error}", file=sys.stderr)
        return 1


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether an allocation failed, on a GPU (`torch.OutOfMemoryError`) or in the main memory."""
    words = ("out of memory", "allocate memory")
    return isinstance(error, MemoryError | RuntimeError) and (
        type(error).__name__ in ("MemoryError", "OutOfMemoryError") or any(each in str(error) for each in words)
    )


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
    if isinstance(error, RuntimeError) and "pip install" in str(error):  # of transformers, for `report_to`
        return True
    return isinstance(error, ImportError) and (error.name or "").partition(".")[0] != __package__.partition(".")[0]
