"""Benchmarks of lm-evaluation-harness, on backbones by themselves and with a reward."""

import hashlib
import json
import math
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from numbers import Real
from pathlib import Path

from transformers import PreTrainedModel

from ..contract import TEXT_GENERATION
from ..errors import PRTValueError, RewardFileError
from ..hub.card import METHODS, Measurement
from ..hub.folder import file_digest
from ..inference import PRTForCausalLM
from ..networks.identity import weights_digest_of_model
from ..reward.backbones import Backbone
from ..reward.model import RewardModel
from .files import check_folder, markdown_table, replace_text, short_name
from .portability import to_json_numbers
from .report import check_names
from .tally import Estimate

TASKS_FILE, TASKS_TABLE = "tasks.json", "tasks.md"
_METHODS = ("pretrained", "prt")  # the others are no model that the harness could ask


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        estimate ([`~evaluation.tally.Estimate`]): as the harness gives it, with 1.96 of its standard errors.
        is_lower_better (`bool`).
    """

    estimate: Estimate
    is_lower_better: bool = False


@dataclass
class TaskReport:
    """Scores of backbones by themselves and with a reward.

    Attributes:
        reward (`str`), targets (list of `str`), tasks (list of `str`).
        scores: (target, method) -> task -> metric (`"exact_match, strict-match"`) -> [`Score`].
    """

    reward: str
    targets: list[str]
    tasks: list[str]
    scores: dict[tuple[str, str], dict[str, dict[str, Score]]] = field(default_factory=dict)

    def table(self) -> str:
        """Markdown: for each metric of each task, methods by backbones."""
        sections = [f"# `{short_name(self.reward)}`: benchmarks\n\nIn brackets 95 % intervals."]
        for task, metric, is_lower in self._rows():
            rows = []
            for method in _METHODS:
                found = [self._score(target, method, task, metric) for target in self.targets]
                rows.append([METHODS[method], *("" if each is None else _cell(each.estimate) for each in found)])
            title = f"{task}: {metric}, {'lower' if is_lower else 'higher'} is better"
            heads = ["", *(f"`{short_name(target)}`" for target in self.targets)]
            sections.append(markdown_table(title, heads, rows))
        return "\n\n".join(sections) + "\n"

    def measurements(self) -> list[Measurement]:
        """For the card."""
        found = []
        for target in self.targets:
            for task, metric, is_lower in self._rows():
                scores = {method: self._score(target, method, task, metric) for method in _METHODS}
                values = {method: score.estimate.value for method, score in scores.items() if score is not None}
                found.append(Measurement(target, task, metric, values, is_lower_better=is_lower))
        return found

    def save(self, folder: str | Path) -> None:
        """Write `tasks.md`, the table."""
        replace_text(Path(folder) / TASKS_TABLE, self.table())

    def to_dict(self) -> dict:
        """For JSON."""
        return {
            target: {
                method: {
                    task: {metric: to_json_numbers(score.estimate) for metric, score in metrics.items()}
                    for task, metrics in self.scores[target, method].items()
                }
                for method in _METHODS
            }
            for target in self.targets
        }

    def _rows(self) -> list[tuple[str, str, bool]]:
        rows = {}
        for of_tasks in self.scores.values():
            for task, metrics in of_tasks.items():
                rows |= {(task, metric, score.is_lower_better): None for metric, score in metrics.items()}
        return list(rows)

    def _score(self, target: str, method: str, task: str, metric: str) -> Score | None:
        return self.scores.get((target, method), {}).get(task, {}).get(metric)


def task_report(
    reward: RewardModel,
    targets: Sequence[str],
    tasks: Sequence[str],
    *,
    reward_name: str,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    output_dir: str | Path | None = None,
    **load_kwargs,
) -> TaskReport:
    """Run `lm_eval.simple_evaluate` on each target, by itself and with the reward as one PRT model.

    Args:
        reward ([`RewardModel`]): of language models; its device is where everything runs.
        targets: ids or folders.
        tasks: names of the harness; the data of most come from the Hub.
        limit (`int`, *optional*): questions of each task; by default all.
        include_path (*optional*): folder with tasks of one's own (YAML).
        output_dir (*optional*): where `tasks.json` is kept up after each model and task; what is there of the same
            models, strength and limit is not run again.
        load_kwargs: for `from_pretrained` of the targets.

    Raises:
        PRTValueError: no language reward, no targets or two of one name, an unknown task (the nearest are shown), an
            `output_dir` that cannot be written, or `lm_eval` is not installed.
        RewardFileError: what lies in `output_dir` cannot be read.
        VocabularyMismatchError: a target does not fit the reward.
    """
    if reward.config.task != TEXT_GENERATION:
        raise PRTValueError(
            "The tasks are asked of language models.", expected=f"a {TEXT_GENERATION} reward", found=reward.config.task
        )
    check_names(targets)
    manager = _task_manager(tasks, include_path)
    store = _Store(output_dir)
    asked = {"limit": limit, "own_tasks": _own_tasks(include_path)}
    report = TaskReport(reward_name, list(targets), list(tasks))
    parts = {"reward": weights_digest_of_model(reward.network), "strength": reward.config.strength}
    for target in targets:
        backbone = Backbone(reward, target, **load_kwargs)
        for method in _METHODS:
            key = {"target": backbone.identity} | asked | (parts if method == "prt" else {})
            scores, model = {}, None
            for task in tasks:
                scores[task] = store.get(target, method, task, key)
                if scores[task] is None:
                    model = model or _model(backbone, reward, method)
                    scores[task] = _scores(model, backbone.processing_class, task, manager, limit, batch_size)
                    store.put(target, method, task, key, scores[task])
            report.scores[target, method] = scores
        backbone.unload()
    return report


def _model(backbone: Backbone, reward: RewardModel, method: str) -> PreTrainedModel:
    backbone.load()
    network = backbone.network
    if not getattr(network, "hf_device_map", None):
        network.to(reward.device)
    if method == "pretrained":
        return network
    return PRTForCausalLM.from_parts(network, [reward], tokenizer=backbone.processing_class)


def _scores(model, tokenizer, task: str, manager, limit: int | None, batch_size: int) -> dict[str, Score]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        device=str(model.device),
        batch_size=batch_size,
    )
    with redirect_stdout(sys.stderr):  # where its words of progress belong; stdout is the caller's
        results = simple_evaluate(model=harness, tasks=[task], task_manager=manager, limit=limit, log_samples=False)
    # A tag has no scores of its own, as a group has, but its tasks do.
    of_tasks = results["results"]
    found = {}
    for name in [task] if task in of_tasks else of_tasks:
        better = results["higher_is_better"].get(name, {})
        for entry, value in of_tasks[name].items():
            metric, _, filtered = entry.partition(",")  # `exact_match,strict-match`
            if not filtered or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            error = of_tasks[name].get(f"{metric}_stderr,{filtered}")
            error = error if isinstance(error, Real) else 0.0
            called = [*([] if name == task else [name]), metric, *([] if filtered == "none" else [filtered])]
            found[", ".join(called)] = Score(Estimate.around(value, error), better.get(metric) is False)
    return found


def _task_manager(tasks: Sequence[str], include_path: str | Path | None):
    if find_spec("lm_eval") is None:
        raise PRTValueError(
            "Tasks are run by lm-evaluation-harness, which is not installed.",
            expected="the package lm_eval",
            found="none",
            remedy="pip install lm_eval",
        )
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    for task in tasks:
        if task not in manager.all_tasks:
            near = get_close_matches(task, manager.all_tasks, n=3)
            raise PRTValueError(
                "lm-evaluation-harness has no such task.",
                expected="a task or group of `lm_eval ls tasks`, or one in `include_path`",
                found=repr(task),
                remedy=f"did you mean {' or '.join(near)}?" if near else None,
            )
    return manager


def _own_tasks(include_path: str | Path | None) -> str | None:
    """What tells one's own tasks from those of the same names in another form."""
    if include_path is None:
        return None
    return file_digest(*sorted(path for path in Path(include_path).rglob("*") if path.suffix in (".yaml", ".py")))


class _Store:
    """`tasks.json`: target -> method -> task -> key and scores."""

    def __init__(self, folder: str | Path | None):
        self._path = None if folder is None else Path(folder) / TASKS_FILE
        self._entries: dict[str, dict] = {}
        if folder is not None:
            check_folder(folder)
        if self._path is not None and self._path.is_file():
            try:
                self._entries = json.loads(self._path.read_text(encoding="utf-8"))
                for entry in self._entries.values():
                    _scores_of(entry)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise RewardFileError.unreadable(
                    self._path,
                    error,
                    expected="the scores of an earlier evaluation",
                    remedy="delete it, or name another folder",
                ) from error

    def get(self, target: str, method: str, task: str, key: dict) -> dict[str, Score] | None:
        entry = self._entries.get(f"{target} {method} {task}")
        if entry is None or entry.get("key") != _digest(key):
            return None
        return _scores_of(entry)

    def put(self, target: str, method: str, task: str, key: dict, scores: dict[str, Score]) -> None:
        values = {name: [to_json_numbers(score.estimate), score.is_lower_better] for name, score in scores.items()}
        self._entries[f"{target} {method} {task}"] = {"key": _digest(key), "scores": values}
        if self._path is not None:
            replace_text(self._path, json.dumps(self._entries, indent=2, allow_nan=False) + "\n")


def _scores_of(entry: dict) -> dict[str, Score]:
    return {name: Score(Estimate.from_json(numbers), is_lower) for name, (numbers, is_lower) in entry["scores"].items()}


def _digest(key: dict) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _cell(estimate: Estimate) -> str:
    value, low, high = (f"{each:.4g}" for each in estimate)
    return f"{value} [{low}, {high}]" if 0 < estimate.high - estimate.low < math.inf else value
