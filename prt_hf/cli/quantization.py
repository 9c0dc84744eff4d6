"""Options that load a backbone quantised; rewards and their bases stay in full precision."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import Any

from ..errors import UnsupportedError
from .arguments import add_option

TORCHAO_INT8 = "torchao-int8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--load_in_4bit`, `--load_in_8bit` and `--quantization`, of which one can be given."""
    group = parser.add_argument_group("quantisation", "of the backbone alone; rewards stay in full precision")
    one = group.add_mutually_exclusive_group()
    for bits in (4, 8):
        add_option(one, f"load_in_{bits}bit", action="store_true", help=f"{bits} bits, by bitsandbytes")
    add_option(one, "quantization", choices=[TORCHAO_INT8], help="8-bit weights by torchao, on any device")


def is_asked(args: argparse.Namespace) -> bool:
    """Return whether one of the options is given."""
    return args.load_in_4bit or args.load_in_8bit or args.quantization is not None


def quantization_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return `quantization_config` for `from_pretrained` as the options say; nothing if none is given.

    Raises:
        UnsupportedError: the library is not installed.
    """
    if not is_asked(args):
        return {}
    bits = next((bits for bits in (4, 8) if getattr(args, f"load_in_{bits}bit")), None)
    option, library = ("--quantization", "torchao") if bits is None else (f"--load_in_{bits}bit", "bitsandbytes")
    if find_spec(library) is None:
        raise UnsupportedError(
            f"{option} needs {library}.",
            expected=f"{library}, which quantises the backbone",
            found="not installed",
            remedy=f"pip install {library}",
        )
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if bits is not None:
        return {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True})}
    from torchao.quantization import Int8WeightOnlyConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(version=2))}
