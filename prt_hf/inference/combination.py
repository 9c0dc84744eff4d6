"""Combine the logits of all parts of a PRT model (Eq. 10)."""

from collections.abc import Sequence
from numbers import Real

import torch

from ..contract import Match
from ..functional import combine, strength_of_rows
from .passes import Part


def combined(
    parts: Sequence[Part], matches: Sequence[Match], factors: Sequence[float | torch.Tensor], logits: list[torch.Tensor]
) -> torch.Tensor:
    """Return log pi over the backbone's tokens or labels, `(..., size)`, float32.

    Args:
        parts: the backbone, then the terms of the rewards.
        matches: how each reward's columns belong to the backbone's.
        factors: what the logits of each part are multiplied by, a number or one per row.
        logits: of each part, `(..., columns)`.

    Raises:
        PRTValueError: factors for other rows.
        NonFiniteRewardError: a reward is NaN or infinite.
    """
    backbone, *others = (each[..., part.columns] for part, each in zip(parts, logits, strict=True))
    totals: dict[int, torch.Tensor] = {}
    for part, factor, other in zip(parts[1:], factors[1:], others, strict=True):
        values = _for_rows(factor, backbone) * other.to(backbone.device).float()
        totals[part.reward] = totals[part.reward] + values if part.reward in totals else values
    if not totals:
        return backbone.float().log_softmax(-1)
    ordered = [(total, matches[index].columns_on(backbone.device)) for index, total in totals.items()]
    if any(match.has_neutral for match in matches):
        for total, columns in ordered:
            # What is neutral to one reward keeps what those before gave it.
            backbone = combine(backbone, total, columns=columns)
        return backbone
    return combine(backbone, sum(total if columns is None else total[..., columns] for total, columns in ordered))


def _for_rows(factor: float | torch.Tensor, logits: torch.Tensor) -> float | torch.Tensor:
    """Return a factor that multiplies logits row by row."""
    if isinstance(factor, Real):
        return factor
    return strength_of_rows(factor, len(logits)).to(logits.device).view(-1, *[1] * (logits.ndim - 1))
