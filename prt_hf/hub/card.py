"""Render the card of a reward or recipe: Markdown, and metadata for the Hub."""

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..contract import (
    IMAGE_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    LabelContract,
    ModelReference,
    RewardConfig,
)
from .card_merge import KINDS, block
from .training_record import TrainingRecord

CITATION = """\
@inproceedings{chijiwa2025portable,
  title     = {Portable Reward Tuning: Towards Reusable Fine-Tuning across Different Pretrained Models},
  author    = {Chijiwa, Daiki and Hasegawa, Taku and Nishida, Kyosuke and Saito, Kuniko and Takeuchi, Susumu},
  booktitle = {International Conference on Machine Learning},
  year      = {2025},
}"""
PAPER_METHODS = {  # as in [`Measurement`], with their names in tables; in the order of the paper's figures
    "pretrained": "pretrained",
    "eft": "EFT",
    "prt": "PRT",
    "reward_only": "reward only",
    "finetuned": "fine-tuned",
}
METHODS = PAPER_METHODS | {
    "transplanted": "transplanted",
    "few_shot": "few-shot",
    "lora": "LoRA",
    "lora_steps": "LoRA, as many steps",
    "lora_compute": "LoRA, as much compute",
    "baked": "baked",
}
MOST_LABELS = 48

_TAGS = ["portable-reward-tuning", "prt"]
_SAMPLES = {
    TEXT_GENERATION: "Once upon a time",
    TEXT_CLASSIFICATION: "A text to be classified",
    IMAGE_CLASSIFICATION: "photo.png",
}
PRT_CLASSES = {
    TEXT_GENERATION: "PRTForCausalLM",
    TEXT_CLASSIFICATION: "PRTForSequenceClassification",
    IMAGE_CLASSIFICATION: "PRTForImageClassification",
}
_FIGURES_OF_HUB = ("loss", "accuracy")


@dataclass(frozen=True)
class Measurement:
    """A row of the table of measured backbones.

    Args:
        backbone (`str`): The id of the source or of a target backbone.
        dataset (`str`): The data's id on the Hub, or its name.
        metric (`str`): The metric, such as `accuracy`.
        values (`dict[str, float]`): Method (`"pretrained"`, `"eft"`, `"prt"`, `"reward_only"`, `"finetuned"`) -> value.
        is_lower_better (`bool`): Whether lower values are better.
        split (`str`, *optional*): The split of the data.
    """

    backbone: str
    dataset: str
    metric: str
    values: dict[str, float]
    is_lower_better: bool = False
    split: str | None = None


def render_card(
    config: RewardConfig, name: str, training: TrainingRecord | None = None, measurements: Sequence[Measurement] = ()
) -> str:
    """Return the card of a reward.

    Folders, which mean nothing elsewhere, are shown by their last part, and are left out of the metadata. The licence
    and the language are for the user to add.

    Args:
        config: The reward's `prt_config.json`.
        name: The repository id or folder that the code in the card loads.
        training (*optional*): How it was tuned.
        measurements (*optional*): Its figures with several backbones.
    """
    is_adapter, is_text = config.is_adapter, config.task == TEXT_GENERATION
    base = _hub_id(config.reward_base.id)
    sources = [] if config.source_backbone is None else [config.source_backbone, *config.more_source_backbones]
    source_ids = [source.id for source in sources if source.id]
    others = [row.backbone for row in measurements if row.backbone not in source_ids]
    ids = [place for place in [*others, *source_ids, config.reward_base.id] if place]
    results = _results(config.task, sources, training, measurements)
    data = ModelCardData(
        base_model=base,
        base_model_relation=base and ("adapter" if is_adapter else "finetune"),
        datasets=[dataset for dataset in (training.datasets if training else ()) if _is_dataset(dataset)] or None,
        eval_results=results or None,
        library_name=__package__.partition(".")[0],
        model_name=_shown(name) if results else None,
        pipeline_tag=config.task,
        tags=[*_TAGS, KINDS["adapter" if is_adapter else "full"]],
    )
    needs_base = is_adapter and base is None
    return _rendered(
        "model_card_template.md.jinja",
        data,
        name=_shown(name),
        config=config,
        is_text=is_text,
        sources=sources,
        source_ids=source_ids,
        backbone=_shown(ids[0] if ids else "BACKBONE"),
        needs_base=needs_base,
        base_argument=f", base_model={_python(_shown(config.reward_base.id or 'BASE'))}" if needs_base else "",
        prt_class=PRT_CLASSES[config.task],
        processor_argument="image_processor" if config.task == IMAGE_CLASSIFICATION else "tokenizer",
        sample="What is 2 + 3?" if config.is_chat else _SAMPLES[config.task],
        labels=config.contract.names if isinstance(config.contract, LabelContract) else (),
        most_labels=MOST_LABELS,
        measurements=measurements,
        methods=_columns((row.values for row in measurements), METHODS),
        method_name=lambda method: METHODS.get(method) or _cell(method),
        training=training,
        columns=_columns(training.rows if training else (), ("step", "training_loss")),
    )


def render_recipe_card(name: str, task: str, backbone: ModelReference, rewards: Sequence[tuple[str, float]]) -> str:
    """Return the card of a recipe.

    `name` is its repository id or folder. Each reward has an id on the Hub, or a folder in the recipe, and a strength.
    """
    on_hub = [place for place, _ in rewards if "/" in place and _hub_id(place)]
    parts = [place for place in [_hub_id(backbone.id), *on_hub] if place]
    data = ModelCardData(
        base_model=(parts if len(parts) > 1 else parts[0]) if parts else None,
        base_model_relation=("merge" if len(parts) > 1 else "adapter") if parts else None,
        library_name=__package__.partition(".")[0],
        pipeline_tag=task,
        tags=[*_TAGS, KINDS["recipe"]],
    )
    return _rendered(
        "recipe_card_template.md.jinja",
        data,
        name=_shown(name),
        task=task,
        backbone=backbone,
        rewards=rewards,
        cell_reward=lambda place: _link(place) if place in on_hub else f"{_cell(_shown(place))} (in this folder)",
        auto_class=PRT_CLASSES[task].replace("PRT", "AutoModel"),  # the names differ in nothing else
        prt_class=PRT_CLASSES[task],
        backbone_is_on_hub=_hub_id(backbone.id) is not None,
        sample=_SAMPLES[task],
    )


def render_baked_card(name: str, task: str, backbone: ModelReference, rewards: Sequence[tuple[str, float]]) -> str:
    """Return the card of a LoRA that a PRT model was baked into.

    `name` is its repository id or folder. Each reward has an id on the Hub or a description, and a strength.
    """
    data = ModelCardData(
        base_model=_hub_id(backbone.id),
        base_model_relation=_hub_id(backbone.id) and "adapter",
        library_name="peft",
        pipeline_tag=task,
        tags=[*_TAGS, "lora", KINDS["baked"]],
    )
    return _rendered(
        "baked_card_template.md.jinja",
        data,
        name=_shown(name),
        task=task,
        backbone=backbone,
        rewards=rewards,
        cell_reward=lambda place: _link(place) if _hub_id(place) else _cell(place),
        peft_class=PRT_CLASSES[task].replace("PRT", "AutoPeftModel") if task != IMAGE_CLASSIFICATION else "PeftModel",
    )


def _rendered(template: str, data: ModelCardData, **values: Any) -> str:
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name(template)),
        title=_plain(values["name"]),
        citation=CITATION,
        block=lambda name, caller: block(name, caller()),
        code=_code,
        cell=_cell,
        cell_setting=lambda value: _cell(_shown(value) if _is_path(value) else value),
        cell_link=_cell_link,
        dataset_link=lambda place: _link(place, "datasets/") if _is_dataset(place) else _code(_shown(place)),
        number=_number,
        python=_python,
        shell=shlex.quote,
        shown=_shown,
        **values,
    )
    return f"{card}\n"  # Jinja cuts the last line end


def _results(
    task: str, sources: list[ModelReference], training: TrainingRecord | None, measurements: Sequence[Measurement]
) -> list[EvalResult]:
    """Return the finite figures of the PRT model on data of the Hub; measurements override the trainer's evaluation."""
    found = {}

    def add(dataset: str | None, split: str | None, metric: str, value: float, backbone: str) -> None:
        if not _is_dataset(dataset) or not isfinite(value):
            return
        result = EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split and _line(split),
            metric_type=_line(metric),
            metric_value=float(f"{value:.6g}"),
            metric_name=f"{_line(metric)} with {_shown(backbone)}",
        )
        found.setdefault((result.unique_identifier, result.metric_name), result)

    for row in measurements:
        if "prt" in row.values:
            add(row.dataset, row.split, row.metric, row.values["prt"], row.backbone)
    if training is not None and len(sources) == 1 and sources[0].id:
        for name in _FIGURES_OF_HUB:
            if (value := training.evaluation.get(f"eval_{name}")) is not None:
                add(training.evaluation_dataset, training.evaluation_split, name, value, sources[0].id)
    return list(found.values())


def _columns(rows: Iterable[dict], first: Iterable[str]) -> list[str]:
    """Return all keys of the rows, those of `first` before others."""
    present = dict.fromkeys(name for row in rows for name in row)
    return [name for name in dict.fromkeys([*first, *present]) if name in present]


def _hub_id(place: str | None) -> str | None:
    """Return a place if it can be a repository on the Hub, else None; folders are given as absolute paths."""
    if not place:
        return None
    try:
        validate_repo_id(place)
    except HFValidationError:
        return None
    return place


def _is_dataset(place: str | None) -> bool:
    """Return whether a place is an id on the Hub; one without a namespace is taken for a mere name."""
    return _hub_id(place) is not None and "/" in place


def _shown(place: str) -> str:
    """Return an id as it is, and the last part of a path."""
    return _hub_id(place) or _line(re.split(r"[\\/]", place.rstrip("\\/"))[-1]) or "unnamed"


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and re.match(r"[/~]|[A-Za-z]:[\\/]", value) is not None


# Names, labels and tokens are untrusted text, which must not end a line, a cell or a code span.


def _line(text: Any) -> str:
    return "".join(each if each.isprintable() else "\ufffd" for each in " ".join(str(text).split()))


def _plain(text: str) -> str:
    return re.sub(r"([\\`*{}\[\]<>|#!~$&]|(?<![a-zA-Z0-9])_|_(?![a-zA-Z0-9]))", r"\\\1", _line(text))


def _code(text: Any) -> str:
    text = _line(text) or " "
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def _cell(text: Any) -> str:
    # GFM reads two backslashes before a pipe as one backslash and the end of the cell.
    return re.sub(r"\\*\|", r"\\|", _code(text))


def _link(place: str, kind: str = "") -> str:
    return f"[`{place}`](https://huggingface.co/{kind}{place})"


def _cell_link(reference: ModelReference) -> str:
    if reference.id is None:
        return f"a {_cell(reference.architecture)} that was created in memory"
    name = _link(reference.id) if _hub_id(reference.id) else _cell(_shown(reference.id))
    return f"{name} at {_cell(reference.revision)}" if reference.revision else name


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value) if isinstance(value, int) else _cell(value)


def _python(text: str) -> str:
    """Return a Python string literal."""
    return json.dumps(text, ensure_ascii=False)
