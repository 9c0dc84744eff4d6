"""The quantities of Prop. 3.2, measured, and what a reward gains at its source and at a target."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from ..contract import TEXT_GENERATION
from ..functional import check_supervised
from ..reward.backbones import Backbone, source_backbones
from ..reward.model import RewardModel
from .reading import Reading
from .tally import ACCURACY, NLL, SOURCE, TARGET, Tally

WAYS = ("source", "target", "prt_source", "prt_target", "reward_only")
RIVALS = {
    "target": "the target by itself",
    "prt_source": "the source with it",
    "reward_only": "the reward by itself",
}
_ERRORS = 2  # standard errors that a difference has to be away from 0


@dataclass(frozen=True)
class Portability:
    """How a reward that was tuned on a source backbone does on a target backbone.

    Means are over positions: the supervised tokens of a language model, or the rows of a classifier. With
    s = `strength`, Prop. 3.2 says that the PRT models of source and target are within O(sqrt(eps)) of each other, by a
    factor that grows with C. It names no values of either that would be enough; Table 7 has eps of 0.0016 to 0.0158 and
    C = 19.41 for image classifiers.

    Attributes:
        task (`str`): of the reward.
        rows, positions (`int`): that were measured.
        strength (`float`): 1 / lambda in use.
        eps (`float`): mean of KL(pi_source || pi_target), nats.
        c_mean, c_max (`float`): mean and maximum of C = max_y exp(s r(x, y)) / E_{y ~ pi_source} exp(s r(x, y)), 1 for
            a reward that changes nothing.
        nll (`dict[str, float]`, *optional*): mean of -log pi(y* | x), nats, of `source` and `target` by themselves, of
            `prt_source` and `prt_target` with the reward, and of `reward_only`, softmax(s r). None without labels.
        accuracy (`dict[str, float]`, *optional*): of the likeliest token or label, by the same names, from 0 to 1.
        advantage (`dict[str, float]`, *optional*): by how much `prt_target` is better than `target`, `prt_source` and
            `reward_only`: in nats per token for language models, in accuracy for classifiers.
        standard_error (`dict[str, float]`, *optional*): of each advantage; a row counts as one draw, however
            many tokens it has; of a single row it is not known (NaN).
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

    def verdict(self) -> tuple[bool | None, list[str]]:
        """Whether the reward is worth porting, and why.

        It is where the target with the reward is better than the target by itself, than the reward by itself, and than
        the source with the reward, each by more than two standard errors; it is not where one of these is as good or
        better; else, of a single row or without labels, the data does not tell (None). eps and C do not enter: no
        threshold is known.
        """
        if self.advantage is None:
            return None, ["the data has no labels, so that nothing tells better from worse"]
        if self.rows < 2:
            return None, ["one row tells nothing of the noise"]
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
        """Whether the target with the reward is better than `"target"`, `"prt_source"` or `"reward_only"`; None where
        the two are within two standard errors of each other."""
        advantage, error = self.advantage[rival], self.standard_error[rival]
        if math.isnan(advantage) or math.isnan(error) or (error and abs(advantage) <= _ERRORS * error):
            return None
        return advantage > 0

    def to_dict(self) -> dict:
        """For JSON, which has no infinity: None in its place."""
        return {name: to_json_numbers(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, entries: dict) -> "Portability":
        """What [`to_dict`] gave."""
        return cls(**{name: from_json_numbers(value) if name in _FIGURES else value for name, value in entries.items()})


def measure_portability(
    reward: RewardModel,
    target: PreTrainedModel | Backbone,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    strength: float | None = None,
    source: PreTrainedModel | Backbone | None = None,
    **load_kwargs,
) -> Portability:
    """Run source, target and reward once over the batches.

    Args:
        reward ([`RewardModel`]): its device is where the inputs go.
        target: pi_pt of use.
        batches: inputs of the models, as of [`~evaluation.reading.Reading.parts`], source and target in this order.
            Classifiers may be without labels.
        strength (`float`, *optional*): 1 / lambda; by default as the reward was tuned.
        source (*optional*): pi_pt of training; by default the reward's base with the adapter off, or the model that the
            reward names (the first, where there were several).
        load_kwargs: for `from_pretrained` of the latter.

    Raises:
        VocabularyMismatchError, LabelMismatchError: the target does not fit the reward.
        ContextLengthError: a text is longer than one of the models can read.
        NonFiniteRewardError: a reward is NaN or infinite.
        PRTValueError: nothing is supervised, or the source backbone is not known.
    """
    if source is None:
        source = source_backbones(reward, **load_kwargs)[0]
    backbones = [each if isinstance(each, Backbone) else Backbone(reward, each) for each in (source, target)]
    reading = Reading(reward, dict(zip((SOURCE, TARGET), backbones, strict=True)))
    tally = counted(reading, batches, reward.config.strength if strength is None else strength)
    return portability_of(tally, reward.config.task, reading.is_labelled)


@torch.no_grad()
def counted(reading: Reading, batches: Iterable[dict[str, torch.Tensor]], strength: float) -> Tally:
    """All that the networks of a reading say of the batches, added up.

    Raises:
        PRTValueError: nothing is supervised.
    """
    tally = Tally(strength)
    for part in reading.parts(batches):
        tally.add(part)
    check_supervised(tally.positions, "the data")
    return tally


def portability_of(tally: Tally, task: str, is_labelled: bool = True) -> Portability:
    """
    Args:
        tally: of source, target and reward.
    """
    figures = {}
    if is_labelled:
        if task == TEXT_GENERATION:  # less is better
            apart = {rival: tally.difference(rival, "prt_target", NLL) for rival in RIVALS}
        else:
            apart = {rival: tally.difference("prt_target", rival, ACCURACY) for rival in RIVALS}
        figures = {
            "nll": {way: tally.mean(way, NLL) for way in WAYS},
            "accuracy": {way: tally.mean(way, ACCURACY) for way in WAYS},
            "advantage": {rival: difference for rival, (difference, _) in apart.items()},
            "standard_error": {rival: error for rival, (_, error) in apart.items()},
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


def to_json_numbers(value):
    """With None in the place of numbers that are not finite, which JSON does not have."""
    if isinstance(value, dict):
        return {name: to_json_numbers(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json_numbers(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json_numbers(value):
    """With infinity in the place of None."""
    if isinstance(value, dict):
        return {name: from_json_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [from_json_numbers(each) for each in value]
    return math.inf if value is None else value
