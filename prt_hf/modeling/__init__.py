"""PRT models: a backbone and its rewards as one transformers model, for everything that takes a model."""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

from ..recipe import PRTModelConfig
from .causal_lm import PRTForCausalLM
from .classification import PRTForImageClassification, PRTForSequenceClassification

__all__ = ["PRTForCausalLM", "PRTForImageClassification", "PRTForSequenceClassification"]

AutoConfig.register(PRTModelConfig.model_type, PRTModelConfig)
AutoModelForCausalLM.register(PRTModelConfig, PRTForCausalLM)
AutoModelForSequenceClassification.register(PRTModelConfig, PRTForSequenceClassification)
AutoModelForImageClassification.register(PRTModelConfig, PRTForImageClassification)
