"""Data sets and batches of token rows: what they must have, what is padded, what is learned."""

from dataclasses import dataclass

import torch
from transformers.trainer_utils import has_length

from .errors import PRTValueError
from .functional import IGNORE_INDEX

MASKS = ("attention_mask", "completion_mask", "assistant_masks")


@dataclass
class TokenCollator:
    """Pads token rows on the right and says which tokens are supervised.

    A row has `input_ids`, and may have `labels` (by default the tokens themselves) and masks: labels are -100 wherever
    `attention_mask`, TRL's `completion_mask` or `assistant_masks` is 0. So are those of padding, by position rather
    than by token, because many tokenizers pad with a token that texts also end with.

    ```
    [{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}, {"input_ids": [8, 9]}]
    ->  input_ids [[5, 6, 7], [8, 9, pad]]  attention_mask [[1, 1, 1], [1, 1, 0]]  labels [[-100, 6, 7], [8, 9, -100]]
    ```
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.full((len(rows), length), value)
            for name, value in {
                "input_ids": self.pad_token_id,
                "attention_mask": 0,
                "labels": IGNORE_INDEX,
            }.items()
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


def check_not_empty(name: str, dataset) -> None:
    """Raises:
    PRTValueError: a data set of a known length without examples.
    """
    if dataset is not None and has_length(dataset) and len(dataset) == 0:
        raise PRTValueError(f"`{name}` is empty.", expected="at least one example", found="0 examples")


def check_tokenized(*datasets) -> None:
    """Raises:
    PRTValueError: columns that [`TokenCollator`] cannot make batches of.
    """
    for dataset in datasets:
        columns = getattr(dataset, "column_names", None)
        if not isinstance(columns, list):
            continue
        if "input_ids" not in columns:
            raise PRTValueError(
                "The data set is not tokenized.",
                expected="a column `input_ids`, and `labels` where not all tokens are to be learned",
                found=", ".join(columns),
                remedy="dataset.map(lambda row: tokenizer(row['text']))",
            )
        if packed := {"position_ids", "seq_lengths"} & set(columns):
            raise PRTValueError(
                "The data set is packed.",
                expected="one document a row",
                found=", ".join(sorted(packed)),
                remedy="pass a `data_collator` that keeps the documents of a row apart",
            )
