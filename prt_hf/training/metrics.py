"""Means over supervised positions of what a trainer logs."""

from collections import defaultdict

import torch
from accelerate import Accelerator

from ..functional import check_supervised
from ..reward.backbones import Batch


class RunningMeans:
    """Sums of [`~prt_hf.functional.prt_statistics`] over batches and devices, in training and in evaluation."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._sums = {"train": defaultdict(float), "eval": defaultdict(float)}

    def clear(self, phase: str) -> None:
        self._sums[phase].clear()

    def add(self, phase: str, statistics: dict[str, torch.Tensor], batch: Batch) -> None:
        """Add a batch.

        Args:
            phase: `"train"` or `"eval"`.
            statistics: tensors of shape `(n,)`, at the batch's supervised positions.
        """
        values = torch.stack(list(statistics.values()), -1)
        placed = values.new_zeros(*batch.labels.shape, len(statistics))
        placed[batch.supervised] = values
        rows = placed.flatten(1, -2).sum(1) if batch.labels.ndim > 1 else placed
        if phase == "eval":
            rows = self._accelerator.gather_for_metrics(rows)  # without the rows that only fill up the last batch
        for name, value in zip(statistics, rows.double().sum(0), strict=True):
            self._sums[phase][name] += value

    def take(self, phase: str) -> dict[str, float]:
        """Return the means since the last call, and forget them.

        Raises:
            PRTValueError: no position was supervised.
        """
        sums = self._sums[phase]
        if not sums:
            return {}
        totals = torch.stack(list(sums.values()))
        if phase == "train":
            totals = self._accelerator.reduce(totals, "sum")
        totals = dict(zip(sums, totals.tolist(), strict=True))
        sums.clear()
        count = totals.pop("count")
        check_supervised(count, "what was measured")
        return {name: total / count for name, total in totals.items()}
