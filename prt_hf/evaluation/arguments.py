"""Check the arguments of a report, and name its targets."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from ..contract import TEXT_GENERATION
from ..errors import PRTValueError
from ..hub.card import METHODS
from ..networks.anatomy import unwrap_adapter
from ..reward.model import RewardModel
from ..training.data import require_column
from .tuned_rivals import SAME_COMPUTE, SAME_STEPS, Tuning

Model = str | PreTrainedModel | PeftModel


def known_methods(methods: Sequence[str]) -> list[str]:
    """Return the methods in the order of the paper's figures."""
    for method in methods:
        if method not in METHODS:
            raise PRTValueError(
                "Unknown method.", expected=", ".join(METHODS), found=repr(method), remedy=did_you_mean(method, METHODS)
            )
    if not methods:
        raise PRTValueError("There is nothing to measure.", expected=f"methods: {', '.join(METHODS)}", found="none")
    return [method for method in METHODS if method in methods]


def check_models(
    methods: Sequence[str],
    eft: Model | None,
    given: Mapping[str, Mapping | None],
    few_shot: Dataset | None,
    tuning: Tuning | None,
) -> None:
    """Raise `PRTValueError` if every method lacks the model or the data that it needs."""
    needed = {method: bool(models) for method, models in given.items()}
    needed |= {"eft": eft is not None, "transplanted": eft is not None, "few_shot": few_shot is not None}
    needed |= dict.fromkeys((SAME_STEPS, SAME_COMPUTE), tuning is not None)
    needed["finetuned"] |= eft is not None
    if not any(needed.get(method, True) for method in methods):
        raise PRTValueError(
            "There is nothing to measure.",
            expected="the fine-tuned models: `eft=` of the source, `finetuned=`, `lora=` or `baked=` of the targets; "
            "or `few_shot=` or `tuning=` for rivals that are made here",
            found=f"only the methods {', '.join(methods)}, without a model that they need",
        )


def named_targets(targets: Any) -> dict[str, str | PreTrainedModel]:
    """Return the targets by their names: an id or folder, or what a mapping calls them."""
    if isinstance(targets, str | Path | PreTrainedModel):
        targets = [targets]
    pairs = list(targets.items()) if isinstance(targets, Mapping) else [(name_of(model), model) for model in targets]
    check_names([name for name, _ in pairs])
    return {name: str(model) if isinstance(model, Path) else model for name, model in pairs}


def check_names(names: Sequence[str]) -> None:
    """Raise `PRTValueError` if there are no targets, or two of one name."""
    if not names:
        raise PRTValueError("There are no targets.", expected="at least one backbone", found="0")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PRTValueError(
            "Two targets share a name.",
            expected="different names",
            found=f"{', '.join(map(repr, twice))} more than once",
            remedy="`targets={name: model, ...}`",
        )


def by_target(finetuned: Mapping, targets: Mapping[str, object]) -> dict[str, Model]:
    """Return models that are given for single targets, after checking that these are targets."""
    found = {str(name): str(model) if isinstance(model, Path) else model for name, model in finetuned.items()}
    for name in found:
        if name not in targets:
            raise PRTValueError(
                "A fine-tuned model belongs to no target.",
                expected=f"one of the targets: {', '.join(targets)}",
                found=repr(name),
                remedy=did_you_mean(name, targets),
            )
    return found


def did_you_mean(name: str, known: Iterable[str], count: int = 1) -> str | None:
    """Return a remedy that names the nearest known names, None if none is near."""
    near = get_close_matches(name, list(known), n=count)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else None


def check_rows(dataset: Dataset, reward: RewardModel, few_shot: Dataset | None) -> None:
    """Raise `PRTValueError` unless the evaluation set can be read more than once, and has rows and labels."""
    if not isinstance(dataset, Dataset):
        raise PRTValueError(
            "The evaluation set has to be read more than once.",
            expected="a datasets.Dataset",
            found=type(dataset).__name__,
            remedy="Dataset.from_list(rows), or one split of what `load_dataset` gives",
        )
    if not len(dataset):
        raise PRTValueError("The evaluation set is empty.", expected="at least one row", found="0 rows")
    if reward.config.task != TEXT_GENERATION:
        require_column(dataset, "label", "given")
        if few_shot is not None:
            raise PRTValueError(
                "Only language models read examples.", expected=f"a {TEXT_GENERATION} reward", found=reward.config.task
            )


def name_of(model: str | Path | PreTrainedModel | PeftModel) -> str:
    """Return the id, folder or class of a model."""
    if isinstance(model, str | Path):
        return str(model)
    return unwrap_adapter(model).name_or_path or type(unwrap_adapter(model)).__name__
