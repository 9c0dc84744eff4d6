"""Decoding with a reward: `generate(logits_processor=[...])`."""

from .logits_processor import EFTLogitsProcessor, PRTLogitsProcessor
from .speculative import speculative_decoding
from .state import RewardState

__all__ = ["EFTLogitsProcessor", "PRTLogitsProcessor", "RewardState", "speculative_decoding"]
