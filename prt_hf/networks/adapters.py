"""Wrap networks with PEFT adapters, share their weights, and look beneath the adapters."""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftConfig, PeftModel
from peft.tuners.lora import Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..errors import PRTValueError, UnsupportedError
from ..hub.folder import ADAPTER_CONFIG

ADAPTER = "default"  # the one adapter of a reward


def wrap(model: PreTrainedModel, peft_config: PeftConfig, *, device: str | None = None) -> PeftModel:
    """Return a PEFT model on the weights of `model`, which itself stays without an adapter.

    The device `"meta"` makes an adapter without memory for its weights.
    """
    peft_class = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(peft_config.task_type, PeftModel)
    with warnings.catch_warnings(), nullcontext() if device is None else torch.device(device):
        # PEFT warns of merging into tied heads, but rewards are not merged; and of GPT-2's transposed layers, which it
        # handles itself.
        warnings.filterwarnings("ignore", message="(?s).*(tie_word_embeddings|fan_in_fan_out)")
        network = peft_class(share_weights(model, device), peft_config)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.data_ptr() in shared:  # biases, with `bias="all"` or `"lora_only"`
            parameter.data = parameter.data.clone()
    return network


def save_adapter(network: PeftModel, folder: Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
    """Write an adapter's files, always the same ones: PEFT writes sets in an order that changes between processes.

    `state_dict` has weights to write in the place of the network's.
    """
    # "auto" would ask the Hub whether the vocabulary was resized.
    network.save_pretrained(folder, save_embedding_layers=False, state_dict=state_dict)
    path = folder / ADAPTER_CONFIG
    entries = json.loads(path.read_text(encoding="utf-8"))
    for name, value in entries.items():
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            entries[name] = sorted(value)
    path.write_text(json.dumps(entries, indent=2, sort_keys=True), encoding="utf-8")


def bare_base(network: PeftModel) -> PreTrainedModel:
    """Return the base of an adapter without the adapter's layers, on the same parameters and buffers."""
    model = network.get_base_model()
    memo = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    base = copy.deepcopy(model, memo)
    for name, layer in list(wrapped_layers(base)):
        check_not_merged(layer)
        is_adapted = isinstance(layer, BaseTunerLayer)
        base.set_submodule(name, layer.get_base_layer() if is_adapted else layer.original_module)
    base.__dict__.pop("peft_config", None)
    return base


def wrapped_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of the outermost layers that PEFT put in the place of the base's own."""
    wrapped = None
    for name, module in model.named_modules():
        if wrapped is not None and name.startswith(wrapped):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            wrapped = f"{name}."
            yield name, module


def adapted_layers(network: PeftModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of the layers that an adapter changes."""
    return wrapped_layers(network.get_base_model())


def check_not_merged(layer: nn.Module) -> None:
    """Raise `UnsupportedError` if PEFT has added an adapter to the base's own weights."""
    if getattr(layer, "merged", False):
        raise UnsupportedError(
            "The adapter is merged into weights that its base, the backbone or other rewards share.",
            expected="an adapter beside its base",
            remedy="unmerge_adapter(), or tune and load the merged network as a full reward",
        )


def is_plain(layer: nn.Module) -> bool:
    """Return whether a layer is plain LoRA, or a fully trained copy, and switched on."""
    # FSDP2 derives a class from the layer's and from FSDPModule.
    kind = type(layer).__mro__[2] if isinstance(layer, FSDPModule) else type(layer)
    if kind is ModulesToSaveWrapper:
        return layer.active_adapters == [ADAPTER] and not layer.disable_adapters
    return (
        kind in (Linear, Conv2d)
        and not isinstance(layer.get_base_layer(), BaseTunerLayer)
        and not layer.lora_variant
        and not layer.merged
        and not layer.disable_adapters
        and layer.active_adapters == [ADAPTER]
    )


def check_bare(model: PreTrainedModel) -> None:
    """Raise `PRTValueError` if a model has an adapter."""
    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise PRTValueError(
            "The base carries an adapter, so it is no longer the pretrained model.",
            expected="a PreTrainedModel without adapters",
            found=type(model).__name__,
            remedy="load the base again, or merge its adapter with `merge_and_unload` if that is what you want",
        )


def share_weights(model: PreTrainedModel, device: str | None = None) -> PreTrainedModel:
    """Return a second model on the same weights, so that an adapter of one leaves the other unchanged.

    The device `"meta"` makes a model without weights.
    """

    def shared(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is nn.Parameter:
            return nn.Parameter(tensor.detach().to(device), requires_grad=False)
        return tensor.to(device) if type(tensor) is torch.Tensor else tensor

    return copy.deepcopy(model, {id(tensor): shared(tensor) for tensor in chain(model.parameters(), model.buffers())})


def tie_parameters(network: nn.Module, base: nn.Module) -> None:
    """Make parameters that `network` and `base` share the same objects, so that they move and are cast together."""
    known = {value.data_ptr(): value for value in base.parameters() if value.numel()}
    for module in network.modules():
        for name, value in module._parameters.items():
            same = None if value is None else known.get(value.data_ptr())
            if same is not None and same.shape == value.shape and same.dtype == value.dtype:
                module._parameters[name] = same
