"""The equations of Portable Reward Tuning (Chijiwa et al., ICML 2025, arXiv:2502.12776) as pure functions.

Each is defined by the naive expression that it equals. Logits and rewards may come in any floating dtype; all
arithmetic is done in float32. Wherever `backbone_logits` appear, log-probabilities serve as well, because softmax does
not see a constant. The fused forms take a [`Projection`] for each model, and hold no more than a chunk of its logits.
"""

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .errors import NonFiniteRewardError, PRTValueError

IGNORE_INDEX = -100
# Logits that a fused form holds at a time: enough rows for a fast matrix product, few enough to stay small.
_CHUNK_ON_CPU, _CHUNK_ELSEWHERE = 2**23, 2**27


def check_finite(reward: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Return `reward` unchanged, or raise. Not checked while compiling: a graph cannot branch on values.

    Args:
        reward (`torch.FloatTensor` of shape `(..., vocab_size)`): r_theta(x, .).
        start (`int`): positions before the first one, of a chunk.

    Raises:
        NonFiniteRewardError: names how many entries are NaN or infinite, and the first of them.
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
    """Raises:
    PRTValueError: none of the positions has a label that is not ignored.
    """
    if not count:
        raise PRTValueError(
            "No position is supervised: every label is ignored.",
            expected=f"at least one label other than {IGNORE_INDEX}",
            found=f"0 supervised positions in {where}",
            remedy="check that truncation keeps the completions, and that the data collator does not mask them",
        )


def combine(backbone_logits: torch.Tensor, reward: torch.Tensor, strength: float | torch.Tensor = 1.0) -> torch.Tensor:
    """log pi_theta(. | x), the PRT model (Eq. 6 in training, Eq. 10 with any other backbone).

    Equals `log_softmax(log_softmax(backbone_logits) + strength * reward)`.

    Args:
        backbone_logits (`torch.FloatTensor` of shape `(..., vocab_size)`): logits of pi_pt, `-inf` where ruled out.
        reward (`torch.FloatTensor` of shape `(..., vocab_size)`): r_theta.
        strength (`float` or tensor broadcastable to `reward`): 1 / lambda; 0 gives the backbone back.

    Returns:
        `torch.FloatTensor` of shape `(..., vocab_size)`: log-probabilities, float32.

    Raises:
        NonFiniteRewardError: a reward is NaN or infinite.
        PRTValueError: the last axes differ.
    """
    _check_same_columns(backbone_logits.shape[-1], reward.shape[-1])
    return _log_probs(backbone_logits.float(), check_finite(reward).float(), strength)


def reward_entropy(reward: torch.Tensor) -> torch.Tensor:
    """H(rho), rho = softmax(r_theta(x, .)), in nats (Eq. 12).

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
) -> torch.Tensor:
    """The training loss: Eq. 7 and Algorithm 1, with the entropy term of Eq. 12.

    Over the positions with `labels != -100`, equals the sum of
    `cross_entropy(combine(backbone_logits, reward, 1 / kl_coef), labels) - entropy_coef * reward_entropy(reward)`
    divided by `num_items_in_batch`. The gradient goes to `reward` alone.

    Args:
        backbone_logits, reward (`torch.FloatTensor` of shape `(..., vocab_size)`): as in [`combine`].
        labels (`torch.LongTensor` of shape `(...)`): already aligned with the logits (shifted, for language models).
        kl_coef (`float`): lambda, the weight of KL(pi || pi_pt) in Eq. 5; 1 in the paper.
        entropy_coef (`float`): alpha of Eq. 12; 0 leaves the term out, 1e-5 ... 1e-1 in the paper.
        num_items_in_batch (`int` or 0-dim tensor): supervised positions of the whole optimiser step, so that
            accumulated micro-batches weigh every token alike; by default those counted here.

    Returns:
        0-dim `torch.FloatTensor`, nats per supervised position; 0 (with a gradient of 0) where none is supervised but
        `num_items_in_batch` says that others are.

    Raises:
        NonFiniteRewardError: a reward at a supervised position is NaN or infinite.
        PRTValueError: no position of the step is supervised, or the shapes do not match.
    """
    backbone_logits, reward, labels = _supervised(backbone_logits, reward, labels)
    items = len(labels) if num_items_in_batch is None else num_items_in_batch
    check_supervised(items, "the whole optimiser step")
    log_probs = _log_probs(backbone_logits, reward, 1 / kl_coef)
    loss = F.nll_loss(log_probs, labels, reduction="sum")
    if entropy_coef:
        loss = loss - entropy_coef * reward_entropy(reward).sum()
    return loss / items


@torch.no_grad()
def prt_statistics(
    backbone_logits: torch.Tensor, reward: torch.Tensor, labels: torch.LongTensor, *, kl_coef: float = 1.0
) -> dict[str, torch.Tensor]:
    """What is worth watching while a reward is tuned: `torch.FloatTensor`s of the shape of `labels`, 0 where ignored.

    - `count`: 1 at supervised positions
    - `loss`: -log pi_theta(y* | x), nats, without the entropy term
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
    values = {
        "count": torch.ones_like(chosen),
        "loss": -log_probs.gather(-1, chosen[:, None])[:, 0],
        "accuracy": log_probs.argmax(-1) == chosen,
        "reward_accuracy": reward.argmax(-1) == chosen,
        "reward_entropy": reward_entropy(reward),
        "reward_abs": (reward - reward.mean(-1, keepdim=True)).abs().mean(-1),
        # 0 * (-inf - -inf) at tokens that the backbone rules out
        "kl": divergence.nan_to_num(nan=0.0).sum(-1),
    }
    zeros = torch.zeros(labels.shape, device=labels.device)
    return {name: zeros.masked_scatter(keep, value.float()) for name, value in values.items()}


class Projection(NamedTuple):
    """The logits of one network at n positions, not made yet.

    Equals `sum(h @ w.T for h, w in zip(hidden, weights)) + bias`, or `softcap * tanh(. / softcap)` of it. A head with
    LoRA is two pieces: its base's, and the rank's.

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
        return len(self.hidden[0]), len(self.weights[0])

    @torch.no_grad()
    def logits(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """`torch.FloatTensor` of shape `(n, vocab_size)`, float32, without a gradient; in `out` if given."""
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
        """Positions whose logits are held together."""
        count, columns = self.shape
        held = _CHUNK_ON_CPU if self.hidden[0].device.type == "cpu" else _CHUNK_ELSEWHERE
        rows = max(1, held // columns)
        return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]

    def at(self, part: slice) -> "Projection":
        return self._replace(hidden=tuple(hidden[part] for hidden in self.hidden))

    def cast(self) -> "Projection":
        """Every piece in the dtype that its product is made in: autocast's, else that of the weight."""
        device = self.hidden[0].device.type
        weights = self.weights
        if torch.is_autocast_enabled(device):
            weights = tuple(weight.to(torch.get_autocast_dtype(device)) for weight in weights)
        hidden = tuple(hidden.to(weight.dtype) for hidden, weight in zip(self.hidden, weights, strict=True))
        return self._replace(hidden=hidden, weights=weights)


def fused_prt_loss(
    backbone: Projection,
    reward: Projection,
    labels: torch.LongTensor,
    *,
    kl_coef: float = 1.0,
    entropy_coef: float = 0.0,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """The training loss (Eq. 7, 12) without whole logits, forward or backward.

    Equals `prt_loss(backbone.logits(), reward.logits(), labels, ...)`. The gradient, to the reward's hidden states, its
    bias and those of its weights that want one, is computed in the forward pass, from the same chunks.

    Args:
        backbone, reward ([`Projection`]): at the supervised positions. Where both have one frozen head (the reward's
            base is the backbone) its product is made once, as (h_b + h_r / kl_coef) W^T.
        labels (`torch.LongTensor` of shape `(n,)`): none of them ignored.
        kl_coef, entropy_coef, num_items_in_batch: as in [`prt_loss`].

    Raises:
        NonFiniteRewardError: a reward is NaN or infinite.
        PRTValueError: no position of the step is supervised, or the shapes do not match.
    """
    _check_same_columns(backbone.shape[1], reward.shape[1])
    _check_same_positions(labels, reward.shape[:1])
    items = len(labels) if num_items_in_batch is None else num_items_in_batch
    check_supervised(items, "the whole optimiser step")
    shared = _same_tensor(backbone.weights[0], reward.weights[0]) and not reward.weights[0].requires_grad
    reward = reward.cast()
    with torch.no_grad():
        if shared:  # cast once
            backbone = backbone._replace(weights=(reward.weights[0], *backbone.weights[1:]))
        backbone = backbone.cast()
    with torch.autocast(labels.device.type, enabled=False):  # the operands are cast, all else is float32
        loss = _FusedLoss.apply(
            backbone, labels, kl_coef, entropy_coef, reward.softcap, reward.bias, *reward.hidden, *reward.weights
        )
    return loss / items


@torch.no_grad()
def fused_prt_statistics(
    backbone: Projection, reward: Projection, labels: torch.LongTensor, *, kl_coef: float = 1.0
) -> dict[str, torch.Tensor]:
    """Equals `prt_statistics(backbone.logits(), reward.logits(), labels, ...)`; none of `labels` is ignored."""
    backbone, reward = backbone.cast(), reward.cast()
    parts = [
        prt_statistics(backbone.at(part).logits(), reward.at(part).logits(), labels[part], kl_coef=kl_coef)
        for part in reward.chunks() or [slice(0)]
    ]
    return {name: torch.cat([values[name] for values in parts]) for name in parts[0]}


class _FusedLoss(torch.autograd.Function):
    """The loss summed over positions."""

    @staticmethod
    def forward(ctx, backbone, labels, kl_coef, entropy_coef, softcap, bias, *pieces):
        hidden, weights = pieces[: len(pieces) // 2], pieces[len(pieces) // 2 :]
        reward = Projection(hidden, weights, bias, softcap)
        gradients = _Gradients(reward, ctx.needs_input_grad[-1 - len(pieces) :])
        # The reward's own logits are needed only where something is done to them.
        is_joint = not entropy_coef and softcap is None and backbone.softcap is None
        terms = (_joint(backbone, reward, kl_coef),) if is_joint else (backbone, reward)
        parts = reward.chunks()
        # The same memory for every chunk: fresh pages would cost as much as the arithmetic.
        rows = parts[0].stop if parts else 0
        buffers = [torch.empty(rows, reward.shape[1], dtype=torch.float32, device=labels.device) for _ in terms]
        loss, total = torch.zeros(2, dtype=torch.float32, device=labels.device)
        for part in parts:
            chosen = labels[part, None]
            z, *of_reward = (
                term.at(part).logits(out=buffer[: len(chosen)]) for term, buffer in zip(terms, buffers, strict=True)
            )
            r = z if is_joint else of_reward[0]
            total += r.sum()
            if not is_joint:
                z.add_(r, alpha=1 / kl_coef)
            largest, where = z.max(1, keepdim=True)
            of_label = z.gather(1, chosen)
            torch.softmax(z, 1, out=z)
            loss += (largest - z.gather(1, where).log() - of_label).sum()
            # From here on, z holds the derivative of the loss with respect to r.
            z.scatter_add_(1, chosen, z.new_full(chosen.shape, -1.0))
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
    def backward(ctx, of_loss):
        return *[None] * 5, *(None if tensor is None else tensor * of_loss for tensor in ctx.saved_tensors)


class _Gradients:
    """Of the loss with respect to a reward's bias, hidden states and weights, added up over chunks."""

    def __init__(self, reward: Projection, wanted: tuple[bool, ...]):
        self._reward = reward
        inputs = (reward.bias, *reward.hidden, *reward.weights)
        # What adds up over chunks does so in float32, as in one large product.
        dtypes = [torch.float32, *(hidden.dtype for hidden in reward.hidden), *[torch.float32] * len(reward.weights)]
        self.tensors = [
            torch.zeros_like(of, dtype=dtype) if want else None
            for of, dtype, want in zip(inputs, dtypes, wanted, strict=True)
        ]

    def add(self, part: slice, of_logits: torch.Tensor) -> None:
        of_bias, *rest = self.tensors
        count = len(self._reward.hidden)
        if of_bias is not None:
            of_bias += of_logits.sum(0)
        for hidden, weight, of_hidden, of_weight in zip(
            self._reward.hidden, self._reward.weights, rest[:count], rest[count:], strict=True
        ):
            of_product = of_logits.to(weight.dtype)
            if of_hidden is not None:
                of_hidden[part] = of_product @ weight
            if of_weight is not None:
                of_weight += of_product.T @ hidden[part]


def _joint(backbone: Projection, reward: Projection, kl_coef: float) -> Projection:
    """Backbone logits + reward / kl_coef, neither of which has a softcap."""
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


def _log_probs(backbone_logits, reward, strength):
    # log_softmax(backbone_logits) differs from backbone_logits by a constant per context, which cancels.
    return torch.log_softmax(backbone_logits + strength * reward, -1)


def _supervised(backbone_logits, reward, labels):
    """The supervised positions as `(n, vocab_size)`, `(n, vocab_size)`, `(n,)`, in float32."""
    _check_same_columns(backbone_logits.shape[-1], reward.shape[-1])
    _check_same_positions(labels, reward.shape[:-1])
    keep = labels != IGNORE_INDEX
    return backbone_logits[keep].detach().float(), check_finite(reward[keep]).float(), labels[keep]


def _check_same_columns(of_backbone: int, of_reward: int) -> None:
    if of_backbone != of_reward:
        raise PRTValueError(
            "Backbone and reward do not have the same number of columns.",
            expected=f"backbone logits with {of_reward} columns, as the reward",
            found=str(of_backbone),
            remedy="cut padded vocabulary rows off, or match the labels, as the contract says",
        )


def _check_same_positions(labels: torch.Tensor, positions: tuple[int, ...]) -> None:
    if labels.shape != tuple(positions):
        raise PRTValueError(
            "Labels do not match the reward's positions.",
            expected=f"labels of shape {tuple(positions)}",
            found=str(tuple(labels.shape)),
        )
