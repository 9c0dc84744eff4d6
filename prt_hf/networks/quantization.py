"""Tell quantised networks from those in full precision."""

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..errors import UnsupportedError
from .anatomy import unwrap_adapter


def is_quantized(network: nn.Module) -> bool:
    """Return whether a network's weights are stored in fewer bits, by `quantization_config=` or by hand."""
    model = unwrap_adapter(network)
    is_from_file = getattr(model, "hf_quantizer", None) is not None
    return is_from_file or any(is_quantized_tensor(value) for value in model.parameters())


def is_quantized_in_files(model: PreTrainedModel) -> bool:
    """Return whether the checkpoint that a model was loaded from holds quantised weights."""
    return getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False)


def is_quantized_tensor(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is not made of plain numbers of 16 bits or more."""
    if type(tensor.data) not in (torch.Tensor, DTensor):  # torchao's and quanto's classes
        return True
    return not tensor.is_floating_point() or tensor.dtype.itemsize < 2


def check_full_precision(network: PreTrainedModel) -> None:
    """Raise `UnsupportedError` if a reward would stand on quantised weights, which it was not tuned on."""
    if is_quantized(network):
        raise UnsupportedError(
            "A reward needs its base in full precision; only backbones may be quantised.",
            expected="a model that was loaded without `quantization_config`",
            found=f"{network.name_or_path or type(network).__name__}, quantised",
            remedy="load the base again without it; in training, pass the quantised model as `backbone=`",
        )


def not_installed(model: str, error: ImportError) -> UnsupportedError:
    """Return the error for a quantised model without the library that it needs."""
    return UnsupportedError(
        f"{model} cannot be loaded quantised.",
        expected="the library of its quantisation (`pip install bitsandbytes`, `pip install torchao`, ...)",
        found=(str(error).strip().splitlines() or [type(error).__name__])[0],
        remedy="install it, or load the model in full precision",
    )
