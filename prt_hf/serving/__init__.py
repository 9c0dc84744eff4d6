"""PRT models in vLLM, as an out-of-tree model: the engine keeps all networks' KV caches; no merged checkpoint on disk.

vLLM finds [`register`] by the entry point `vllm.general_plugins`. Nothing here is imported without vLLM.
"""

ARCHITECTURE = "PRTForCausalLM"
ADAPTER_BASE = "prt_adapter_base"  # of the rewards that requests name; an entry of `--hf-overrides`


def register() -> None:
    """Register recipes and their architecture with vLLM, which calls this in each process, maybe more than once."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .engine_config import PRTEngineConfig

    MODELS_CONFIG_MAP[ARCHITECTURE] = PRTEngineConfig
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
