"""`prt-hf env`."""

import argparse
import json
import platform

from .arguments import add_command, add_json

DESCRIPTION = """\
Print the versions of prt_hf and of the packages that it works with, and the hardware, for reports of problems. Nothing
is sent anywhere, and no names of users, folders or hosts are printed."""
EXAMPLES = """examples:
  prt-hf env
  prt-hf env --json"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(commands, "env", "print versions and hardware for reports of problems", DESCRIPTION, EXAMPLES)
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Print versions and hardware."""
    from ..evaluation.machine import hardware, versions

    packages = versions("trl", "datasets", "accelerate", "huggingface_hub", "vllm")
    found = packages | {"system": platform.platform()} | {"gpu": "none"} | hardware()
    if args.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:<18}{value}" for name, value in found.items()))
