"""Record a reward's training for its card."""

import re
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer

from .._version import __version__

MOST_ROWS = 20  # of the log's table
_SPEED = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_PACKAGES = ("torch", "transformers", "peft", "datasets", "trl")


@dataclass(frozen=True)
class TrainingRecord:
    """The facts about a reward's training that are not in `prt_config.json`.

    Args:
        datasets (tuple of `str`): The ids of the training data on the Hub, or names.
        hyperparameters (`dict`): Name -> value.
        evaluation (`dict[str, float]`): The last evaluation of the present weights with the source backbone
            (with `load_best_model_at_end`, those of the best checkpoint): `eval_loss`, `eval_accuracy`, ...
        rows (`list[dict]`): The log as a table: `step`, `training_loss`, and the figures of evaluations.
        versions (`dict[str, str]`): Package -> version.
        evaluation_dataset (`str`, *optional*): The data of `evaluation`.
        evaluation_split (`str`, *optional*): The split of that data.
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
        """Return the record of a trainer, after training.

        Data sets are named where they know that they came from the Hub (see [`hub_ids`]). Evaluations before the first
        step are left out; those of data other than the trainer's `eval_dataset` name no data set.
        """
        log = [entry for entry in trainer.state.log_history if entry["step"] > 0]
        elsewhere = getattr(trainer, "evaluations_elsewhere", ())  # times in them tell entries of one step apart
        evaluations = _evaluations(trainer, log)
        if evaluations and evaluations[-1] in elsewhere:
            evaluations, evaluated, ids = evaluations[-1:], None, ()
        else:
            evaluations, evaluated = [entry for entry in evaluations if entry not in elsewhere], trainer.eval_dataset
            ids = hub_ids(evaluated) if evaluations else ()
        return cls(
            datasets=hub_ids(trainer.train_dataset),
            hyperparameters=_hyperparameters(trainer),
            evaluation={name: value for entry in evaluations for name, value in _figures(entry).items()},
            rows=_thinned(_log_rows([entry for entry in log if entry not in elsewhere])),
            versions={__package__.partition(".")[0]: __version__} | {name: version(name) for name in _PACKAGES},
            evaluation_dataset=ids[0] if len(ids) == 1 else None,
            evaluation_split=str(evaluated.split) if len(ids) == 1 and evaluated.split else None,
        )


def _log_rows(log: list[dict]) -> list[dict[str, float]]:
    """Return a row for each evaluation, with the last training loss before it; or for each loss, if there are none."""
    rows, loss = {}, {}
    evaluations = [entry for entry in log if _figures(entry)]
    for entry in log:
        if "loss" in entry:
            loss = {"training_loss": entry["loss"]}
        if entry in evaluations if evaluations else "loss" in entry:
            row = rows.get(entry["step"], {"step": entry["step"]} | loss)
            rows[entry["step"]] = row | _figures(entry) | row  # the first counts: later, other weights may be loaded
    return list(rows.values())


def _thinned(rows: list[dict]) -> list[dict]:
    """Return at most `MOST_ROWS` rows, including the first and the last."""
    if len(rows) <= MOST_ROWS:
        return rows
    return [rows[index * (len(rows) - 1) // (MOST_ROWS - 1)] for index in range(MOST_ROWS)]


def _evaluations(trainer: Trainer, log: list[dict]) -> list[dict]:
    """Return the last evaluations of the present weights; several data sets have one entry each at the same step."""
    ends = [index for index, entry in enumerate(log) if "train_runtime" in entry]
    evaluations = [entry for entry in log if _figures(entry)]
    if ends and trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        later = [entry for entry in log[ends[-1] :] if _figures(entry)]
        return later or [entry for entry in evaluations if entry["step"] == trainer.state.best_global_step]
    return [entry for entry in evaluations if entry["step"] == evaluations[-1]["step"]]


def _figures(entry: dict) -> dict[str, float]:
    return {name: value for name, value in entry.items() if name.startswith("eval_") and not name.endswith(_SPEED)}


def _hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """Return the hyperparameters in transformers' cards, and those of the adapter."""
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


def hub_ids(dataset: Any) -> tuple[str, ...]:
    """Return the ids of the data sets on the Hub from which `load_dataset` took the data, if it noted their URLs."""
    urls = getattr(getattr(dataset, "info", None), "download_checksums", None) or {}
    return tuple(dict.fromkeys(match[1] for url in urls if (match := re.match(r"hf://datasets/(.+?)@", url))))
