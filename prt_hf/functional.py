"""The equations of Portable Reward Tuning (Chijiwa et al., ICML 2025, arXiv:2502.12776) as pure functions.

Each is defined by the naive expression that it equals. Logits and rewards may have any floating dtype; all arithmetic
is done in float32. Log-probabilities may be passed as `backbone_logits`, because softmax ignores a constant.
"""

from collections.abc import Sequence
from math import isfinite
from numbers import Real

import torch
from torch.nn import functional as F

from .errors import NonFiniteRewardError, PRTValueError

IGNORE_INDEX = -100


def check_finite(reward: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Return `reward` unchanged, or raise. Not checked while compiling: a graph cannot branch on values.

    Args:
        reward (`torch.FloatTensor` of shape `(..., vocab_size)`): r_theta(x, .).
        start (`int`): number of positions before those of `reward`, if it is a chunk.

    Raises:
        NonFiniteRewardError: some entries are NaN or infinite; names their number, and the first of them.
    """
    if torch.compiler.is_compiling():
        return reward
    finite = torch.isfinite(reward)
    if finite.all():
        return reward
    bad = (~finite).nonzero()
    *position, token = bad[0].tolist()
    position = [index + start for index in position[:1]] + position[1:]
    raise NonFiniteRewardError(
        f"The reward holds {len(bad)} values that are NaN or infinite.",
        expected="finite numbers for every token or label",
        found=f"{reward[tuple(bad[0])].item()} at position {tuple(position)}, token or label id {token}",
        remedy="lower the learning rate, or run the reward model in bfloat16 or float32 rather than float16",
    )


def check_supervised(count: int | float | torch.Tensor, where: str) -> None:
    """Check that a position is supervised.

    Args:
        count: of supervised positions.
        where: the place that was searched, for the error.

    Raises:
        PRTValueError: every label is ignored.
    """
    if not count:
        raise PRTValueError(
            "No position is supervised: every label is ignored.",
            expected=f"at least one label other than {IGNORE_INDEX}",
            found=f"0 supervised positions in {where}",
            remedy="check that truncation keeps the completions, and that the data collator does not mask them",
        )


def combine(
    backbone_logits: torch.Tensor,
    reward: torch.Tensor,
    strength: float | torch.Tensor = 1.0,
    columns: torch.LongTensor | None = None,
) -> torch.Tensor:
    """Return log pi_theta(. | x), the PRT model (Eq. 6 in training, Eq. 10 with any other backbone).

    Equals `log_softmax(log_softmax(backbone_logits) + strength * reward)`.

    With `columns`, some of the backbone's tokens N are neutral: they have no reward. pi(N) = pi_pt(N), and the others,
    S, share the rest in proportion to pi_pt exp(strength r). This is r = 0 in the normalisation of Prop. 3.1, E[exp(r)]
    = 1 over S: r_N = log(sum_S pi_pt exp(strength r) / sum_S pi_pt). Where S has no mass, the backbone stays.

    Args:
        backbone_logits (`torch.FloatTensor` of shape `(..., vocab_size)`): logits of pi_pt, `-inf` where ruled out.
        reward (`torch.FloatTensor` of shape `(..., vocab_size)`): r_theta.
        strength (`float` or tensor broadcastable to `reward`): 1 / lambda; 0 gives the backbone back.
        columns (`torch.LongTensor` of shape `(vocab_size,)`, *optional*): the reward's column for each of the
            backbone's, -1 for neutral ones; by default both have the same.

    Returns:
        `torch.FloatTensor` of shape `(..., vocab_size)`: log-probabilities, float32.

    Raises:
        NonFiniteRewardError: a reward is NaN or infinite.
        PRTValueError: the last axes differ.
    """
    backbone_logits = backbone_logits.float()
    if columns is not None:
        check_same_columns(backbone_logits.shape[-1], len(columns))
        reward = reward[..., columns.clamp(min=0)]
    check_same_columns(backbone_logits.shape[-1], reward.shape[-1])
    reward = check_finite(reward).float()
    if columns is None:
        return _log_probs(backbone_logits, reward, strength)
    is_neutral = columns < 0
    log_backbone = torch.log_softmax(backbone_logits, -1)
    scored = log_backbone.masked_fill(is_neutral, -torch.inf)
    log_share = scored.logsumexp(-1, keepdim=True)
    has_no_share = log_share.isneginf()
    log_probs = _log_probs(scored.masked_fill(has_no_share, 0.0), reward, strength) + log_share
    return torch.where(is_neutral | has_no_share, log_backbone, log_probs)


def signed_sum(signs: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `sum(sign * value)`, the reward of several terms, without a copy of the first where its sign is 1."""
    total = values[0] if signs[0] == 1 else signs[0] * values[0]
    for sign, value in zip(signs[1:], values[1:], strict=True):
        total = total.add(value.to(total.device), alpha=sign)
    return total


def as_strength(value: float | torch.Tensor | list[float]) -> float | torch.Tensor:
    """Return 1 / lambda of Eq. 10 as a number, or as a tensor with one per prompt.

    Raises:
        PRTValueError: neither, or not finite.
    """
    try:
        numbers = torch.as_tensor(value, dtype=None if isinstance(value, torch.Tensor) else torch.float32)
        is_usable = numbers.ndim <= 1 and numbers.numel() > 0 and bool(torch.isfinite(numbers).all())
    except (TypeError, ValueError, RuntimeError):
        is_usable = False
    if not is_usable:
        raise PRTValueError(
            "`strength` is not usable.", expected="a finite number, or one per prompt", found=repr(value)
        )
    if isinstance(value, Real):
        return value
    return numbers if numbers.ndim else numbers.item()


def check_strengths(strengths: Sequence[float], count: int, name: str = "strengths") -> None:
    """Check that there is one finite number for each reward.

    Raises:
        PRTValueError: there are more or fewer, or one is not finite; `name` is that of the argument.
    """
    is_usable = isinstance(strengths, list | tuple) and len(strengths) == count
    if not is_usable or not all(isinstance(value, Real) and isfinite(value) for value in strengths):
        raise PRTValueError(
            f"`{name}` is not usable.", expected=f"{count} finite numbers, one for each reward", found=str(strengths)
        )


def strength_of_rows(strength: float | torch.Tensor | list[float], rows: int) -> torch.Tensor:
    """Return one strength for each row that `generate` made of the prompts, `(rows,)`.

    Args:
        strength: one for all, or one per prompt.
        rows: a multiple of the number of prompts.

    Raises:
        PRTValueError: `rows` is no such multiple.
    """
    strength = torch.as_tensor(strength, dtype=torch.float32).reshape(-1)
    if not len(strength) or rows % len(strength):
        raise PRTValueError(
            "`strength` does not fit the batch.",
            expected=f"one number, or one per prompt of a batch of {rows} rows",
            found=f"{len(strength)} numbers",
        )
    return strength.repeat_interleave(rows // len(strength))


def reward_entropy(reward: torch.Tensor) -> torch.Tensor:
    """Return H(rho), rho = softmax(r_theta(x, .)), in nats (Eq. 12).

    Equals `-(softmax(reward) * log_softmax(reward)).sum(-1)`; shape `(...)`, float32.
    """
    log_rho = torch.log_softmax(reward.float(), -1)
    return -(log_rho.exp() * log_rho).sum(-1)


def prt_loss(
    backbone_logits: torch.Tensor,
    reward: torch.Tensor,
    labels: torch.LongTensor,
    *,
    kl_coef: float = 1.0,
    entropy_coef: float = 0.0,
    num_items_in_batch: int | torch.Tensor | None = None,
    teacher_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the training loss: Eq. 7 and Algorithm 1, with the entropy term of Eq. 12.

    Over the positions with `labels != -100`, equals the sum of
    `cross_entropy(combine(backbone_logits, reward, 1 / kl_coef), labels) - entropy_coef * reward_entropy(reward)`
    divided by `num_items_in_batch`. The gradient goes to `reward` alone. With `teacher_logits` the reward is distilled:
    KL(softmax(teacher_logits) || pi_theta) replaces the cross-entropy, and labels only select positions.

    Args:
        backbone_logits (`torch.FloatTensor` of shape `(..., vocab_size)`): as in [`combine`].
        reward (`torch.FloatTensor` of shape `(..., vocab_size)`): as in [`combine`].
        labels (`torch.LongTensor` of shape `(...)`): already aligned with the logits (shifted, for language models).
        kl_coef (`float`): lambda, the weight of KL(pi || pi_pt) in Eq. 5; 1 in the paper.
        entropy_coef (`float`): alpha of Eq. 12; 0 leaves the term out, 1e-5 ... 1e-1 in the paper.
        num_items_in_batch (`int` or 0-dim tensor): number of supervised positions in the whole optimiser step, so that
            accumulated micro-batches weigh every token alike; by default those in `labels`.
        teacher_logits (`torch.FloatTensor` of the shape of `reward`, *optional*): logits of a fine-tuned model. Tokens
            that it or the backbone lacks, at -inf, are left out of both distributions.

    Returns:
        0-dim `torch.FloatTensor`, nats per supervised position; 0 (with a gradient of 0) where none is supervised but
        `num_items_in_batch` counts some of other batches.

    Raises:
        NonFiniteRewardError: a reward at a supervised position is NaN or infinite.
        PRTValueError: no position of the step is supervised, or the shapes do not match.
    """
    keep = labels != IGNORE_INDEX
    backbone_logits, reward, labels = _supervised(backbone_logits, reward, labels)
    items = len(labels) if num_items_in_batch is None else num_items_in_batch
    check_supervised(items, "the whole optimiser step")
    log_probs = _log_probs(backbone_logits, reward, 1 / kl_coef)
    if teacher_logits is None:
        loss = F.nll_loss(log_probs, labels, reduction="sum")
    else:
        loss = _divergence(teacher_logits[keep].detach().float(), log_probs).sum()
    if entropy_coef:
        loss = loss - entropy_coef * reward_entropy(reward).sum()
    return loss / items


@torch.no_grad()
def prt_statistics(
    backbone_logits: torch.Tensor,
    reward: torch.Tensor,
    labels: torch.LongTensor,
    *,
    kl_coef: float = 1.0,
    teacher_logits: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Return statistics of tuning for every position: `torch.FloatTensor`s of the shape of `labels`, 0 where ignored.

    - `count`: 1 at supervised positions
    - `loss`: -log pi_theta(y* | x), with `teacher_logits` KL(teacher || pi_theta); nats, without the entropy term
    - `backbone_loss`: the same of pi_pt, the backbone by itself
    - `accuracy`: whether pi_theta is right; `reward_accuracy`: whether the reward alone is (Fig. 6a)
    - `reward_entropy`: H(softmax(r)) of Eq. 12, nats
    - `reward_abs`: mean over tokens of |r - mean(r)|: r is defined up to a constant per context (Prop. 3.1)
    - `kl`: KL(pi_theta || pi_pt) of Eq. 5, nats
    """
    keep = labels != IGNORE_INDEX
    backbone_logits, reward, chosen = _supervised(backbone_logits, reward, labels)
    log_backbone = torch.log_softmax(backbone_logits, -1)
    log_probs = _log_probs(log_backbone, reward, 1 / kl_coef)
    divergence = log_probs.exp() * (log_probs - log_backbone)
    teacher = None if teacher_logits is None else teacher_logits[keep].float()

    def loss(of: torch.Tensor) -> torch.Tensor:
        return -of.gather(-1, chosen[:, None])[:, 0] if teacher is None else _divergence(teacher, of)

    values = {
        "count": torch.ones_like(chosen),
        "loss": loss(log_probs),
        "backbone_loss": loss(log_backbone),
        "accuracy": log_probs.argmax(-1) == chosen,
        "reward_accuracy": reward.argmax(-1) == chosen,
        "reward_entropy": reward_entropy(reward),
        "reward_abs": (reward - reward.mean(-1, keepdim=True)).abs().mean(-1),
        # 0 * (-inf - -inf) at tokens that the backbone rules out
        "kl": divergence.nan_to_num(nan=0.0).sum(-1),
    }
    zeros = torch.zeros(labels.shape, device=labels.device)
    return {name: zeros.masked_scatter(keep, value.float()) for name, value in values.items()}


def _log_probs(backbone_logits: torch.Tensor, reward: torch.Tensor, strength: float | torch.Tensor) -> torch.Tensor:
    """Return log pi_theta of float32 operands."""
    # log_softmax(backbone_logits) differs from backbone_logits by a constant per context, which cancels.
    return torch.log_softmax(backbone_logits + strength * reward, -1)


def _divergence(teacher_logits: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Return KL(softmax(teacher_logits) || pi) at each position, over the tokens that neither rules out."""
    is_absent = teacher_logits.isneginf() | log_probs.isneginf()
    log_p, log_q = (each.masked_fill(is_absent, -torch.inf).log_softmax(-1) for each in (log_probs, teacher_logits))
    return (log_q.exp() * (log_q - log_p)).masked_fill(is_absent, 0.0).sum(-1)


def _supervised(
    backbone_logits: torch.Tensor, reward: torch.Tensor, labels: torch.LongTensor
) -> tuple[torch.Tensor, torch.Tensor, torch.LongTensor]:
    """Select the supervised positions: `(n, vocab_size)`, `(n, vocab_size)`, `(n,)`, in float32."""
    check_same_columns(backbone_logits.shape[-1], reward.shape[-1])
    check_same_positions(labels, reward.shape[:-1])
    keep = labels != IGNORE_INDEX
    return backbone_logits[keep].detach().float(), check_finite(reward[keep]).float(), labels[keep]


def check_same_columns(backbone_columns: int, reward_columns: int) -> None:
    """Check that the last axes match.

    Raises:
        PRTValueError: they do not.
    """
    if backbone_columns != reward_columns:
        raise PRTValueError(
            "Backbone and reward do not have the same number of columns.",
            expected=f"backbone logits with {reward_columns} columns, as the reward",
            found=str(backbone_columns),
            remedy="cut padded vocabulary rows off, or match the labels, as the contract says",
        )


def check_same_positions(labels: torch.Tensor, positions: tuple[int, ...]) -> None:
    """Check that there is one label for each position.

    Raises:
        PRTValueError: there are more or fewer labels.
    """
    if labels.shape != tuple(positions):
        raise PRTValueError(
            "Labels do not match the reward's positions.",
            expected=f"labels of shape {tuple(positions)}",
            found=str(tuple(labels.shape)),
        )
