"""Portable Reward Tuning: tune a reward once, add it to the logits of any newer model.

Chijiwa et al., ICML 2025, arXiv:2502.12776.

    pi(y|x)  proportional to  pi_pt(y|x) exp(r(x, y) / lambda)

functional.py  the paper's equations              vocabulary/   which tokens of two models are the same
contract.py    what a reward needs of a backbone
reward/        the reward r itself                training/     Algorithm 1: tune it on a frozen backbone
inference/     Algorithm 2: add it to another     evaluation/   Prop. 3.2: does it fit, is it worth it
baking/        make one plain model of it         serving/      the same inside vLLM
hub/           files, cards, commits              networks/     what is known of others' models
demo/, benchmark/   toy models, timings           playground/   both side by side in the browser
cli/           the command

A room imports from those below it only: errors < functional, vocabulary < contract < hub < networks < reward
< training | inference < baking | evaluation | serving < demo, benchmark, playground < cli.

Names are imported at first use, so that `import prt_hf` loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .baking.trainer import BakeConfig, bake
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
        PRTModelConfig,
        speculative_decoding,
    )
    from .networks.pixels import PRTImageProcessor
    from .networks.zero_shot import TEMPLATES, ZeroShotForImageClassification, zero_shot_classifier
    from .reward.adapter import default_peft_config
    from .reward.model import RewardModel
    from .training.collators import PixelCollator
    from .training.config import PRTConfig
    from .training.sft import PRTSFTConfig, PRTSFTTrainer
    from .training.trainer import PRTTrainer

_EXPORTS = {  # the same, for use
    "baking.trainer": ("BakeConfig", "bake"),
    "contract": ("LabelContract", "RewardConfig", "VocabularyContract"),
    "errors": (
        "BackboneCacheError",
        "BaseModelMismatchError",
        "ContextLengthError",
        "LabelMismatchError",
        "NonFiniteRewardError",
        "PRTError",
        "RewardFileError",
        "UnsupportedError",
        "VocabularyMismatchError",
    ),
    "functional": ("combine", "prt_loss"),
    "inference": (
        "EFTLogitsProcessor",
        "PRTForCausalLM",
        "PRTForImageClassification",
        "PRTForSequenceClassification",
        "PRTLogitsProcessor",
        "PRTModelConfig",
        "speculative_decoding",
    ),
    "networks.pixels": ("PRTImageProcessor",),
    "networks.zero_shot": ("TEMPLATES", "ZeroShotForImageClassification", "zero_shot_classifier"),
    "reward.adapter": ("default_peft_config",),
    "reward.model": ("RewardModel",),
    "training.collators": ("PixelCollator",),
    "training.config": ("PRTConfig",),
    "training.sft": ("PRTSFTConfig", "PRTSFTTrainer"),
    "training.trainer": ("PRTTrainer",),
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = ["__version__", *_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
