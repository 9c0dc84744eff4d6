"""pi_pt in training: another network, the reward's own base with its adapter off, or what either has given before."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .backbone_cache import BackboneCache, weights_digest_of_files, weights_digest_of_model
from .contract import ModelReference, contract_from_dict, contract_to_dict
from .errors import BackboneCacheError
from .functional import IGNORE_INDEX, Projection
from .heads import Head, last_hidden_state, projection, why_not_projected
from .hub import commit_of
from .passes import bare_base
from .pretrained import TEXT_GENERATION, check_bare, context_length, contract_of, load_pretrained, reference_to
from .reward_model import RewardModel, load_processing_class
from .shared_trunk import SharedTrunk

ROW = "backbone_row"
_ROW_BITS = 40


@dataclass
class Batch:
    """What both models read, and where they are judged.

    Attributes:
        inputs (`dict`): of either model.
        labels (`torch.LongTensor`): aligned with what is predicted: `(batch_size, sequence_length - 1)` for language
            models, whose last position has no label, `(batch_size,)` for classifiers.
        rows (`torch.LongTensor` of shape `(batch_size,)`, *optional*): places in the data set, for stored states.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.LongTensor
    rows: torch.LongTensor | None = None

    @cached_property
    def supervised(self) -> torch.BoolTensor:
        return self.labels != IGNORE_INDEX

    @cached_property
    def supervised_labels(self) -> torch.LongTensor:
        return self.labels[self.supervised]

    def aligned(self, values: torch.Tensor) -> torch.Tensor:
        """Logits or hidden states of all positions -> of those that are judged."""
        return values[:, :-1] if self.labels.ndim > 1 else values


class Backbone:
    """A network pi_pt, frozen and in evaluation mode.

    Args:
        reward ([`RewardModel`]): that is tuned on it.
        network (`PreTrainedModel` or `str`): an id is not loaded before [`load`], so that stored states do without.
        load_kwargs: for `from_pretrained` of an id.

    Attributes:
        columns: of its logits, in the reward's order.
        limit (`int`, *optional*): tokens that it can read.
        reference ([`~contract.ModelReference`]): for the reward's configuration.
    """

    def __init__(self, reward: RewardModel, network: PreTrainedModel | str, **load_kwargs):
        self._reward = reward
        self._id, self._load_kwargs = (network, load_kwargs) if isinstance(network, str) else (None, {})
        self.network = None
        if self._id is None:
            check_bare(network)
            # A model in memory may have been separated from its tokenizer.
            self._take(network, None)

    def load(self) -> None:
        """
        Raises:
            VocabularyMismatchError, LabelMismatchError: it does not fit the reward.
        """
        if self.network is None:
            network = load_pretrained(self._id, **self._load_kwargs)
            self._take(network, load_processing_class(self._id, self._reward.config.task))

    def _take(self, network: PreTrainedModel, processing_class) -> None:
        order = self._reward.order_for(network, processing_class)
        self.columns = order if isinstance(order, slice) else _inverse(order)
        self._processing_class = processing_class or self._reward.processing_class
        self.limit, self.reference = context_length(network), reference_to(network)
        self.network = network.eval()

    def unload(self) -> None:
        """Free what can be loaded again."""
        if self._id is not None:
            self.network = None

    def place(self, placed: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
        self.network = placed(self.network)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells its weights from all others, without loading it."""
        if self._id is None:
            return {"weights": weights_digest_of_model(self.network)}
        if Path(self._id).is_dir():
            return {"weights": weights_digest_of_files(self._id)}
        return {"id": self._id, "revision": commit_of(self._id)}

    def logits(self, batch: Batch) -> torch.Tensor:
        """`(batch_size, sequence_length, vocab_size)` or `(batch_size, num_labels)`, in the reward's order."""
        with torch.no_grad(), self._pretrained() as network:
            return network(**batch.inputs).logits[..., self.columns]

    def projection(self, batch: Batch) -> Projection:
        """Of a language model: the logits at the supervised positions, not made yet."""
        with torch.no_grad(), self._pretrained() as network:
            return projection(network, _hidden(network, batch), self.columns)

    def states(self, batch: Batch) -> torch.Tensor:
        """`(n, hidden_size)` or `(n, num_labels)`: all that is ever needed of it at the supervised positions."""
        with torch.no_grad(), self._pretrained() as network:
            if self._reward.config.task == TEXT_GENERATION:
                return _hidden(network, batch)
            return network(**batch.inputs).logits[batch.supervised]

    def companions(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors and facts that turn its states into logits of the reward's order."""
        with self._pretrained() as network:
            facts = {
                "reference": vars(self.reference),
                "contract": contract_to_dict(contract_of(network, self._processing_class)),
            }
            if self._reward.config.task != TEXT_GENERATION:
                return {}, facts
            head = Head.of(network, self._reward.columns)
        tensors = {"weight": head.weights[0]} | ({} if head.bias is None else {"bias": head.bias})
        return tensors, facts | {"scale": head.scale, "softcap": head.softcap}

    def prepare(self, batch: Batch) -> None:
        """Look at a first batch."""

    def why_not_projected(self, batch: Batch) -> str | None:
        with torch.no_grad(), self._pretrained() as network:
            return why_not_projected(network, batch.inputs)

    def reused(self) -> AbstractContextManager[None]:
        """Around the reward's pass of the same batch: what both have in common is not computed again."""
        return nullcontext()

    @contextmanager
    def _pretrained(self) -> Iterator[nn.Module]:
        yield self.network


class OwnBase(Backbone):
    """The reward's own network with its adapter off: no second model in memory, and the layers below the first adapted
    one are computed once for both."""

    def __init__(self, reward: RewardModel):
        self._reward, self._id, self._trunk = reward, None, None
        self._processing_class = reward.processing_class
        self.network: PeftModel = reward.network
        self.columns = reward.columns
        self.limit, self.reference = context_length(reward.network), reference_to(reward.network)

    def place(self, placed):
        """It is where the reward is."""

    @cached_property
    def identity(self) -> dict[str, str]:
        return {"weights": weights_digest_of_model(bare_base(self.network))}

    def prepare(self, batch: Batch) -> None:
        trunk = SharedTrunk.of(self.network)
        if trunk is not None and trunk.is_enough(self.network, self._pretrained(), batch.inputs):
            self._trunk = trunk

    def reused(self):
        return nullcontext() if self._trunk is None else self._trunk.reused()

    @contextmanager
    def _pretrained(self):
        network = self.network
        is_training, flags = network.training, [(value, value.requires_grad) for value in network.parameters()]
        network.eval()
        try:
            with network.disable_adapter(), nullcontext() if self._trunk is None else self._trunk.recorded():
                yield network
        finally:
            network.train(is_training)
            for value, flag in flags:  # PEFT makes the whole adapter trainable when it is switched on again
                value.requires_grad_(flag)


class StoredBackbone(Backbone):
    """What a backbone gave at the supervised positions of data sets: read instead of computed.

    Attributes:
        caches (`list[BackboneCache]`): one for each data set; [`numbered`] tells the batches of which one.
    """

    def __init__(self, reward: RewardModel):
        self._reward, self._head = reward, None
        self.network = self.limit = None
        self.caches: list[BackboneCache] = []

    def add(self, cache: BackboneCache) -> None:
        """
        Raises:
            VocabularyMismatchError, LabelMismatchError: the backbone does not fit the reward.
        """
        order = self._reward.contract.check(contract_from_dict(cache.facts["contract"]))
        self.columns = self._reward.columns if order is None else _inverse(order)
        if not self.caches and self._reward.config.task == TEXT_GENERATION:
            weight, bias = cache.tensors["weight"], cache.tensors.get("bias")
            own = Head.of(self._reward.network, self._reward.columns).weights[0]
            if own.shape == weight.shape and torch.equal(own.cpu(), weight):
                weight = own  # once in memory, and its product once a step
            self._head = Head((weight,), bias, cache.facts["scale"], cache.facts["softcap"])
        self.caches.append(cache)

    @property
    def reference(self) -> ModelReference:
        return ModelReference(**self.caches[0].facts["reference"])

    def logits(self, batch: Batch) -> torch.Tensor:
        states = self._read(batch)
        logits = states.new_zeros(*batch.labels.shape, states.shape[-1])
        logits[batch.supervised] = states
        return logits[..., self.columns]

    def projection(self, batch: Batch) -> Projection:
        states = self._read(batch)
        weights = tuple(weight.to(states.device) for weight in self._head.weights)
        bias = None if self._head.bias is None else self._head.bias.to(states.device)
        self._head = self._head._replace(weights=weights, bias=bias)
        return self._head.project([states])

    def why_not_projected(self, batch: Batch) -> None:
        """It was looked at before its states were stored."""

    def _read(self, batch: Batch) -> torch.Tensor:
        if batch.rows is None:
            raise BackboneCacheError(
                "The batch does not say which rows of the data set it is made of.",
                expected="a batch of the trainer's own data loaders",
                found=", ".join(batch.inputs),
            )
        place, rows = int(batch.rows[0]) >> _ROW_BITS, batch.rows & ((1 << _ROW_BITS) - 1)
        return self.caches[place].read(rows, batch.supervised_labels).to(batch.labels.device)


def numbered(dataset: Dataset, place: int) -> Dataset:
    """A data set whose rows tell where their states are: `place` in the list of caches, and the row."""
    return dataset.add_column(ROW, [(place << _ROW_BITS) + row for row in range(len(dataset))])


@dataclass
class NumberedCollator:
    """Hands the column of [`numbered`] on beside what a collator makes of the others."""

    collator: Callable

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        rows = [dict(row) for row in rows]
        numbers = [row.pop(ROW, None) for row in rows]
        batch = self.collator(rows)
        return batch if None in numbers else {**batch, ROW: torch.as_tensor(numbers)}


def _hidden(network: nn.Module, batch: Batch) -> torch.Tensor:
    return batch.aligned(last_hidden_state(network, batch.inputs))[batch.supervised]


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
