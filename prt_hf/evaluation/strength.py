"""Propose a strength: a line search over 1 / lambda in the pass that measures a reward."""

import math
from dataclasses import dataclass

from .tally import ACCURACY, ERRORS, FACTORS, NLL, Tally, at_factor

_FEWEST_ROWS = 4  # two in each half, so that the noise is known


@dataclass(frozen=True)
class Proposal:
    """The strength that serves one half of the rows best, and what it gains on the other half.

    The first half has every other row. Best is the lowest negative log-likelihood, for classifiers too: it tells
    strengths apart where accuracy does not. Searched are a tenth to twice the present strength, in steps of a tenth.

    Attributes:
        present (`float`): The strength in use.
        strength (`float`): The proposed one.
        rows (`int`): The number of rows of the other half.
        gain (`float`): By how much -log pi(y* | x) falls there against the present strength, in nats.
        standard_error (`float`): The standard error of the gain.
        accuracy_gain (`float`): By how much the accuracy rises there, from -1 to 1.
    """

    present: float
    strength: float
    rows: int
    gain: float
    standard_error: float
    accuracy_gain: float

    @property
    def is_better(self) -> bool:
        """Whether the gain is more than two standard errors."""
        return self.strength != self.present and self.gain > ERRORS * self.standard_error

    def __str__(self) -> str:
        """Return the proposal as a sentence; if it is better, with the option to copy."""
        figures = (
            f"{self.gain:+.4f} +- {self.standard_error:.4f} nats, {100 * self.accuracy_gain:+.1f} points of accuracy "
            f"on the {self.rows} other rows"
        )
        if self.strength == self.present:
            return f"strength: {self.present:g}, the present one, is best on half of the rows"
        if not self.is_better:
            return (
                f"strength: stay at {self.present:g}; {self.strength:g} is best on half of the rows, and within noise "
                f"or worse on the others: {figures}"
            )
        edge = "; the search ends there" if self.strength == at_present(FACTORS[-1], self.present) else ""
        return f"strength: use --strength {self.strength:g} in the place of {self.present:g}: {figures}{edge}"


def at_present(factor: float, present: float) -> float:
    """Return a strength without the digits that a product of floats leaves: 0.7, not 0.7000000000000001."""
    return float(f"{factor * present:.6g}")


def propose(tally: Tally) -> Proposal | None:
    """Return the best strength by a tally of target and reward; None for fewer than four rows or without noise."""
    if tally.rows < _FEWEST_ROWS:
        return None
    first, second = tally.halves()
    means = {factor: tally.mean_over(first, at_factor(factor), NLL) for factor in FACTORS}
    best = min(means, key=lambda factor: (means[factor], abs(factor - 1)))
    gain, error = tally.difference(at_factor(1), at_factor(best), NLL, second)
    if not (math.isfinite(gain) and math.isfinite(error)):
        return None
    more, _ = tally.difference(at_factor(best), at_factor(1), ACCURACY, second)
    strength = at_present(best, tally.strength)
    return Proposal(tally.strength, strength, len(second), gain, error, more)
