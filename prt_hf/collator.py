"""Batches of token rows: what is padded, what is learned."""

from dataclasses import dataclass

import torch

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
