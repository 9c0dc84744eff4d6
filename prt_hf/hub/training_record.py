"""What a trainer knows of a reward's training, for its card."""

import re
from dataclasses import dataclass, field
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets.naming import camelcase_to_snakecase
from huggingface_hub import constants
from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer

from .._version import __version__

MOST_ROWS = 20  # of the table of a training's log
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_PACKAGES = ("torch", "transformers", "peft", "datasets", "trl")


@dataclass(frozen=True)
class TrainingRecord:
    """What a trainer knows of a reward's training, and `prt_config.json` does not.

    Args:
        datasets (tuple of `str`): ids of the training data on the Hub, or names.
        hyperparameters (`dict`): name -> value.
        evaluation (`dict[str, float]`): the last evaluation with the source backbone, of the weights that the reward
            has now (with `load_best_model_at_end`, those of the best checkpoint): `eval_loss`, `eval_accuracy`, ...
        rows (`list[dict]`): the log as a table: `step`, `training_loss`, and the figures of evaluations.
        versions (`dict[str, str]`): package -> version.
        evaluation_dataset, evaluation_split (`str`, *optional*): what was evaluated on.
    """

    datasets: tuple[str, ...] = ()
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    evaluation_dataset: str | None = None
    evaluation_split: str | None = None

    @classmethod
    def from_trainer(cls, trainer: Trainer) -> "TrainingRecord":
        """Read a trainer after training.

        Data are named where `load_dataset` took them from the Hub, whatever `map` or `filter` made of them; files of
        one's own and streams are not. Evaluations before the first step are left out; those of other data than the
        trainer's `eval_dataset` name none.
        """
        log = [entry for entry in trainer.state.log_history if entry["step"] > 0]
        elsewhere = [id(entry) for entry in getattr(trainer, "evaluations_elsewhere", ())]
        of_training = [entry for entry in log if id(entry) not in elsewhere]
        evaluated, evaluations = trainer.eval_dataset, _evaluations(trainer, log)
        if evaluations and id(evaluations[-1]) in elsewhere:
            evaluated, evaluations = None, evaluations[-1:]
        evaluations = [entry for entry in evaluations if evaluated is None or id(entry) not in elsewhere]
        on_hub = hub_ids(evaluated) if evaluations else ()
        return cls(
            datasets=hub_ids(trainer.train_dataset),
            hyperparameters=_hyperparameters(trainer),
            evaluation={name: value for entry in evaluations for name, value in _figures(entry).items()},
            rows=_thinned(_log_rows(of_training)),
            versions={__package__.partition(".")[0]: __version__} | {name: version(name) for name in _PACKAGES},
            evaluation_dataset=on_hub[0] if len(on_hub) == 1 else None,
            evaluation_split=str(evaluated.split) if len(on_hub) == 1 and evaluated.split else None,
        )


def _log_rows(log: list[dict]) -> list[dict[str, float]]:
    """One row for each evaluation, with the last training loss before it; without evaluations, one for each loss."""
    rows, loss = {}, {}
    evaluations = [entry for entry in log if _figures(entry)]
    for entry in log:
        if "loss" in entry:
            loss = {"training_loss": entry["loss"]}
        if entry in evaluations if evaluations else "loss" in entry:
            row = rows.get(entry["step"], {"step": entry["step"]} | loss)
            rows[entry["step"]] = row | _figures(entry) | row  # after training, other weights may have been loaded
    return list(rows.values())


def _thinned(rows: list[dict]) -> list[dict]:
    """At most `MOST_ROWS`, the first and the last among them."""
    if len(rows) <= MOST_ROWS:
        return rows
    return [rows[index * (len(rows) - 1) // (MOST_ROWS - 1)] for index in range(MOST_ROWS)]


def _evaluations(trainer: Trainer, log: list[dict]) -> list[dict]:
    """The last of the weights that the trainer has now. Of several sets, each is an entry of its own at one step."""
    ends = [index for index, entry in enumerate(log) if "train_runtime" in entry]
    evaluations = [entry for entry in log if _figures(entry)]
    if ends and trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        later = [entry for entry in log[ends[-1] :] if _figures(entry)]
        return later or [entry for entry in evaluations if entry["step"] == trainer.state.best_global_step]
    return [entry for entry in evaluations if entry["step"] == evaluations[-1]["step"]]


def _figures(entry: dict) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name.startswith("eval_") and not name.endswith(_SPEED)}


def _hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Those of transformers' cards, and the adapter's."""
    args, adapter = trainer.args, getattr(trainer.model, "peft_config", {}).get("default")
    found = extract_hyperparameters_from_trainer(trainer) | {"optimizer": args.optim.value}
    if "adam" in args.optim.value:
        found["optimizer"] += f", betas=({args.adam_beta1}, {args.adam_beta2}), epsilon={args.adam_epsilon}"
    if args.bf16:
        found["bf16"] = True
    if adapter is not None:
        values = {name: getattr(adapter, name, None) for name in ("r", "lora_alpha", "lora_dropout")}
        found |= {"peft_type": adapter.peft_type.value} | {k: v for k, v in values.items() if v is not None}
    return found


def hub_ids(dataset) -> tuple[str, ...]:
    """Where `load_dataset` took the data from. It does not write that down (up to datasets 4 it did), but its files lie
    in folders that tell."""
    urls = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    found = [match[1] for url in urls if (match := re.match(r"hf://datasets/(.+?)@", url))]
    for file in getattr(dataset, "cache_files", ()):
        for folder in Path(file["filename"]).parts:
            namespace, _, name = folder.partition("___")
            found += _downloaded(namespace, name) if name else []
    return tuple(dict.fromkeys(found))


def _downloaded(namespace: str, name: str) -> list[str]:
    """The folder of the data has the name in snake case, that of the download as it is."""
    prefix = f"datasets--{namespace}--"
    names = [path.name.removeprefix(prefix) for path in Path(constants.HF_HUB_CACHE).glob(f"{escape(prefix)}*")]
    same = [f"{namespace}/{each}" for each in names if camelcase_to_snakecase(each) == name]
    return same if len(same) == 1 else []
