"""`prt-hf evaluate` with several rewards, and with an earlier report to compare with."""

import argparse
import json
import sys
from pathlib import Path

from ..errors import PRTValueError
from . import quantization
from .arguments import COLUMNS, chosen_device, config_kwargs, evaluation_rows, load_kwargs

_YAML = (".yaml", ".yml")
_OF_ONE_REWARD = (
    *("eft", "finetuned", "lora", "baked", "few_shot", "tune_rivals"),
    *("tasks", "include_path", "methods", "write_card", "across_vocabularies"),
)
_KEYS = ("reward", "data", "split", *(f"{name}_column" for name in COLUMNS), "samples", "max_length")


def is_fleet(args: argparse.Namespace) -> bool:
    """Return whether there are several rewards, or a file that lists them."""
    return len(args.rewards) > 1 or Path(args.rewards[0]).suffix in _YAML


def run(args: argparse.Namespace) -> int:
    """Tell what fits, measure it if there is data, and compare; return the exit status."""
    from tqdm.auto import tqdm

    from ..evaluation.fit import check_fits
    from ..evaluation.fleet import Fleet, check_earlier, measure_fleet
    from ..inference.loading import load_reward

    for name in _OF_ONE_REWARD:
        if getattr(args, name):
            raise PRTValueError(
                f"--{name} goes with one reward.", expected="one reward", found=f"{len(args.rewards)} rewards or a list"
            )
    if args.compare:
        check_earlier(args.compare, args.output_dir)
    entries = _entries(args)
    kwargs, device = load_kwargs(args), chosen_device(args)
    quantized, dtype = quantization.quantization_kwargs(args), kwargs.get("dtype")
    own = {"is_quantized": bool(quantized), **config_kwargs(args)}
    fits = check_fits(list(entries), args.targets, dtype=dtype, **own)
    fleet, is_measured = Fleet(fits), all(entry.data for entry in entries.values())
    if not args.json:
        print(fleet.fit_table(), flush=True)
    if is_measured:

        def load(place: str):
            reward, _ = load_reward(place, [], kwargs)
            return reward if device is None else reward.to(device)

        fleet = measure_fleet(
            fits,
            {name: evaluation_rows(entry) for name, entry in entries.items()},
            load,
            output_dir=args.output_dir,
            earlier=args.compare,
            lengths={name: entry.max_length for name, entry in entries.items()},
            dataset_names={name: entry.data for name, entry in entries.items()},
            batch_size=args.batch_size,
            progress=lambda batches, text: tqdm(batches, text, unit="batch"),
            revision=args.revision,
            **quantized,
            **kwargs,
        )
    if args.json:
        print(json.dumps(fleet.to_dict()))
    elif is_measured:
        print(fleet.table(), end="")
    return int(bool(fleet.regressions) or not any(fit.fits for fit in fits.values()))


def check_comparable(args: argparse.Namespace) -> None:
    """Raise `PRTValueError` unless there is data, and a report to compare with."""
    from ..evaluation.fleet import check_earlier

    if not args.data:
        raise PRTValueError("Reports of data are compared.", expected="--data", found="--compare without it")
    check_earlier(args.compare, args.output_dir)


def compare_report(args: argparse.Namespace, report) -> int:
    """Print what has changed since an earlier report of one reward; return the exit status."""
    from ..evaluation.fleet import change_table, compare, earlier_report

    earlier = earlier_report(args.compare, report.reward, report)
    if earlier is None:
        raise PRTValueError(
            "There is no report to compare with.", expected=f"a report of {report.reward}", found=args.compare
        )
    changes = compare(report, earlier)
    print("\n" + change_table(changes), file=sys.stderr if args.json else sys.stdout)
    return int(any(change.is_better is False for change in changes))


def _entries(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """Return the options of each reward's data."""
    listed = [{"reward": reward} for reward in args.rewards]
    if Path(args.rewards[0]).suffix in _YAML and len(args.rewards) == 1:
        listed = _listed(Path(args.rewards[0]))
    entries: dict[str, argparse.Namespace] = {}
    for entry in listed:
        if entry["reward"] in entries:
            raise PRTValueError("A reward is named twice.", expected="each reward once", found=repr(entry["reward"]))
        entries[entry["reward"]] = argparse.Namespace(**vars(args) | entry)
    lacking = [name for name, entry in entries.items() if not entry.data]
    if lacking and (args.compare or len(lacking) < len(entries)):
        raise PRTValueError(
            "There is no data to measure on.", expected="--data, or `data` of each reward", found=", ".join(lacking)
        )
    return entries


def _listed(path: Path) -> list[dict]:
    import yaml

    from ..evaluation.arguments import did_you_mean

    expected = f"a list of rewards, each with {', '.join(_KEYS)}"
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise PRTValueError(f"{path} cannot be read.", expected=expected, found=str(error)) from error
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise PRTValueError(f"{path} lists no rewards.", expected=expected, found=str(listed)[:80])
    for entry in listed:
        for name, value in entry.items():
            if name not in _KEYS:
                remedy = did_you_mean(str(name), _KEYS)
                raise PRTValueError(f"Unknown entry in {path}.", expected=expected, found=repr(name), remedy=remedy)
            kind = int if name in ("samples", "max_length") else str
            if type(value) is not kind or not value or (kind is int and value < 1):
                raise PRTValueError(
                    f"A wrong value in {path}.",
                    expected=f"{name}: a {'positive number' if kind is int else 'text'}",
                    found=f"{name}: {value!r}",
                )
        if "reward" not in entry:
            raise PRTValueError(f"An entry in {path} has no reward.", expected=expected, found=str(entry)[:80])
    return listed
