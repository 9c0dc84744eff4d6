"""The portability report: a reward at its source and at other backbones, beside the other ways to get there."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..contract import TEXT_GENERATION
from ..errors import PRTValueError
from ..hub.card import METHODS
from ..hub.training_record import hub_ids
from ..networks.anatomy import context_length, unwrap_adapter
from ..networks.auto import CONFIG_KWARGS, load_processing_class, load_skeleton
from ..networks.identity import as_bytes, weights_digest_of_model
from ..reward.backbones import Backbone, source_backbones
from ..reward.finetuned import TunedModel
from ..reward.model import RewardModel
from ..training.data import require_column
from .files import check_folder
from .portability import counted, portability_of
from .reading import REWARD, Reading
from .results import Figures, Place, PortabilityReport
from .rows import prepared
from .tally import ENTROPY, SOURCE, TARGET, TERMS, TUNED_SOURCE, TUNED_TARGET, Tally

_AT_TARGET = {
    "pretrained": "target",
    "eft": "eft_target",
    "prt": "prt_target",
    "reward_only": "reward_only",
    "finetuned": "tuned_target",
}
# log pi_source + log pi_tuned - log pi_source is the fine-tuned source itself.
_AT_SOURCE = {
    "pretrained": "source",
    "eft": "tuned_source",
    "prt": "prt_source",
    "reward_only": "reward_only",
    "finetuned": "tuned_source",
}

Model = str | PreTrainedModel | PeftModel
Keys = dict[str, dict[str, str]]  # of methods, as in [`Place`]
Progress = Callable[[DataLoader, str], Iterable[dict[str, torch.Tensor]]]


def portability_report(
    reward: RewardModel | str | Path,
    targets: Sequence[str | Path | PreTrainedModel] | Mapping[str, str | PreTrainedModel],
    dataset: Dataset,
    methods: Sequence[str] = tuple(METHODS),
    *,
    eft: Model | None = None,
    finetuned: Mapping[str, Model] | None = None,
    source: PreTrainedModel | None = None,
    strength: float | None = None,
    batch_size: int = 8,
    length: int = 1024,
    reward_name: str | None = None,
    dataset_name: str | None = None,
    output_dir: str | Path | None = None,
    progress: Progress = lambda batches, description: batches,
    revision: str | None = None,
    **load_kwargs,
) -> PortabilityReport:
    """Measure a reward on its source and on other backbones: Tables 4, 6 and 7 of the paper, for any task.

    Every network reads each batch once, however many methods it is part of; a method's time is that of its networks,
    one after another. The fine-tuned target is read in a pass of its own, so that it is never held beside the others.

    Args:
        reward ([`RewardModel`], folder or id): in memory, its device is where everything runs.
        targets: ids, folders or models in memory; or name -> one of these.
        dataset (`Dataset`): rows as [`~evaluation.batches`] takes them, with labels.
        methods: of `"pretrained"`, `"eft"`, `"prt"`, `"reward_only"`, `"finetuned"`. Without the model that it needs a
            method is left out, and the report says so.
        eft (*optional*): the fine-tuned source, for log pi_target + log pi_tuned - log pi_source; a model, a
            `PeftModel`, or the id or folder of either.
        finetuned (*optional*): target (name, id or folder) -> that target, fine-tuned.
        source (*optional*): pi_pt of training; by default the one that the reward knows (the first, of several).
        strength (`float`, *optional*): 1 / lambda; by default as the reward was tuned.
        batch_size, length (`int`): rows read at a time, and tokens at which a text is cut off, or earlier, where a
            model can read less.
        reward_name, dataset_name (`str`, *optional*): in the report; by default the reward's id or folder, or its
            base's, and where the data came from on the Hub.
        output_dir (*optional*): where `report.json` is kept up after each backbone. What is there of the same reward,
            data, settings and models is part of the report, and is not measured again.
        progress: wraps the batches of a pass; gets its description.
        revision: of the targets that are given by id.
        load_kwargs: for `from_pretrained` of all that is given by id (`dtype`, `token`, `device_map`, ...).

    Raises:
        VocabularyMismatchError, LabelMismatchError: a backbone or a fine-tuned model does not fit the reward; all are
            looked at before the first is measured.
        BaseModelMismatchError: `eft` is an adapter on another model than the source.
        PRTValueError: an unknown method, no targets or two of one name, no rows or labels, nothing to measure, or an
            `output_dir` that cannot be written or has the report of another reward or other data.
    """
    methods = _known_methods(methods)
    _check_models(methods, eft, finetuned)
    if strength is not None and not math.isfinite(strength):
        raise PRTValueError("The strength is no number.", expected="a finite one", found=str(strength))
    if output_dir is not None:
        check_folder(output_dir)
    reward_name = reward_name or _name_of(reward.network if isinstance(reward, RewardModel) else reward)
    if not isinstance(reward, RewardModel):
        reward = RewardModel.from_pretrained(reward, **load_kwargs)
    targets = _named_targets(targets)
    finetuned = {} if finetuned is None else _of_targets(finetuned, targets)
    _check_rows(dataset, reward)

    of_source = source_backbones(reward, **load_kwargs)[0] if source is None else Backbone(reward, source)
    at_revision = load_kwargs | ({} if revision is None else {"revision": revision})
    limits = [_limit(reward, model, at_revision) for model in targets.values()]
    of_targets = {target: Backbone(reward, model, **at_revision) for target, model in targets.items()}
    of_tuned = {target: TunedModel(reward, model, **load_kwargs) for target, model in finetuned.items()}
    of_eft = None if eft is None else TunedModel(reward, eft, **load_kwargs)
    for tuned in (*of_tuned.values(), of_eft):
        if tuned is not None:
            limits.append(_limit(reward, tuned.base if tuned.network is None else tuned.network, load_kwargs))
    named = reward.config.sources[0]
    if of_source.network is None:
        limits.append(_limit(reward, named.id, load_kwargs | ({"revision": named.revision} if named.revision else {})))
    else:
        limits.append(of_source.limit)
    limits.append(context_length(reward.network))
    read = prepared(dataset, reward, min([length, *filter(None, limits)]))

    on_hub = hub_ids(dataset)
    dataset_name = dataset_name or (on_hub[0] if len(on_hub) == 1 else "evaluation data")
    strength = float(reward.config.strength if strength is None else strength)
    report = PortabilityReport(
        reward=reward_name,
        config=reward.config,
        dataset=dataset_name,
        # What lies in one file is called `train`, whatever it is.
        split=str(dataset.split) if dataset.split and not Path(dataset_name).is_file() else None,
        strength=strength,
        source=Place((named.id or named.architecture) if source is None else _name_of(source)),
        settings={
            "reward": weights_digest_of_model(reward.network),
            "source": of_source.identity,
            # Row by row: how many are read at a time makes no other data.
            "data": _digest(read(1)),
            "strength": strength,
        },
    )
    if output_dir is not None:
        report = _continued(report, output_dir)
    report.notes = _left_out(methods, report, of_targets if of_eft else (), of_tuned, of_targets)
    for target, of_target in of_targets.items():
        networks = {SOURCE: of_source, TARGET: of_target, TUNED_SOURCE: of_eft, TUNED_TARGET: of_tuned.get(target)}
        run = _Run(reward, report, report.targets.setdefault(target, Place(target)), networks)
        for at_target, at_source in run.passes(methods):
            run.measure(at_target, at_source, partial(read, batch_size), progress)
            if output_dir is not None:
                report.save_figures(output_dir)
    return report


class _Run:
    """All passes with one target.

    Args:
        place: of the target, in the report.
        networks: name -> backbone, None where there is none.
    """

    def __init__(
        self,
        reward: RewardModel,
        report: PortabilityReport,
        place: Place,
        networks: Mapping[str, Backbone | None],
    ):
        self._reward, self._report, self._place = reward, report, place
        self._networks = {name: backbone for name, backbone in networks.items() if backbone is not None}
        self._told = {name: _told(backbone.identity) for name, backbone in self._networks.items()}
        place.forget(self._told)
        of_all = {name: told for name, told in self._told.items() if name in (SOURCE, TUNED_SOURCE)}
        for other in report.places:
            other.forget(of_all)

    def passes(self, methods: Sequence[str]) -> list[tuple[Keys, Keys]]:
        """What is not in the report yet, as method -> key, at the target and at the source; what is read together."""
        at_target = self._missing(self._place, methods, _AT_TARGET)
        at_source = self._missing(self._report.source, methods, _AT_SOURCE)
        alone = {method: at_target.pop(method) for method in ("finetuned",) if method in at_target}
        return [each for each in ((at_target, at_source), (alone, {})) if any(each)]

    def measure(
        self,
        at_target: Keys,
        at_source: Keys,
        read: Callable[[Sequence[Backbone]], DataLoader],
        progress: Progress,
    ) -> None:
        reward, report, task = self._reward, self._report, self._reward.config.task
        ways = [_AT_TARGET[method] for method in at_target] + [_AT_SOURCE[method] for method in at_source]
        names = {name for way in ways for name in TERMS[way]} | ({SOURCE} if "prt" in at_target else set())
        backbones = {name: backbone for name, backbone in self._networks.items() if name in names}
        reading = Reading(reward, backbones, reads_reward=REWARD in names)
        try:
            if {SOURCE, TUNED_SOURCE} <= names:
                self._networks[TUNED_SOURCE].check_base(self._networks[SOURCE])
            called = ", ".join(METHODS[method] for method in dict.fromkeys([*at_target, *at_source]))
            batches = progress(read(list(backbones.values())), f"{self._place.name}: {called}")
            tally = counted(reading, batches, report.strength)
            report.rows, report.positions = tally.rows, tally.positions
            for place, keys, way_of in (
                (self._place, at_target, _AT_TARGET),
                (report.source, at_source, _AT_SOURCE),
            ):
                for method, key in keys.items():
                    place.figures[method] = _figures(tally, reading, way_of[method])
                    place.keys[method] = key
            if "prt" in at_target:
                self._place.portability = portability_of(tally, task)
        finally:
            reading.unload()

    def _missing(self, place: Place, methods: Sequence[str], way_of: Mapping[str, str]) -> Keys:
        missing = {}
        for method in methods:
            names = TERMS[way_of[method]].keys() - {REWARD}
            if method not in place.figures and names <= self._networks.keys():
                missing[method] = {name: self._told[name] for name in sorted(names)}
        return missing


def _told(identity: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _figures(tally: Tally, reading: Reading, way: str) -> Figures:
    names = list(TERMS[way])
    return Figures(
        nll=tally.nll(way),
        accuracy=tally.accuracy(way),
        entropy=tally.mean(way, ENTROPY),
        milliseconds=reading.milliseconds(names),
        memory=reading.memory(names),
    )


def _known_methods(methods: Sequence[str]) -> list[str]:
    """In the order of the paper's figures."""
    for method in methods:
        if method not in METHODS:
            raise PRTValueError(
                "Unknown method.", expected=", ".join(METHODS), found=repr(method), remedy=_nearest(method, METHODS)
            )
    if not methods:
        raise PRTValueError("There is nothing to measure.", expected=f"methods: {', '.join(METHODS)}", found="none")
    return [method for method in METHODS if method in methods]


def _check_models(methods: Sequence[str], eft: Model | None, finetuned: Mapping | None) -> None:
    needed = {"eft": eft is not None, "finetuned": eft is not None or bool(finetuned)}
    if not any(needed.get(method, True) for method in methods):
        raise PRTValueError(
            "There is nothing to measure.",
            expected="the fine-tuned models: `eft=` of the source, `finetuned=` of the targets",
            found=f"only the methods {', '.join(methods)}, without a model that they need",
        )


def _named_targets(targets) -> dict[str, str | PreTrainedModel]:
    if isinstance(targets, str | Path | PreTrainedModel):
        targets = [targets]
    pairs = list(targets.items()) if isinstance(targets, Mapping) else [(_name_of(model), model) for model in targets]
    check_names([name for name, _ in pairs])
    return {name: str(model) if isinstance(model, Path) else model for name, model in pairs}


def check_names(names: Sequence[str]) -> None:
    """
    Raises:
        PRTValueError: no targets, or two of one name.
    """
    if not names:
        raise PRTValueError("There are no targets.", expected="at least one backbone", found="0")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise PRTValueError(
            "Two targets share a name.",
            expected="names that tell the targets apart",
            found=f"{', '.join(map(repr, twice))} more than once",
            remedy="`targets={name: model, ...}`",
        )


def _of_targets(finetuned: Mapping, targets: Mapping[str, object]) -> dict[str, Model]:
    found = {str(name): str(model) if isinstance(model, Path) else model for name, model in finetuned.items()}
    for name in found:
        if name not in targets:
            raise PRTValueError(
                "A fine-tuned model is of no target.",
                expected=f"one of the targets: {', '.join(targets)}",
                found=repr(name),
                remedy=_nearest(name, targets),
            )
    return found


def _nearest(name: str, known: Iterable[str]) -> str | None:
    near = get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else None


def _check_rows(dataset: Dataset, reward: RewardModel) -> None:
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


def _limit(reward: RewardModel, model: Model, load_kwargs: dict) -> int | None:
    """Tokens that a model can read, after checking, without its weights, that it fits the reward."""
    processing_class = None
    if isinstance(model, str):
        kwargs = {name: load_kwargs[name] for name in CONFIG_KWARGS if name in load_kwargs}
        processing_class = load_processing_class(model, reward.config.task, **kwargs)
        model = load_skeleton(model, **kwargs)
    reward.order_for(model, processing_class)
    return context_length(model)


def _continued(report: PortabilityReport, output_dir: str | Path) -> PortabilityReport:
    """The report that lies in a folder, if it was measured in the same way."""
    earlier = PortabilityReport.from_folder(output_dir, report.config)
    if earlier is None:
        return report
    if differing := [name for name, value in report.settings.items() if earlier.settings.get(name) != value]:
        raise PRTValueError(
            f"{output_dir} holds the report of another evaluation.",
            expected="a new folder, or one with a report of the same reward, source, data and strength",
            found=f"{earlier.reward} on {earlier.dataset}; another {', another '.join(differing)}",
            remedy="name another folder, or delete the report",
        )
    return earlier


def _left_out(methods, report: PortabilityReport, with_eft, with_tuned, targets) -> list[str]:
    """What neither this run nor an earlier one measures."""

    def without(method: str, given) -> list[str]:
        earlier = [name for name, place in report.targets.items() if method in place.figures]
        return [name for name in targets if method in methods and name not in (*given, *earlier)]

    notes = []
    if without("eft", with_eft):
        notes.append("EFT is left out: it needs the fine-tuned source (`eft=`)")
    if names := without("finetuned", with_tuned):
        notes.append(f"fine-tuned is left out, for want of the model (`finetuned=`), at: {', '.join(names)}")
    return notes


def _name_of(model: str | Path | PreTrainedModel | PeftModel) -> str:
    if isinstance(model, str | Path):
        return str(model)
    return unwrap_adapter(model).name_or_path or type(unwrap_adapter(model)).__name__


def _digest(batches: Iterable[dict[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(as_bytes(tensor.reshape(-1)))
    return digest.hexdigest()
