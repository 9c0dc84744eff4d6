"""Run tasks of lm-evaluation-harness on backbones by themselves, with a reward, and on its rivals."""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from numbers import Real
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from ..contract import TEXT_GENERATION
from ..errors import PRTValueError
from ..hub.card import METHODS, Measurement
from ..hub.folder import check_writable, file_digest, replace_file
from ..inference import PRTForCausalLM
from ..networks.adapters import bare_base
from ..networks.identity import weights_digest_of_model
from ..reward.backbones import Backbone, source_backbones
from ..reward.finetuned import TunedModel
from ..reward.model import RewardModel
from .arguments import check_names, did_you_mean
from .portability import to_json_numbers
from .results import markdown_table, short_name
from .store import key_of, load_results, save_results
from .tally import Estimate

TASKS_FILE, TASKS_TABLE = "tasks.json", "tasks.md"


@dataclass(frozen=True)
class Score:
    """One metric of one task: the harness's value, plus and minus 1.96 of its standard errors."""

    estimate: Estimate
    is_lower_better: bool = False


@dataclass
class TaskReport:
    """Scores of backbones by themselves, with a reward, and of its rivals.

    Attributes:
        reward (`str`): The reward's name.
        targets (list of `str`): The backbones.
        tasks (list of `str`): The names of the tasks.
        scores (`dict`): (target, method) -> task -> metric (`"exact_match, strict-match"`) -> [`Score`].
    """

    reward: str
    targets: list[str]
    tasks: list[str]
    scores: dict[tuple[str, str], dict[str, dict[str, Score]]] = field(default_factory=dict)

    @property
    def methods(self) -> list[str]:
        """The methods that were asked at any backbone, in the order of their names' table."""
        return [method for method in METHODS if any(method == asked for _, asked in self.scores)]

    def table(self) -> str:
        """Return Markdown tables: for each metric of each task, methods by backbones."""
        sections = [f"# `{short_name(self.reward)}`: benchmarks\n\nIn brackets: 95 % intervals."]
        for task, metric, is_lower in self._rows():
            rows = []
            for method in self.methods:
                found = [self._score(target, method, task, metric) for target in self.targets]
                rows.append([METHODS[method], *("" if each is None else _cell(each.estimate) for each in found)])
            title = f"{task}: {metric}, {'lower' if is_lower else 'higher'} is better"
            heads = ["", *(f"`{short_name(target)}`" for target in self.targets)]
            sections.append(markdown_table(title, heads, rows))
        return "\n\n".join(sections) + "\n"

    def measurements(self) -> list[Measurement]:
        """Return the scores for the card."""
        found = []
        for target in self.targets:
            for task, metric, is_lower in self._rows():
                scores = {method: self._score(target, method, task, metric) for method in self.methods}
                values = {method: score.estimate.value for method, score in scores.items() if score is not None}
                found.append(Measurement(target, task, metric, values, is_lower_better=is_lower))
        return found

    def save(self, folder: str | Path) -> None:
        """Write `tasks.md`, the table."""
        replace_file(Path(folder) / TASKS_TABLE, self.table())

    def to_dict(self) -> dict:
        """Return the scores for JSON."""
        return {
            target: {
                method: {
                    task: {metric: to_json_numbers(score.estimate) for metric, score in metrics.items()}
                    for task, metrics in self.scores[target, method].items()
                }
                for method in self.methods
                if (target, method) in self.scores
            }
            for target in self.targets
        }

    def _rows(self) -> list[tuple[str, str, bool]]:
        rows = {}
        for tasks in self.scores.values():
            for task, metrics in tasks.items():
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
    eft: str | None = None,
    given: Mapping[str, Mapping[str, str]] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    output_dir: str | Path | None = None,
    **load_kwargs: Any,
) -> TaskReport:
    """Run `lm_eval.simple_evaluate` on each target: by itself, with the reward as one PRT model, and on its rivals.

    Args:
        reward ([`RewardModel`]): A reward for language models; everything runs on its device.
        targets: Ids or folders.
        tasks: Names of the harness; the data of most come from the Hub.
        reward_name: The reward's name in the report.
        eft (`str`, *optional*): The id or folder of the fine-tuned source, for EFT: one PRT model whose rewards are the
            source after tuning, with strength 1, and before, with strength -1.
        given (*optional*): Method (`"finetuned"`, `"lora"` or `"baked"`) -> target -> the id or folder of its model.
        limit (`int`, *optional*): The number of questions of each task; by default all.
        batch_size (`int`): The number of questions that are asked at a time.
        include_path (*optional*): A folder with your own tasks (YAML).
        output_dir (*optional*): Where `tasks.json` is updated after each model and task. Scores there of the same
            models, strength and limit are not measured again.
        **load_kwargs: Arguments of `from_pretrained` for the targets.

    Raises:
        PRTValueError: The reward is not one for language models, there are no targets or two of one name, a task is
            unknown, `output_dir` cannot be written, or `lm_eval` is not installed.
        RewardFileError: `tasks.json` in `output_dir` cannot be read.
        VocabularyMismatchError: A target does not fit the reward.
    """
    if reward.config.task != TEXT_GENERATION:
        raise PRTValueError(
            "The tasks are for language models.", expected=f"a {TEXT_GENERATION} reward", found=reward.config.task
        )
    check_names(targets)
    manager = _task_manager(tasks, include_path)
    path = None if output_dir is None else Path(output_dir) / TASKS_FILE
    stored: dict[str, dict] = {}
    if path is not None:
        check_writable(output_dir)
        stored = load_results(path, _checked, "the scores of an earlier evaluation") or {}
    asked = {"limit": limit, "own_tasks": _own_tasks(include_path)}
    report = TaskReport(reward_name, list(targets), list(tasks))
    prt = {"reward": weights_digest_of_model(reward.network), "strength": reward.config.strength}
    for_all = {name: value for name, value in load_kwargs.items() if name not in ("revision", "quantization_config")}
    pair = None
    if eft is not None:
        pair = TunedModel(reward, eft, **for_all), source_backbones(reward, **for_all)[0]
    for target in targets:
        backbone = Backbone(reward, target, **load_kwargs)
        tuned = {
            method: TunedModel(reward, models[target], **for_all)
            for method, models in (given or {}).items()
            if target in models
        }
        parts = {"pretrained": {}, "prt": prt} | {method: each.identity for method, each in tuned.items()}
        if pair is not None:
            parts["eft"] = {"eft": [each.identity for each in pair]}
        for method in filter(parts.__contains__, METHODS):
            key = key_of({"target": backbone.identity} | asked | parts[method])
            scores, model = {}, None
            for task in tasks:
                name = f"{target} {method} {task}"
                if name in stored and stored[name].get("key") == key:
                    scores[task] = _scores_from_dict(stored[name])
                    continue
                model = model or _model(tuned.get(method, backbone), reward, method, pair)
                scores[task] = _scores(model, backbone.processing_class, task, manager, limit, batch_size)
                stored[name] = {"key": key, "scores": _scores_to_dict(scores[task])}
                if path is not None:
                    save_results(path, stored)
            report.scores[target, method] = scores
            if method in tuned:
                tuned[method].unload()
        backbone.unload()
    return report


def _model(
    backbone: Backbone, reward: RewardModel, method: str, pair: tuple[TunedModel, Backbone] | None
) -> PreTrainedModel | PeftModel:
    """Return the model that is asked; `pair` is the fine-tuned source, and the source."""
    network = _loaded(backbone, reward)
    if method == "prt":
        return PRTForCausalLM.from_parts(network, [reward], tokenizer=backbone.processing_class)
    if method == "eft":
        tuned, source = (_loaded(each, reward) for each in pair)
        pair[0].check_base(pair[1])
        source = bare_base(source) if isinstance(source, PeftModel) else source  # that of the reward
        rewards = [RewardModel.from_base(each, pair[0].processing_class) for each in (tuned, source)]
        return PRTForCausalLM.from_parts(network, rewards, [1.0, -1.0], tokenizer=backbone.processing_class)
    return network


def _loaded(backbone: Backbone, reward: RewardModel) -> PreTrainedModel | PeftModel:
    """Return a network on the reward's device."""
    backbone.load()
    network = backbone.network
    return network if getattr(network, "hf_device_map", None) else network.to(reward.device)


def _scores(
    model: PreTrainedModel, tokenizer: Any, task: str, manager: Any, limit: int | None, batch_size: int
) -> dict[str, Score]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", device=str(model.device), batch_size=batch_size
    )
    with redirect_stdout(sys.stderr):  # it prints its progress; stdout is the caller's
        results = simple_evaluate(model=harness, tasks=[task], task_manager=manager, limit=limit, log_samples=False)
    # A tag has no scores itself, as a group has, but its tasks do.
    by_task = results["results"]
    found = {}
    for name in [task] if task in by_task else by_task:
        better = results["higher_is_better"].get(name, {})
        for entry, value in by_task[name].items():
            metric, _, filtered = entry.partition(",")  # `exact_match,strict-match`
            if not filtered or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            error = by_task[name].get(f"{metric}_stderr,{filtered}")
            error = error if isinstance(error, Real) else 0.0
            called = [*([] if name == task else [name]), metric, *([] if filtered == "none" else [filtered])]
            found[", ".join(called)] = Score(Estimate.around(value, error), better.get(metric) is False)
    return found


def _task_manager(tasks: Sequence[str], include_path: str | Path | None) -> Any:
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
            raise PRTValueError(
                "lm-evaluation-harness has no such task.",
                expected="a task or group of `lm_eval ls tasks`, or one in `include_path`",
                found=repr(task),
                remedy=did_you_mean(task, manager.all_tasks, 3),
            )
    return manager


def _own_tasks(include_path: str | Path | None) -> str | None:
    """Return a digest of the user's own tasks, which may change under the same names."""
    if include_path is None:
        return None
    return file_digest(*sorted(path for path in Path(include_path).rglob("*") if path.suffix in (".yaml", ".py")))


def _scores_to_dict(scores: dict[str, Score]) -> dict:
    return {name: [to_json_numbers(score.estimate), score.is_lower_better] for name, score in scores.items()}


def _scores_from_dict(entry: dict) -> dict[str, Score]:
    return {name: Score(Estimate.from_json(numbers), is_lower) for name, (numbers, is_lower) in entry["scores"].items()}


def _checked(entries: dict[str, dict]) -> dict[str, dict]:
    for entry in entries.values():
        _scores_from_dict(entry)
    return entries


def _cell(estimate: Estimate) -> str:
    value, low, high = (f"{each:.4g}" for each in estimate)
    return f"{value} [{low}, {high}]" if 0 < estimate.high - estimate.low < math.inf else value
