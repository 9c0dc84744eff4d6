"""The quantities of Prop. 3.2, measured, and what a reward gains at its source and at a target."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel

from ..backbones import Backbone, Batch, OwnBase, source_backbones
from ..errors import PRTValueError
from ..functional import IGNORE_INDEX, Projection, check_finite, check_supervised
from ..heads import last_hidden_state, projection, why_not_projected
from ..pretrained import TEXT_GENERATION, check_length, context_length
from ..reward_model import RewardModel

SOURCE, TARGET, PRT_SOURCE, PRT_TARGET, REWARD_ONLY = WAYS = (
    "source",
    "target",
    "prt_source",
    "prt_target",
    "reward_only",
)
RIVALS = {TARGET: "the target by itself", PRT_SOURCE: "the source with it", REWARD_ONLY: "the reward by itself"}
_ERRORS = 2  # standard errors that a difference has to be away from 0
_CHUNK = 2**22  # numbers of one model that are held in float64


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
            advantage, error = self.advantage[rival], self.standard_error[rival]
            is_better = None if abs(advantage) <= _ERRORS * error and error else advantage > 0
            word = {True: "better than", False: "no better than", None: "within noise of"}[is_better]
            verdicts.append(is_better)
            reasons.append(f"target with the reward {word} {text}: {advantage:+.3f} +- {error:.3f} {unit}")
        worth = False if False in verdicts else (None if None in verdicts else True)
        return worth, reasons

    def to_dict(self) -> dict:
        """For JSON, which has no infinity: None in its place."""
        return {name: _finite(value) for name, value in asdict(self).items()}


@torch.no_grad()
def measure_portability(
    reward: RewardModel,
    target: PreTrainedModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    strength: float | None = None,
    source: PreTrainedModel | None = None,
    **load_kwargs,
) -> Portability:
    """Run source, target and reward once over the batches.

    Whole logits are made of models without a plain head only; others are read at the supervised positions, a few at a
    time, so that memory stays bounded with large vocabularies. Sums are in float64, where the device has it.

    Args:
        reward ([`RewardModel`]): its device is where the inputs go.
        target: pi_pt of use.
        batches: inputs of the models. Language models need `input_ids`, and may have an `attention_mask` (padding on
            either side) and `labels`, not shifted, -100 where not supervised; by default every token but the first.
            Classifiers may have `labels`, in the order of the reward's labels.
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
    strength = reward.config.strength if strength is None else strength
    reward.network.eval()
    of_target = Backbone(reward, target)
    of_source = source_backbones(reward, **load_kwargs)[0] if source is None else Backbone(reward, source)
    for backbone in (of_source, of_target):
        backbone.load()
        if not isinstance(backbone, OwnBase) and getattr(backbone.network, "hf_device_map", None) is None:
            backbone.network.to(reward.device)
    limits = [limit for limit in (context_length(reward.network), of_source.limit, of_target.limit) if limit]
    is_labelled, readers, sums = True, None, _Sums(reward.config.task)
    for inputs in batches:
        batch = _batch(inputs, reward)
        if "input_ids" in batch.inputs:
            check_length(batch.inputs["input_ids"].shape[1], min(limits, default=None))
        is_labelled &= reward.config.task == TEXT_GENERATION or "labels" in inputs
        if not len(batch.supervised_labels):
            continue
        readers = readers or _readers(reward, of_source, of_target, batch)
        read = [reader(batch) for reader in readers]
        step = max(1, _CHUNK // read[0].shape[1])
        sums.start_rows(len(batch.labels))
        for start in range(0, len(batch.supervised_labels), step):
            part = slice(start, start + step)
            values = [_exact(each.at(part).logits() if isinstance(each, Projection) else each[part]) for each in read]
            check_finite(values[0])
            values = [value.to(reward.device) for value in values]
            sums.add(*values, batch.supervised_labels[part], batch.supervised[0][part], strength)
    check_supervised(sums.count, "the data")
    mean = {name: total / sums.count for name, total in sums.totals.items()}
    advantage, standard_error = sums.advantages()
    return Portability(
        task=reward.config.task,
        rows=int((sums.of_rows[0] > 0).sum()),
        positions=sums.count,
        strength=float(strength),
        eps=mean["eps"],
        c_mean=mean["c"],
        c_max=sums.c_max,
        nll={way: mean["nll", way] for way in WAYS} if is_labelled else None,
        accuracy={way: mean["accuracy", way] for way in WAYS} if is_labelled else None,
        advantage=advantage if is_labelled else None,
        standard_error=standard_error if is_labelled else None,
    )


def divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, of log-probabilities `(..., size)` -> `(...)`; infinite where q rules out what p does not."""
    p = log_p.exp()
    return (p * (log_p - log_q)).masked_fill(p == 0, 0.0).sum(-1).clamp(min=0)


def log_concentration(log_p: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """log C of Prop. 3.2: max_y r(y) - log E_{y ~ p} exp(r(y)), `(..., size)` -> `(...)`, 0 for constant rewards."""
    return reward.max(-1).values - torch.logsumexp(log_p + reward, -1)


class _Sums:
    """Over positions, of everything that [`Portability`] is the mean of.

    Attributes:
        of_rows (`torch.DoubleTensor` of shape `(1 + len(RIVALS), rows)`): positions of each row, and the sums of its
            advantages.
    """

    def __init__(self, task: str):
        self.measure = "nll" if task == TEXT_GENERATION else "accuracy"
        self.count, self.c_max, self.totals = 0, 0.0, Counter()
        self.first = 0  # row of the batch at hand
        self.of_rows = torch.zeros(1 + len(RIVALS), 0, dtype=torch.float64)

    def start_rows(self, count: int) -> None:
        self.first = self.of_rows.shape[1]
        self.of_rows = torch.nn.functional.pad(self.of_rows, (0, count))

    def add(self, reward, source, target, labels: torch.LongTensor, rows: torch.LongTensor, strength: float) -> None:
        """
        Args:
            reward, source, target (`torch.FloatTensor` of shape `(n, size)`): r and the backbones' logits.
            labels, rows (`torch.LongTensor` of shape `(n,)`): rows are those of the batch.
        """
        reward = strength * reward
        log_source, log_target = source.log_softmax(-1), target.log_softmax(-1)
        concentration = log_concentration(log_source, reward).exp()
        self.count += len(labels)
        self.c_max = max(self.c_max, concentration.max().item())
        self.totals["eps"] += divergence(log_source, log_target).sum().item()
        self.totals["c"] += concentration.sum().item()
        of_ways = {
            SOURCE: log_source,
            TARGET: log_target,
            PRT_SOURCE: log_source + reward,
            PRT_TARGET: log_target + reward,
            REWARD_ONLY: reward,
        }
        goodness = {}
        for way, scores in of_ways.items():
            losses = torch.logsumexp(scores, -1) - scores.gather(-1, labels[:, None])[:, 0]
            hits = (scores.argmax(-1) == labels).to(losses)
            self.totals["nll", way] += losses.sum().item()
            self.totals["accuracy", way] += hits.sum().item()
            goodness[way] = -losses if self.measure == "nll" else hits
        advantages = [goodness[PRT_TARGET] - goodness[rival] for rival in RIVALS]
        values = torch.stack([torch.ones_like(advantages[0]), *advantages]).cpu().double()
        self.of_rows.index_add_(1, rows.cpu() + self.first, values)

    def advantages(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means over positions, and their standard errors: the rows are the draws, and a mean is a ratio of sums."""
        counts, *sums = self.of_rows[:, self.of_rows[0] > 0]
        rows, total = len(counts), counts.sum()
        means, errors = {}, {}
        for rival, of_rows in zip(RIVALS, sums, strict=True):
            mean = of_rows.sum() / total
            squares = (of_rows - mean * counts).square().sum()
            means[rival] = mean.item()
            errors[rival] = (squares * rows / (rows - 1)).sqrt().item() / total.item() if rows > 1 else math.nan
        return means, errors


def _batch(inputs: dict[str, torch.Tensor], reward: RewardModel) -> Batch:
    inputs = {name: value.to(reward.device) for name, value in inputs.items()}
    labels = inputs.pop("labels", None)
    if reward.config.task != TEXT_GENERATION:
        if labels is None:
            labels = torch.zeros(len(next(iter(inputs.values()))), dtype=torch.long, device=reward.device)
        return Batch(inputs, labels)
    if "input_ids" not in inputs:
        raise PRTValueError("The batch has no text.", expected="`input_ids`", found=", ".join(inputs))
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    labels = (ids if labels is None else labels).masked_fill(mask == 0, IGNORE_INDEX)
    # Padding to the right, where no causal model sees it, and every text starts at position 0.
    order = (mask == 0).long().argsort(dim=1, stable=True)
    ids, mask, labels = (value.gather(1, order) for value in (ids, mask, labels))
    return Batch({"input_ids": ids, "attention_mask": mask}, labels[:, 1:])


def _readers(reward: RewardModel, source: Backbone, target: Backbone, batch: Batch) -> list[Callable]:
    """What gives the reward's and the two backbones' logits at the supervised positions of a batch, or their
    projections, where the first batch shows that these are the same."""
    is_text = reward.config.task == TEXT_GENERATION

    def of_reward(batch: Batch):
        return batch.chosen(reward(**batch.inputs))

    def projection_of_reward(batch: Batch):
        hidden = batch.chosen(last_hidden_state(reward.network, batch.inputs))
        return projection(reward.network, hidden, reward.columns).cast()

    is_projected = is_text and why_not_projected(reward.network, batch.inputs) is None
    readers: list[Callable] = [projection_of_reward if is_projected else of_reward]
    for backbone in (source, target):
        if is_text and backbone.why_not_projected(batch) is None:
            readers.append(lambda batch, backbone=backbone: backbone.projection(batch).cast())
        else:
            readers.append(lambda batch, backbone=backbone: batch.chosen(backbone.logits(batch)))
    return readers


def _exact(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def _finite(value):
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
