"""Measure the quantities of Prop. 3.2, and what a reward gains at its source and at a target."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..contract import TEXT_GENERATION
from ..functional import check_supervised
from ..reward.backbones import Backbone, source_backbones
from ..reward.model import RewardModel
from .reading import Reading
from .strength import Proposal, propose
from .tally import ACCURACY, ERRORS, NLL, SOURCE, TARGET, TERMS, Tally

WAYS = {
    "source": TERMS[SOURCE]["pretrained"],
    "target": TERMS[TARGET]["pretrained"],
    "prt_source": TERMS[SOURCE]["prt"],
    "prt_target": TERMS[TARGET]["prt"],
    "reward_only": TERMS[TARGET]["reward_only"],
}
RIVALS = {"target": "the target by itself", "prt_source": "the source with it", "reward_only": "the reward by itself"}


@dataclass(frozen=True)
class Portability:
    """The performance on a target backbone of a reward that was tuned on a source backbone.

    Means are over positions: the supervised tokens of a language model, or the rows of a classifier. Where the
    vocabulary of a backbone is an update of the reward's, figures are over the tokens that both have. With
    s = `strength`, Prop. 3.2 says that the PRT models of source and target are within O(sqrt(eps)) of each other, by a
    factor that grows with C. It names no values that would be enough; Table 7 has eps from 0.0016 to 0.0158 and
    C = 19.41 for image classifiers.

    Attributes:
        task (`str`): The reward's task.
        rows (`int`): The number of rows that were measured.
        positions (`int`): The number of positions that were measured.
        strength (`float`): 1 / lambda in use.
        eps (`float`): The mean of KL(pi_source || pi_target), nats.
        c_mean (`float`): The mean of C = max_y exp(s r(x, y)) / E_{y ~ pi_source} exp(s r(x, y)), which is 1 for a
            reward that changes nothing.
        c_max (`float`): The largest C.
        nll (`dict[str, float]`, *optional*): The mean of -log pi(y* | x), nats, of `source` and `target` by themselves,
            of `prt_source` and `prt_target` with the reward, and of `reward_only`, softmax(s r). None without labels.
        accuracy (`dict[str, float]`, *optional*): The accuracy of the likeliest token or label, from 0 to 1.
        advantage (`dict[str, float]`, *optional*): How much better `prt_target` is than `target`, `prt_source` and
            `reward_only`: in nats per token for language models, in accuracy for classifiers.
        standard_error (`dict[str, float]`, *optional*): The standard error of each advantage. A row counts as one draw,
            however many tokens it has; for a single row it is unknown (NaN).
        proposal ([`~evaluation.strength.Proposal`], *optional*): Another strength; None for fewer than four rows.
    """

    task: str
    rows: int
    positions: int
    strength: float
    eps: float
    c_mean: float
    c_max: float
    nll: dict[str, float] | None = None
    accuracy: dict[str, float] | None = None
    advantage: dict[str, float] | None = None
    standard_error: dict[str, float] | None = None
    proposal: Proposal | None = None

    def verdict(self) -> tuple[bool | None, list[str]]:
        """Return whether the reward is worth porting, and why.

        It is (True) if the target with the reward is better than the target by itself, the reward by itself, and the
        source with the reward, each by more than two standard errors. It is not (False) if one of these is as good or
        better. Otherwise, and for a single row or without labels, the data cannot tell (None). eps and C do not count:
        no threshold is known.
        """
        if self.advantage is None:
            return None, ["the data has no labels, so better and worse are unknown"]
        if self.rows < 2:
            return None, ["one row gives no estimate of the noise"]
        unit = "nats per token" if self.task == TEXT_GENERATION else "in accuracy"
        verdicts, reasons = [], []
        for rival, text in RIVALS.items():
            is_better = self.is_better_than(rival)
            word = {True: "better than", False: "no better than", None: "within noise of"}[is_better]
            verdicts.append(is_better)
            figures = f"{self.advantage[rival]:+.3f} +- {self.standard_error[rival]:.3f}"
            reasons.append(f"target with the reward {word} {text}: {figures} {unit}")
        worth = False if False in verdicts else (None if None in verdicts else True)
        return worth, reasons

    def is_better_than(self, rival: str) -> bool | None:
        """Return whether the target with the reward is better than `"target"`, `"prt_source"` or `"reward_only"`.

        None if the two are within two standard errors of each other.
        """
        advantage, error = self.advantage[rival], self.standard_error[rival]
        if math.isnan(advantage) or math.isnan(error) or (error and abs(advantage) <= ERRORS * error):
            return None
        return advantage > 0

    def to_dict(self) -> dict:
        """Return the figures for JSON, with None for numbers that are not finite."""
        return {name: to_json_numbers(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, entries: dict) -> "Portability":
        """Read what [`to_dict`] returned."""
        proposal = entries.get("proposal")
        figures = {name: from_json_numbers(value) if name in _FIGURES else value for name, value in entries.items()}
        return cls(**figures | {"proposal": proposal and Proposal(**proposal)})


def measure_portability(
    reward: RewardModel,
    target: PreTrainedModel | Backbone,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    strength: float | None = None,
    source: PreTrainedModel | Backbone | None = None,
    **load_kwargs: Any,
) -> Portability:
    """Run source, target and reward once over the batches.

    Args:
        reward ([`RewardModel`]): The reward; inputs are moved to its device.
        target: pi_pt at use.
        batches: Inputs of the models, see [`~evaluation.reading.Reading.parts`]; the backbones are source and target,
            in this order. Classifiers may be without labels.
        strength (`float`, *optional*): 1 / lambda; by default that of the reward's training.
        source (*optional*): pi_pt in training; by default the reward's base with the adapter off, or the (first) model
            that the reward names.
        **load_kwargs: Arguments of `from_pretrained` for the latter.

    Raises:
        VocabularyMismatchError, LabelMismatchError: The target does not fit the reward, or lacks a token of a text.
        ContextLengthError: A text is longer than one of the models can read.
        NonFiniteRewardError: A reward is NaN or infinite.
        PRTValueError: Nothing is supervised, or the source backbone is unknown.
    """
    if source is None:
        source = source_backbones(reward, **load_kwargs)[0]
    backbones = [each if isinstance(each, Backbone) else Backbone(reward, each) for each in (source, target)]
    reading = Reading(reward, dict(zip((SOURCE, TARGET), backbones, strict=True)))
    tally = counted(reading, batches, reward.config.strength if strength is None else strength)
    return portability_of(tally, reward.config.task, reading.is_labelled)


@torch.no_grad()
def counted(reading: Reading, batches: Iterable[dict[str, torch.Tensor]], strength: float) -> Tally:
    """Read all batches and add up the figures; raise `PRTValueError` if nothing is supervised."""
    tally = Tally(strength)
    for part in reading.parts(batches):
        tally.add(part)
    check_supervised(tally.positions, "the data")
    return tally


def portability_of(tally: Tally, task: str, is_labelled: bool = True) -> Portability:
    """Return the figures of a tally of source, target and reward."""
    figures = {}
    if is_labelled:
        if task == TEXT_GENERATION:  # less is better
            apart = {rival: tally.difference(WAYS[rival], WAYS["prt_target"], NLL) for rival in RIVALS}
        else:
            apart = {rival: tally.difference(WAYS["prt_target"], WAYS[rival], ACCURACY) for rival in RIVALS}
        figures = {
            "nll": {way: tally.mean(terms, NLL) for way, terms in WAYS.items()},
            "accuracy": {way: tally.mean(terms, ACCURACY) for way, terms in WAYS.items()},
            "advantage": {rival: difference for rival, (difference, _) in apart.items()},
            "standard_error": {rival: error for rival, (_, error) in apart.items()},
            "proposal": propose(tally),
        }
    return Portability(
        task=task,
        rows=tally.rows,
        positions=tally.positions,
        strength=tally.strength,
        eps=tally.totals["eps"] / tally.positions,
        c_mean=tally.totals["c"] / tally.positions,
        c_max=tally.c_max,
        **figures,
    )


_FIGURES = ("eps", "c_mean", "c_max", "nll", "accuracy", "advantage", "standard_error")


def to_json_numbers(value: Any) -> Any:
    """Replace numbers that are not finite, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {name: to_json_numbers(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_numbers(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json_numbers(value: Any) -> Any:
    """Replace None by infinity."""
    if isinstance(value, dict):
        return {name: from_json_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [from_json_numbers(each) for each in value]
    return math.inf if value is None else value
