"""PRT models: a backbone and its rewards as one transformers model, for everything that takes a model."""

from contextlib import suppress

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from ..own_pixels import PRTImageProcessor
from ..recipe import PRTModelConfig
from .causal_lm import PRTForCausalLM
from .classification import PRTForImageClassification, PRTForSequenceClassification

__all__ = ["PRTForCausalLM", "PRTForImageClassification", "PRTForSequenceClassification"]

AutoConfig.register(PRTModelConfig.model_type, PRTModelConfig)
AutoModelForCausalLM.register(PRTModelConfig, PRTForCausalLM)
AutoModelForSequenceClassification.register(PRTModelConfig, PRTForSequenceClassification)
AutoModelForImageClassification.register(PRTModelConfig, PRTForImageClassification)
with suppress(ImportError):  # where transformers has no image processors: earlier ones want torchvision for them all
    AutoImageProcessor.register(
        PRTModelConfig, image_processor_classes=dict.fromkeys(("pil", "torchvision"), PRTImageProcessor)
    )
