"""Measure a reward on backbones with other vocabularies, for `check` and `evaluate`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .arguments import chosen_device, config_kwargs, evaluation_rows, load_kwargs

if TYPE_CHECKING:
    from ..evaluation.across import AcrossReport


def measured(args: argparse.Namespace, place: str, backbone_place: str, quantized: dict[str, Any]) -> AcrossReport:
    """Return the figures of a reward on one backbone, on the rows that the options name."""
    from ..contract import TEXT_GENERATION
    from ..evaluation.across import measure_across
    from ..inference.loading import load_reward
    from ..networks.auto import load_pretrained, load_processing_class

    device, kwargs = chosen_device(args), load_kwargs(args)
    reward, _ = load_reward(place, [], kwargs)
    tokenizer = load_processing_class(backbone_place, TEXT_GENERATION, **config_kwargs(args))
    backbone = load_pretrained(backbone_place, **kwargs | config_kwargs(args) | quantized).eval()
    if device is not None:
        reward.to(device)
        backbone = backbone if quantized else backbone.to(device)
    return measure_across(reward, backbone, evaluation_rows(args), tokenizer=tokenizer, length=args.max_length)
