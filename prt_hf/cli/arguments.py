"""Options that several commands have: where models come from, and where they go."""

import argparse

from ..errors import PRTValueError

DTYPES = ("bfloat16", "float16", "float32")
COLUMNS = ("text", "image", "label")


def add_option(parser, name: str, **kwargs) -> None:
    """`--max_new_tokens`, and `--max-new-tokens` as well, as transformers' own parser has it."""
    parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **kwargs)


def boolean(text: str) -> bool:
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be true or false, not {text}")
    return values[text.lower()]


def add_loading_options(parser: argparse.ArgumentParser, *, batch_size: int) -> None:
    group = parser.add_argument_group("models")
    add_option(group, "dtype", choices=DTYPES, help="of all weights; default: each as it is stored")
    add_option(group, "device", help="cpu, cuda, ..., or auto (device_map='auto'); default: cuda if there is one")
    add_option(group, "batch_size", type=positive(int), default=batch_size, help="default: %(default)s")
    add_option(group, "revision", help="of the backbone: branch, tag or commit")
    add_option(group, "trust_remote_code", action="store_true", help="run code of the models' own repositories")
    add_option(group, "token", help="for the Hub; default: the one that `hf auth login` saved")


def add_evaluation_data(parser: argparse.ArgumentParser, *, samples: int) -> None:
    parser.add_argument(
        "--data",
        help="Hub id, folder, or file (.jsonl, .json, .csv, .parquet, .txt) of the task; columns: text, prompt and "
        "completion, messages or input_ids; for classifiers text or image, and label",
    )
    add_option(parser, "split", help="of the data; default: test, else validation, else the first")
    for name in COLUMNS:
        add_option(parser, f"{name}_column", help=f"of the data, instead of `{name}`")
    add_option(parser, "samples", type=positive(int), default=samples, help="rows of the data; default: %(default)s")
    add_option(
        parser,
        "max_length",
        type=positive(int),
        default=1024,
        help="tokens at which a text is cut off, or earlier, where a model can read less; default: %(default)s",
    )


def evaluation_rows(args: argparse.Namespace):
    """As many rows of the data as are asked for, the same in every run.

    Raises:
        PRTValueError: the data cannot be loaded, or has no such split or column.
    """
    from ..training.data import load_data, require_column, require_split

    parts = load_data(args.data)
    split = args.split or next((name for name in ("test", "validation") if name in parts), next(iter(parts)))
    rows = require_split(parts, split, args.data).shuffle(seed=0)
    for name in COLUMNS:
        given = getattr(args, f"{name}_column")
        if given not in (None, name):
            require_column(rows, given, args.data)
            rows = rows.remove_columns([name] if name in rows.column_names else []).rename_column(given, name)
    return rows.select(range(min(args.samples, len(rows))))


def config_kwargs(args: argparse.Namespace) -> dict:
    """For a backbone's configuration and tokenizer."""
    return {"revision": args.revision, "token": args.token, "trust_remote_code": args.trust_remote_code}


def load_kwargs(args: argparse.Namespace) -> dict:
    """For the weights of backbone, rewards and their bases."""
    import torch

    kwargs = {"token": args.token, "trust_remote_code": args.trust_remote_code}
    if args.dtype:
        kwargs["dtype"] = getattr(torch, args.dtype)
    return kwargs | ({"device_map": "auto"} if args.device == "auto" else {})


def device_of(args: argparse.Namespace) -> str | None:
    """Where to move what was loaded; None where `device_map` has placed it.

    Raises:
        PRTValueError: the device is none, or not there.
    """
    import torch

    if args.device == "auto":
        return None
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        raise PRTValueError(
            f"The device {device} cannot be used.",
            expected="cpu, cuda, cuda:1, ..., or auto",
            found=str(error).splitlines()[0],
        ) from error
    return device


def seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^32 - 1, not {text}")
    return value


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return value


def positive(number: type):
    def parse(text: str):
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return value

    return parse
