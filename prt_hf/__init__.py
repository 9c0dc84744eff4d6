"""Portable Reward Tuning: tune a reward once, add it to the logits of any newer model.

Chijiwa et al., ICML 2025, arXiv:2502.12776.
"""

from ._version import __version__
from .adapter import default_peft_config
from .collator import PixelCollator
from .config import PRTConfig
from .contract import LabelContract, RewardConfig, VocabularyContract
from .errors import (
    BackboneCacheError,
    BaseModelMismatchError,
    ContextLengthError,
    LabelMismatchError,
    NonFiniteRewardError,
    PRTError,
    RewardFileError,
    UnsupportedError,
    VocabularyMismatchError,
)
from .functional import combine, prt_loss
from .generation import EFTLogitsProcessor, PRTLogitsProcessor, speculative_decoding
from .modeling import PRTForCausalLM, PRTForImageClassification, PRTForSequenceClassification
from .own_pixels import PRTImageProcessor
from .recipe import PRTModelConfig
from .reward_model import RewardModel
from .sft import PRTSFTConfig, PRTSFTTrainer
from .trainer import PRTTrainer
from .vision import TEMPLATES, ZeroShotForImageClassification, zero_shot_classifier

__all__ = [
    "BackboneCacheError",
    "BaseModelMismatchError",
    "ContextLengthError",
    "EFTLogitsProcessor",
    "LabelContract",
    "LabelMismatchError",
    "NonFiniteRewardError",
    "PRTConfig",
    "PRTError",
    "PRTForCausalLM",
    "PRTForImageClassification",
    "PRTForSequenceClassification",
    "PRTImageProcessor",
    "PRTLogitsProcessor",
    "PRTModelConfig",
    "PRTSFTConfig",
    "PRTSFTTrainer",
    "PRTTrainer",
    "PixelCollator",
    "RewardConfig",
    "RewardFileError",
    "RewardModel",
    "TEMPLATES",
    "UnsupportedError",
    "VocabularyContract",
    "VocabularyMismatchError",
    "ZeroShotForImageClassification",
    "__version__",
    "combine",
    "default_peft_config",
    "prt_loss",
    "speculative_decoding",
    "zero_shot_classifier",
]
