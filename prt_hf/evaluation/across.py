"""Measure a reward on a backbone with another vocabulary: nats per byte of text, which all tokenizers share."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PRTValueError
from ..inference import PRTForCausalLM
from ..inference.logits_processor import source_of
from ..networks.anatomy import context_length
from ..reward.model import RewardModel
from ..vocabulary import unwrap_tokenizer
from .portability import to_json_numbers
from .tally import ERRORS

_ROOM = 16  # source tokens by which a text may grow: cut inside of a word, and by those that are looked ahead
FACTORS = (0.25, 0.5, 1.0)  # times the reward's own strength: a weak source overshoots on a strong backbone


@dataclass(frozen=True)
class AcrossReport:
    """The performance of a reward on a backbone with another vocabulary.

    Nats per byte are -log p of the scored tokens over the bytes of these: of completions, else of all tokens of a text
    but the first.

    Attributes:
        rows (`int`): The number of rows.
        size (`int`): The number of bytes that the backbone was scored on.
        nats (`dict[str, float]`): Nats per byte of `source` and `target` by themselves, and of `prt_source` with the
            reward.
        prt_target (`dict[float, float]`): Strength -> nats per byte of the target with the reward.
        gains (`dict[float, tuple[float, float]]`): Strength -> by how much the reward lowers the nats per byte of the
            target, and its standard error, for which a row counts as one draw.
        strength (`float`): The one that serves every other row best.
        gain (`tuple[float, float]`): What it gains on the other rows against the reward's own strength, and its
            standard error.
        in_place (`float`): The share of the backbone's tokens that are one source token each where they stand.
        rows_per_token (`float`): The number of tokens that the source reads for each of the backbone's.
    """

    rows: int
    size: int
    nats: dict[str, float]
    prt_target: dict[float, float]
    gains: dict[float, tuple[float, float]]
    strength: float
    gain: tuple[float, float]
    in_place: float
    rows_per_token: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return {name: to_json_numbers(value) for name, value in asdict(self).items()}

    def lines(self) -> list[str]:
        """Return the figures as lines of text."""
        own = max(self.gains)
        figures = [("source", self.nats["source"]), ("source with the reward", self.nats["prt_source"])]
        lines = [
            f"on {self.rows} rows, {self.size} bytes of text",
            f"{100 * self.in_place:.1f} % of the backbone's tokens are one of the reward's where they stand; it reads "
            f"{self.rows_per_token:.1f} tokens for each",
            "",
            f"{'nats per byte':<28}{'':>9}{'gain':>20}",
            *(f"  {name:<26}{value:>9.4f}" for name, value in figures),
            f"  {'target':<26}{self.nats['target']:>9.4f}",
        ]
        for strength, (gain, error) in self.gains.items():
            name = f"target, strength {strength:g}"
            lines.append(f"  {name:<26}{self.prt_target[strength]:>9.4f}{gain:>+11.4f} +- {error:.4f}")
        if all(gain <= 0 for gain, _ in self.gains.values()):
            return [*lines, "", "strength: the target is best without the reward"]
        gain, error = self.gain
        if self.strength == own:
            return [*lines, "", f"strength: {own:g}, the reward's own, is best on half of the rows"]
        is_better = gain > ERRORS * error
        advice = f"use --strength {self.strength:g} in the place of {own:g}" if is_better else f"stay at {own:g}"
        found = f"{self.strength:g} is best on half of the rows, and on the others {gain:+.4f} +- {error:.4f}"
        return [*lines, "", f"strength: {advice}; {found} nats per byte"]


@torch.no_grad()
def measure_across(
    reward: RewardModel,
    backbone: PreTrainedModel,
    rows: Dataset,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    length: int = 1024,
    **kwargs: Any,
) -> AcrossReport:
    """Score texts with a reward on a backbone with another vocabulary, and with its source.

    Args:
        reward: The reward.
        backbone: The target.
        rows: With the columns `text`, or `prompt` and `completion` (only the latter is scored).
        tokenizer (*optional*): The backbone's; by default the one saved with its weights.
        length: The number of tokens at which a text is cut off.
        **kwargs: For [`PRTLogitsProcessor`]: `lookahead`, `token_map`, `source_backbone`.

    Raises:
        VocabularyMismatchError, UnsupportedError: As raised by the processor.
        PRTValueError: The backbone has the reward's vocabulary, the rows have other columns, or nothing can be scored.
    """
    processor = reward.processor(backbone, tokenizer, across_vocabularies=True, **kwargs)
    if processor.vocabularies is None:
        raise PRTValueError(
            "The backbone has the reward's own vocabulary.",
            expected="a backbone with another one",
            found=f"{backbone.name_or_path or type(backbone).__name__}: {processor.match}",
            remedy="measure it without `--across_vocabularies`, in nats per token",
        )
    own = unwrap_tokenizer(reward.processing_class)
    source = PRTForCausalLM.from_parts(source_of(reward, kwargs.get("source_backbone")), [reward], tokenizer=own)
    source.eval()
    strengths = [factor * reward.strength for factor in FACTORS]
    totals: dict[Any, list[float]] = {name: [] for name in ("source", "prt_source", "target", *strengths)}
    sizes: dict[str, list[int]] = {"source": [], "target": []}
    tokens = in_place = 0
    limit = context_length(source.backbone)
    for row in rows:
        prompt, text = _text_of(row)
        text = text if limit is None else _cut(text, own, limit - _ROOM)
        if len(text) <= len(prompt):
            continue
        ids, start, size = _encoded(prompt, text, own, length)
        their_length = min(length, context_length(backbone) or length)
        theirs, first, their_size = _encoded(prompt, text, processor.tokenizer, their_length)
        if not size or not their_size:
            continue
        own_ids = ids.to(source.device)
        alone = source.backbone(input_ids=own_ids).logits[0, :, : reward.size].float().log_softmax(-1)
        totals["source"].append(_nats(alone, ids, start))
        totals["prt_source"].append(_nats(source(input_ids=own_ids, use_cache=False).logits[0], ids, start))
        logits = backbone(input_ids=theirs.to(backbone.device)).logits[0, :, : processor.match.size].float()
        totals["target"].append(_nats(logits.log_softmax(-1), theirs, first))
        positions = torch.arange(first - 1, theirs.shape[1] - 1)
        for strength in strengths:
            processor.strength = strength
            scored = processor.score(theirs[0], torch.ones_like(theirs[0]), positions, logits[positions])
            totals[strength].append(-scored.gather(1, theirs[0, first:, None].to(scored.device)).sum().item())
        sizes["source"].append(size)
        sizes["target"].append(their_size)
        tokens += len(positions)
        in_place += processor.vocabularies.in_place(theirs[0, first:].tolist())
    if not tokens:
        raise PRTValueError("No text has a token to predict.", expected="longer texts", found=f"{len(rows)} rows")
    return _figures(totals, sizes, strengths, in_place / tokens, processor.tokens_computed / tokens / len(strengths))


def _text_of(row: dict) -> tuple[str, str]:
    """Return the prompt of a row, which is not scored, and its whole text."""
    if "text" in row:
        return "", row["text"]
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return row["prompt"], row["prompt"] + row["completion"]
    raise PRTValueError(
        "The rows hold no texts that two tokenizers can read.",
        expected="columns text, or prompt and completion",
        found=", ".join(row),
        remedy="write chats as prompt and completion",
    )


def _cut(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    """Return the beginning of a text that has at most as many tokens."""
    ends = [end for _, end in tokenizer(text, return_offsets_mapping=True)["offset_mapping"]]
    return text if len(ends) <= length else text[: ends[length - 1]]


def _encoded(
    prompt: str, text: str, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[torch.LongTensor, int, int]:
    """Return the tokens of a text, `(1, length)`, the first one that is scored, and the bytes from there on."""
    ids = tokenizer(text).input_ids[:length]
    ids = ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    start = 1
    if prompt:
        own = tokenizer(prompt).input_ids
        start = max(1, next((i for i, pair in enumerate(zip(ids, own, strict=False)) if pair[0] != pair[1]), len(own)))
    size = len(tokenizer.decode(ids[start:]).encode())
    return torch.tensor([ids]), start, size


def _nats(log_probs: torch.Tensor, ids: torch.LongTensor, start: int) -> float:
    """Return -log p of the tokens from `start` on, of log-probabilities at all positions."""
    return -log_probs[start - 1 : -1].gather(1, ids[0, start:, None].to(log_probs.device)).sum().item()


def _figures(
    totals: dict[Any, list[float]],
    sizes: dict[str, list[int]],
    strengths: Sequence[float],
    in_place: float,
    rows_per_token: float,
) -> AcrossReport:
    size = sum(sizes["target"])

    def gain(better: Any, than: Any, part: slice = slice(None)) -> tuple[float, float]:
        """Return a difference in nats per byte, and its standard error."""
        apart = [b - a for a, b in zip(totals[better][part], totals[than][part], strict=True)]
        lengths = sizes["target"][part]
        mean = sum(apart) / sum(lengths)
        rest = sum((each - mean * length) ** 2 for each, length in zip(apart, lengths, strict=True))
        count = len(apart)
        return mean, math.sqrt(rest * count / (count - 1)) / sum(lengths) if count > 1 else math.nan

    own, halves = max(strengths), (slice(0, None, 2), slice(1, None, 2))
    best = min(strengths, key=lambda strength: (sum(totals[strength][halves[0]]), abs(strength - own)))
    return AcrossReport(
        rows=len(totals["target"]),
        size=size,
        nats={
            "source": sum(totals["source"]) / sum(sizes["source"]),
            "prt_source": sum(totals["prt_source"]) / sum(sizes["source"]),
            "target": sum(totals["target"]) / size,
        },
        prt_target={strength: sum(totals[strength]) / size for strength in strengths},
        gains={strength: gain(strength, "target") for strength in strengths},
        strength=best,
        gain=gain(best, own, halves[1]) if len(totals["target"]) > 1 else (math.nan, math.nan),
        in_place=in_place,
        rows_per_token=rows_per_token,
    )
