"""The training loss without full logits: models are given as a [`Projection`], and a chunk of logits is held at a time.

Losses and statistics equal their plain forms in [`~prt_hf.functional`].
"""

from typing import Any

import torch
from peft import PeftModel
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ..contract import TEXT_GENERATION
from ..functional import (
    check_finite,
    check_same_columns,
    check_same_positions,
    check_supervised,
    prt_loss,
    prt_statistics,
)
from ..networks.lm_head import Projection, why_not_projected
from ..reward.batch import BackboneLogits, Batch
from .config import PRTConfig


def fused_prt_loss(
    backbone: Projection,
    reward: Projection,
    labels: torch.LongTensor,
    *,
    kl_coef: float = 1.0,
    entropy_coef: float = 0.0,
    num_items_in_batch: int | torch.Tensor | None = None,
    teacher: Projection | None = None,
) -> torch.Tensor:
    """Return the training loss (Eq. 7, 12) without full logits, forward or backward.

    Equals `prt_loss(backbone.logits(), reward.logits(), labels, ..., teacher_logits=teacher.logits())`. The gradient
    with respect to the reward's hidden states, bias and trainable weights is computed in the forward pass, from the
    same chunks.

    Args:
        backbone ([`Projection`]): at the supervised positions. If it shares a frozen head with the reward, they are
            multiplied once, as (h_b + h_r / kl_coef) W^T.
        reward ([`Projection`]): at the supervised positions.
        labels (`torch.LongTensor` of shape `(n,)`): none of them ignored.
        kl_coef: as in [`prt_loss`].
        entropy_coef: as in [`prt_loss`].
        num_items_in_batch: as in [`prt_loss`].
        teacher ([`Projection`], *optional*): fine-tuned model, at the same positions.

    Raises:
        NonFiniteRewardError: a reward is NaN or infinite.
        PRTValueError: no position of the step is supervised, or the shapes do not match.
    """
    check_same_columns(backbone.shape[1], reward.shape[1])
    check_same_positions(labels, reward.shape[:1])
    items = len(labels) if num_items_in_batch is None else num_items_in_batch
    check_supervised(items, "the whole optimiser step")
    shared = _same_tensor(backbone.weights[0], reward.weights[0]) and not reward.weights[0].requires_grad
    reward = reward.cast()
    with torch.no_grad():
        if shared:  # cast once
            backbone = backbone._replace(weights=(reward.weights[0], *backbone.weights[1:]))
        backbone, teacher = backbone.cast(), None if teacher is None else teacher.cast()
    with torch.autocast(labels.device.type, enabled=False):  # the operands are cast, all else is float32
        loss = _FusedLoss.apply(
            backbone,
            teacher,
            labels,
            kl_coef,
            entropy_coef,
            reward.softcap,
            reward.bias,
            *reward.hidden,
            *reward.weights,
        )
    return loss / items


@torch.no_grad()
def fused_prt_statistics(
    backbone: Projection,
    reward: Projection,
    labels: torch.LongTensor,
    *,
    kl_coef: float = 1.0,
    teacher: Projection | None = None,
) -> dict[str, torch.Tensor]:
    """Return the statistics of [`~prt_hf.functional.prt_statistics`] without full logits.

    Equals `prt_statistics(backbone.logits(), reward.logits(), labels, ...)`; none of `labels` is ignored.
    """
    backbone, reward = backbone.cast(), reward.cast()
    teacher = None if teacher is None else teacher.cast()
    parts = [
        prt_statistics(
            backbone.at(part).logits(),
            reward.at(part).logits(),
            labels[part],
            kl_coef=kl_coef,
            teacher_logits=None if teacher is None else teacher.at(part).logits(),
        )
        for part in reward.chunks() or [slice(0)]
    ]
    return {name: torch.cat([values[name] for values in parts]) for name in parts[0]}


def training_loss(
    backbone: Projection | torch.Tensor,
    reward: Projection | torch.Tensor,
    labels: torch.LongTensor,
    *,
    teacher: Projection | torch.Tensor | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Return the training loss of operands that are logits at the supervised positions, or projections of them.

    Args:
        backbone: frozen model pi_pt.
        reward: if it is a [`Projection`], all must be.
        labels (`torch.LongTensor` of shape `(n,)`): none of them ignored.
        teacher: fine-tuned model whose distribution takes the place of the labels.
        settings: `kl_coef`, `entropy_coef` and `num_items_in_batch`, as in [`~prt_hf.functional.prt_loss`].

    Raises:
        NonFiniteRewardError, PRTValueError: as in `prt_loss`.
    """
    if isinstance(reward, Projection):
        return fused_prt_loss(backbone, reward, labels, teacher=teacher, **settings)
    return prt_loss(_as_logits(backbone), reward, labels, teacher_logits=_as_logits(teacher), **settings)


def training_statistics(
    backbone: Projection | torch.Tensor,
    reward: Projection | torch.Tensor,
    labels: torch.LongTensor,
    *,
    kl_coef: float = 1.0,
    teacher: Projection | torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return [`~prt_hf.functional.prt_statistics`] of the operands of [`training_loss`]."""
    if isinstance(reward, Projection):
        return fused_prt_statistics(backbone, reward, labels, kl_coef=kl_coef, teacher=teacher)
    logits = _as_logits(backbone), reward, labels
    return prt_statistics(*logits, kl_coef=kl_coef, teacher_logits=_as_logits(teacher))


def _as_logits(term: Projection | torch.Tensor | None) -> torch.Tensor | None:
    return term.cast().logits() if isinstance(term, Projection) else term


class _FusedLoss(torch.autograd.Function):
    """Sums the loss over positions, and computes its gradient in the forward pass."""

    @staticmethod
    def forward(ctx: Any, backbone, teacher, labels, kl_coef, entropy_coef, softcap, bias, *pieces):
        hidden, weights = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
        reward = Projection(hidden, weights, bias, softcap)
        gradients = _Gradients(reward, ctx.needs_input_grad[-1 - len(pieces) :])
        # The reward's own logits are needed only for the entropy term and for softcaps.
        is_joint = not entropy_coef and softcap is None and backbone.softcap is None
        terms = (_joint(backbone, reward, kl_coef),) if is_joint else (backbone, reward)
        absent = _absent(backbone, teacher)
        parts = reward.chunks()
        # All chunks use the same memory: fresh pages would cost as much as the arithmetic.
        rows = parts[0].stop if parts else 0
        buffers = [torch.empty(rows, reward.shape[1], dtype=torch.float32, device=labels.device) for _ in terms]
        teacher_buffer = None if teacher is None else torch.empty_like(buffers[0])
        loss, total = torch.zeros(2, dtype=torch.float32, device=labels.device)
        for part in parts:
            chosen = labels[part, None]
            z, *reward_logits = (
                term.at(part).logits(out=buffer[: len(chosen)]) for term, buffer in zip(terms, buffers, strict=True)
            )
            r = z if is_joint else reward_logits[0]
            total += (r if absent is None else r.masked_fill(absent, 0)).sum()
            if not is_joint:
                z.add_(r, alpha=1 / kl_coef)
            # The calls below turn z into the derivative of the loss with respect to r.
            if teacher is None:
                loss += _surprise_(z, chosen)
            else:
                loss += _divergence_(z, teacher.at(part).logits(out=teacher_buffer[: len(chosen)]), absent)
            if kl_coef != 1:
                z.div_(kl_coef)
            if entropy_coef:
                log_rho = torch.log_softmax(r, 1)
                rho = log_rho.exp()
                entropy = -torch.linalg.vecdot(rho, log_rho)[:, None]
                loss -= entropy_coef * entropy.sum()
                z.addcmul_(rho, log_rho.add_(entropy), value=entropy_coef)
            if softcap is not None:
                z.mul_(r.div_(softcap).square_().neg_().add_(1))
            gradients.add(part, z)
        if not torch.isfinite(total):
            for part in parts:
                check_finite(reward.at(part).logits(), part.start)
        ctx.save_for_backward(*gradients.tensors)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient):
        return *[None] * 6, *(None if tensor is None else tensor * loss_gradient for tensor in ctx.saved_tensors)


def _surprise_(z: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of logits summed over positions; `z` becomes its derivative."""
    largest, where = z.max(1, keepdim=True)
    label_logit = z.gather(1, chosen)
    torch.softmax(z, 1, out=z)
    surprise = (largest - z.gather(1, where).log() - label_logit).sum()
    z.scatter_add_(1, chosen, z.new_full(chosen.shape, -1.0))
    return surprise


def _divergence_(z: torch.Tensor, teacher: torch.Tensor, absent: torch.Tensor | None) -> torch.Tensor:
    """Return KL(softmax(teacher) || softmax(z)), summed; `z` becomes its derivative, `teacher` is overwritten."""
    if absent is not None:
        z.masked_fill_(absent, -torch.inf)
        teacher.masked_fill_(absent, -torch.inf)
    normaliser = z.logsumexp(1, keepdim=True)
    teacher.sub_(teacher.logsumexp(1, keepdim=True))
    gap = (teacher - z).add_(normaliser)
    if absent is not None:
        gap.masked_fill_(absent, 0)
    torch.softmax(z, 1, out=z)
    z.sub_(teacher.exp_())
    return gap.mul_(teacher).sum()


def _absent(*frozen: Projection | None) -> torch.Tensor | None:
    """Return which tokens one of the models lacks, `(vocab_size,)`; None if there are none."""
    biases = [each.bias for each in frozen if each is not None and each.bias is not None]
    absent = sum(bias.isneginf() for bias in biases) > 0 if biases else None
    return absent if absent is not None and bool(absent.any()) else None


class _Gradients:
    """Accumulates gradients with respect to a reward's bias, hidden states and weights over chunks."""

    def __init__(self, reward: Projection, wanted: tuple[bool, ...]):
        self._reward = reward
        inputs = (reward.bias, *reward.hidden, *reward.weights)
        # Sums over chunks are in float32, as in one large product.
        dtypes = [torch.float32, *(hidden.dtype for hidden in reward.hidden), *[torch.float32] * len(reward.weights)]
        self.tensors = [
            torch.zeros_like(value, dtype=dtype) if want else None
            for value, dtype, want in zip(inputs, dtypes, wanted, strict=True)
        ]

    def add(self, part: slice, logits_gradient: torch.Tensor) -> None:
        bias_gradient, *rest = self.tensors
        count = len(self._reward.hidden)
        if bias_gradient is not None:
            bias_gradient += logits_gradient.sum(0)
        for hidden, weight, hidden_gradient, weight_gradient in zip(
            self._reward.hidden, self._reward.weights, rest[:count], rest[count:], strict=True
        ):
            product_gradient = logits_gradient.to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = product_gradient @ weight
            if weight_gradient is not None:
                weight_gradient += product_gradient.T @ hidden[part]


def _joint(backbone: Projection, reward: Projection, kl_coef: float) -> Projection:
    """Return the projection of backbone + reward / kl_coef, neither of which has a softcap."""
    hidden = [*backbone.hidden, *(piece / kl_coef for piece in reward.hidden)]
    weights = [*backbone.weights, *reward.weights]
    if _same_tensor(backbone.weights[0], reward.weights[0]):
        count = len(backbone.weights)
        hidden[0] = hidden[0] + hidden.pop(count)
        del weights[count]
    biases = [
        bias for bias in (backbone.bias, None if reward.bias is None else reward.bias / kl_coef) if bias is not None
    ]
    return Projection(tuple(hidden), tuple(weights), sum(biases) if biases else None)


def _same_tensor(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first.data_ptr(), first.shape, first.dtype) == (second.data_ptr(), second.shape, second.dtype)


def why_not_fused(
    args: PRTConfig,
    shards_heads: bool,
    network: PreTrainedModel | PeftModel,
    others: list[BackboneLogits],
    batch: Batch,
) -> str | None:
    """Return why the loss needs full logits; None if it does not.

    Args:
        args: the trainer's.
        shards_heads: whether DeepSpeed shards parameters.
        network: the reward's.
        others: the backbones, and the fine-tuned model that the reward is distilled from.
        batch: the first one.
    """
    networks = [network, *(other.network for other in others if other.network is not None)]
    devices = sorted({str(value.device) for each in networks for value in each.parameters()})
    for problem, holds in {
        "fused_loss='never'": args.fused_loss == "never",
        "a classifier has few": others[0].task != TEXT_GENERATION,
        "the networks are compiled": args.torch_compile,
        "torch.nn.DataParallel runs copies of the network": args.n_gpu > 1,
        "ZeRO-3 shards the heads": shards_heads,
        f"the models are on several devices: {devices}": len(devices) > 1,
    }.items():
        if holds:
            return problem
    problems = [why_not_projected(network, batch.inputs), *(each.why_not_projected(batch) for each in others)]
    return next((problem for problem in problems if problem), None)
