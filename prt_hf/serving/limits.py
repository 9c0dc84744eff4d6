"""Refuse what vLLM's engine cannot do with several networks; with all other options it gives the PRT model's text."""

import copy

from transformers import PreTrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.transformers_utils.config import get_hf_text_config, uses_mrope

from ..errors import ContextLengthError, UnsupportedError
from . import ADAPTER_BASE

_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "dummy")
_SPECULATION = ("ngram", "ngram_gpu", "draft_model")  # methods that look at tokens alone


def check_networks(model_config: ModelConfig, networks: list[PreTrainedConfig]) -> None:
    """Check that every network can run beside others.

    Args:
        model_config: of the engine.
        networks: configurations of the backbone and of the other networks.

    Raises:
        UnsupportedError: one cannot.
    """
    for network in networks:
        _check_network(model_config, network)
    if model_config.disable_sliding_window and any(map(window_of, networks)):
        raise UnsupportedError(
            "Sliding windows of the parts cannot be switched off.", remedy="leave out --disable-sliding-window"
        )


def fit_length(model_config: ModelConfig, config: PreTrainedConfig) -> None:
    """Limit the length of texts to what a network beside the backbone can read.

    Raises:
        ContextLengthError: longer ones were asked for.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not limit or model_config.max_model_len <= limit:
        return
    if model_config.original_max_model_len not in (None, -1):
        raise ContextLengthError(
            "`max_model_len` is more than a reward can read.",
            expected=f"at most {limit} (max_position_embeddings)",
            found=str(model_config.max_model_len),
            remedy=f"--max-model-len {limit}",
        )
    model_config.max_model_len = limit


def check_engine(vllm_config: VllmConfig, others: list[PreTrainedConfig], *, has_adapter_base: bool) -> None:
    """Check the options of the engine.

    Args:
        vllm_config: of the engine.
        others: configurations of the networks beside the backbone.
        has_adapter_base: whether requests may name rewards.

    Raises:
        UnsupportedError: an option with which the engine would give other text, or none.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    lora, speculation = vllm_config.lora_config, vllm_config.speculative_config
    method = None if speculation is None else speculation.method
    quantised = [reward.quantization_config for reward in others if getattr(reward, "quantization_config", None)]
    refused = {
        "it generates tokens, and the hidden states of its networks cannot be pooled": (
            model.runner_type == "pooling",
            f"runner = {model.runner_type}",
        ),
        "vLLM's other loaders read the weights of one network, and leave the rewards with random ones": (
            vllm_config.load_config.load_format not in _LOAD_FORMATS,
            f"load_format = {vllm_config.load_config.load_format}",
        ),
        "the rewards' decoders run beside the backbone's, not in stages": (
            parallel.pipeline_parallel_size > 1,
            f"pipeline_parallel_size = {parallel.pipeline_parallel_size}",
        ),
        "vLLM makes the groups of ranks that experts run in for the backbone alone": (
            not model.is_moe and any(_has_experts(model, reward) for reward in others),
            "a reward with experts, and a backbone without",
        ),
        "quantised networks have not been shown to give the PRT model's text": (
            model.quantization is not None or quantised,
            f"quantization = {model.quantization or quantised}",
        ),
        "a reward has embeddings of its own, and cannot read the backbone's": (
            model.enable_prompt_embeds,
            "enable_prompt_embeds",
        ),
        "such drafts are made from the hidden states of one network": (
            method not in (None, *_SPECULATION),
            f"speculative method {method}",
        ),
        "the engine keeps one network's cache and states for drafts": (
            method == "draft_model" and speculation.draft_model_config.architecture == model.architecture,
            "a draft model with rewards",
        ),
        "requests' own rewards are put on one base, and none is known": (
            lora is not None and not has_adapter_base,
            f"enable_lora, and no `{ADAPTER_BASE}`",
        ),
        "requests' own rewards change their base, and all of it that they were tuned on": (
            lora is not None and lora.target_modules is not None,
            "lora_target_modules",
        ),
        "vLLM's V1 model runner does not show which of the drafts' rows have rewards of their own": (
            lora is not None and speculation is not None and not vllm_config.use_v2_model_runner,
            "enable_lora with speculation",
        ),
    }
    for reason, (is_asked, found) in refused.items():
        if is_asked:
            raise UnsupportedError(f"This way of serving is not supported for a PRT model: {reason}.", found=found)
    for config in others:
        _check_heads(config.get_text_config(), parallel.tensor_parallel_size)


def window_of(config: PreTrainedConfig) -> int | None:
    """Return the sliding window of a network whose layers all have one; mixed layers tell the engine themselves."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and any(kind != "sliding_attention" for kind in kinds):
        return None
    return getattr(config, "sliding_window", None)


def _check_network(model_config: ModelConfig, config: PreTrainedConfig) -> None:
    """Refuse architectures whose caches the engine cannot keep beside others."""
    registry, architectures = model_config.registry, config.architectures or ["none"]
    problem = None
    if architectures[0] not in registry.get_supported_archs() or model_config.model_impl == "transformers":
        problem = "an architecture that vLLM has no model of its own for"
    else:
        info, _ = registry.inspect_model_cls(architectures, model_config)
        if not info.is_text_generation_model or info.supports_multimodal:
            problem = "no plain language model"
        elif info.has_inner_state or info.is_attention_free or info.is_hybrid:
            problem = "state-space layers, whose state the engine lays out for one network"
        elif hasattr(config.get_text_config(), "kv_lora_rank"):
            problem = "latent attention, whose cache the engine lays out for one network"
        elif uses_mrope(config):
            problem = "positions of three dimensions (M-RoPE), which the engine makes for one network"
    if problem:
        raise UnsupportedError(
            "A network of the PRT model cannot be run beside others in vLLM.",
            expected="decoders with attention",
            found=f"{architectures[0]}: {problem}",
            remedy="`generate` of transformers",
        )


def _has_experts(model_config: ModelConfig, config: PreTrainedConfig) -> bool:
    """Return whether the engine takes a network for one with experts."""
    own = copy.copy(model_config)
    own.hf_config, own.hf_text_config = config, get_hf_text_config(config)
    return own.get_model_arch_config().num_experts > 0


def _check_heads(config: PreTrainedConfig, degree: int) -> None:
    """Refuse a number of ranks that does not divide the attention heads."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % degree or (key_heads % degree and degree % key_heads):
        raise UnsupportedError(
            "A reward's attention heads cannot be divided among the ranks.",
            expected=f"a tensor_parallel_size that divides {heads} heads, and divides {key_heads} key heads or is a "
            "multiple of them",
            found=str(degree),
        )
