"""Decoding with a reward: `generate(logits_processor=[...])`."""

from .logits_processor import EFTLogitsProcessor, PRTLogitsProcessor
from .state import RewardState

__all__ = ["EFTLogitsProcessor", "PRTLogitsProcessor", "RewardState"]
