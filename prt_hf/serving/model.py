"""The PRT model as vLLM runs it."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.transformers_utils.config import get_hf_text_config

from ..errors import UnsupportedError
from .engine_config import network_configs, parts_of, window_of
from .strength import Steps
from .weights import merged_weights


class PRTForCausalLM(nn.Module):
    """Backbone and rewards over one batch of tokens, each with its own layers in the engine's paged cache.

    logits = log_softmax(b + sum_i strength_i r_i) over the contract's tokens, which is Eq. 10. A reward adapter is
    merged into its base's weights while these are loaded, in memory only.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.parts = parts_of(self.config)
        backbone, *rewards = network_configs(self.config)
        self.backbone = init_vllm_registered_model(
            vllm_config, prefix=maybe_prefix(prefix, "backbone"), hf_config=backbone
        )
        # Not a ModuleList: the engine takes the one number in a layer's name for its depth.
        self._names = [f"reward_{index}" for index in range(len(rewards))]
        for name, config in zip(self._names, rewards, strict=True):
            network = init_vllm_registered_model(
                _own_cache_config(vllm_config, config), prefix=maybe_prefix(prefix, name), hf_config=config
            )
            setattr(self, name, network)
        self._sizes = [config.get_text_config().hidden_size for config in (backbone, *rewards)]
        self.secondary_weights = [
            DefaultModelLoader.Source(reward.folder, revision=None, prefix=f"{name}.")
            for name, reward in zip(self._names, self.parts.rewards, strict=True)
            if not reward.is_adapter
        ]
        self._steps = Steps(vllm_config, [reward.strength for reward in self.parts.rewards], self.parts.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.backbone.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors=None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last hidden states of all networks, side by side: `(num_tokens, sum of hidden sizes)`."""
        return torch.cat([network(input_ids, positions) for network in self._networks], -1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """`(num_rows, vocab_size)` in float32; None on ranks that do not sample."""
        hidden = hidden_states.split(self._sizes, -1)
        backbone, *rewards = [
            network.compute_logits(states.contiguous()) for network, states in zip(self._networks, hidden, strict=True)
        ]
        return None if backbone is None else self._steps.combine(backbone, rewards)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded = AutoWeightsLoader(self).load_weights(
            (name if name.startswith(tuple(f"{own}." for own in self._names)) else f"backbone.{name}", tensor)
            for name, tensor in weights
        )
        for name, reward in zip(self._names, self.parts.rewards, strict=True):
            if reward.is_adapter:
                network = getattr(self, name)
                _check_own_head(network)
                of_reward = ((f"{name}.{key}", tensor) for key, tensor in merged_weights(reward))
                loaded |= AutoWeightsLoader(self).load_weights(of_reward)
        return loaded

    @property
    def _networks(self) -> list[nn.Module]:
        return [self.backbone, *(getattr(self, name) for name in self._names)]


def _own_cache_config(vllm_config: VllmConfig, config) -> VllmConfig:
    """Layers take their sliding window from the engine's cache configuration, which has the backbone's."""
    own = copy.copy(vllm_config)
    own.cache_config = copy.copy(vllm_config.cache_config)
    own.cache_config.sliding_window = window_of(config)
    own.model_config = copy.copy(vllm_config.model_config)
    own.model_config.hf_text_config = get_hf_text_config(config)
    return own


def _check_own_head(network: nn.Module) -> None:
    if not any(isinstance(module, ParallelLMHead) for module in network.modules()):
        raise UnsupportedError(
            f"vLLM's {type(network).__name__} has no head but its embeddings, and an adapter changes the head alone.",
            remedy="tune a full reward, or a reward on another architecture",
        )
