"""A language model's logits as its last hidden state times its head, so that they need not be made."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from .functional import Projection
from .passes import ADAPTER, is_plain
from .pretrained import unwrap_adapter

_TOLERANCE = 0.02  # of the largest logit: what bfloat16 rounds away
_SCALES = ("logit_scale", "lm_head_multiplier", "output_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAP = "final_logit_softcapping"


def projection(network: nn.Module, hidden: torch.Tensor, columns: slice = slice(None)) -> Projection:
    """The logits of a language model, as it is switched now (adapter on or off), from its last hidden states.

    Args:
        hidden (`torch.FloatTensor` of shape `(n, hidden_size)`).
        columns (`slice`): without the rows that pad the vocabulary.
    """
    model = unwrap_adapter(network)
    found = behind_the_head(model)
    scale = 1.0
    for name in _SCALES:
        scale *= found.get(name, 1)
    for name in _DIVISORS:
        scale /= found.get(name, 1)
    weights, bias = head_pieces(model)
    pieces = hidden_pieces(model, hidden)
    if scale != 1:
        pieces = [piece * scale for piece in pieces]
        bias = None if bias is None else bias * scale
    whole = columns.indices(len(weights[0])) == (0, len(weights[0]), 1)
    return Projection(
        tuple(pieces),
        tuple(weights if whole else [weight[columns] for weight in weights]),
        bias if bias is None or whole else bias[columns],
        found.get(_SOFTCAP),
    )


def why_not_projected(network: nn.Module, inputs: dict[str, torch.Tensor]) -> str | None:
    """Why [`projection`] is not what the network computes, or None where it is, by the first row of a batch."""
    model = unwrap_adapter(network)
    if model.base_model is model or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return f"{type(model).__name__} has no `logits_to_keep`, or no decoder apart from its head"
    if problem := why_not_linear(model, inputs):
        return f"{type(model).__name__} has {problem}"
    return None


def why_not_linear(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> str | None:
    """Why the pieces of the head, times the last hidden state, are not the model's logits, by the first row of a batch;
    None where they are."""
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper) and not (is_plain(head) or head.disable_adapters):
        return f"an adapter of the head that is not plain LoRA: {head}"
    if (difference := _difference(model, inputs)) > _TOLERANCE:
        return f"logits that differ by {difference:.0%}"
    return None


@contextmanager
def last_hidden_states(network: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects the last hidden states, `(batch_size, sequence_length, hidden_size)`, of the passes made inside.

    A hook, so that whatever wraps the network (data parallelism, checkpointing, autocast) sees an ordinary pass.
    """
    found: list[torch.Tensor] = []
    handle = unwrap_adapter(network).base_model.register_forward_hook(
        lambda module, args, output: found.append(output[0])
    )
    try:
        yield found
    finally:
        handle.remove()


def behind_the_head(model: PreTrainedModel) -> dict[str, float]:
    """What the model does to its logits behind the head, by the names in its configuration."""
    config = model.config.get_text_config()
    values = {name: getattr(config, name, None) for name in (*_SCALES, *_DIVISORS, _SOFTCAP)}
    return {name: value for name, value in values.items() if value not in (None, 1)}


def hidden_pieces(model: PreTrainedModel, hidden: torch.Tensor) -> list[torch.Tensor]:
    """What the weights of [`head_pieces`] are multiplied by."""
    head = model.get_output_embeddings()
    if not _has_lora(head):
        return [hidden]
    lora_a = head.lora_A[ADAPTER]
    inner = lora_a(head.lora_dropout[ADAPTER](hidden.to(lora_a.weight.dtype)))
    return [hidden, head.scaling[ADAPTER] * inner]


def head_pieces(model: PreTrainedModel) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The head's weights, LoRA's apart from its base's, and its bias."""
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


@torch.no_grad()
def _difference(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """Between a model's logits and those of [`projection`], of the largest of them."""
    given = {
        name: value[:1] if isinstance(value, torch.Tensor) and value.ndim > 1 else value
        for name, value in inputs.items()
    }
    is_training = model.training
    model.eval()
    try:
        hidden = model.base_model(**given)[0]
        expected = model(**given).logits.float()
    finally:
        model.train(is_training)
    found = projection(model, hidden.flatten(0, 1)).cast().logits().view_as(expected)
    return float((found - expected).abs().max() / expected.abs().max())
