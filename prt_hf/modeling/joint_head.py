"""A PRT model as hidden states times a head, for trainers that never make whole logits (TRL from 1.16 on).

softmax(log_softmax(b) + s r) = softmax(b + s r), so where b = h_b W_b^T and r = h_r W_r^T, the logits of the PRT model
are [h_b, s h_r] [W_b, W_r]^T, up to a constant per context.
"""

from typing import NamedTuple

import torch
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..errors import UnsupportedError
from ..passes import ADAPTER, Pass, is_plain
from .base import PRTPreTrainedModel

_TOLERANCE = 0.02  # of the largest logit: what bfloat16 rounds away
# What models do to logits behind the head. Weak ones hide in the tolerance.
_BEHIND_THE_HEAD = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "output_multiplier",
)


class JointHead(NamedTuple):
    """`weight` of shape `(vocab_size, sum of hidden sizes)`, `bias` of shape `(vocab_size,)` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class JointBase:
    """Called as a decoder without its head; `last_hidden_state` belongs to the head of [`joint_head`]."""

    def __init__(self, model: PRTPreTrainedModel):
        self.model = model

    def __call__(self, input_ids: torch.LongTensor, **inputs) -> BaseModelOutput:
        """
        Raises:
            UnsupportedError: a network's logits are not its last hidden state times its head, or a loss over experts.
        """
        model = self.model
        if inputs.get("output_router_logits"):
            raise UnsupportedError(
                "The experts of a frozen backbone are not balanced any more.",
                expected="a loss of log-probabilities alone",
                remedy="router_aux_loss_coef=0.0",
            )
        inputs = {"input_ids": input_ids} | inputs | {"use_cache": False}
        if not model._is_joint:
            for run in model._separate:
                _check_linear(run, inputs)
            model._is_joint = True
        hidden = []
        for index, (run, strength) in enumerate(zip(model._separate, [1.0, *model.strengths], strict=True)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index > 0):
                pieces = _hidden_pieces(run.model, run.model.base_model(**run.prepare(inputs)).last_hidden_state)
            hidden += [(strength * piece).to(model.device) for piece in pieces]
        model._is_tuned |= model.training and torch.is_grad_enabled()
        return BaseModelOutput(last_hidden_state=torch.cat(hidden, -1))


def joint_head(model: PRTPreTrainedModel) -> JointHead:
    weights, biases = [], []
    for run, strength in zip(model._separate, [1.0, *model.strengths], strict=True):
        of_network, bias = _head_pieces(run.model)
        weights += [weight[: model.config.vocab_size].to(model.device) for weight in of_network]
        if bias is not None:
            biases.append(strength * bias[: model.config.vocab_size].to(model.device))
    return JointHead(torch.cat(weights, -1), sum(biases) if biases else None)


def _hidden_pieces(model: PreTrainedModel, hidden: torch.Tensor) -> list[torch.Tensor]:
    head = model.get_output_embeddings()
    if not isinstance(head, Linear):
        return [hidden]
    lora_a = head.lora_A[ADAPTER]
    inner = lora_a(head.lora_dropout[ADAPTER](hidden.to(lora_a.weight.dtype)))
    return [hidden, head.scaling[ADAPTER] * inner]


def _head_pieces(model: PreTrainedModel) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    head = model.get_output_embeddings()
    if isinstance(head, Linear):
        base, lora_b = head.get_base_layer(), head.lora_B[ADAPTER]
        biases = [base.bias, lora_b.bias if lora_b.bias is None else head.scaling[ADAPTER] * lora_b.bias]
        biases = [bias for bias in biases if bias is not None]
        return [base.weight, lora_b.weight], sum(biases) if biases else None
    if isinstance(head, ModulesToSaveWrapper):
        head = head.modules_to_save[ADAPTER]
    return [head.weight], getattr(head, "bias", None)


def _check_linear(run: Pass, inputs: dict) -> None:
    """Anything but a linear head would quietly become something else."""
    head, config = run.model.get_output_embeddings(), run.model.config.get_text_config()
    found = [f"{name}={value}" for name in _BEHIND_THE_HEAD if (value := getattr(config, name, None)) not in (None, 1)]
    if isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper) and not is_plain(head):
        found.append(f"an adapter of the head that is not plain LoRA: {head}")
    if not found and (difference := _nonlinearity(run, inputs)) > _TOLERANCE:
        found.append(f"logits that differ by {difference:.0%}")
    if found:
        raise UnsupportedError(
            f"{type(run.model).__name__}'s logits are not its last hidden state times its head.",
            expected="a plain linear head, without soft-capping or scaling",
            found=", ".join(found),
            remedy="tune with PRTTrainer, or with a trainer that asks the model for its logits",
        )


@torch.no_grad()
def _nonlinearity(run: Pass, inputs: dict) -> float:
    """How far the head is from what [`_head_pieces`] makes of it, by the first row of a batch."""
    given = {
        name: value[:1] if isinstance(value, torch.Tensor) and value.ndim > 1 else value
        for name, value in run.prepare(inputs).items()
    }
    is_training = run.model.training
    run.model.eval()
    try:
        hidden = _hidden_pieces(run.model, run.model.base_model(**given).last_hidden_state)
        expected = run.model(**given).logits.float()
    finally:
        run.model.train(is_training)
    weights, bias = _head_pieces(run.model)
    found = sum(piece.float() @ weight.float().T for piece, weight in zip(hidden, weights, strict=True))
    found = found if bias is None else found + bias.float()
    return float((found - expected).abs().max() / expected.abs().max())
