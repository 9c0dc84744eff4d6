"""The user's own data, on the Hub or in files: splits, columns, and the rows that are made of them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, IterableDataset, Value, load_dataset
from PIL import Image as PILImage
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl.data_utils import is_conversational, is_conversational_from_value

from ..contract import IMAGE_CLASSIFICATION, TEXT_GENERATION
from ..errors import PRTValueError
from ..networks.anatomy import ProcessingClass, context_length, task_of, unwrap_adapter
from ..networks.auto import load_config, load_processing_class
from ..networks.pixels import PIXELS, is_same_pixels
from .config import PRTConfig

logger = logging.get_logger(__name__)

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SHOWN = 10


def load_data(dataset: str, config: str | None = None) -> DatasetDict:
    """Load all splits of a data set: an id of the Hub, a folder, or a file."""

    def refusal(found: str) -> PRTValueError:
        expected = f"a dataset of the Hub, a folder, or a file ({', '.join(FORMATS)})"
        return PRTValueError(f"The dataset {dataset} cannot be loaded.", expected=expected, found=found)

    path = Path(dataset)
    suffix = path.suffix.lower()
    if path.is_file() != (suffix in FORMATS) and not path.is_dir():
        raise refusal(f"a file with the suffix {suffix!r}" if path.is_file() else "no such file")
    try:
        if path.is_file():
            return load_dataset(FORMATS[suffix], data_files=str(path))
        return load_dataset(dataset, config)
    except Exception as error:  # the datasets library raises what its many back ends raise
        inner = _innermost(error)
        raise refusal("no rows" if isinstance(inner, StopIteration) else first_line(inner)) from error


def prepare_rows(
    dataset: str,
    dataset_config: str | None,
    splits: Sequence[str],
    config: PRTConfig,
    network: PreTrainedModel,
    processing_class: ProcessingClass,
    backbones: Sequence[tuple[str | None, str | None]],
    *,
    text_column: str = "text",
    image_column: str = "image",
    label_column: str = "label",
) -> list[Dataset]:
    """Load splits of a data set, and make the rows that a trainer takes.

    Rows of language models are checked only. Of classifiers, texts become token ids, images become pixels, and labels
    become the model's ids. In `config`, `max_length` is set to what the model can read, and `remove_unused_columns` to
    `False` for images. `backbones` are id and revision of each source backbone; the id of the model itself is None.
    """
    parts = load_data(dataset, dataset_config)
    parts = [require_split(parts, split, dataset) for split in splits]
    task, limit, model_config = task_of(network), context_length(network), unwrap_adapter(network).config
    if task == TEXT_GENERATION:
        has_template = bool(processing_class.chat_template or config.chat_template_path)
        for rows in parts:
            check_language_rows(rows, config.dataset_text_field, has_template, dataset)
        if config.max_length is not None and limit is not None:
            config.max_length = min(config.max_length, limit)  # TRL's default is longer than some models can read
        return parts
    labels = {"label_column": label_column, "id2label": model_config.id2label}
    if task != IMAGE_CLASSIFICATION:
        texts = {"text_column": text_column, "tokenizer": processing_class, "length": limit}
        return [classified_texts(rows, dataset, **texts, **labels) for rows in parts]
    config.remove_unused_columns = False  # it would remove the images before they are read
    others = [
        (None, None)
        if name is None
        else (load_processing_class(name, task, revision=revision), load_config(name, revision=revision))
        for name, revision in backbones
    ]
    pixels = pixel_makers(processing_class, model_config, others)
    images = {"image_column": image_column, "pixels": pixels, "is_lazy": not config.precompute_backbone}
    return [classified_images(rows, dataset, **images, **labels) for rows in parts]


def require_split(parts: DatasetDict, split: str, dataset: str) -> Dataset:
    """Return a split; raise `PRTValueError` if it is missing or empty."""
    if split not in parts:
        raise PRTValueError(f"The dataset {dataset} has no split {split!r}.", expected=split, found=", ".join(parts))
    if len(parts[split]) == 0:
        raise PRTValueError(
            f"The split {split!r} of the dataset {dataset} is empty.", expected="at least one row", found="0 rows"
        )
    return parts[split]


def require_column(rows: Dataset, name: str, dataset: str) -> None:
    """Raise `PRTValueError` if a data set lacks a column."""
    if name not in rows.column_names:
        raise PRTValueError(
            f"The dataset {dataset} has no column {name!r}.",
            expected=f"a column {name!r}",
            found=", ".join(rows.column_names),
            remedy=f"rename the column that holds it to {name!r}",
        )


def require_texts(rows: Dataset, column: str, dataset: str) -> None:
    """Raise `PRTValueError` unless a column has a text in every row."""
    require_column(rows, column, dataset)
    for index, value in enumerate(rows[column]):
        if not isinstance(value, str):
            raise PRTValueError(
                f"The column {column!r} of the dataset {dataset} has something else than texts.",
                expected="a string in every row",
                found=f"{value!r} in row {index}",
            )
    if not any(map(str.strip, rows[column])):
        raise PRTValueError(
            f"The column {column!r} of the dataset {dataset} has empty texts only.",
            expected="a text in some row",
            found=f"{len(rows)} empty ones",
        )


def label_ids(rows: Dataset, column: str, id2label: dict) -> list[int]:
    """Return a column of labels as the classifier's ids, matched by name.

    Numbers that are not names of labels are taken for the classifier's ids. If the data's class names or the
    classifier's labels are placeholders, and there are as many of both, they are matched by their order. Both
    assumptions are logged.

    Raises:
        PRTValueError: the column holds no labels, or one that the classifier does not have.
    """
    feature = rows.features[column]
    if not isinstance(feature, ClassLabel | Value):
        raise PRTValueError(
            f"The column {column!r} holds no labels.", expected="one name or number a row", found=str(feature)
        )
    ids = {str(name): int(index) for index, name in id2label.items()}
    labels = sorted(ids, key=ids.get)
    known, values = ids, list(rows[column])
    if isinstance(feature, ClassLabel):
        names = feature.names
        values = [names[value] if value is not None and value >= 0 else None for value in values]  # -1: no label
        is_ordered = _are_placeholders(names) or _are_placeholders(labels)
        if is_ordered and len(names) == len(labels) and not set(names) & set(labels):
            logger.warning(f"Classes and labels are matched by their order: {_pairs(names, labels)}.")
            known = {name: index for index, name in enumerate(names)}
    elif all(isinstance(value, int) for value in values):
        if {str(value) for value in values} & set(labels):
            values = [str(value) for value in values]
        else:
            logger.warning(f"Labels are numbers, taken for the model's ids: {_pairs(range(len(labels)), labels)}.")
            known = {index: index for index in ids.values()}
    if unknown := sorted({value for value in values if value not in known}, key=str):
        raise PRTValueError(
            "The dataset has labels that the model does not know.",
            expected=f"the model's labels: {labels[:SHOWN]}",
            found=str(unknown[:SHOWN]),
            remedy="name a classifier that was trained for these labels",
        )
    return [known[value] for value in values]


def check_language_rows(rows: Dataset, text_column: str, has_chat_template: bool, dataset: str) -> None:
    """Raise `PRTValueError` unless TRL can make token rows of the data: text, prompt and completion, or messages."""
    columns = set(rows.column_names)
    if "input_ids" in columns:
        return
    is_prompted = "prompt" in columns
    if not (
        columns >= {"prompt", "completion"} if is_prompted else columns & {text_column, "messages", "conversations"}
    ):
        raise PRTValueError(
            f"The dataset {dataset} has no columns that a language model is tuned on.",
            expected=f"`{text_column}`, or `prompt` and `completion`, or `messages`, or `input_ids`",
            found=", ".join(rows.column_names),
            remedy="`dataset_text_field` names the column of texts",
        )
    if holds_messages(rows):
        if not has_chat_template:
            raise PRTValueError(
                f"The dataset {dataset} holds messages, and the tokenizer has no chat template to write them with.",
                expected="a tokenizer with a chat template",
                found="none",
                remedy="`chat_template_path` names a .jinja file",
            )
        return
    for column in ("prompt", "completion") if is_prompted else (text_column,):
        require_texts(rows, column, dataset)


def holds_messages(rows: Dataset | IterableDataset | Sequence | None) -> bool:
    """Return whether the rows of a data set are messages, by the first of them."""
    if not isinstance(rows, Dataset | IterableDataset):
        return False
    first = next(iter(rows), {})
    return is_conversational(first) or is_conversational_from_value(first)


def classified_texts(
    rows: Dataset,
    dataset: str,
    *,
    text_column: str,
    label_column: str,
    id2label: dict,
    tokenizer: PreTrainedTokenizerBase,
    length: int | None,
) -> Dataset:
    """Return the rows of a text classifier: token ids, cut off at `length`, and `labels`."""
    require_texts(rows, text_column, dataset)
    require_column(rows, label_column, dataset)
    if tokenizer.pad_token is None:
        raise PRTValueError(
            "The tokenizer has no padding token, which batches of texts need.",
            expected="a `pad_token` in tokenizer_config.json, and its id in the model's config.json",
            found="none",
        )
    labelled = rows.select_columns([text_column]).add_column("labels", label_ids(rows, label_column, id2label))

    def tokenized(batch):
        return tokenizer(batch[text_column], truncation=length is not None, max_length=length)

    return labelled.map(tokenized, batched=True, remove_columns=[text_column], desc="Tokenizing")


def classified_images(
    rows: Dataset,
    dataset: str,
    *,
    image_column: str,
    label_column: str,
    id2label: dict,
    pixels: Mapping[str, Callable[[PILImage.Image], torch.Tensor]],
    is_lazy: bool,
) -> Dataset:
    """Return the rows of an image classifier: pixels and `labels`.

    Images may be paths. `pixels` maps columns to functions that make them, see [`pixel_makers`]; `is_lazy` makes them
    whenever a row is read, instead of once.
    """
    require_column(rows, image_column, dataset)
    require_column(rows, label_column, dataset)
    feature = rows.features[image_column]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        rows = rows.cast_column(image_column, Image())  # paths
    elif not isinstance(feature, Image):
        raise PRTValueError(
            f"The column {image_column!r} holds no images.", expected="images, or paths to them", found=str(feature)
        )
    labelled = rows.select_columns([image_column]).add_column("labels", label_ids(rows, label_column, id2label))

    def prepared(batch):
        images = batch.pop(image_column)
        return batch | {name: [make(image) for image in images] for name, make in pixels.items()}

    if is_lazy:
        return labelled.with_transform(prepared)
    rows = labelled.map(prepared, batched=True, remove_columns=[image_column], desc="Reading images")
    return rows.with_format("torch")


def pixel_values(image: PILImage.Image, image_processor: BaseImageProcessor, config: PreTrainedConfig) -> torch.Tensor:
    """Return the pixels of a Pillow image, `(channels, height, width)`, in as many colours as the classifier sees."""
    colours = "L" if getattr(config, "num_channels", 3) == 1 else "RGB"
    if image.mode.startswith("I;16"):
        image = PILImage.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # `convert` would cut off at 255
    elif image.mode in ("I", "F"):
        raise PRTValueError(
            "An image's pixels have no known range.", expected="8 or 16 bits a channel", found=f"mode {image.mode}"
        )
    return image_processor(image.convert(colours), return_tensors="pt")["pixel_values"][0]


def pixel_makers(
    image_processor: BaseImageProcessor,
    config: PreTrainedConfig,
    backbones: Sequence[tuple[BaseImageProcessor | None, PreTrainedConfig | None]],
) -> dict[str, Callable[[PILImage.Image], torch.Tensor]]:
    """Return functions that make the columns of pixels of an image.

    These are `pixel_values`, for the model of `config`, and `backbone_0_pixel_values`, ... of the backbones that need
    others. Each backbone has an image processor and a configuration; None for those that read `pixel_values`.
    """
    made = {PIXELS: partial(pixel_values, image_processor=image_processor, config=config)}
    for index, (theirs, their_config) in enumerate(backbones):
        if not is_same_pixels(image_processor, theirs):
            made[f"backbone_{index}_{PIXELS}"] = partial(pixel_values, image_processor=theirs, config=their_config)
    return made


def first_line(error: Exception) -> str:
    """Return the kind of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _are_placeholders(names: list[str]) -> bool:
    return all(name in (str(index), f"LABEL_{index}") for index, name in enumerate(names))


def _pairs(names, labels: list[str]) -> str:
    pairs = [f"{name} = {label}" for name, label in zip(names, labels, strict=True)]
    return ", ".join(pairs[:SHOWN]) + (f" and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else "")
