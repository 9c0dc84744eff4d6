"""Means of the statistics that a trainer logs, over supervised positions."""

from collections import defaultdict

import torch
from accelerate import Accelerator
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..functional import check_supervised
from ..reward.batch import Batch

logger = logging.get_logger(__name__)


class RunningMeans:
    """Running means of [`~prt_hf.functional.prt_statistics`] over batches and devices, for training and evaluation."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._sums = {"train": defaultdict(float), "eval": defaultdict(float)}

    def clear(self, phase: str) -> None:
        """Forget the sums of `"train"` or `"eval"`."""
        self._sums[phase].clear()

    def add(self, phase: str, statistics: dict[str, torch.Tensor], batch: Batch) -> None:
        """Add the statistics of a batch, of shape `(n,)` at its supervised positions, to `"train"` or `"eval"`."""
        values = torch.stack(list(statistics.values()), -1)
        placed = values.new_zeros(*batch.labels.shape, len(statistics))
        placed[batch.supervised] = values
        rows = placed.flatten(1, -2).sum(1) if batch.labels.ndim > 1 else placed
        if phase == "eval":
            rows = self._accelerator.gather_for_metrics(rows)  # without the rows that pad the last batch
        for name, value in zip(statistics, rows.double().sum(0), strict=True):
            self._sums[phase][name] += value

    def take(self, phase: str) -> dict[str, float]:
        """Return the means since the last call, and forget them."""
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


def tell_start(statistics: dict[str, torch.Tensor]) -> None:
    """Log why the first loss is above the backbone's, where it is: whoever knows LoRA expects it there.

    Args:
        statistics: of the first batch.
    """
    loss, backbone_loss = (float(statistics[name].mean()) for name in ("loss", "backbone_loss"))
    if loss > backbone_loss:
        logger.warning(
            f"The first loss is {loss:.3f}; the backbone by itself has {backbone_loss:.3f}, logged as `backbone_loss`. "
            "This is usual: a reward that starts as the pretrained logits counts them twice. The loss falls below the "
            "backbone's within the first part of training."
        )


def is_step_logged(args: TrainingArguments, state: TrainerState) -> bool:
    """Return whether the Trainer logs after the step that it computes now."""
    if args.logging_strategy != IntervalStrategy.STEPS:
        return args.logging_strategy == IntervalStrategy.EPOCH
    step = state.global_step + 1
    return step % state.logging_steps == 0 or (step == 1 and args.logging_first_step)
