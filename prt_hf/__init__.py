"""Portable Reward Tuning: tune a reward once, add it to the logits of any newer model.

Chijiwa et al., ICML 2025, arXiv:2502.12776.

    pi(y|x)  proportional to  pi_pt(y|x) exp(r(x, y) / lambda)

functional.py  the paper's equations              contract.py   what a reward needs of a backbone
reward/        the reward r itself                training/     Algorithm 1: tune it on a frozen backbone
inference/     Algorithm 2: add it to another     evaluation/   Prop. 3.2: does it fit, is it worth it
serving/       the same inside vLLM               hub/          files, cards, commits
networks/      what is known of others' models    demo/, benchmark/, cli/   toy models, timings, the command

A room imports from those below it only: errors < functional, contract < hub < networks < reward
< training | inference < evaluation | serving < demo, benchmark < cli.
"""

from ._version import __version__
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
from .inference import (
    EFTLogitsProcessor,
    PRTForCausalLM,
    PRTForImageClassification,
    PRTForSequenceClassification,
    PRTLogitsProcessor,
    speculative_decoding,
)
from .inference.recipe import PRTModelConfig
from .networks.pixels import PRTImageProcessor
from .networks.zero_shot import TEMPLATES, ZeroShotForImageClassification, zero_shot_classifier
from .reward.adapter import default_peft_config
from .reward.model import RewardModel
from .training.collators import PixelCollator
from .training.config import PRTConfig
from .training.sft import PRTSFTConfig, PRTSFTTrainer
from .training.trainer import PRTTrainer

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
