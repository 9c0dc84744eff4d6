"""Compute the layers that a reward and its own base share, those below the first adapted one, only once."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from peft import PeftModel
from torch import nn

from .adapters import wrapped_layers
from .anatomy import head_of, layer_stack, unwrap_adapter
from .lm_head import TOLERANCE
from .mixed_pass import replaced_forwards


class SharedTrunk:
    """The lowest layers of a reward adapter's network, which compute the same with the adapter on and off.

    A pass within `recorded()` stores their output; a pass of the same inputs within `reused()` starts from it, and
    gradients end there.
    """

    def __init__(self, layers: list[nn.Module]):
        self._layers = layers
        self._output = None

    @classmethod
    def of(cls, network: PeftModel) -> "SharedTrunk | None":
        """Return the shared layers of a reward adapter and its base.

        It is None if there are none: the lowest layers are adapted or trained, the layers are not in one list, or
        dropout makes passes differ.
        """
        model = unwrap_adapter(network)
        stack = layer_stack(model)
        if stack is None or _has_noise(model):
            return None
        (prefix, layers), (head, _) = stack, head_of(model)
        changed = [name for name, _ in wrapped_layers(model)]
        changed += [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        # A fully trained copy of the head is inside PEFT's wrapper.
        above = [name for name in changed if not f"{name}.".startswith(f"{head}.") and not head.startswith(f"{name}.")]
        if not all(name.startswith(f"{prefix}.") for name in above):
            return None
        first = min((int(name.removeprefix(f"{prefix}.").partition(".")[0]) for name in above), default=len(layers))
        return cls(list(layers[:first])) if first else None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Store the output of the shared layers in the next pass."""

        def record(module, args, output):
            self._output = output

        handle = self._layers[-1].register_forward_hook(record)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Let the shared layers return the stored output; only the last layer's is read."""
        output, self._output = self._output, None
        hidden = output if isinstance(output, torch.Tensor) else output[0]

        def return_stored(*args, **kwargs):
            # Reentrant checkpointing computes no gradient for the weights of a layer whose input needs none, so PEFT
            # makes embeddings require one.
            if any(isinstance(value, torch.Tensor) and value.requires_grad for value in (*args, *kwargs.values())):
                hidden.requires_grad_()
            return output

        with replaced_forwards([(layer, return_stored) for layer in self._layers]):
            yield

    @torch.no_grad()
    def is_enough(
        self, network: PeftModel, pretrained: AbstractContextManager, inputs: dict[str, torch.Tensor]
    ) -> bool:
        """Return whether a pass from the trunk's output equals the whole pass; some upper layers read more of it.

        `pretrained` switches the adapter of the reward's network off.
        """
        with pretrained:  # the reward's own logits may all be zero
            with self.recorded():
                expected = network(**inputs).logits.float()
            try:
                with self.reused():
                    found = network(**inputs).logits.float()
            except (KeyError, TypeError):  # for example keys and values of lower layers
                return False
        return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _has_noise(model: nn.Module) -> bool:
    """Return whether dropout, or jitter of routers, makes training passes differ."""
    values = model.config.get_text_config().to_dict()
    return any(value for name, value in values.items() if isinstance(value, float) and re.search("drop|jitter", name))
