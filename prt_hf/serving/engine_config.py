"""What vLLM asks of an architecture before it starts: where the parts lie, and whether the engine can serve them."""

import copy

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config import get_config, get_hf_text_config, uses_mrope

from ..errors import ContextLengthError, PRTValueError, UnsupportedError
from ..hub import local_folder
from ..recipe import PRTModelConfig
from .parts import ServedParts, parts_by_name, parts_of_recipe
from .strength import RefusedStrengths, processor_name

PARTS = "prt_parts"  # entry of the configuration that the engine hands to its processes
_ADAPTER_BASE = "prt_adapter_base"  # the user's, beside `prt_rewards`
_LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "dummy")
_SPECULATION = ("ngram", "ngram_gpu", "draft_model")  # methods that look at tokens alone


class PRTEngineConfig(VerifyAndUpdateConfig):
    """Makes the backbone the engine's model, under the architecture of a PRT model and with its rewards told."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """
        Raises:
            RewardFileError, BaseModelMismatchError, VocabularyMismatchError: as of [`~prt_hf.serving.parts`].
            ContextLengthError: `max_model_len` is more than a reward can read.
            UnsupportedError: a network that the engine cannot run beside another.
        """
        config = model_config.hf_config
        where = {"revision": model_config.revision, "token": model_config.hf_token}
        if isinstance(config, PRTModelConfig):
            overrides = model_config.hf_overrides  # of draft models, a function
            if isinstance(overrides, dict) and overrides:
                raise PRTValueError(
                    "A recipe says what its networks are.", expected="no `hf_overrides`", found=str(overrides)
                )
            folder = local_folder(model_config.model, **where)
            parts = parts_of_recipe(folder, config, model_config.tokenizer, token=where["token"])
            model_config.hf_config_path = str(folder)  # where the engine looks for the settings of generation
        elif any(getattr(config, name, None) is not None for name in ("prt_rewards", _ADAPTER_BASE)):
            parts = parts_by_name(
                model_config.model,
                getattr(config, "prt_rewards", []),
                getattr(config, "prt_strengths", None),
                model_config.tokenizer,
                adapter_base=getattr(config, _ADAPTER_BASE, None),
                **where,
            )
        else:
            raise PRTValueError(
                "The model names no rewards.",
                expected='a recipe, or a backbone with `--hf-overrides \'{"architectures": ["PRTForCausalLM"], '
                '"prt_rewards": [...]}\'`',
                found=f"{model_config.model} ({config.model_type})",
            )
        networks = [get_config(parts.backbone, trust_remote_code=False)]
        networks += [get_config(network.folder, trust_remote_code=False) for network in parts.networks.values()]
        for network in networks:
            _check_network(model_config, network)
        if model_config.disable_sliding_window and any(map(window_of, networks)):
            raise UnsupportedError(
                "Sliding windows of the parts cannot be switched off.", remedy="leave out --disable-sliding-window"
            )
        for network in networks[1:]:
            _fit_length(model_config, network)
        backbone = networks[0]
        own = {"architectures": backbone.architectures, "vocab_size": backbone.vocab_size}
        if isinstance(config, PRTModelConfig):
            config = backbone
        setattr(config, PARTS, parts.to_dict() | {"backbone_config": own})
        config.architectures, config.vocab_size = [model_config.architecture], parts.vocab_size
        model_config.hf_config, model_config.hf_text_config = config, get_hf_text_config(config)
        model_config.model_arch_config = model_config.get_model_arch_config()

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """
        Raises:
            UnsupportedError: a way of running the engine that would give other text, or none.
        """
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        # Not before `EngineArgs` has taken its own model's name from here: it may be asked again, as by Ray Data, and
        # would then serve the bare backbone.
        model.model, model.revision = parts_of(model.hf_config).backbone, None
        speculation = vllm_config.speculative_config
        method = None if speculation is None else speculation.method
        lora = vllm_config.lora_config
        if lora is None:
            _forget_adapters(model.hf_config)
        parts = parts_of(model.hf_config)
        _, *rewards = network_configs(model.hf_config)
        quantised = [reward.quantization_config for reward in rewards if getattr(reward, "quantization_config", None)]
        refused = {
            "it gives tokens, and the hidden states of its networks are not to be pooled together": (
                model.runner_type == "pooling",
                f"runner = {model.runner_type}",
            ),
            "vLLM's other loaders read the weights of one network, and leave the rewards as they were made": (
                vllm_config.load_config.load_format not in _LOAD_FORMATS,
                f"load_format = {vllm_config.load_config.load_format}",
            ),
            "the rewards' decoders run beside the backbone's, not in stages": (
                parallel.pipeline_parallel_size > 1,
                f"pipeline_parallel_size = {parallel.pipeline_parallel_size}",
            ),
            "vLLM makes the groups of ranks that experts run in for the backbone alone": (
                not model.is_moe and any(_has_experts(model, reward) for reward in rewards),
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
            "such drafts are made from hidden states of one network": (
                method not in (None, *_SPECULATION),
                f"speculative method {method}",
            ),
            "the engine keeps one network's cache and states for drafts": (
                method == "draft_model" and speculation.draft_model_config.architecture == model.architecture,
                "a draft model with rewards",
            ),
            "requests' own rewards are put on one base, and none is known": (
                lora is not None and parts.adapter_base is None,
                f"enable_lora, and no `{_ADAPTER_BASE}`",
            ),
            "requests' own rewards change their base, and all of it that they were tuned on": (
                lora is not None and lora.target_modules is not None,
                "lora_target_modules",
            ),
            "vLLM's V1 model runner does not tell which of the drafts' rows have rewards of their own": (
                lora is not None and speculation is not None and not vllm_config.use_v2_model_runner,
                "enable_lora with speculation",
            ),
        }
        for reason, (is_asked, found) in refused.items():
            if is_asked:
                raise UnsupportedError(f"A PRT model is not served so: {reason}.", found=found)
        for config in rewards:
            _check_heads(config.get_text_config(), parallel.tensor_parallel_size)
        if speculation is not None and not vllm_config.use_v2_model_runner:
            RefusedStrengths.engines[id(model)] = model
        else:
            processor = processor_name(vllm_config, len(parts.rewards), with_adapters=lora is not None)
            model.logits_processors = [*(model.logits_processors or []), processor]


def network_configs(config) -> list:
    """Configurations of the backbone and of what runs beside it, as the engine builds them, from the PRT model's."""
    backbone = copy.deepcopy(config)
    backbone.update(getattr(config, PARTS)["backbone_config"])
    others = []
    for network in parts_of(config).networks.values():
        other = get_config(network.folder, trust_remote_code=False)
        if network.is_adapted:
            other.tie_word_embeddings = other.get_text_config().tie_word_embeddings = False
        others.append(other)
    return [backbone, *others]


def parts_of(config) -> ServedParts:
    return ServedParts.from_dict(
        {name: value for name, value in getattr(config, PARTS).items() if name != "backbone_config"}
    )


def _forget_adapters(config) -> None:
    """Of an engine that takes no LoRA.

    Raises:
        PRTValueError: a base for adapters was given.
    """
    if getattr(config, _ADAPTER_BASE, None) is not None:
        raise PRTValueError(
            f"`{_ADAPTER_BASE}` is for rewards that requests name.", expected="--enable-lora", found="an engine without"
        )
    getattr(config, PARTS)["adapter_base"] = None


def window_of(config) -> int | None:
    """The sliding window of a network all of whose layers have one; mixed ones tell the engine layer by layer."""
    config = config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and any(kind != "sliding_attention" for kind in kinds):
        return None
    return getattr(config, "sliding_window", None)


def _check_network(model_config: ModelConfig, config) -> None:
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


def _fit_length(model_config: ModelConfig, config) -> None:
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


def _has_experts(model_config: ModelConfig, config) -> bool:
    own = copy.copy(model_config)
    own.hf_config, own.hf_text_config = config, get_hf_text_config(config)
    return own.get_model_arch_config().num_experts > 0


def _check_heads(config, degree: int) -> None:
    heads = config.num_attention_heads
    of_keys = getattr(config, "num_key_value_heads", None) or heads
    if heads % degree or (of_keys % degree and degree % of_keys):
        raise UnsupportedError(
            "A reward's attention heads cannot be divided among the ranks.",
            expected=f"a tensor_parallel_size that divides {heads} heads, and divides {of_keys} key heads or is a "
            "multiple of them",
            found=str(degree),
        )
