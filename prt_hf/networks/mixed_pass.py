"""Forward passes of a network, or of several adapters of one base and the base itself as blocks of rows.

Decoding reads every weight once per pass, so two rows cost little more than one, while two passes cost twice as much.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import UnsupportedError
from .adapters import ADAPTER, adapted_layers, check_not_merged, is_plain
from .anatomy import CACHE, first_position, unwrap_adapter

_LOCKS: "weakref.WeakKeyDictionary[nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_NAMED = ("logits_to_keep", "position_ids")  # models that do not name these pass them on to layers without them


def lock_of(model: PreTrainedModel) -> threading.RLock:
    """Return the lock under which a model's layers or its mode are changed for the time of a pass.

    Shallow copies of a model, which run on the same layers, have the same lock.
    """
    return _LOCKS.setdefault(model.base_model, threading.RLock())


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode for a while, under its lock."""
    with lock_of(unwrap_adapter(network)):
        in_training = [module for module in network.modules() if module.training] if network.training else []
        for module in in_training:
            module.training = False
        try:
            yield
        finally:
            for module in in_training:
                module.training = True


class Pass:
    """A forward pass of one network, with or without an adapter.

    Attributes:
        model (`PreTrainedModel`): has the weights, and the configuration of the cache.
        blocks (`tuple`): the networks that each block of rows is computed for; here one.
    """

    def __init__(self, network: PreTrainedModel | PeftModel):
        self.network = network
        self.model = unwrap_adapter(network)
        self.blocks: tuple[PeftModel | PreTrainedModel | None, ...] = (network,)
        parameters = inspect.signature(self.model.forward).parameters
        self.accepted = set(parameters)
        self._accepts_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        self._first_position = first_position(self.model)

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return self.model.device

    @property
    def is_cached(self) -> bool:
        """Whether the model takes the usual cache, and has attention to fill it."""
        if CACHE not in self.accepted or not self._has_usual_cache:
            return False
        return not all(DynamicCache(config=self.model.config).is_linear)

    @property
    def cache_name(self) -> str | None:
        """The name of the usual cache among the model's inputs; None if it has a cache of its own kind."""
        if not self._has_usual_cache:
            return None
        # State-space models had another name for it before transformers 5.24.
        return next((name for name in (CACHE, "cache_params") if name in self.accepted), None)

    @property
    def _has_usual_cache(self) -> bool:
        # Private to transformers, and its only word on this. RWKV, xLSTM and MiniMax cannot reorder their own caches.
        return getattr(self.model, "_supports_default_dynamic_cache", lambda: True)()

    @property
    def has_own_layers(self) -> bool:
        """Whether layers of the usual cache are of the model's own kind."""
        if self.cache_name is None:
            return False
        layers = DynamicCache(config=self.model.config).layers
        return any(type(layer).__module__ != DynamicCache.__module__ for layer in layers)

    def __call__(self, **inputs: Any) -> ModelOutput:
        """Return the network's output; inputs that it does not take are left out, `position_ids` count from 0."""
        return self.network(**self.prepare(inputs))

    def prepare(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs that the network takes, on its device."""
        prepared = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
            if name in self.accepted or (self._accepts_all and name not in _NAMED)
        }
        if self._first_position and prepared.get("position_ids") is not None:
            prepared["position_ids"] = prepared["position_ids"] + self._first_position
        return prepared

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split `(len(blocks) * batch_size, ...)` into a tensor of shape `(batch_size, ...)` for each block."""
        return rows.chunk(len(self.blocks))


class MixedPass(Pass):
    """Runs `base` once with the rows of a batch repeated, block j of them through the layers of adapter j.

    Args:
        base (`PreTrainedModel`): without adapters; its layers are changed for the time of a pass.
        blocks (sequence of `PeftModel` or None): adapters on this base, see [`can_mix`]; None for the base itself.

    Equals the separate passes up to rounding: same weights, another batch size. Not for training.
    """

    def __init__(self, base: PreTrainedModel, blocks: Sequence[PeftModel | None]):
        super().__init__(base)
        self.blocks = tuple(blocks)
        self._thread: list[int | None] = [None]  # the one that runs the pass
        changes: dict[str, list[tuple[int, Callable]]] = {}
        for index, network in enumerate(self.blocks):
            for name, layer in adapted_layers(network) if network is not None else ():
                changes.setdefault(name, []).append((index, _change_of(layer)))
        self._changes = [(base.get_submodule(name), block_changes) for name, block_changes in changes.items()]
        adapters = (network for network in self.blocks if network is not None)
        # An adapter is switched as a whole, so one layer of each is enough to look at.
        self._witnesses = [layer for network in adapters for _, layer in islice(adapted_layers(network), 1)]

    @property
    def is_current(self) -> bool:
        """Whether the adapters are still switched on; one that is merged into the shared weights is refused."""
        for layer in self._witnesses:
            check_not_merged(layer)
        return all(is_plain(layer) for layer in self._witnesses)

    def prepare(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs that the base takes; tensors with a batch axis are repeated for each block."""
        prepared = super().prepare(inputs)
        rows = len(prepared[self.model.main_input_name])
        for name, value in prepared.items():
            if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == rows:
                prepared[name] = value.repeat(len(self.blocks), *[1] * (value.ndim - 1))
        return prepared

    def __call__(self, **inputs: Any) -> ModelOutput:
        """Return the output for the rows of all blocks, one block after another."""
        with lock_of(self.model), self._changed_layers():
            return super().__call__(**inputs)

    @contextmanager
    def _changed_layers(self) -> Iterator[None]:
        # Hooks would do the same, but setting and calling them takes as long as a small layer.
        forwards = [
            (module, partial(_changed_forward, module.forward, self._thread, len(self.blocks), changes))
            for module, changes in self._changes
        ]
        with replaced_forwards(forwards):
            self._thread[0] = threading.get_ident()
            try:
                yield
            finally:
                self._thread[0] = None


@contextmanager
def replaced_forwards(forwards: Collection[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Replace the forwards of modules for a while."""
    earlier = [(module, module.__dict__.get("forward")) for module, _ in forwards]
    for module, forward in forwards:
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, forward in earlier:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = forward


def can_mix(network: nn.Module) -> bool:
    """Return whether an adapter's changes can be applied to some rows only: plain LoRA, and trained copies of layers.

    Experts do not see whole batches, so the blocks of their rows are unknown.
    """
    return (
        isinstance(network, PeftModel)
        and getattr(network.peft_config.get(ADAPTER), "bias", "none") == "none"  # else the base's own are changed
        and all(is_plain(layer) and "expert" not in name for name, layer in adapted_layers(network))
    )


def _change_of(layer: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Return a function of input and base's output that turns the latter into the adapted layer's output, in place."""
    if isinstance(layer, ModulesToSaveWrapper):
        return partial(_replace, layer.modules_to_save[ADAPTER])
    return partial(_add_lora, layer.lora_A[ADAPTER], layer.lora_B[ADAPTER], layer.scaling)


def _add_lora(lora_a, lora_b, scaling: dict[str, float], inputs: torch.Tensor, output: torch.Tensor) -> None:
    # The forwards themselves: calling a module costs more.
    output.add_(lora_b.forward(lora_a.forward(inputs.to(lora_a.weight.dtype))), alpha=scaling[ADAPTER])


def _replace(module: nn.Module, inputs: torch.Tensor, output: torch.Tensor) -> None:
    output.copy_(module(inputs))


def _changed_forward(forward, thread: list, count: int, changes, inputs: torch.Tensor, *args, **kwargs):
    output = forward(inputs, *args, **kwargs)
    if thread[0] != threading.get_ident():  # another thread uses the base alone
        return output
    if count == 1:
        changes[0][1](inputs, output)
        return output
    if len(inputs) % count:
        raise UnsupportedError(
            "A layer does not see whole batches, so the blocks of its rows are unknown.",
            expected=f"a multiple of {count} rows",
            found=f"{tuple(inputs.shape)}",
        )
    block_inputs, block_outputs = inputs.chunk(count), output.chunk(count)
    for index, change in changes:
        change(block_inputs[index], block_outputs[index])
    return output
