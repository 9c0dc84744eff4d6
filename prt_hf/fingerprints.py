"""What tells data sets and models from all others, in any process: the keys of what is kept of them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from .errors import BackboneCacheError

_SAMPLED_ROWS = 16  # that a data set is recognised by, beside its fingerprint
_BOOKKEEPING = ("_name_or_path", "architectures", "dtype", "problem_type", "transformers_version", "use_cache")


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


def weights_digest_of_files(folder: str | Path) -> str:
    """SHA-256 of a local model: `config.json` and all safetensors files, by name and content.

    Raises:
        BackboneCacheError: there are none.
    """
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BackboneCacheError(
            f"{folder} has no weights that a model could be told by.",
            expected="config.json and *.safetensors",
            found=", ".join(sorted(path.name for path in folder.glob("*"))[:10]) or "nothing",
            remedy="convert the weights to safetensors",
        )
    digests = {path.name: file_digest(path) for path in [folder / "config.json", *weights]}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def weights_digest_of_model(model: PreTrainedModel) -> str:
    """SHA-256 of a model in memory: all parameters and buffers by name, shape, dtype and value, and the config and the
    scales of adapters, which say how they are used.

    Raises:
        BackboneCacheError: some of them are offloaded.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise BackboneCacheError(
            "The weights of this model cannot be told from others: some are offloaded.",
            expected="all weights in memory, or the model's id or path",
            found=type(model).__name__,
            remedy="pass its id or path, or train without stored states",
        )
    config = {name: value for name, value in model.config.to_dict().items() if name not in _BOOKKEEPING}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(as_bytes(tensor.reshape(-1)))
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            digest.update(f"{name} {sorted(getattr(module, 'scaling', {}).items())}".encode())
    return digest.hexdigest()


def file_digest(*paths: Path) -> str:
    """SHA-256 over the content of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
