"""One pass of the layers that a reward and its own base have in common: those below the first adapted one."""

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

    Within `recorded()`, a pass leaves what came out of them; within `reused()`, the next pass of the same inputs starts
    from there, and gradients end there.
    """

    def __init__(self, layers: list[nn.Module]):
        self._layers = layers
        self._output = None

    @classmethod
    def of(cls, network: PeftModel) -> "SharedTrunk | None":
        """None where nothing is shared: the lowest layers are adapted or trained, the layers do not follow one another
        in one list, or noise makes every pass another."""
        model = unwrap_adapter(network)
        stack = layer_stack(model)
        if stack is None or _has_noise(model):
            return None
        (prefix, layers), (head, _) = stack, head_of(model)
        changed = [name for name, _ in wrapped_layers(model)]
        changed += [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        # A head that is saved whole lies within what PEFT put in its place.
        above = [name for name in changed if not f"{name}.".startswith(f"{head}.") and not head.startswith(f"{name}.")]
        if not all(name.startswith(f"{prefix}.") for name in above):
            return None
        first = min((int(name.removeprefix(f"{prefix}.").partition(".")[0]) for name in above), default=len(layers))
        return cls(list(layers[:first])) if first else None

    @contextmanager
    def recorded(self) -> Iterator[None]:
        def record(module, args, output):
            self._output = output

        handle = self._layers[-1].register_forward_hook(record)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Every layer of the trunk gives what the last one gave before; only the last one's is read."""
        output, self._output = self._output, None
        hidden = output if isinstance(output, torch.Tensor) else output[0]

        def hand_on(*args, **kwargs):
            # Embeddings are made to want a gradient for reentrant checkpointing, under which a layer whose input wants
            # none gets none for its weights either.
            if any(isinstance(value, torch.Tensor) and value.requires_grad for value in (*args, *kwargs.values())):
                hidden.requires_grad_()
            return output

        with replaced_forwards([(layer, hand_on) for layer in self._layers]):
            yield

    @torch.no_grad()
    def is_enough(
        self, network: PeftModel, pretrained: AbstractContextManager, inputs: dict[str, torch.Tensor]
    ) -> bool:
        """Whether a pass that starts from the trunk's output is the whole one: some models hand more than that on to
        their upper layers.

        Args:
            pretrained: switches the adapter off.
        """
        with pretrained:  # the reward itself may be zero, and would tell nothing
            with self.recorded():
                expected = network(**inputs).logits.float()
            try:
                with self.reused():
                    found = network(**inputs).logits.float()
            except (KeyError, TypeError):  # keys and values of lower layers, say
                return False
        return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _has_noise(model: nn.Module) -> bool:
    """Dropout, or jitter of routers: training makes every pass another."""
    values = model.config.get_text_config().to_dict()
    return any(value for name, value in values.items() if isinstance(value, float) and re.search("drop|jitter", name))
