"""Language models' logits as hidden states and head, so that full logits are never materialised."""

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .adapters import ADAPTER, is_plain
from .anatomy import unwrap_adapter
from .quantization import is_quantized_tensor

TOLERANCE = 0.02  # relative to the largest logit, for rounding in bfloat16
_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISOR = "logits_scaling"
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Number of logits in memory at a time: enough rows for a fast matrix product, few enough to stay small.
_CHUNK_ON_CPU, _CHUNK_ELSEWHERE = 2**23, 2**27


class Projection(NamedTuple):
    """The logits of a network at n positions, before the product with its head.

    Equals `sum(h @ w.T for h, w in zip(hidden, weights)) + bias`, or `softcap * tanh(. / softcap)` of it. A head with
    LoRA has two pieces: the base's and LoRA's.

    Attributes:
        hidden (tuple of `torch.FloatTensor` of shape `(n, hidden_size_i)`): times the scale of the logits, if any.
        weights (tuple of `torch.FloatTensor` of shape `(vocab_size, hidden_size_i)`).
        bias (`torch.FloatTensor` of shape `(vocab_size,)`, *optional*).
        softcap (`float`, *optional*).
    """

    hidden: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None = None
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the logits, `(n, vocab_size)`."""
        return len(self.hidden[0]), len(self.weights[0])

    @torch.no_grad()
    def logits(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits, `(n, vocab_size)`, in float32, without a gradient; in `out` if given."""
        if out is None:
            out = torch.empty(self.shape, dtype=torch.float32, device=self.hidden[0].device)
        for index, (hidden, weight) in enumerate(zip(self.hidden, self.weights, strict=True)):
            if weight.dtype == torch.float32:
                torch.addmm(out, hidden, weight.T, beta=min(index, 1), out=out)
            elif index:
                out.add_(hidden @ weight.T)
            else:
                out.copy_(hidden @ weight.T)
        if self.bias is not None:
            out.add_(self.bias)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def chunks(self) -> list[slice]:
        """Return the parts of the positions whose logits are in memory together."""
        count, columns = self.shape
        held = _CHUNK_ON_CPU if self.hidden[0].device.type == "cpu" else _CHUNK_ELSEWHERE
        rows = max(1, held // columns)
        return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]

    def at(self, part: slice) -> "Projection":
        """Return the projection at some of the positions."""
        return self._replace(hidden=tuple(hidden[part] for hidden in self.hidden))

    def cast(self) -> "Projection":
        """Cast every piece to the dtype of its product: autocast's, else that of the weight."""
        device = self.hidden[0].device.type
        weights = self.weights
        if torch.is_autocast_enabled(device):
            weights = tuple(weight.to(torch.get_autocast_dtype(device)) for weight in weights)
        hidden = tuple(hidden.to(weight.dtype) for hidden, weight in zip(self.hidden, weights, strict=True))
        return self._replace(hidden=hidden, weights=weights)


class Head(NamedTuple):
    """The output layer of a language model, as it is applied to last hidden states.

    Attributes:
        weights (tuple of `torch.FloatTensor` of shape `(vocab_size, hidden_size_i)`): the base's, and LoRA's.
        bias (`torch.FloatTensor` of shape `(vocab_size,)`, *optional*).
        scale (`float`), softcap (`float`, *optional*): applied to the logits, in this order.
    """

    weights: tuple[torch.Tensor, ...]
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(
        cls,
        network: nn.Module,
        columns: slice | torch.LongTensor = slice(None),
        absent: torch.LongTensor | None = None,
    ) -> "Head":
        """Return the head of a language model, with its adapter on or off as it is now.

        Args:
            network: the language model.
            columns: rows of the head, without those that pad the vocabulary; as indices, they are copied.
            absent: those of the rows whose logits are to be `-inf`, for a head without a softcap.
        """
        model = unwrap_adapter(network)
        found = behind_the_head(model)
        scale = math.prod(found.get(name, 1.0) for name in _SCALES) / found.get(_DIVISOR, 1.0)
        weights, bias = head_pieces(model)
        if not isinstance(columns, slice) or columns.indices(len(weights[0])) != (0, len(weights[0]), 1):
            weights, bias = [weight[columns] for weight in weights], None if bias is None else bias[columns]
        if absent is not None:
            bias = weights[0].new_zeros(len(weights[0])) if bias is None else bias
            bias = bias.index_fill(0, absent.to(bias.device), -torch.inf)
        softcap = next((found[name] for name in _SOFTCAPS if name in found), None)
        return cls(tuple(weights), bias, scale, softcap)

    def project(self, pieces: Sequence[torch.Tensor]) -> Projection:
        """Return the logits of hidden states.

        Args:
            pieces (sequence of `torch.FloatTensor` of shape `(n, hidden_size_i)`): one for each of the weights.
        """
        pieces = [piece.to(weight.device) for piece, weight in zip(pieces, self.weights, strict=True)]
        bias = self.bias
        if self.scale != 1:
            pieces = [self.scale * piece for piece in pieces]
            bias = None if bias is None else self.scale * bias
        return Projection(tuple(pieces), self.weights, bias, self.softcap)


def projection(network: nn.Module, hidden: torch.Tensor, *order: slice | torch.LongTensor | None) -> Projection:
    """Return the logits of a language model, with its adapter on or off as it is now, from last hidden states.

    Args:
        network: the language model.
        hidden: of shape `(n, hidden_size)`.
        *order: `columns` and `absent`, as in [`Head.of`].
    """
    return Head.of(network, *order).project(hidden_pieces(unwrap_adapter(network), hidden))


def why_not_projected(network: nn.Module, inputs: dict[str, torch.Tensor]) -> str | None:
    """Return why [`projection`] does not give the network's logits for the first row of a batch; None if it does."""
    model = unwrap_adapter(network)
    if model.base_model is model or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} has no `logits_to_keep`, or no separate decoder"
    if problem := why_not_linear(network, inputs):
        return f"{type(model).__name__} has {problem}"
    return None


def why_not_linear(network: nn.Module, inputs: dict[str, torch.Tensor]) -> str | None:
    """Return why the logits of the first row of a batch are not hidden states times head; None if they are."""
    head = unwrap_adapter(network).get_output_embeddings()
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper) and not (is_plain(head) or head.disable_adapters):
        return f"an adapter of the head that is not plain LoRA: {head}"
    hidden, expected, probe = _probed(network, inputs)
    if hidden is None:
        return "a decoder that its forward pass does not call"
    parts = Head.of(network)
    if any(isinstance(weight, DTensor) for weight in parts.weights):  # FSDP2 keeps the last layers whole if it can
        return "a head that is sharded after a pass"
    if any(is_quantized_tensor(weight) for weight in parts.weights):
        return "a quantised head"
    parts = parts._replace(bias=probe if parts.bias is None else parts.bias + probe)
    found = parts.project(hidden).cast().logits().view_as(expected)
    difference = float((found - expected).abs().max() / expected.abs().max())
    return f"logits that differ by {difference:.0%}" if difference > TOLERANCE else None


def last_hidden_state(
    network: nn.Module, inputs: dict[str, torch.Tensor], wrapped: nn.Module | None = None
) -> torch.Tensor:
    """Return the last hidden states, `(batch_size, sequence_length, hidden_size)`, from a pass that makes no logits.

    Args:
        network: a language model.
        inputs: its inputs.
        wrapped: module around the network (data parallelism, autocast) that is called instead.
    """
    nowhere = torch.empty(0, dtype=torch.long, device=unwrap_adapter(network).device)
    with _caught(network) as found:
        (network if wrapped is None else wrapped)(**inputs, logits_to_keep=nowhere)
    return found[0]


def behind_the_head(model: PreTrainedModel) -> dict[str, float]:
    """Return scales and softcaps of the model's logits, by their names in the configuration."""
    config = model.config.get_text_config()
    values = {name: getattr(config, name, None) for name in (*_SCALES, _DIVISOR, *_SOFTCAPS)}
    return {name: value for name, value in values.items() if value not in (None, 1)}


def hidden_pieces(model: PreTrainedModel, hidden: torch.Tensor) -> list[torch.Tensor]:
    """Return the factors of the weights of [`head_pieces`]."""
    head = model.get_output_embeddings()
    if not _has_lora(head):
        return [hidden]
    lora_a = head.lora_A[ADAPTER]
    inner = lora_a(head.lora_dropout[ADAPTER](hidden.to(lora_a.weight.dtype)))
    return [hidden, head.scaling[ADAPTER] * inner]


def head_pieces(model: PreTrainedModel) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Return the head's weights, the base's and LoRA's, and its bias."""
    head = model.get_output_embeddings()
    if _has_lora(head):
        base, lora_b = head.get_base_layer(), head.lora_B[ADAPTER]
        biases = [base.bias, lora_b.bias if lora_b.bias is None else head.scaling[ADAPTER] * lora_b.bias]
        biases = [bias for bias in biases if bias is not None]
        return [base.weight, lora_b.weight], sum(biases) if biases else None
    if isinstance(head, Linear):
        head = head.get_base_layer()
    if isinstance(head, ModulesToSaveWrapper):
        head = head.original_module if head.disable_adapters else head.modules_to_save[ADAPTER]
    return [head.weight], getattr(head, "bias", None)


def _has_lora(head: nn.Module) -> bool:
    return isinstance(head, Linear) and not head.disable_adapters


@contextmanager
def _caught(network: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list to which every pass within adds its last hidden states."""
    found = []
    decoder = unwrap_adapter(network).base_model
    handle = decoder.register_forward_hook(lambda module, args, output: found.append(output[0]))
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def _probed(
    network: nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[list[torch.Tensor] | None, torch.Tensor, torch.Tensor]:
    """Return the factors of the head's weights, the logits, and the probe, for the first row of a batch.

    The probe is added to the output of the head, which may be zero, so that operations behind it show.
    """
    first_row = {
        name: value[:1] if isinstance(value, torch.Tensor) and value.ndim > 1 else value
        for name, value in inputs.items()
    }
    model = unwrap_adapter(network)
    head, is_training = model.get_output_embeddings(), network.training
    size = len(head_pieces(model)[0][0])
    probe = torch.linspace(-10, 10, size, device=model.device)
    handle = head.register_forward_hook(lambda module, args, output: output + probe.to(output))
    network.eval()
    try:
        with _caught(network) as found:
            logits = network(**first_row).logits.float()
        return (hidden_pieces(model, found[0].flatten(0, 1)) if found else None), logits, probe.to(logits.device)
    finally:
        handle.remove()
        network.train(is_training)
