"""Describe a PRT model to vLLM before it starts: its networks, and their folders."""

import copy

from transformers import PreTrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config import get_config, get_hf_text_config

from ..errors import PRTValueError, UnsupportedError
from ..hub.client import local_folder
from ..inference.configuration import PRTModelConfig
from . import ADAPTER_BASE
from .limits import check_engine, check_networks, fit_length
from .parts import ServedParts, parts_by_name, parts_of_recipe
from .strength import RefusedStrengths, processor_name

PARTS = "prt_parts"  # entry of the configuration that the engine hands to its processes


class PRTEngineConfig(VerifyAndUpdateConfig):
    """Makes the backbone the engine's model, under the architecture of a PRT model and with its rewards."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Find the parts, and store them in the model's configuration.

        Raises:
            RewardFileError, BaseModelMismatchError, VocabularyMismatchError: as raised in [`~prt_hf.serving.parts`].
            ContextLengthError, UnsupportedError: as raised in [`~prt_hf.serving.limits`].
        """
        config = model_config.hf_config
        where = {"revision": model_config.revision, "token": model_config.hf_token}
        if isinstance(config, PRTModelConfig):
            overrides = model_config.hf_overrides  # of draft models, a function
            if isinstance(overrides, dict) and overrides:
                raise PRTValueError(
                    "A recipe names all of its networks.", expected="no `hf_overrides`", found=str(overrides)
                )
            if getattr(config.backbone_config, "quantization_config", None) is not None:
                raise UnsupportedError(
                    "The recipe quantises its backbone when it is loaded, which the engine would not do.",
                    expected="a recipe of a backbone in full precision",
                    found=str(config.backbone_config.quantization_config)[:200],
                    remedy="save a recipe without `quantization_config`",
                )
            folder = local_folder(model_config.model, **where)
            parts = parts_of_recipe(folder, config, model_config.tokenizer, token=where["token"])
            model_config.hf_config_path = str(folder)  # where the engine looks for the settings of generation
        elif any(getattr(config, name, None) is not None for name in ("prt_rewards", ADAPTER_BASE)):
            parts = parts_by_name(
                model_config.model,
                getattr(config, "prt_rewards", []),
                getattr(config, "prt_strengths", None),
                model_config.tokenizer,
                adapter_base=getattr(config, ADAPTER_BASE, None),
                token_map=getattr(config, "prt_token_map", None),
                **where,
            )
        else:
            raise PRTValueError(
                "The model names no rewards.",
                expected='a recipe, or a backbone with `--hf-overrides \'{"architectures": ["PRTForCausalLM"], '
                '"prt_rewards": [...]}\'`',
                found=f"{model_config.model} ({config.model_type})",
            )
        folders = [parts.backbone, *(network.folder for network in parts.networks.values())]
        backbone, *others = networks = [get_config(folder, trust_remote_code=False) for folder in folders]
        check_networks(model_config, networks)
        for network in others:
            fit_length(model_config, network)
        own = {"architectures": backbone.architectures, "vocab_size": backbone.vocab_size}
        if isinstance(config, PRTModelConfig):
            config = backbone
        setattr(config, PARTS, parts.to_dict() | {"backbone_config": own})
        config.architectures, config.vocab_size = [model_config.architecture], parts.size
        model_config.hf_config, model_config.hf_text_config = config, get_hf_text_config(config)
        model_config.model_arch_config = model_config.get_model_arch_config()

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the engine's options, and name the processor of strengths.

        Raises:
            UnsupportedError: as raised by [`~prt_hf.serving.limits.check_engine`].
            PRTValueError: a base for rewards that requests name, and no LoRA.
        """
        model = vllm_config.model_config
        # Not before `EngineArgs` has taken its own model's name from here: it may be asked again, as by Ray Data, and
        # would then serve the bare backbone.
        model.model, model.revision = parts_of(model.hf_config).backbone, None
        lora = vllm_config.lora_config
        if lora is None:
            if getattr(model.hf_config, ADAPTER_BASE, None) is not None:
                problem = f"`{ADAPTER_BASE}` is for rewards that requests name."
                raise PRTValueError(problem, expected="--enable-lora", found="an engine without")
            getattr(model.hf_config, PARTS)["adapter_base"] = None
        parts = parts_of(model.hf_config)
        _, *others = network_configs(model.hf_config)
        check_engine(vllm_config, others, has_adapter_base=parts.adapter_base is not None)
        if vllm_config.speculative_config is not None and not vllm_config.use_v2_model_runner:
            RefusedStrengths.engines[id(model)] = model
        else:
            processor = processor_name(vllm_config, len(parts.rewards), with_adapters=lora is not None)
            model.logits_processors = [*(model.logits_processors or []), processor]


def network_configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Return the configurations of the backbone and of the other networks, as the engine builds them."""
    backbone = copy.deepcopy(config)
    backbone.update(getattr(config, PARTS)["backbone_config"])
    others = []
    for network in parts_of(config).networks.values():
        other = get_config(network.folder, trust_remote_code=False)
        if network.is_adapted:
            other.tie_word_embeddings = other.get_text_config().tie_word_embeddings = False
        others.append(other)
    return [backbone, *others]


def parts_of(config: PreTrainedConfig) -> ServedParts:
    """Return the parts that are stored in a PRT model's configuration."""
    return ServedParts.from_dict(
        {name: value for name, value in getattr(config, PARTS).items() if name != "backbone_config"}
    )
