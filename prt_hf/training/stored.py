"""Read the stored states of backbones instead of running them, and number the rows of data sets to find them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher

from ..contract import TEXT_GENERATION, Match, ModelReference, contract_from_dict
from ..errors import BackboneCacheError, UnsupportedError
from ..networks.lm_head import Head, Projection
from ..reward.backbones import Backbone
from ..reward.batch import BackboneLogits, Batch
from ..reward.matching import RewardOrder
from ..reward.model import RewardModel
from .sharding import is_sharding
from .state_cache import BackboneCache, cache_folder, precompute

ROW = "backbone_row"  # the column with the place of a row's states
_ROW_BITS = 40
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SAMPLED_ROWS = 16  # of a data set whose batch is part of its key


class StoredBackbone(BackboneLogits):
    """A backbone whose states at the supervised positions of data sets are read from disk.

    Args:
        reward: the reward that is tuned on the backbone.
        shares_head: use the reward's head for the backbone too where both are the same. Impossible where the head is
            sharded later.

    Attributes:
        caches (`list[BackboneCache]`): one for each data set, whose index [`numbered`] writes into the rows.
    """

    def __init__(self, reward: RewardModel, shares_head: bool):
        super().__init__(reward)
        self._shares_head, self._head = shares_head, None
        self.caches: list[BackboneCache] = []

    def add(self, cache: BackboneCache) -> None:
        """Add the states of a data set.

        Raises:
            VocabularyMismatchError, LabelMismatchError: the backbone does not fit the reward.
        """
        contract = contract_from_dict(cache.facts["contract"])
        if self.task == TEXT_GENERATION:
            self._reward.contract.check(contract)
        else:
            columns = torch.tensor(self._reward.contract.match(contract))
            self.order = RewardOrder.of(Match(columns), self._reward.size)
        if not self.caches and self.task == TEXT_GENERATION:
            weight, bias = cache.tensors["weight"], cache.tensors.get("bias")
            own = Head.of(self._reward.network, self._reward.columns).weights[0]
            is_alike = not own.requires_grad and (own.shape, own.dtype) == (weight.shape, weight.dtype)
            if self._shares_head and is_alike and torch.equal(own.cpu(), weight):
                weight = own  # held once, and multiplied once a step
            self._head = Head((weight,), bias, cache.facts["scale"], cache.facts["softcap"])
        self.caches.append(cache)

    @property
    def reference(self) -> ModelReference:
        """The backbone's entry in the reward's configuration."""
        return ModelReference(**self.caches[0].facts["reference"])

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return a classifier's logits, `(batch_size, num_labels)`, in the reward's order; 0 where no label is."""
        states = self._read(batch)
        logits = states.new_zeros(*batch.labels.shape, states.shape[-1])
        logits[batch.supervised] = states
        return self.order.take(logits)

    def projection(self, batch: Batch) -> Projection:
        """Return a language model's logits at the supervised positions, as states and head."""
        states = self._read(batch)
        weights = tuple(weight.to(states.device) for weight in self._head.weights)
        bias = None if self._head.bias is None else self._head.bias.to(states.device)
        self._head = self._head._replace(weights=weights, bias=bias)
        return self._head.project([states])

    def why_not_projected(self, batch: Batch) -> None:
        """Return None: [`stored_states`] has checked it."""

    def _read(self, batch: Batch) -> torch.Tensor:
        """Return the states; refuse a batch that has no row numbers, or other labels than when they were stored."""
        if batch.rows is None:
            raise BackboneCacheError(
                "The batch does not name the rows of the data set that it is made of.",
                expected="a batch of the trainer's own data loaders",
                found=", ".join(batch.inputs),
            )
        place, rows = int(batch.rows[0]) >> _ROW_BITS, batch.rows & ((1 << _ROW_BITS) - 1)
        return self.caches[place].read(rows, batch.supervised_labels).to(batch.labels.device)


def numbered(dataset: Dataset, place: int) -> Dataset:
    """Add a column [`ROW`] to a data set: `place`, the index of its cache, and the number of the row."""
    return dataset.add_column(ROW, [(place << _ROW_BITS) + row for row in range(len(dataset))])


@dataclass
class NumberedCollator:
    """A data collator that keeps the column of [`numbered`] and gives the others to another collator."""

    collator: Callable

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Return the other collator's batch, with the column where the rows have it."""
        rows = [dict(row) for row in rows]
        numbers = [row.pop(ROW, None) for row in rows]
        batch = self.collator(rows)
        return batch if None in numbers else {**batch, ROW: torch.as_tensor(numbers)}


def stored_states(
    source: Backbone,
    make_batch: Callable[[list[int], bool], Batch],
    num_rows: int,
    *,
    data: str,
    root: str,
    accelerator: Accelerator,
    place: Callable[[Backbone], None],
    batch_size: int,
    disable_tqdm: bool,
) -> BackboneCache:
    """Return a backbone's states for a data set; compute and store those that are missing.

    Args:
        source: the backbone, which need not be loaded.
        make_batch: makes a batch of the given rows of the data set, on the device if the second argument is true.
        num_rows: rows of the data set.
        data: its [`dataset_key`].
        root: folder for the states of all backbones and data sets, each in a folder of its own.
        accelerator: names precision and processes.
        place: loads a backbone on its device.
        batch_size: rows in a forward pass.
        disable_tqdm: shows no progress.
    """
    precision = accelerator.mixed_precision
    key = {"task": source.task, "backbone": source.identity, "precision": precision, "data": data}
    key |= {"vocabulary": source.vocabulary}
    # The identity of a model in memory is a digest of its weights, which FSDP may give to the first process only.
    (key,) = broadcast_object_list([key])
    folder = cache_folder(root, key)
    cache = BackboneCache.open(folder, key)
    if cache is not None:
        return cache
    if is_sharding(accelerator):
        # Processes compute different blocks, but would wait for each other in every layer.
        raise UnsupportedError(
            "A sharded backbone cannot compute states, because every process computes other rows.",
            expected=f"complete states in {folder}",
            found="none, or incomplete ones",
            remedy="make the trainer once without sharding, which computes them",
        )
    place(source)

    def states(rows: list[int]) -> torch.Tensor:
        with accelerator.autocast():
            values = source.states(make_batch(rows, True))
        # Autocast multiplies them with the head in this precision.
        return values.to(_AUTOCAST.get(precision, values.dtype))

    if source.task == TEXT_GENERATION and (problem := source.why_not_projected(make_batch([0], True))):
        raise UnsupportedError(
            "The states of this backbone cannot be stored.", expected="precompute_backbone=False", found=problem
        )
    like, (tensors, facts) = states([0]), source.companions()
    cache = precompute(
        folder,
        key,
        num_rows=num_rows,
        supervised=lambda rows: [make_batch([row], False).supervised_labels for row in rows],
        states=states,
        width=like.shape[-1],
        dtype=like.dtype,
        tensors=tensors,
        facts=facts,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        barrier=accelerator.wait_for_everyone,
        disable_tqdm=disable_tqdm,
    )
    source.unload()
    return cache


def dataset_key(dataset: Dataset, collator: Callable) -> str:
    """Return a key of a data set and its collator that is the same in any process.

    It joins the fingerprints of both and a digest of the batch for a few rows, because two results of a random `map`
    have the same fingerprint. The data set is as the data loader reads it, without columns that the collator does not
    take. Streamed data, and batches that are not the same every time, raise `BackboneCacheError`.
    """

    def refusal(problem: str, expected: str, found: str, remedy: str) -> BackboneCacheError:
        problem, remedy = f"The states of {problem}.", f"{remedy}, or train without stored states"
        return BackboneCacheError(problem, expected=expected, found=found, remedy=remedy)

    if not isinstance(dataset, Dataset):
        kind = "a datasets.Dataset", type(dataset).__name__
        if isinstance(dataset, IterableDataset):
            problem = "a streamed data set cannot be stored: it has no rows to number"
            raise refusal(problem, *kind, "load it without streaming")
        raise refusal("this data set cannot be stored: it has no fingerprint", *kind, "Dataset.from_list(rows)")
    if dataset.format["type"] == "custom":
        raise refusal(
            "this data set cannot be stored: its rows may be augmented differently in every epoch",
            "a data set without a transform on the fly",
            "`set_transform` or `with_transform`",
            "dataset.map(transform)",
        )
    try:
        collator_key = Hasher.hash(collator)
    except Exception as error:  # of any kind: pickling runs code of the collator
        raise refusal(
            f"this data set cannot be stored: its collator has no fingerprint ({error})",
            "a data collator that can be pickled",
            type(collator).__name__,
            "a collator without open files, locks or generators",
        ) from error
    sample = np.linspace(0, len(dataset) - 1, min(len(dataset), _SAMPLED_ROWS), dtype=int).tolist()
    batch, again = (Hasher.hash(dict(collator([dataset[row] for row in sample]))) for _ in range(2))
    if batch != again:
        raise refusal(
            "this data set cannot be stored: its collator gives another batch every time",
            "the same batch for the same rows",
            type(collator).__name__,
            "a collator without randomness",
        )
    return f"{dataset._fingerprint}-{collator_key}-{batch}"
