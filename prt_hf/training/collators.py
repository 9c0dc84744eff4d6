"""Data collators for token rows and images, and the checks of the data sets that they read."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow.compute
import torch
from datasets import Dataset, IterableDataset
from transformers import BaseImageProcessor, GenerationConfig, PreTrainedTokenizerBase
from transformers.trainer_utils import has_length
from transformers.utils import logging

from ..errors import PRTValueError
from ..functional import IGNORE_INDEX
from ..networks.anatomy import check_length
from ..networks.pixels import PRTImageProcessor

logger = logging.get_logger(__name__)

MASKS = ("attention_mask", "completion_mask", "assistant_masks")
IMAGE = "image"
LABELS = ("label", "labels")
TRUNCATE = "cut rows off: `truncation=True, max_length=...` of the tokenizer, or `max_length` of PRTSFTConfig"
_WATCHED_ROWS = 64
_PACKED = {"position_ids", "seq_lengths"}


@dataclass
class TokenCollator:
    """Pads token rows on the right, and makes `labels` of the supervised tokens.

    A row has `input_ids`, and may have `labels` (by default the tokens themselves) and masks: labels are -100 wherever
    `attention_mask`, TRL's `completion_mask` or `assistant_masks` is 0. Padding is recognised by its position, because
    many tokenizers pad with the token that ends texts.

    ```
    [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, {"input_ids": [8, 9]}]
    ->  input_ids [[5, 6, 7], [8, 9, pad]]  attention_mask [[1, 1, 1], [1, 1, 0]]  labels [[-100, 6, 7], [8, 9, -100]]
    ```
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return `input_ids`, `attention_mask` and `labels`, each `(batch_size, sequence_length)`."""
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.full((len(rows), length), value)
            for name, value in {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}.items()
        }
        for index, row in enumerate(rows):
            ids = torch.as_tensor(row["input_ids"])
            masks = {name: torch.as_tensor(row[name]).bool() for name in MASKS if row.get(name) is not None}
            labels = torch.as_tensor(row["labels"] if row.get("labels") is not None else ids).clone()
            for mask in masks.values():
                labels[~mask] = IGNORE_INDEX
            batch["input_ids"][index, : len(ids)] = ids
            batch["attention_mask"][index, : len(ids)] = masks.get("attention_mask", torch.ones(len(ids))).long()
            batch["labels"][index, : len(ids)] = labels
        return batch


class PixelCollator:
    """Makes pixels of the column `image`, for each model its own, and `labels` of the column `label` if there is one.

    ```
    PixelCollator(reward_processor, [backbone_processor])([{"image": <PIL image>, "label": 3}, ...])
    ->  pixel_values [2, 3, 224, 224]  backbone_0_pixel_values [2, 3, 384, 384]  labels [3, ...]
    ```

    Args:
        processor: image processor of the reward, or of another model that is tuned. A PRT model's makes the pixels of
            all its parts.
        backbones: image processors of `PRTTrainer`'s `backbone=`, in the same order; None for the reward's own base.
            Pixels that a backbone shares with the reward are made once.
    """

    def __init__(self, processor: BaseImageProcessor, backbones: Sequence[BaseImageProcessor | None] = ()):
        self.processor = PRTImageProcessor.of(processor, "backbone", backbones)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return `pixel_values`, those of backbones that need others, and `labels` of shape `(batch_size,)`."""
        batch = dict(self.processor([row[IMAGE] for row in rows], return_tensors="pt"))
        label = next((name for name in LABELS if name in rows[0]), None)
        return batch if label is None else batch | {"labels": torch.as_tensor([row[label] for row in rows])}


def check_not_empty(name: str, dataset: Dataset | IterableDataset | Sequence | None) -> None:
    """Raise `PRTValueError` if a data set of a known length has no examples."""
    if dataset is not None and has_length(dataset) and len(dataset) == 0:
        raise PRTValueError(f"`{name}` is empty.", expected="at least one example", found="0 examples")


def check_tokenized(*datasets: Dataset | IterableDataset | Sequence | None) -> None:
    """Raise `PRTValueError` if a data set has no token ids for [`TokenCollator`], or is packed."""
    for dataset in datasets:
        columns = getattr(dataset, "column_names", None)
        if not isinstance(columns, list):
            continue
        if "input_ids" not in columns:
            raise PRTValueError(
                "The data set is not tokenized.",
                expected="a column `input_ids`, and `labels` unless all tokens are to be learned",
                found=", ".join(columns),
                remedy="dataset.map(lambda row: tokenizer(row['text']))",
            )
        if packed := _PACKED & set(columns):
            raise PRTValueError(
                "The data set is packed.",
                expected="one document in each row",
                found=", ".join(sorted(packed)),
                remedy="pass a `data_collator` that keeps the documents of a row apart",
            )


def check_lengths(dataset: Dataset | IterableDataset | Sequence | None, limit: int | None) -> None:
    """Raise `ContextLengthError` if a table of token rows has one that is longer than the models can read."""
    if limit is None or not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":  # made when read
        return
    if "input_ids" not in dataset.column_names or _PACKED & set(dataset.column_names):
        return
    for rows in dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=4096):
        lengths = pyarrow.compute.list_value_length(rows["input_ids"])
        check_length(pyarrow.compute.max(lengths).as_py(), limit, TRUNCATE)


class EndWatch:
    """Warns once if the first rows that a language model is trained on never supervise a token that ends texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None):
        ends = getattr(generation_config, "eos_token_id", None) or []
        self._ends = {tokenizer.eos_token_id, *([ends] if isinstance(ends, int) else ends)} - {None}
        self._token, self._rows = tokenizer.eos_token, 0

    def see(self, labels: torch.LongTensor) -> None:
        """Look at the labels of a batch, `(batch_size, sequence_length)`, until an end was seen or enough rows were."""
        if self._rows >= _WATCHED_ROWS or not self._ends:
            return
        if bool(torch.isin(labels, labels.new_tensor(sorted(self._ends))).any()):
            self._rows = _WATCHED_ROWS
            return
        self._rows += len(labels)
        if self._rows >= _WATCHED_ROWS:
            logger.warning(
                f"None of the first {self._rows} rows supervises an end token ({self._token!r}): texts will not end by "
                "what the reward learns. Append it to texts or completions if they should."
            )
