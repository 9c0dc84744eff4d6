"""Detect changes of a network's weights and adapters between calls."""

from operator import attrgetter

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


class Versions:
    """Tell when a network's weights or adapters have changed: a call returns another value after each change.

    It sees writes that autograd counts (`load_state_dict`, in-place operations, most optimisers), tensors replaced by
    others, moves and casts, and adapters switched on or off, chosen, merged or scaled. It does not see writes that
    bypass autograd: in place through `.data` or NumPy, by fused optimisers, to tensors made in inference mode; nor a
    module replaced by another.
    """

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        self._parameters = [module._parameters for module in modules if module._parameters]
        # Other buffers are computed from the configuration, by some models in every pass.
        self._buffers = [
            (module._buffers, name)
            for module in modules
            for name in module._buffers.keys() - module._non_persistent_buffers_set
        ]
        self._layers = [m for m in modules if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]

    def __call__(self) -> tuple:
        """Return the present value, which is compared with an earlier one."""
        tensors = [value for table in self._parameters for value in table.values() if value is not None]
        tensors += [table[name] for table, name in self._buffers if table[name] is not None]
        try:
            counts = sum(map(attrgetter("_version"), tensors)), tuple(map(torch.Tensor.data_ptr, tensors))
        except RuntimeError:  # tensors of inference mode have no counter, sharded ones no address
            counts = tuple(map(_count, tensors))
        return counts, list(map(_flags, self._layers))


def _flags(layer: nn.Module) -> tuple:
    """Return the settings of an adapted layer: its adapters, their scales, whether they are switched on or merged."""
    known = vars(layer)
    scaling = known.get("scaling", {}).values()
    return layer._disable_adapters, *layer._active_adapter, None, *known.get("merged_adapters", ()), *scaling


def _count(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the writes to a tensor that autograd has counted, and the identity of the tensor."""
    return 0 if tensor.is_inference() else tensor._version, id(tensor)
