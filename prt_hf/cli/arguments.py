"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import PRTValueError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

DTYPES = ("bfloat16", "float16", "float32")
COLUMNS = ("text", "image", "label")


class StrictParser(argparse.ArgumentParser):
    """The parser of a command: a mistyped option is an error, and what is wrong comes with a hint."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)
        self.set_defaults(parser=self)  # that of the command in use, for errors

    def error(self, message: str) -> NoReturn:
        """Leave with status 2 after the message."""
        lists = [action.option_strings[0] for action in self._actions if action.option_strings and action.nargs == "+"]
        if lists and message.startswith("the following arguments are required"):
            message += f"\nput them first: {', '.join(lists)} take every word up to the next option"
        super().error(message)

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Leave with status 2, and name the options that unknown ones may stand for."""
        self.error(describe_unknown(unknown, self._option_string_actions))


def describe_unknown(unknown: list[str], known: Iterable[str], hints: Mapping[str, str] | None = None) -> str:
    """Return a message with the hint for each unknown option, else with the known option nearest to it."""
    found = []
    for argument in unknown:
        name = argument.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if name in (hints or {}):
            found.append(hints[name])
        elif name.startswith("--"):
            found += [f"did you mean {close}?" for close in difflib.get_close_matches(name, known, n=1)]
    return "; ".join([f"unrecognized arguments: {' '.join(unknown)}", *found])


def add_command(
    commands: argparse._SubParsersAction, name: str, help: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add the parser of a command; description and examples keep their lines."""
    raw = argparse.RawDescriptionHelpFormatter
    return commands.add_parser(name, help=help, description=description, epilog=examples, formatter_class=raw)


def add_option(parser: argparse._ActionsContainer, name: str, **kwargs: Any) -> None:
    """Add `--max_new_tokens`, and `--max-new-tokens` as well, as transformers' own parser has it."""
    parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **kwargs)


def add_counts(parser: argparse._ActionsContainer, **counts: tuple[int, str]) -> None:
    """Add options that are positive integers, each with a default and a help text."""
    for name, (default, text) in counts.items():
        add_option(parser, name, type=positive(int), default=default, metavar="N", help=with_default(text))


def add_json(parser: argparse._ActionsContainer, text: str = "print the result as one JSON object") -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help=text)


def add_loading_options(parser: argparse.ArgumentParser, *, batch_size: int | None = None) -> None:
    """Add the options for loading models, and for the rows that they read at a time, unless that is None."""
    group = parser.add_argument_group("models")
    add_option(group, "dtype", choices=DTYPES, help="type of all weights; default: each model's as it is stored")
    add_option(group, "device", help="cpu, cuda, ..., or auto (device_map='auto'); default: cuda if there is one")
    if batch_size is not None:
        add_counts(group, batch_size=(batch_size, "rows in a forward pass"))
    add_option(group, "revision", help="branch, tag or commit of the backbone")
    add_option(group, "trust_remote_code", action="store_true", help="run code from the models' repositories")
    add_option(group, "token", help="access token for the Hub; default: the one that `hf auth login` saved")


def add_across(parser: argparse._ActionsContainer) -> None:
    """Add `--across_vocabularies`."""
    text = "accept a backbone with another vocabulary; rewards need their own tokenizer, and their source backbone"
    add_option(parser, "across_vocabularies", action="store_true", help=text)


def add_evaluation_data(parser: argparse.ArgumentParser, *, samples: int) -> None:
    """Add the options of the data that a reward is measured on."""
    add_option(
        parser,
        "data",
        help="rows of the task: Hub id, folder, or file (.jsonl, .json, .csv, .parquet, .txt); columns: text, prompt "
        "and completion, messages or input_ids; for classifiers text or image, and label",
    )
    add_option(parser, "split", help="split of the data; default: test, else validation, else the first")
    for name in COLUMNS:
        add_option(parser, f"{name}_column", metavar="NAME", help=f"column that holds `{name}`; default: {name}")
    add_counts(
        parser,
        samples=(samples, "number of rows"),
        max_length=(1024, "longest text in tokens, if the models can read as much; longer ones are cut off"),
    )


def evaluation_rows(args: argparse.Namespace) -> Dataset:
    """Return as many rows of the data as `--samples` says, the same in every run."""
    from ..training.data import load_data, require_split

    parts = load_data(args.data)
    rows = _renamed(require_split(parts, _split(args, parts), args.data), args, args.data).shuffle(seed=0)
    return rows.select(range(min(args.samples, len(rows))))


def training_rows(args: argparse.Namespace) -> Dataset:
    """Return the rows that the reward was tuned on, the same in every run; raise if they are those of the data."""
    from ..training.data import load_data, require_split

    name = args.train_data or args.data
    parts = load_data(name)
    if name == args.data and _split(args, parts) == "train":
        raise PRTValueError(
            "The examples to learn from are those that are measured on.",
            expected="--train_data, or a data set with a split for each",
            found=f"only {', '.join(parts)} in {name}",
        )
    return _renamed(require_split(parts, "train", name), args, name).shuffle(seed=0)


def _split(args: argparse.Namespace, parts: DatasetDict) -> str:
    """Return the split that is measured on."""
    return args.split or next((name for name in ("test", "validation") if name in parts), next(iter(parts)))


def _renamed(rows: Dataset, args: argparse.Namespace, dataset: str) -> Dataset:
    """Return rows whose columns have the names that `--text_column` and the like stand for."""
    from ..training.data import require_column

    for name in COLUMNS:
        given = getattr(args, f"{name}_column")
        if given not in (None, name):
            require_column(rows, given, dataset)
            rows = rows.remove_columns([name] if name in rows.column_names else []).rename_column(given, name)
    return rows


def config_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments for a backbone's configuration and tokenizer."""
    return {"revision": args.revision, "token": args.token, "trust_remote_code": args.trust_remote_code}


def load_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return the keyword arguments for the weights of backbone, rewards and their bases."""
    import torch

    kwargs = {"token": args.token, "trust_remote_code": args.trust_remote_code}
    if args.dtype:
        kwargs["dtype"] = getattr(torch, args.dtype)
    return kwargs | ({"device_map": "auto"} if args.device == "auto" else {})


def chosen_device(args: argparse.Namespace) -> str | None:
    """Return the device for models that were loaded; None if `device_map` has placed them."""
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


def with_default(text: str) -> str:
    """Return a help text that ends with the option's default."""
    return f"{text}; default: %(default)s"


def boolean(text: str) -> bool:
    """Parse `true` or `false`."""
    values = {"true": True, "false": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"must be true or false, not {text}")
    return values[text.lower()]


def names(text: str) -> dict[str, str]:
    """Parse a JSON object of strings."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise argparse.ArgumentTypeError(f'must be a JSON object like \'{{"a": "b"}}\', not {text}')
    return value


def seed(text: str) -> int:
    """Parse the seed of a random generator."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from 0 to 2^32 - 1, not {text}")
    return value


def share(text: str) -> float:
    """Parse a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, not {text}")
    return value


def positive(number: type) -> Callable[[str], int | float]:
    """Return a parser of positive numbers of a type."""

    def parse(text: str) -> int | float:
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, not {text}")
        return value

    return parse
