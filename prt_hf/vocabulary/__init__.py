"""Vocabularies: the tokens that a language model's logits are indexed by, and how those of two models match.

A reward is one number per token (Eq. 5). Updates of a model family rename, append and move tokens that were never
ordinary text: every other token means the same, and the reward acts on it. The rest is neutral, see
[`~prt_hf.functional.combine`].
"""

from .contract import SHOWN, VocabularyContract, unwrap_tokenizer
from .match import EXTENDED, IDENTICAL, MOVED, OTHER, RENAMED, VocabularyMatch

__all__ = [
    "EXTENDED",
    "IDENTICAL",
    "MOVED",
    "OTHER",
    "RENAMED",
    "SHOWN",
    "VocabularyContract",
    "VocabularyMatch",
    "unwrap_tokenizer",
]
