"""The ways that networks are added up to one model, and how good each of them is, with its sampling error."""

import math
from typing import NamedTuple

import torch

from ..functional import check_finite
from .reading import REWARD, Part

# Networks
SOURCE, TARGET, TUNED_SOURCE, TUNED_TARGET = "source", "target", "tuned_source", "tuned_target"

# Way -> the log-probabilities (of the reward, the rewards times the strength) that add up to it, up to a constant.
TERMS: dict[str, dict[str, int]] = {
    "source": {SOURCE: 1},
    "target": {TARGET: 1},
    "prt_source": {SOURCE: 1, REWARD: 1},
    "prt_target": {TARGET: 1, REWARD: 1},
    "reward_only": {REWARD: 1},
    "eft_target": {TARGET: 1, TUNED_SOURCE: 1, SOURCE: -1},
    "tuned_source": {TUNED_SOURCE: 1},
    "tuned_target": {TUNED_TARGET: 1},
}
MEASURES = NLL, ACCURACY, ENTROPY = "nll", "accuracy", "entropy"

Z = 1.959963984540054  # of a 95 % interval
_INFINITE = math.inf, -math.inf, math.inf
_UNKNOWN = _INFINITE[1:]


class Estimate(NamedTuple):
    """A figure and its 95 % confidence interval, infinite where the sampling error is not known."""

    value: float
    low: float
    high: float

    @classmethod
    def around(cls, value: float, error: float) -> "Estimate":
        """With 1.96 standard errors on either side."""
        return cls(value, value - Z * error, value + Z * error) if math.isfinite(error) else cls(value, *_UNKNOWN)

    @classmethod
    def from_json(cls, numbers: list[float | None]) -> "Estimate":
        """Of JSON, which has None in the place of infinity."""
        return cls(*(end if number is None else number for number, end in zip(numbers, _INFINITE, strict=True)))


class Tally:
    """Over positions, the sums that every figure is the mean of; rows are the draws, however many positions they have.

    Args:
        strength (`float`): 1 / lambda.

    Attributes:
        positions (`int`): supervised tokens, or examples.
        c_max (`float`), totals (`dict[str, float]`): of `eps` and `c`, where source, target and reward were read.
    """

    def __init__(self, strength: float):
        self.strength = float(strength)
        self.positions, self.c_max = 0, 0.0
        self.totals = {"eps": 0.0, "c": 0.0}
        self._counts = torch.zeros(0, dtype=torch.float64)  # (rows,)
        self._sums: dict[tuple[str, str], torch.Tensor] = {}  # (way, measure) -> (rows,)

    def add(self, part: Part) -> None:
        """
        Raises:
            NonFiniteRewardError: the fine-tuned source is undefined relative to the source (EFT).
        """
        terms = {name: values if name == REWARD else values.log_softmax(-1) for name, values in part.logits.items()}
        if REWARD in terms:
            terms[REWARD] = self.strength * terms[REWARD]
        self.positions += len(part.labels)
        self._grow(int(part.rows.max()) + 1)
        self._counts.index_add_(0, part.rows, torch.ones(len(part.rows), dtype=torch.float64))
        if {SOURCE, TARGET, REWARD} <= terms.keys():
            concentration = log_concentration(terms[SOURCE], terms[REWARD]).exp()
            self.c_max = max(self.c_max, concentration.max().item())
            self.totals["c"] += concentration.sum().item()
            self.totals["eps"] += divergence(terms[SOURCE], terms[TARGET]).sum().item()
        for way, signs in TERMS.items():
            if not signs.keys() <= terms.keys():
                continue
            scores = sum(terms[name] for name, sign in signs.items() if sign > 0)
            for name in (name for name, sign in signs.items() if sign < 0):
                scores = check_finite(scores - terms[name])
            log_pi = scores.log_softmax(-1)
            losses = -log_pi.gather(-1, part.labels[:, None])[:, 0]
            hits = (scores.argmax(-1) == part.labels).to(losses)
            entropies = -(log_pi.exp() * log_pi).masked_fill(log_pi.isneginf(), 0.0).sum(-1)
            for measure, values in zip(MEASURES, (losses, hits, entropies), strict=True):
                sums = self._sums.setdefault((way, measure), torch.zeros_like(self._counts))
                sums.index_add_(0, part.rows, values.cpu().double())

    @property
    def rows(self) -> int:
        """With supervised positions."""
        return int((self._counts > 0).sum())

    @property
    def ways(self) -> list[str]:
        """Those whose networks were read."""
        return [way for way in TERMS if (way, NLL) in self._sums]

    def mean(self, way: str, measure: str) -> float:
        return self._sums[way, measure].sum().item() / self.positions

    def difference(self, way: str, other: str, measure: str) -> tuple[float, float]:
        """By how much the mean of a way is larger, and the standard error of that."""
        return self._ratio(self._sums[way, measure] - self._sums[other, measure])

    def nll(self, way: str) -> Estimate:
        """Mean of -log pi(y* | x), nats."""
        return Estimate.around(*self._ratio(self._sums[way, NLL]))

    def accuracy(self, way: str) -> Estimate:
        """Of the likeliest token or label, from 0 to 1, with Wilson's interval.

        Tokens of one text are no draws of their own: the interval is that of as many independent ones as have the
        standard error over rows.
        """
        mean, error = self._ratio(self._sums[way, ACCURACY])
        count = self.rows
        if self.positions > self.rows and 0 < mean < 1 and error > 0:
            count = min(self.positions, mean * (1 - mean) / error**2)
        return wilson(mean, count)

    def _ratio(self, sums: torch.Tensor) -> tuple[float, float]:
        """Mean over positions, and its standard error: a ratio of sums over rows. Of a single row it is not known."""
        kept = self._counts > 0
        counts, sums = self._counts[kept], sums[kept]
        rows, total = len(counts), counts.sum()
        mean = sums.sum() / total
        squares = (sums - mean * counts).square().sum()
        return mean.item(), (squares * rows / (rows - 1)).sqrt().item() / total.item() if rows > 1 else math.nan

    def _grow(self, rows: int) -> None:
        more = rows - len(self._counts)
        if more > 0:
            self._counts = torch.nn.functional.pad(self._counts, (0, more))
            self._sums = {key: torch.nn.functional.pad(sums, (0, more)) for key, sums in self._sums.items()}


def wilson(share: float, count: float) -> Estimate:
    """The 95 % score interval of Wilson (1927) for a share of `count` independent draws."""
    spread = Z**2 / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, of log-probabilities `(..., size)` -> `(...)`; infinite where q rules out what p does not."""
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill(p == 0, 0.0).sum(-1).clamp(min=0)


def log_concentration(log_p: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """log C of Prop. 3.2: max_y r(y) - log E_{y ~ p} exp(r(y)), `(..., size)` -> `(...)`, 0 for constant rewards."""
    return reward.max(-1).values - torch.logsumexp(log_p + reward, -1)
