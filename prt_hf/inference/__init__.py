"""Algorithm 2: add rewards to a backbone, in `generate()` or as one transformers model."""

from contextlib import suppress

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from ..networks.pixels import PRTImageProcessor
from .causal_lm import PRTForCausalLM
from .classification import PRTForImageClassification, PRTForSequenceClassification
from .configuration import PRTModelConfig
from .eft import EFTLogitsProcessor
from .logits_processor import PRTLogitsProcessor
from .speculative import speculative_decoding
from .state import RewardState

__all__ = [
    "EFTLogitsProcessor",
    "PRTForCausalLM",
    "PRTForImageClassification",
    "PRTForSequenceClassification",
    "PRTLogitsProcessor",
    "PRTModelConfig",
    "RewardState",
    "speculative_decoding",
]

AutoConfig.register(PRTModelConfig.model_type, PRTModelConfig)
AutoModelForCausalLM.register(PRTModelConfig, PRTForCausalLM)
AutoModelForSequenceClassification.register(PRTModelConfig, PRTForSequenceClassification)
AutoModelForImageClassification.register(PRTModelConfig, PRTForImageClassification)
with suppress(ImportError):  # without image processors: earlier transformers need torchvision for all of them
    AutoImageProcessor.register(
        PRTModelConfig, image_processor_classes=dict.fromkeys(("pil", "torchvision"), PRTImageProcessor)
    )
