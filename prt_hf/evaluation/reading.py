"""Read batches with several networks: their logits at the supervised positions, time and memory."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ..contract import TEXT_GENERATION
from ..errors import PRTValueError
from ..functional import IGNORE_INDEX, check_finite
from ..networks.anatomy import check_length, context_length, pretrained_parameters
from ..networks.lm_head import Head, Projection, last_hidden_state, projection, why_not_projected
from ..networks.pixels import split_inputs
from ..reward.backbones import Backbone
from ..reward.batch import Batch
from ..reward.model import RewardModel
from .machine import now

REWARD = "reward"
_CHUNK = 2**22  # logits of one network that are held in float64 at a time


class Part(NamedTuple):
    """A few supervised positions.

    Attributes:
        logits (`dict[str, torch.DoubleTensor]`): Network -> `(n, size)`, in the reward's order of tokens or labels.
        labels (`torch.LongTensor` of shape `(n,)`): The right tokens or labels.
        rows (`torch.LongTensor` of shape `(n,)`): The index, among all rows, of the row of each position.
        absent (`dict[str, torch.LongTensor]`): Network -> the reward's tokens that it lacks, whose logits are -inf.
    """

    logits: dict[str, torch.Tensor]
    labels: torch.LongTensor
    rows: torch.LongTensor
    absent: dict[str, torch.LongTensor] = {}


class Reading:
    """A reward and backbones that read the same batches, each network once.

    Full logits are computed only for models without a plain head. The logits of others are computed at the supervised
    positions, a few at a time, so that memory stays bounded for large vocabularies. Numbers are float64 if the device
    supports it.

    Args:
        reward ([`RewardModel`]): The reward; inputs are moved to its device.
        backbones: Name -> backbone; loaded here.
        reads_reward (`bool`): Whether the reward is read as well.

    Attributes:
        is_labelled (`bool`): Whether all batches had labels.

    Raises:
        VocabularyMismatchError, LabelMismatchError: A backbone does not fit the reward.
    """

    def __init__(self, reward: RewardModel, backbones: Mapping[str, Backbone], *, reads_reward: bool = True):
        self._reward, self._backbones, self._reads_reward = reward, dict(backbones), reads_reward
        self.is_labelled = True
        reward.network.eval()
        self._networks: dict[str, nn.Module] = {}
        for name, backbone in self._backbones.items():
            backbone.load()
            backbone.place(self._placed)
            backbone.index = len(self._networks)
            self._networks[name] = backbone.network
        limits = [backbone.limit for backbone in self._backbones.values()]
        if reads_reward:
            self._networks = {REWARD: reward.network} | self._networks
            limits.append(context_length(reward.network))
        self._limit = min(filter(None, limits), default=None)
        self._readers: dict[str, Callable] | None = None
        self._seconds: list[dict[str, float]] = []  # of every batch
        self._units: list[int] = []  # tokens or examples of every batch
        self._peaks = dict.fromkeys(self._networks, 0)

    @torch.no_grad()
    def parts(self, batches: Iterable[dict[str, torch.Tensor]]) -> Iterator[Part]:
        """Read batches and yield the supervised positions, a few at a time.

        Args:
            batches: Inputs of the models. Language models need `input_ids`, and may have an `attention_mask` (padding
                on either side) and `labels`, not shifted, -100 where not supervised; by default every token but the
                first is supervised. Classifiers may have `labels`, in the order of the reward's labels, and image
                classifiers pixels of single backbones, numbered in their order (see [`~prt_hf.networks.pixels`]).

        Raises:
            ContextLengthError: A text is longer than one of the networks can read.
            NonFiniteRewardError: A reward is NaN or infinite.
            VocabularyMismatchError: A text holds a token of the reward that a backbone does not have.
        """
        rows = 0
        orders = {name: backbone.order for name, backbone in self._backbones.items()}
        absent = {name: order.absent for name, order in orders.items() if order.absent is not None}
        for inputs in batches:
            batch = self._batch(inputs)
            if "input_ids" in batch.inputs:
                check_length(batch.inputs["input_ids"].shape[1], self._limit)
            self.is_labelled &= self._reward.config.task == TEXT_GENERATION or "labels" in inputs
            if not len(batch.supervised_labels):
                continue
            self._readers = self._readers or self._chosen(batch)
            self._seconds.append(dict.fromkeys(self._readers, 0.0))
            self._units.append(self._units_of(batch))
            read = {}
            for name, reader in self._readers.items():
                with self._measured(name):
                    read[name] = reader(batch)
            step = max(1, _CHUNK // next(iter(read.values())).shape[1])
            for start in range(0, len(batch.supervised_labels), step):
                part = slice(start, start + step)
                logits = {}
                for name, each in read.items():
                    with self._measured(name):
                        logits[name] = each.at(part).logits() if isinstance(each, Projection) else each[part]
                    precision = torch.float32 if logits[name].device.type == "mps" else torch.float64
                    logits[name] = logits[name].to(precision).to(self._reward.device)
                if REWARD in logits:
                    check_finite(logits[REWARD])
                yield Part(logits, batch.supervised_labels[part], batch.supervised[0][part].cpu() + rows, absent)
            rows += len(batch.labels)

    def milliseconds(self, names: Iterable[str]) -> float:
        """Return the time that these networks take, one after another, for one token of a text or for one example.

        Padding is not counted, nor is the first of several batches, which warms up.
        """
        first = 1 if len(self._units) > 1 else 0
        seconds = sum(batch[name] for batch in self._seconds[first:] for name in names)
        return 1000 * seconds / sum(self._units[first:])

    def memory(self, names: Iterable[str]) -> int:
        """Return the bytes of these networks' weights, counting shared weights once.

        On a GPU, this includes the largest amount that one of them takes beside its weights while it reads.
        """
        tensors = {}
        for name in names:
            for tensor in self._weights(name):
                tensors[tensor.data_ptr()] = tensor.nbytes
        return sum(tensors.values()) + max(self._peaks[name] for name in names)

    def unload(self) -> None:
        """Free what can be loaded again, and move models of the user back to their devices."""
        for backbone in self._backbones.values():
            backbone.unload()
        self._networks, self._readers = {}, None

    def _placed(self, network: nn.Module) -> nn.Module:
        return network if getattr(network, "hf_device_map", None) else network.to(self._reward.device)

    def _chosen(self, batch: Batch) -> dict[str, Callable]:
        """Return for each network a function from a batch to its logits at the supervised positions.

        The function returns a projection instead, if the first batch shows that this gives the same logits.
        """
        reward, is_text = self._reward, self._reward.config.task == TEXT_GENERATION

        def reward_logits(batch: Batch) -> torch.Tensor:
            return batch.chosen(reward(**batch.inputs))

        def reward_projection(batch: Batch) -> Projection:
            terms = []
            for network, sign in reward.terms:
                hidden = batch.chosen(last_hidden_state(network, batch.inputs))
                terms.append((sign, projection(network, hidden, reward.columns).cast()))
            return signed_projection(terms)

        readers = {}
        if self._reads_reward:
            networks = [network for network, _ in reward.terms] if is_text else []
            is_projected = is_text and not any(why_not_projected(network, batch.inputs) for network in networks)
            is_projected &= len(networks) < 2 or Head.of(reward.network).softcap is None
            readers[REWARD] = reward_projection if is_projected else reward_logits
        for name, backbone in self._backbones.items():
            if is_text and backbone.why_not_projected(batch) is None:
                readers[name] = lambda batch, backbone=backbone: backbone.projection(batch).cast()
            else:
                readers[name] = lambda batch, backbone=backbone: batch.chosen(backbone.logits(batch))
        return readers

    def _batch(self, inputs: dict[str, torch.Tensor]) -> Batch:
        inputs = {name: value.to(self._reward.device) for name, value in inputs.items()}
        labels = inputs.pop("labels", None)
        if self._reward.config.task != TEXT_GENERATION:
            if labels is None:
                labels = torch.zeros(len(next(iter(inputs.values()))), dtype=torch.long, device=self._reward.device)
            inputs, own_inputs = split_inputs(inputs, "backbone", len(self._backbones))
            return Batch(inputs, labels, backbone_inputs=own_inputs)
        if "input_ids" not in inputs:
            raise PRTValueError("The batch has no text.", expected="`input_ids`", found=", ".join(inputs))
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        labels = (ids if labels is None else labels).masked_fill(mask == 0, IGNORE_INDEX)
        # Move padding to the right, so that no causal model sees it and every text starts at position 0.
        order = (mask == 0).long().argsort(dim=1, stable=True)
        ids, mask, labels = (value.gather(1, order) for value in (ids, mask, labels))
        return Batch({"input_ids": ids, "attention_mask": mask}, labels[:, 1:])

    def _units_of(self, batch: Batch) -> int:
        if self._reward.config.task == TEXT_GENERATION:
            return int(batch.inputs["attention_mask"].sum())
        return len(batch.labels)

    @contextmanager
    def _measured(self, name: str) -> Iterator[None]:
        """Add the time and memory of the block to this network's."""
        network = self._networks[name]
        is_on_gpu = network.device.type == "cuda"
        if is_on_gpu:
            torch.cuda.reset_peak_memory_stats(network.device)
            before = torch.cuda.memory_allocated(network.device)
        start = now(network)
        yield
        self._seconds[-1][name] += now(network) - start
        if is_on_gpu:
            peak = torch.cuda.max_memory_allocated(network.device) - before
            self._peaks[name] = max(self._peaks[name], peak)

    def _weights(self, name: str) -> list[torch.Tensor]:
        network = self._networks[name]
        if name in self._backbones and self._backbones[name].shares_reward_network:  # the adapter is off
            return [*pretrained_parameters(network).values(), *network.buffers()]
        return [*network.parameters(), *network.buffers()]


def signed_projection(terms: Sequence[tuple[float, Projection]]) -> Projection:
    """Return `sum(sign * projection)` of heads without softcaps as one projection; a single term is returned as is."""
    if len(terms) == 1:
        return terms[0][1]
    biases = [sign * each.bias for sign, each in terms if each.bias is not None]
    return Projection(
        tuple(sign * hidden for sign, each in terms for hidden in each.hidden),
        tuple(weight for _, each in terms for weight in each.weights),
        sum(biases) if biases else None,
    )
