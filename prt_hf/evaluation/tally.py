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
SOURCE, TARGET, TUNED_SOURCE = "source", "target", "tuned_source"
# Methods at a target that are a network of this name.
ALONE = ("finetuned", "transplanted", "few_shot", "lora", "lora_steps", "lora_compute", "baked")

Terms = dict[str, float]  # network -> sign, or factor of the reward
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
        **{method: {method: 1} for method in ALONE},
    },
}
_DISTINCT = list({tuple(t.items()): t for methods in TERMS.values() for t in methods.values()}.values())
MEASURES = NLL, ACCURACY, ENTROPY = "nll", "accuracy", "entropy"
FACTORS = tuple(tenths / 10 for tenths in range(1, 21))  # of the strength in use, which a line search tries

Z = 1.959963984540054  # of a 95 % interval
ERRORS = 2  # standard errors that a difference has to be away from 0
_INFINITE = math.inf, -math.inf, math.inf
_UNKNOWN = _INFINITE[1:]


def at_factor(factor: float) -> Terms:
    """Return the terms of the target with the reward at `factor` times the strength."""
    return {TARGET: 1, REWARD: factor}


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
        for terms in _DISTINCT:
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
            self._add(part, terms, dict(zip(MEASURES, (losses, hits, entropies), strict=True)))
        if {TARGET, REWARD} <= log_probs.keys():
            self._search(part, log_probs[TARGET], log_probs[REWARD])

    @property
    def rows(self) -> int:
        """The number of rows with supervised positions."""
        return int((self._counts > 0).sum())

    @property
    def counts(self) -> list[int]:
        """The number of positions of each row."""
        return self._counts.int().tolist()

    def scores(self, terms: Terms, measure: str) -> list[float]:
        """Return the sum of a measure over the positions of each row, to six decimals."""
        return [round(value, 6) for value in self._sums_of(terms, measure).tolist()]

    def halves(self) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Return the indices of every other row with supervised positions, and of the rows between them."""
        rows = self._counts.nonzero()[:, 0]
        return rows[::2], rows[1::2]

    def mean(self, terms: Terms, measure: str) -> float:
        """Return the mean of a measure over all positions."""
        return self._sums_of(terms, measure).sum().item() / self.positions

    def mean_over(self, rows: torch.LongTensor, terms: Terms, measure: str) -> float:
        """Return the mean of a measure over the positions of some rows."""
        return (self._sums_of(terms, measure)[rows].sum() / self._counts[rows].sum()).item()

    def difference(
        self, terms: Terms, other: Terms, measure: str, rows: torch.LongTensor | slice = slice(None)
    ) -> tuple[float, float]:
        """Return the mean of `terms` minus that of `other`, and the standard error of the difference."""
        apart = self._sums_of(terms, measure) - self._sums_of(other, measure)
        return mean_and_error(apart[rows], self._counts[rows])

    def nll(self, terms: Terms) -> Estimate:
        """Return the mean of -log pi(y* | x), in nats."""
        return Estimate.around(*mean_and_error(self._sums_of(terms, NLL), self._counts))

    def accuracy(self, terms: Terms) -> Estimate:
        """Return the share, from 0 to 1, of positions whose likeliest token or label is right; Wilson's interval.

        Tokens of one text are not independent draws: the interval is that of as many independent ones as have the same
        standard error over rows.
        """
        mean, error = mean_and_error(self._sums_of(terms, ACCURACY), self._counts)
        count = self.rows
        if self.positions > self.rows and 0 < mean < 1 and error > 0:
            count = min(self.positions, mean * (1 - mean) / error**2)
        return wilson(mean, count)

    def _search(self, part: Part, log_target: torch.Tensor, reward: torch.Tensor) -> None:
        """Add what every other strength of the line search gives, in float32, which is six times as fast."""
        at_label = [values.gather(-1, part.labels[:, None])[:, 0] for values in (log_target, reward)]
        log_target, reward = log_target.float(), reward.float()
        for factor in FACTORS:
            if factor == 1:
                continue  # counted already
            scores = torch.add(log_target, reward, alpha=factor)
            losses = scores.logsumexp(-1).to(at_label[0]) - at_label[0] - factor * at_label[1]
            hits = (scores.argmax(-1) == part.labels).to(losses)
            self._add(part, at_factor(factor), {NLL: losses, ACCURACY: hits})

    def _add(self, part: Part, terms: Terms, found: dict[str, torch.Tensor]) -> None:
        """Add values `(n,)` of each measure to the sums of their rows."""
        for measure, values in found.items():
            sums = self._sums.setdefault((tuple(terms.items()), measure), torch.zeros_like(self._counts))
            sums.index_add_(0, part.rows, values.cpu().double())

    def _sums_of(self, terms: Terms, measure: str) -> torch.Tensor:
        return self._sums[tuple(terms.items()), measure]

    def _grow(self, rows: int) -> None:
        more = rows - len(self._counts)
        if more > 0:
            self._counts = torch.nn.functional.pad(self._counts, (0, more))
            self._sums = {key: torch.nn.functional.pad(sums, (0, more)) for key, sums in self._sums.items()}


def mean_and_error(sums: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """Return the mean over positions, of sums over rows `(rows,)` with their counts, and its standard error.

    It is a ratio of sums over rows, which are the draws; the error of a single row is NaN.
    """
    kept = counts > 0
    counts, sums = counts[kept], sums[kept]
    rows, total = len(counts), counts.sum()
    mean = sums.sum() / total
    squares = (sums - mean * counts).square().sum()
    return mean.item(), (squares * rows / (rows - 1)).sqrt().item() / total.item() if rows > 1 else math.nan


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
