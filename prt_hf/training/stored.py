"""Backbones that are read instead of run: what they gave for data sets, computed once and kept on disk."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher

from ..contract import TEXT_GENERATION, ModelReference, contract_from_dict
from ..errors import BackboneCacheError, UnsupportedError
from ..networks.lm_head import Head, Projection
from ..reward.backbones import Backbone, Batch, inverse
from ..reward.model import RewardModel
from .sharding import is_sharding
from .state_cache import BackboneCache, cache_folder, precompute

ROW = "backbone_row"  # the column that tells where a row's states are
_ROW_BITS = 40
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SAMPLED_ROWS = 16  # that a data set is recognised by, beside its fingerprint


class StoredBackbone(Backbone):
    """What a backbone gave at the supervised positions of data sets: read instead of computed.

    Args:
        shares_head (`bool`): the reward's own head serves for the backbone too where it is the same. Not where it will
            be divided among devices.

    Attributes:
        caches (`list[BackboneCache]`): one for each data set; [`numbered`] tells the batches of which one.
    """

    def __init__(self, reward: RewardModel, shares_head: bool):
        self._reward, self._shares_head, self._head = reward, shares_head, None
        self.network = self.limit = None
        self.caches: list[BackboneCache] = []

    def add(self, cache: BackboneCache) -> None:
        """
        Raises:
            VocabularyMismatchError, LabelMismatchError: the backbone does not fit the reward.
        """
        order = self._reward.contract.check(contract_from_dict(cache.facts["contract"]))
        self.columns = self._reward.columns if order is None else inverse(order)
        if not self.caches and self._reward.config.task == TEXT_GENERATION:
            weight, bias = cache.tensors["weight"], cache.tensors.get("bias")
            own = Head.of(self._reward.network, self._reward.columns).weights[0]
            is_alike = not own.requires_grad and (own.shape, own.dtype) == (weight.shape, weight.dtype)
            if self._shares_head and is_alike and torch.equal(own.cpu(), weight):
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


def stored_states(
    source: Backbone,
    batch_of: Callable[[list[int], bool], Batch],
    num_rows: int,
    *,
    data: str,
    root: str,
    accelerator: Accelerator,
    place: Callable[[Backbone], None],
    rows_per_block: int,
    disable_tqdm: bool,
) -> BackboneCache:
    """What a backbone gives for a data set, computed and kept where that has not been done.

    Args:
        batch_of: a batch of these rows of the data set, on the device or not.
        data (`str`): its [`~training.stored.dataset_key`].
        root: below it the states lie, in a folder of their own.
        place: loads the backbone where it is computed.

    Raises:
        UnsupportedError: a language model's logits are not its last hidden state times its head; or they have to be
            computed by networks in parts.
        BackboneCacheError: what lies there is damaged, or cannot be written.
    """
    precision = accelerator.mixed_precision
    key = {"task": source.task, "backbone": source.identity, "precision": precision, "data": data}
    # FSDP may leave all processes but the first without weights, which tell models in memory apart.
    (key,) = broadcast_object_list([key])
    folder = cache_folder(root, key)
    cache = BackboneCache.open(folder, key)
    if cache is not None:
        return cache
    if is_sharding(accelerator):
        # Every process would compute blocks of its own, and wait for the others in each layer.
        raise UnsupportedError(
            "A backbone in parts cannot compute the states that processes share out among themselves.",
            expected=f"complete states in {folder}",
            found="none, or unfinished ones",
            remedy="make the trainer once on whole backbones, which computes them",
        )
    place(source)

    def states(rows: list[int]) -> torch.Tensor:
        with accelerator.autocast():
            values = source.states(batch_of(rows, True))
        # The product with the head is made in autocast's precision.
        return values.to(_AUTOCAST.get(precision, values.dtype))

    if source.task == TEXT_GENERATION and (problem := source.why_not_projected(batch_of([0], True))):
        raise UnsupportedError(
            "The states of this backbone cannot be stored.", expected="precompute_backbone=False", found=problem
        )
    like, (tensors, facts) = states([0]), source.companions()
    cache = precompute(
        folder,
        key,
        num_rows=num_rows,
        supervised=lambda rows: [batch_of([row], False).supervised_labels for row in rows],
        states=states,
        width=like.shape[-1],
        dtype=like.dtype,
        tensors=tensors,
        facts=facts,
        rows_per_block=rows_per_block,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        barrier=accelerator.wait_for_everyone,
        disable_tqdm=disable_tqdm,
    )
    source.unload()
    return cache


def dataset_key(dataset: Dataset, collator) -> str:
    """What tells a data set and its collator apart from others, in any process: the fingerprints of both, and that of
    the batch that they give for a few rows, because a random `map` has the fingerprint of its function only.

    Args:
        dataset: as the data loader reads it, without the columns that the collator does not take.

    Raises:
        BackboneCacheError: the data set has no numbered rows or no fingerprint, or gives other rows every time.
    """
    if isinstance(dataset, IterableDataset):
        raise BackboneCacheError(
            "The states of a streamed data set cannot be stored: it has no rows to number.",
            expected="a datasets.Dataset",
            found=type(dataset).__name__,
            remedy="load it without streaming, or train without stored states",
        )
    if not isinstance(dataset, Dataset):
        raise BackboneCacheError(
            "The states of this data set cannot be stored: its content cannot be told apart from another's.",
            expected="a datasets.Dataset, which has a fingerprint",
            found=type(dataset).__name__,
            remedy="Dataset.from_list(rows), or train without stored states",
        )
    if dataset.format["type"] == "custom":
        raise BackboneCacheError(
            "The states of this data set cannot be stored: its rows may be augmented differently in every epoch.",
            expected="a data set without a transform on the fly",
            found="`set_transform` or `with_transform`",
            remedy="dataset.map(transform), or train without stored states",
        )
    try:
        collator_key = Hasher.hash(collator)
    except Exception as error:  # of any kind: pickling runs code of the collator
        raise BackboneCacheError(
            f"The states of this data set cannot be stored: its collator has no fingerprint ({error}).",
            expected="a data collator that can be pickled",
            found=type(collator).__name__,
            remedy="a collator without open files, locks or generators, or train without stored states",
        ) from error
    sample = np.linspace(0, len(dataset) - 1, min(len(dataset), _SAMPLED_ROWS), dtype=int).tolist()
    batch, again = (Hasher.hash(dict(collator([dataset[row] for row in sample]))) for _ in range(2))
    if batch != again:
        raise BackboneCacheError(
            "The states of this data set cannot be stored: its collator gives another batch every time.",
            expected="the same batch for the same rows",
            found=type(collator).__name__,
            remedy="a collator without randomness, or train without stored states",
        )
    return f"{dataset._fingerprint}-{collator_key}-{batch}"
