"""Count how good each method is at each place, with its sampling error.

A method adds up log-probabilities of a few networks; `TERMS` is the one list of them. Its figures are those of its
distribution over the tokens that the reward and all of these networks have.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..functional import check_finite
from .reading import REWARD, Part

# Networks; the first two are the places as well.
SOURCE, TARGET, TUNED_SOURCE, TUNED_TARGET = "source", "target", "tuned_source", "tuned_target"

Terms = dict[str, int]  # network -> sign
# Place -> method -> the log-probabilities (for the reward, strength * r) whose sum is log pi, up to a constant.
TERMS: dict[str, dict[str, Terms]] = {
    SOURCE: {
        "pretrained": {SOURCE: 1},
        "eft": {TUNED_SOURCE: 1},  # log pi_source + log pi_tuned - log pi_source
        "prt": {SOURCE: 1, REWARD: 1},
        "reward_only": {REWARD: 1},
        "finetuned": {TUNED_SOURCE: 1},
    },
    TARGET: {
        "pretrained": {TARGET: 1},
        "eft": {TARGET: 1, TUNED_SOURCE: 1, SOURCE: -1},
        "prt": {TARGET: 1, REWARD: 1},
        "reward_only": {REWARD: 1},
        "finetuned": {TUNED_TARGET: 1},
    },
}
_DISTINCT = {tuple(terms.items()): terms for methods in TERMS.values() for terms in methods.values()}
MEASURES = NLL, ACCURACY, ENTROPY = "nll", "accuracy", "entropy"

Z = 1.959963984540054  # of a 95 % interval
_INFINITE = math.inf, -math.inf, math.inf
_UNKNOWN = _INFINITE[1:]


class Estimate(NamedTuple):
    """A figure and its 95 % confidence interval, which is infinite if the sampling error is unknown."""

    value: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, error: float) -> "Estimate":
        """Return the interval of 1.96 standard errors on either side of `value`."""
        return cls(value, value - Z * error, value + Z * error) if math.isfinite(error) else cls(value, *_UNKNOWN)

    @classmethod
    def from_json(cls, numbers: list[float | None]) -> "Estimate":
        """Read an estimate from JSON, where None stands for infinity."""
        return cls(*(end if number is None else number for number, end in zip(numbers, _INFINITE, strict=True)))


class Tally:
    """Sums over positions, of which every figure is the mean. A row counts as one draw, however many positions it has.

    Args:
        strength (`float`): 1 / lambda.

    Attributes:
        positions (`int`): The number of supervised tokens, or of examples.
        c_max (`float`): The largest C of Prop. 3.2, if source, target and reward were read.
        totals (`dict[str, float]`): The sums of `eps` and `c` of Prop. 3.2, under the same condition.
    """

    def __init__(self, strength: float):
        self.strength = float(strength)
        self.positions, self.c_max = 0, 0.0
        self.totals = {"eps": 0.0, "c": 0.0}
        self._counts = torch.zeros(0, dtype=torch.float64)  # (rows,)
        self._sums: dict[tuple, torch.Tensor] = {}  # (terms, measure) -> (rows,)

    def add(self, part: Part) -> None:
        """Add a few positions.

        Raises:
            NonFiniteRewardError: EFT is undefined, because the source rules out what the fine-tuned source does not.
        """
        log_probs = {name: values if name == REWARD else values.log_softmax(-1) for name, values in part.logits.items()}
        if REWARD in log_probs:
            log_probs[REWARD] = self.strength * log_probs[REWARD]
        self.positions += len(part.labels)
        self._grow(int(part.rows.max()) + 1)
        self._counts.index_add_(0, part.rows, torch.ones(len(part.rows), dtype=torch.float64))
        if {SOURCE, TARGET, REWARD} <= log_probs.keys():
            absent = _absent(part, (SOURCE, TARGET))
            log_source, log_target = log_probs[SOURCE], log_probs[TARGET]
            if absent is not None:
                log_source, log_target = (_without(each, absent).log_softmax(-1) for each in (log_source, log_target))
            concentration = log_concentration(log_source, _without(log_probs[REWARD], absent)).exp()
            self.c_max = max(self.c_max, concentration.max().item())
            self.totals["c"] += concentration.sum().item()
            self.totals["eps"] += divergence(log_source, log_target).sum().item()
        for key, terms in _DISTINCT.items():
            if not terms.keys() <= log_probs.keys():
                continue
            scores = sum(log_probs[name] for name, sign in terms.items() if sign > 0)
            absent = _absent(part, terms)
            for name in (name for name, sign in terms.items() if sign < 0):
                scores = _without(scores - log_probs[name], absent, 0.0)
                check_finite(scores)
            scores = _without(scores, absent)
            log_pi = scores.log_softmax(-1)
            losses = -log_pi.gather(-1, part.labels[:, None])[:, 0]
            hits = (scores.argmax(-1) == part.labels).to(losses)
            entropies = -(log_pi.exp() * log_pi).masked_fill(log_pi.isneginf(), 0.0).sum(-1)
            for measure, values in zip(MEASURES, (losses, hits, entropies), strict=True):
                sums = self._sums.setdefault((key, measure), torch.zeros_like(self._counts))
                sums.index_add_(0, part.rows, values.cpu().double())

    @property
    def rows(self) -> int:
        """The number of rows with supervised positions."""
        return int((self._counts > 0).sum())

    def mean(self, terms: Terms, measure: str) -> float:
        """Return the mean of a measure over all positions."""
        return self._sums_of(terms, measure).sum().item() / self.positions

    def difference(self, terms: Terms, other: Terms, measure: str) -> tuple[float, float]:
        """Return the mean of `terms` minus that of `other`, and the standard error of the difference."""
        return self._ratio(self._sums_of(terms, measure) - self._sums_of(other, measure))

    def nll(self, terms: Terms) -> Estimate:
        """Return the mean of -log pi(y* | x), in nats."""
        return Estimate.around(*self._ratio(self._sums_of(terms, NLL)))

    def accuracy(self, terms: Terms) -> Estimate:
        """Return the share, from 0 to 1, of positions whose likeliest token or label is right; Wilson's interval.

        Tokens of one text are not independent draws: the interval is that of as many independent ones as have the same
        standard error over rows.
        """
        mean, error = self._ratio(self._sums_of(terms, ACCURACY))
        count = self.rows
        if self.positions > self.rows and 0 < mean < 1 and error > 0:
            count = min(self.positions, mean * (1 - mean) / error**2)
        return wilson(mean, count)

    def _ratio(self, sums: torch.Tensor) -> tuple[float, float]:
        """Return the mean over positions and its standard error (a ratio of sums over rows; NaN for a single row)."""
        kept = self._counts > 0
        counts, sums = self._counts[kept], sums[kept]
        rows, total = len(counts), counts.sum()
        mean = sums.sum() / total
        squares = (sums - mean * counts).square().sum()
        return mean.item(), (squares * rows / (rows - 1)).sqrt().item() / total.item() if rows > 1 else math.nan

    def _sums_of(self, terms: Terms, measure: str) -> torch.Tensor:
        return self._sums[tuple(terms.items()), measure]

    def _grow(self, rows: int) -> None:
        more = rows - len(self._counts)
        if more > 0:
            self._counts = torch.nn.functional.pad(self._counts, (0, more))
            self._sums = {key: torch.nn.functional.pad(sums, (0, more)) for key, sums in self._sums.items()}


def _absent(part: Part, names: Iterable[str]) -> torch.Tensor | None:
    """Return the reward's tokens that one of the networks lacks; None if there are none."""
    absent = [part.absent[name] for name in names if name in part.absent]
    return torch.cat(absent).to(part.labels.device) if absent else None


def _without(values: torch.Tensor, absent: torch.Tensor | None, fill: float = -torch.inf) -> torch.Tensor:
    return values if absent is None else values.index_fill(-1, absent, fill)


def wilson(share: float, count: float) -> Estimate:
    """Return a share of `count` independent draws with its 95 % score interval (Wilson, 1927)."""
    spread = Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) in nats, `(..., size)` -> `(...)`; infinite where q rules out what p does not.

    Args:
        log_p: log-probabilities.
        log_q: log-probabilities.
    """
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill(p == 0, 0.0).sum(-1).clamp(min=0)


def log_concentration(log_p: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """Return log C of Prop. 3.2, max_y r(y) - log E_{y ~ p} exp(r(y)); 0 for a constant reward.

    Args:
        log_p (`torch.Tensor` of shape `(..., size)`): log-probabilities.
        reward (`torch.Tensor` of shape `(..., size)`): strength * r.

    Returns:
        `torch.Tensor` of shape `(...)`.
    """
    return reward.max(-1).values - torch.logsumexp(log_p + reward, -1)
