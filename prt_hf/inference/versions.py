"""Whether a network still is what it was at an earlier call."""

from operator import attrgetter

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


class Versions:
    """Called, returns a value that is another one when the network's weights or adapters have changed since.

    Seen are writes that autograd counts (`load_state_dict`, in-place operations, most optimisers), tensors put in the
    place of others, moves and casts, and adapters switched on or off, chosen, merged or scaled. Not seen are writes
    that pass autograd by: in place through `.data` or NumPy, by fused optimisers, to tensors made in inference mode;
    nor a module put in the place of another.
    """

    def __init__(self, network: nn.Module):
        modules = list(network.modules())
        self._parameters = [module._parameters for module in modules if module._parameters]
        # What is not saved is computed from the configuration, by some models in every pass.
        self._buffers = [
            (module._buffers, name)
            for module in modules
            for name in module._buffers.keys() - module._non_persistent_buffers_set
        ]
        self._layers = [m for m in modules if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]

    def __call__(self) -> tuple:
        tensors = [value for table in self._parameters for value in table.values() if value is not None]
        tensors += [table[name] for table, name in self._buffers if table[name] is not None]
        try:
            counts = sum(map(attrgetter("_version"), tensors)), tuple(map(torch.Tensor.data_ptr, tensors))
        except RuntimeError:  # tensors of inference mode have no counter, sharded ones no address
            counts = tuple(map(_count, tensors))
        return counts, list(map(_flags, self._layers))


def _flags(layer: nn.Module) -> tuple:
    known = vars(layer)
    scaling = known.get("scaling", {}).values()
    return layer._disable_adapters, *layer._active_adapter, None, *known.get("merged_adapters", ()), *scaling


def _count(tensor: torch.Tensor) -> tuple[int, int]:
    return 0 if tensor.is_inference() else tensor._version, id(tensor)
