"""Batches of data, and the logits of a backbone that losses read, from a network or from stored states."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from ..contract import ModelReference
from ..functional import IGNORE_INDEX
from ..networks.lm_head import Projection
from .model import RewardModel


@dataclass
class Batch:
    """The inputs of both models, and the positions where they are judged.

    Attributes:
        inputs (`dict`): for the reward, and for backbones that have no others.
        labels (`torch.LongTensor`): aligned with what is predicted: `(batch_size, sequence_length - 1)` for language
            models, whose last position has no label, `(batch_size,)` for classifiers.
        rows (`torch.LongTensor` of shape `(batch_size,)`, *optional*): row numbers in the data set, for stored states.
        backbone_inputs (`list[dict]`): inputs of single backbones, in the order of `backbone=`.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.LongTensor
    rows: torch.LongTensor | None = None
    backbone_inputs: Sequence[dict[str, torch.Tensor]] = ()

    @cached_property
    def supervised(self) -> tuple[torch.LongTensor, ...]:
        """Indices of the labels that are not ignored."""
        return (self.labels != IGNORE_INDEX).nonzero(as_tuple=True)

    @cached_property
    def supervised_labels(self) -> torch.LongTensor:
        """The labels that are not ignored, `(n,)`."""
        return self.labels[self.supervised]

    def chosen(self, values: torch.Tensor) -> torch.Tensor:
        """Select the supervised positions from logits or hidden states of all positions, `(n, ...)`."""
        return self.aligned(values)[tuple(index.to(values.device) for index in self.supervised)]

    def aligned(self, values: torch.Tensor) -> torch.Tensor:
        """Select the positions that `labels` are for from logits or hidden states of all positions."""
        return values[:, :-1] if self.labels.ndim > 1 else values


class BackboneLogits:
    """The logits of pi_pt, in the order of a reward's tokens or labels.

    Args:
        reward ([`RewardModel`]): the reward that is tuned on the backbone.

    Attributes:
        network (`PreTrainedModel`, *optional*): the network that computes them, if it is in memory.
        reference ([`~contract.ModelReference`]): names the backbone in the reward's configuration.
    """

    network: PreTrainedModel | None = None
    reference: ModelReference

    def __init__(self, reward: RewardModel):
        self._reward = reward

    @property
    def task(self) -> str:
        """The task of the reward."""
        return self._reward.config.task

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits in the reward's order.

        Their shape is `(batch_size, sequence_length, vocab_size)` or `(batch_size, num_labels)`.
        """
        raise NotImplementedError

    def projection(self, batch: Batch) -> Projection:
        """Return a language model's logits at the supervised positions as a product that is not computed yet."""
        raise NotImplementedError

    def why_not_projected(self, batch: Batch) -> str | None:
        """Return why [`projection`] would be wrong; None if it is right."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> None:
        """Inspect the first batch; subclasses may enable optimisations."""

    def reused(self) -> AbstractContextManager[None]:
        """Return a context for the reward's pass of the same batch, in which shared layers are not computed again."""
        return nullcontext()
