"""Training in several processes: networks that are sharded by FSDP2 or ZeRO-3, and the loss of all."""

import os

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from packaging.version import Version
from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl.models import prepare_deepspeed

from ..errors import UnsupportedError
from ..networks.anatomy import unwrap_adapter

_ACCELERATE = Version("1.15")


def check_fsdp(args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raise `UnsupportedError` unless FSDP runs as configured, and rewards can be saved and resumed under it."""
    is_wanted = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if is_wanted and not accelerator.is_fsdp2:
        raise UnsupportedError(
            "The networks would not be sharded as configured.",
            expected="FSDP version 2, on accelerators, in several processes",
            found="FSDP version 1" if plugin else f"{accelerator.distributed_type} on {accelerator.device}",
            remedy="`fsdp_version: 2` in the configuration of `accelerate launch`, or no FSDP",
        )
    if plugin is not None and plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        # The Trainer's `save_model` would do nothing.
        raise UnsupportedError(
            "A reward cannot be saved in shards.",
            expected="fsdp_state_dict_type: FULL_STATE_DICT",
            found=plugin.state_dict_type.name,
        )
    if plugin is not None and Version(accelerate.__version__) < _ACCELERATE:
        raise UnsupportedError(
            "This version of accelerate does not load an adapter's weights when training resumes under FSDP 2.",
            expected=f"accelerate {_ACCELERATE} or newer",
            found=accelerate.__version__,
            remedy="pip install --upgrade accelerate",
        )


def is_sharding(accelerator: Accelerator) -> bool:
    """Return whether the networks that the accelerator prepares are sharded."""
    return accelerator.is_fsdp2 or is_zero3(accelerator)


def is_zero3(accelerator: Accelerator) -> bool:
    """Return whether DeepSpeed shards parameters."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def name_blocks(network: PreTrainedModel | PeftModel, accelerator: Accelerator) -> None:
    """Set the blocks of a network that FSDP 2 keeps together.

    These are the network's own `_no_split_modules`, without names that it does not have, and without blocks around the
    input embeddings: accelerate shards the embeddings later, and FSDP shards from the inside out only.

    Raises:
        UnsupportedError: accelerate cannot shard the network, or not as it is loaded.
    """
    model = unwrap_adapter(network)
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError as error:
        raise UnsupportedError(
            "accelerate needs the input embeddings of a network that FSDP shards.",
            expected="a network with `get_input_embeddings`",
            found=type(model).__name__,
            remedy="no FSDP",
        ) from error
    buffers = network.state_dict().keys() & {name for name, _ in network.named_buffers()}
    if buffers and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise UnsupportedError(
            f"accelerate distributes parameters only, and {type(model).__name__} also has saved buffers.",
            expected="fsdp_cpu_ram_efficient_loading: false",
            found=f"true, and {', '.join(sorted(buffers)[:3])}",
        )
    around = [module for module in model.modules() if embeddings in list(module.modules())[1:]]
    there = {type(module).__name__ for module in model.modules()} - {type(module).__name__ for module in around}
    model._no_split_modules = there.intersection(model._no_split_modules or ())


def sharded(network: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Shard a frozen network like the one that is trained; raise `UnsupportedError` if some parameters stay whole."""
    if is_zero3(accelerator):
        return prepare_deepspeed(network, accelerator).module
    plugin = accelerator.state.fsdp_plugin
    kept = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    # accelerate stores the names of blocks here: this network's must not replace those of the trained network.
    plugin.transformer_cls_names_to_wrap = None
    name_blocks(network, accelerator)
    try:
        network = fsdp2_prepare_model(accelerator, network)
    finally:
        plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = kept
    if whole := [name for name, value in network.named_parameters() if not isinstance(value, DTensor)]:
        raise UnsupportedError(
            f"FSDP does not shard the whole of {network.name_or_path or type(network).__name__}.",
            expected="every parameter sharded",
            found=f"{len(whole)} whole on every device: {', '.join(whole[:3])}",
            remedy="neither quantised weights nor `fsdp_ignored_modules`",
        )
    return network


def address(value: torch.Tensor) -> int | None:
    """Return the address of a parameter, or of this device's shard of it; None if the shard is empty."""
    return (value.to_local() if isinstance(value, DTensor) else value).data_ptr() or None


def summed_over_processes(
    trainer: Trainer, model: nn.Module, loss: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> torch.Tensor:
    """Scale the loss of a process, so that the mean gradient of all processes is the gradient of their sum.

    Nothing is scaled if `num_items_in_batch` does not count the items of all processes.
    """
    is_of_all = trainer.args.average_tokens_across_devices and num_items_in_batch is not None
    return loss * trainer.accelerator.num_processes if model.training and is_of_all else loss
