"""Measure a portability report: a reward on its source and on other backbones, beside EFT and fine-tuning."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..contract import TEXT_GENERATION
from ..errors import PRTValueError
from ..hub.card import METHODS
from ..hub.folder import check_writable
from ..hub.training_record import hub_ids
from ..inference.loading import load_reward
from ..networks.anatomy import context_length
from ..networks.auto import CONFIG_KWARGS, load_processing_class, load_skeleton
from ..networks.identity import as_bytes, weights_digest_of_model
from ..reward.backbones import Backbone, source_backbones
from ..reward.finetuned import TunedModel
from ..reward.model import RewardModel
from ..vocabulary import VocabularyMatch
from .arguments import Model, by_target, check_models, check_rows, known_methods, name_of, named_targets
from .portability import counted, portability_of
from .reading import REWARD, Reading
from .results import Figures, Place, PortabilityReport
from .rivals import context_of, made_rivals
from .rows import prepared
from .store import key_of
from .tally import ALONE, ENTROPY, SOURCE, TARGET, TERMS, TUNED_SOURCE, Tally, Terms
from .tuned_rivals import Tuning

Keys = dict[str, dict[str, str]]  # method -> network -> key, as in [`Place`]
Progress = Callable[[DataLoader, str], Iterable[dict[str, torch.Tensor]]]


def portability_report(
    reward: RewardModel | str | Path,
    targets: Sequence[str | Path | PreTrainedModel] | Mapping[str, str | PreTrainedModel],
    dataset: Dataset,
    methods: Sequence[str] = tuple(METHODS),
    *,
    eft: Model | None = None,
    finetuned: Mapping[str, Model] | None = None,
    lora: Mapping[str, Model] | None = None,
    baked: Mapping[str, Model] | None = None,
    few_shot: Dataset | None = None,
    tuning: Tuning | None = None,
    source: PreTrainedModel | None = None,
    strength: float | None = None,
    batch_size: int = 8,
    length: int = 1024,
    reward_name: str | None = None,
    dataset_name: str | None = None,
    output_dir: str | Path | None = None,
    progress: Progress = lambda batches, description: batches,
    revision: str | None = None,
    quantization_config: Any = None,
    **load_kwargs: Any,
) -> PortabilityReport:
    """Measure a reward on its source and on other backbones: Tables 4, 6 and 7 of the paper, for any task.

    Every network reads each batch once, however many methods it is part of; the time of a method is that of its
    networks, one after another. Each rival that is a model at the target (fine-tuned, transplanted, LoRA, baked) is
    read in a separate pass, so that it is not in memory together with the others.

    Args:
        reward ([`RewardModel`], folder or id): The reward, or an ordinary adapter to be carried over. If it is in
            memory, everything runs on its device.
        targets: Ids, folders or models in memory; or a mapping of names to these.
        dataset (`Dataset`): Rows as [`~evaluation.batches`] takes them, with labels.
        methods: Some of `"pretrained"`, `"eft"`, `"prt"`, `"reward_only"`, `"finetuned"`, `"transplanted"`,
            `"few_shot"`, `"lora"`, `"lora_steps"`, `"lora_compute"`, `"baked"`. A method whose model is not given is
            left out, and the report says so.
        eft (*optional*): The fine-tuned source, for log pi_target + log pi_tuned - log pi_source: a model, a
            `PeftModel`, or the id or folder of either. It also gives `"transplanted"`, where all weights have the
            shapes of the target's: its adapter on the target, or its difference from the source added to the target.
        finetuned (*optional*): A mapping of targets (name, id or folder) to their fine-tuned models.
        lora (*optional*): Like `finetuned`, the targets tuned with LoRA on the data of the reward.
        baked (*optional*): Like `finetuned`, the targets with a LoRA that `bake` made of the PRT model.
        few_shot (`Dataset`, *optional*): Examples, rows like the data, that the targets get in front of every row.
        tuning ([`~evaluation.tuned_rivals.Tuning`], *optional*): Tunes LoRAs on the targets here, with as many steps as
            the reward and with as much compute.
        source (*optional*): pi_pt in training; by default the (first) one that the reward names.
        strength (`float`, *optional*): 1 / lambda; by default that of the reward's training.
        batch_size (`int`): The number of rows that are read at a time.
        length (`int`): The number of tokens at which texts are cut off; less, if a model can read less.
        reward_name (`str`, *optional*): By default the reward's id or folder, or that of its base.
        dataset_name (`str`, *optional*): By default the id on the Hub that the data came from, if known.
        output_dir (*optional*): Where `report.json` is updated after each backbone. Figures there of the same reward,
            data, settings and models become part of the report, and are not measured again.
        progress: Wraps the batches of a pass; also gets its description.
        revision: Of the targets that are given by id.
        quantization_config: Of the targets that are given by id; all else stays in full precision.
        **load_kwargs: Arguments of `from_pretrained` for all that is given by id (`dtype`, `token`, `device_map`, ...).

    Raises:
        VocabularyMismatchError, LabelMismatchError: A backbone or fine-tuned model does not fit the reward. All are
            checked before the first is measured.
        BaseModelMismatchError: `eft` is an adapter of another model than the source.
        PRTValueError: A method is unknown, there are no targets or two of one name, the data has no rows or labels,
            there is nothing to measure, or `output_dir` cannot be written or holds the report of another evaluation.
    """
    methods = known_methods(methods)
    given = {"finetuned": finetuned, "lora": lora, "baked": baked}
    check_models(methods, eft, given, few_shot, tuning)
    if strength is not None and not math.isfinite(strength):
        raise PRTValueError("The strength is not a number.", expected="a finite one", found=str(strength))
    if output_dir is not None:
        check_writable(output_dir)
    reward_name = reward_name or name_of(reward.network if isinstance(reward, RewardModel) else reward)
    if not isinstance(reward, RewardModel):
        reward, _ = load_reward(reward, [], load_kwargs)
    targets = named_targets(targets)
    given = {method: by_target(models or {}, targets) for method, models in given.items()}
    check_rows(dataset, reward, few_shot)

    own = {"revision": revision, "quantization_config": quantization_config}
    target_kwargs = load_kwargs | {name: value for name, value in own.items() if value is not None}
    networks = {
        SOURCE: source_backbones(reward, **load_kwargs)[0] if source is None else Backbone(reward, source),
        TUNED_SOURCE: None if eft is None else TunedModel(reward, eft, **load_kwargs),
    }
    target_networks = {
        name: {
            TARGET: Backbone(reward, model, **target_kwargs),
            **{
                method: TunedModel(reward, models[name], **load_kwargs)
                for method, models in given.items()
                if name in models and method in methods
            },
        }
        for name, model in targets.items()
    }
    tuned = [networks[TUNED_SOURCE], *(each.get(method) for each in target_networks.values() for method in given)]
    judged = {name: _judged(reward, model, target_kwargs) for name, model in targets.items()}
    limits = [
        context_length(reward.network),
        _source_limit(reward, networks[SOURCE], load_kwargs),
        *(limit for limit, _ in judged.values()),
        *(_judged(reward, model.network or model.base, load_kwargs)[0] for model in tuned if model is not None),
    ]
    read = prepared(dataset, reward, min([length, *filter(None, limits)]))
    made, notes = made_rivals(
        reward,
        targets,
        {name: theirs[TARGET] for name, theirs in target_networks.items()},
        networks[SOURCE],
        networks[TUNED_SOURCE],
        methods,
        context=[] if few_shot is None else context_of(few_shot, reward, length),
        longest=0 if few_shot is None else max(batch["input_ids"].shape[1] for batch in read(batch_size)),
        limits={name: limit for name, (limit, _) in judged.items()},
        tuning=tuning,
        load_kwargs=load_kwargs,
        target_kwargs=target_kwargs,
    )
    target_networks = {name: theirs | made[name] for name, theirs in target_networks.items()}

    named = reward.config.sources[0]
    strength = float(reward.config.strength if strength is None else strength)
    report = PortabilityReport(
        reward=reward_name,
        config=reward.config,
        strength=strength,
        source=Place((named.id or named.architecture) if source is None else name_of(source)),
        settings={
            "reward": weights_digest_of_model(reward.network),
            "source": networks[SOURCE].identity,
            "data": _digest(read(1)),  # row by row: the data does not depend on the batch size
            "strength": strength,
        },
        **_description(dataset, dataset_name),
    )
    if output_dir is not None:
        report = _continued(report, output_dir)
    report.notes = [*_missing_notes(methods, report, targets, targets if eft else (), given), *notes]
    for name, (_, tokens) in judged.items():
        if reward.config.task == TEXT_GENERATION and not tokens.is_identical:
            report.notes.append(f"{name}: its vocabulary is {tokens}. Figures are over the tokens that both have")
    for name, theirs in target_networks.items():
        run = _Run(reward, report, report.targets.setdefault(name, Place(name)), networks | theirs)
        for at_target, at_source in run.passes(methods):
            run.measure(at_target, at_source, partial(read, batch_size), progress)
            if output_dir is not None:
                report.save_figures(output_dir)
    return report


class _Run:
    """The passes over the data with one target, which fill its place in the report."""

    def __init__(
        self, reward: RewardModel, report: PortabilityReport, place: Place, networks: Mapping[str, Backbone | None]
    ):
        self._reward, self._report, self._place = reward, report, place
        self._networks = {name: backbone for name, backbone in networks.items() if backbone is not None}
        self._keys = {name: key_of(backbone.identity) for name, backbone in self._networks.items()}
        place.forget(self._keys)
        common = {name: key for name, key in self._keys.items() if name in (SOURCE, TUNED_SOURCE)}
        for other in report.places:
            other.forget(common)

    def passes(self, methods: Sequence[str]) -> list[tuple[Keys, Keys]]:
        """Return the methods that the report lacks, at the target and at the source, one pair for each pass."""
        at_target = self._missing(self._place, methods, TERMS[TARGET])
        at_source = self._missing(self._report.source, methods, TERMS[SOURCE])
        alone = [({method: at_target.pop(method)}, {}) for method in ALONE if method in at_target]
        return [each for each in ((at_target, at_source), *alone) if any(each)]

    def measure(
        self, at_target: Keys, at_source: Keys, read: Callable[[Sequence[Backbone]], DataLoader], progress: Progress
    ) -> None:
        """Read all batches once and put the figures into the report."""
        reward, report = self._reward, self._report
        asked = [
            (place, method, key, TERMS[at][method])
            for place, at, keys in ((self._place, TARGET, at_target), (report.source, SOURCE, at_source))
            for method, key in keys.items()
        ]
        names = {name for *_, terms in asked for name in terms} | ({SOURCE} if "prt" in at_target else set())
        backbones = {name: backbone for name, backbone in self._networks.items() if name in names}
        reading = Reading(reward, backbones, reads_reward=REWARD in names)
        try:
            if {SOURCE, TUNED_SOURCE} <= names:
                self._networks[TUNED_SOURCE].check_base(self._networks[SOURCE])
            called = ", ".join(METHODS[method] for method in dict.fromkeys([*at_target, *at_source]))
            batches = progress(read(list(backbones.values())), f"{self._place.name}: {called}")
            tally = counted(reading, batches, report.strength)
            report.rows, report.positions, report.counts = tally.rows, tally.positions, tally.counts
            for place, method, key, terms in asked:
                place.figures[method], place.keys[method] = _figures(tally, reading, terms), key
            if "prt" in at_target:
                self._place.portability = portability_of(tally, reward.config.task)
                self._place.scores = tally.scores(TERMS[TARGET]["prt"], report.measure)
        finally:
            reading.unload()

    def _missing(self, place: Place, methods: Sequence[str], terms: Mapping[str, Terms]) -> Keys:
        missing = {}
        for method in filter(terms.__contains__, methods):
            names = terms[method].keys() - {REWARD}
            if method not in place.figures and names <= self._networks.keys():
                missing[method] = {name: self._keys[name] for name in sorted(names)}
        return missing


def _figures(tally: Tally, reading: Reading, terms: Terms) -> Figures:
    return Figures(
        nll=tally.nll(terms),
        accuracy=tally.accuracy(terms),
        entropy=tally.mean(terms, ENTROPY),
        milliseconds=reading.milliseconds(terms),
        memory=reading.memory(terms),
    )


def _judged(reward: RewardModel, model: Model, load_kwargs: dict) -> tuple[int | None, VocabularyMatch | None]:
    """Check without its weights that a model fits; return how many tokens it can read, and how they match."""
    processing_class = None
    if isinstance(model, str):
        kwargs = {name: load_kwargs[name] for name in CONFIG_KWARGS if name in load_kwargs}
        processing_class = load_processing_class(model, reward.config.task, **kwargs)
        model = load_skeleton(model, **kwargs)
    match = reward.match_with(model, processing_class)
    return context_length(model), match.tokens


def _source_limit(reward: RewardModel, source: Backbone, load_kwargs: dict) -> int | None:
    if source.network is not None:
        return source.limit
    named = reward.config.sources[0]
    return _judged(reward, named.id, load_kwargs | ({"revision": named.revision} if named.revision else {}))[0]


def _description(dataset: Dataset, name: str | None) -> dict[str, str | None]:
    ids = hub_ids(dataset)
    name = name or (ids[0] if len(ids) == 1 else "evaluation data")
    # The data of a single file is called `train`, whatever it is.
    return {"dataset": name, "split": str(dataset.split) if dataset.split and not Path(name).is_file() else None}


def _continued(report: PortabilityReport, output_dir: str | Path) -> PortabilityReport:
    """Return the report in a folder, if there is one, after a check that it was measured in the same way."""
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


def _missing_notes(
    methods: Sequence[str],
    report: PortabilityReport,
    targets: Iterable[str],
    with_eft: Iterable[str],
    given: Mapping[str, Mapping],
) -> list[str]:
    """Name what neither this run nor an earlier one measures."""

    def without(method: str, given: Iterable[str]) -> list[str]:
        earlier = [name for name, place in report.targets.items() if method in place.figures]
        return [name for name in targets if method in methods and name not in (*given, *earlier)]

    notes = []
    if without("eft", with_eft):
        notes.append("EFT is left out: it needs the fine-tuned source (`eft=`)")
    if names := without("finetuned", given["finetuned"]):
        notes.append(f"fine-tuned is left out, because the model (`finetuned=`) is missing, at: {', '.join(names)}")
    return notes


def _digest(batches: Iterable[dict[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(as_bytes(tensor.reshape(-1)))
    return digest.hexdigest()
