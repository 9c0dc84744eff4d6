"""Identify a network by its id, commit and weights, and check that two are the same."""

import copy
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from ..contract import ModelReference
from ..errors import BackboneCacheError, BaseModelMismatchError, UnsupportedError
from ..hub.client import folder_on_disk
from ..hub.folder import file_digest, mapped_weights
from .anatomy import FixedLinear, pretrained_parameters, unwrap_adapter
from .quantization import is_quantized, is_quantized_in_files, is_quantized_tensor

_BOOKKEEPING = ("_name_or_path", "architectures", "dtype", "problem_type", "transformers_version", "use_cache")
_SAMPLES_PER_TENSOR = 64
# Private to transformers, which stored the commit of every loaded model there up to 5.17; never written to files.
_COMMIT = "_commit_hash"


def weights_digest_of_files(folder: str | Path) -> str:
    """Return the SHA-256 of a local model: `config.json` and all safetensors files, by name and content."""
    folder = Path(folder)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise BackboneCacheError(
            f"{folder} has no weights that identify the model.",
            expected="config.json and *.safetensors",
            found=", ".join(sorted(path.name for path in folder.glob("*"))[:10]) or "nothing",
            remedy="convert the weights to safetensors",
        )
    digests = {path.name: file_digest(path) for path in [folder / "config.json", *weights]}
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def weights_digest_of_model(model: PreTrainedModel) -> str:
    """Return the SHA-256 of a model in memory; raise `BackboneCacheError` if it is offloaded or quantised.

    It covers all parameters and buffers by name, shape, dtype and value, the configuration, and adapters' scales.
    """
    if is_quantized(model) or any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise BackboneCacheError(
            "This model cannot be identified by its weights: some are quantised or offloaded.",
            expected="all weights in memory in full precision, or the model's id or path",
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


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the memory of a tensor, copied only if it is not contiguous or not on the CPU."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


def origin_of(path_or_repo: str | Path, folder: Path) -> ModelReference:
    """Return the reference to a model or adapter: a local path, or a repository and the commit that names `folder`."""
    if Path(path_or_repo).is_dir():
        return ModelReference(os.path.abspath(path_or_repo))
    return ModelReference(str(path_or_repo), folder.name)


def check_same_model(expected: ModelReference, model: PreTrainedModel) -> None:
    """Raise `BaseModelMismatchError` unless a model is the expected one, see [`check_same_reference`]."""
    check_same_reference(expected, reference_to(model))


def check_same_reference(expected: ModelReference, found: ModelReference) -> None:
    """Raise `BaseModelMismatchError` if two references differ: in weights if both are known, else in id or revision."""
    if found.weights and expected.weights:
        same = found.weights == expected.weights
    else:
        names = [(reference.id, reference.revision, reference.architecture) for reference in (found, expected)]
        same = found.id is not None and names[0] == names[1]
    if not same:
        raise BaseModelMismatchError(
            "The pretrained model is not the one that was used before.",
            expected=str(expected),
            found=str(found),
            remedy="use that model, at that revision; one that was changed in memory, as by resized embeddings, has to "
            "be saved, and loaded from there",
        )


def remember_commit(model: PreTrainedModel, commit: str | None) -> None:
    """Store the commit that a model was loaded from, for [`commit_of_model`]."""
    setattr(model.config, _COMMIT, commit)


def commit_of_model(model: PreTrainedModel) -> str | None:
    """Return the commit that a model was loaded from; None if it is not known."""
    return getattr(model.config, _COMMIT, None)


def reference_to(network: nn.Module) -> ModelReference:
    """Return id, commit, class and weights of a network without adapters; DeepSpeed must not have sharded it.

    A quantised network is identified by the checkpoint that it was loaded from, so that it has the reference of the
    same model in full precision.
    """
    model = unwrap_adapter(network)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UnsupportedError(
            "The model was loaded in shards, so that its weights cannot identify it.",
            expected="a model that is whole until the trainer shards it",
            found=f"{model.name_or_path or type(model).__name__} of DeepSpeed ZeRO-3",
            remedy="load it before `PRTConfig` is made, or use FSDP 2 (`fsdp_cpu_ram_efficient_loading`)",
        )
    place = model.name_or_path or None
    return ModelReference(
        id=os.path.abspath(place) if place and os.path.isdir(place) else place,
        revision=commit_of_model(model),
        architecture=type(model).__name__,
        weights=_source_fingerprint(model) if is_quantized(model) else weights_fingerprint(network),
    )


def weights_fingerprint(network: nn.Module) -> str | None:
    """Return the SHA-256 over shapes and samples of the pretrained weights, batch statistics and fixed heads.

    It covers up to 64 samples of each tensor, rounded to bfloat16, so that a model has the same fingerprint in float32
    and in bfloat16; no names, which change between versions of transformers; no adapters. It is None if the values
    cannot be read (quantised or offloaded weights) or were rounded in another way (float16).
    """
    return _fingerprint_of(_identifying_tensors(network).values())


def fingerprint_of_files(skeleton: PreTrainedModel, folder: Path) -> str | None:
    """Return [`weights_fingerprint`] of the model in a folder, reading only its samples.

    None if the files hold the weights in another form than the model does.

    Args:
        skeleton: the model without its weights.
        folder: with safetensors files.
    """
    wanted = _identifying_tensors(skeleton).keys()
    found = {name: tensor for name, tensor in mapped_weights(folder).items() if name in wanted}
    return _fingerprint_of(found.values()) if found.keys() == wanted else None


def _source_fingerprint(model: PreTrainedModel) -> str | None:
    """Return the fingerprint of the checkpoint that a quantised model was loaded from; None if it cannot be told.

    Files in full precision have the fingerprint of that model; of files that hold quantised weights, these are sampled.
    The weights that are not quantised show whether the files are the model's.
    """
    folder = folder_on_disk(model.name_or_path, commit_of_model(model))
    if folder is None:
        return None
    stored = mapped_weights(folder)
    plain = {name: value for name, value in model.named_parameters() if not is_quantized_tensor(value)}
    for name, value in plain.items():
        same = stored.get(name)
        if same is None or same.shape != value.shape:
            return None
        if not value.is_meta and not torch.equal(_samples(same).to(value.dtype), _samples(value)):
            return None
    if is_quantized_in_files(model):
        return _fingerprint_of(stored.values(), as_stored=True)
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        skeleton = type(model)(config)
    return fingerprint_of_files(skeleton, folder)


def _fingerprint_of(tensors: Iterable[torch.Tensor], *, as_stored: bool = False) -> str | None:
    """Return the fingerprint of a model with these tensors: rounded, see [`weights_fingerprint`], or as they are."""
    digests = []
    for tensor in tensors:
        if not as_stored and (tensor.dtype not in (torch.float32, torch.bfloat16) or tensor.is_meta):
            return None
        samples = _samples(tensor) if as_stored else _samples(tensor).to(torch.bfloat16)
        digests.append(hashlib.sha256(str(tuple(tensor.shape)).encode() + as_bytes(samples).tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    """Return up to 64 values from all over a tensor, on the CPU."""
    flat = tensor.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
    return flat[::step][:_SAMPLES_PER_TENSOR].cpu()


def _identifying_tensors(network: nn.Module) -> dict[str, torch.Tensor]:
    """Return pretrained parameters, means and variances of batch normalisation, and the weights of fixed heads."""
    tensors = dict(pretrained_parameters(network))
    for place, module in network.named_modules():
        if ".modules_to_save." in place:
            continue
        names = ("weight", "bias") if isinstance(module, FixedLinear) else ("running_mean", "running_var")
        tensors |= {f"{place}.{name}": getattr(module, name, None) for name in names}
    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}


def digest(network: nn.Module) -> str:
    """Return the SHA-256 over the values in a reward's file: the adapter's, or all."""
    is_adapter = isinstance(network, PeftModel)
    values = get_peft_model_state_dict(network, save_embedding_layers=False) if is_adapter else network.state_dict()
    digest = hashlib.sha256()
    for value in values.values():
        digest.update(as_bytes(value.reshape(-1)))
    return digest.hexdigest()
