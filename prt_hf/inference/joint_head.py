"""A PRT model as hidden states times a head, for trainers that avoid full logits (TRL from 1.16 on).

softmax(log_softmax(b) + s r) = softmax(b + s r), so where b = h_b W_b^T and r = h_r W_r^T, the logits of the PRT model
are [h_b, s h_r] [W_b, W_r]^T, up to a constant per context.
"""

import weakref
from numbers import Real
from typing import NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutput

from ..errors import UnsupportedError
from ..networks.lm_head import behind_the_head, head_pieces, hidden_pieces, why_not_linear
from ..networks.mixed_pass import Pass
from .prt_model import PRTPreTrainedModel

_LINEAR: "weakref.WeakSet[PRTPreTrainedModel]" = weakref.WeakSet()  # models whose heads have been checked


class JointHead(NamedTuple):
    """A head with `weight` of shape `(vocab_size, sum of hidden sizes)`, `bias` of shape `(vocab_size,)` or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class JointBase:
    """The PRT model as a decoder without its head; `last_hidden_state` belongs to the head of [`joint_head`]."""

    def __init__(self, model: PRTPreTrainedModel):
        self.model = model

    def __call__(self, input_ids: torch.LongTensor, **inputs) -> BaseModelOutput:
        """Return the last hidden states of all parts side by side, `(batch_size, sequence_length, sum of sizes)`.

        Raises:
            UnsupportedError: a network's logits are not its last hidden state times its head, or a loss over experts.
        """
        model, factors = self.model, self.model.factors()
        if inputs.get("output_router_logits"):
            raise UnsupportedError(
                "The experts of a frozen backbone are not balanced any more.",
                expected="a loss of log-probabilities alone",
                remedy="router_aux_loss_coef=0.0",
            )
        if any(match.columns is not None or match.is_across for match in model.matches):
            raise UnsupportedError(
                "A reward of another vocabulary has no rows for some of the backbone's tokens.",
                expected="rewards of the backbone's own vocabulary",
                found="; ".join(str(match.tokens) for match in model.matches),
                remedy="tune with PRTTrainer, or with a trainer that asks the model for its logits",
            )
        if not all(isinstance(factor, Real) for factor in factors):
            raise UnsupportedError(
                "One head serves all rows.", expected="one strength for each reward", found="strengths per row"
            )
        inputs = {"input_ids": input_ids} | inputs | {"use_cache": False}
        if model not in _LINEAR:
            for part in model.parts:
                _check_linear(part.run, inputs)
            _LINEAR.add(model)
        hidden = []
        for part, factor in zip(model.parts, factors, strict=True):
            run = part.run
            with torch.set_grad_enabled(torch.is_grad_enabled() and not part.is_frozen):
                pieces = hidden_pieces(run.model, run.model.base_model(**run.prepare(inputs)).last_hidden_state)
            hidden += [(factor * piece).to(model.device) for piece in pieces]
        model.is_tuned |= model.training and torch.is_grad_enabled()
        return BaseModelOutput(last_hidden_state=torch.cat(hidden, -1))


def joint_head(model: PRTPreTrainedModel) -> JointHead:
    """Return the heads of all parts side by side, in the order of the hidden states of [`JointBase`]."""
    weights, biases = [], []
    for part, factor in zip(model.parts, model.factors(), strict=True):
        part_weights, bias = head_pieces(part.run.model)
        weights += [weight[: model.config.vocab_size].to(model.device) for weight in part_weights]
        if bias is not None:
            biases.append(factor * bias[: model.config.vocab_size].to(model.device))
    return JointHead(torch.cat(weights, -1), sum(biases) if biases else None)


def _check_linear(run: Pass, inputs: dict) -> None:
    """Refuse anything but a linear head, which would quietly become another one."""
    found = [f"{name}={value}" for name, value in behind_the_head(run.model).items()]
    if not found and (problem := why_not_linear(run.model, run.prepare(inputs))):
        found = [problem]
    if found:
        raise UnsupportedError(
            f"{type(run.model).__name__}'s logits are not its last hidden state times its head.",
            expected="a plain linear head, without soft-capping or scaling",
            found=", ".join(found),
            remedy="tune with PRTTrainer, or with a trainer that asks the model for its logits",
        )
