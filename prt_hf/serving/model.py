"""The PRT model as vLLM runs it."""

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import DefaultModelLoader
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.sequence import IntermediateTensors
from vllm.transformers_utils.config import get_hf_text_config

from ..errors import UnsupportedError
from ..functional import signed_sum
from .adapters import RequestAdapters
from .engine_config import network_configs, parts_of
from .limits import window_of
from .parts import ADAPTERS
from .strength import Steps
from .tokens import TokenReader
from .weights import merged_weights, weights_of_base


class PRTForCausalLM(nn.Module, SupportsLoRA):
    """The backbone and all networks of rewards, each with its own layers in the engine's paged cache.

    logits = log_softmax(b + sum_i strength_i r_i) over the backbone's tokens, which is Eq. 10; those that a reward does
    not know are neutral to it, see [`~prt_hf.functional.combine`]. A reward adapter is merged into its base's weights
    while these are loaded, in memory only; adapters that requests name are LoRAs of the engine, on a network of their
    own.

    The engine's caches have one slot for each token of the backbone. A token that a reward does not know is therefore
    read as one of its own, where `generate` of transformers reads several or none
    ([`~prt_hf.serving.tokens.ServedTokens`]), and a reward has no prompt of its own.
    """

    embedding_modules = {"lm_head": "output_embeddings"}

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.parts = parts_of(self.config)
        backbone, *others = network_configs(self.config)
        self.backbone = init_vllm_registered_model(
            _own_text_config(vllm_config, backbone), prefix=maybe_prefix(prefix, "backbone"), hf_config=backbone
        )
        # Not a ModuleList: the engine takes the one number in a layer's name for its depth.
        self._networks = self.parts.networks
        for name, config in zip(self._networks, others, strict=True):
            network = init_vllm_registered_model(
                _own_cache_config(vllm_config, config), prefix=maybe_prefix(prefix, name), hf_config=config
            )
            setattr(self, name, network)
        most = vllm_config.scheduler_config.max_num_batched_tokens
        self.readers = nn.ModuleDict({name: TokenReader(tokens, most) for name, tokens in self.parts.tokens.items()})
        self._sizes = [_width(config.get_text_config()) for config in (backbone, *others)]
        self.secondary_weights = [
            DefaultModelLoader.Source(network.folder, revision=None, prefix=f"{name}.")
            for name, network in self._networks.items()
            if not network.is_adapted
        ]
        self._steps = Steps(vllm_config, [reward.strength for reward in self.parts.rewards], self.parts.size)
        self.request_adapters = None
        if ADAPTERS in self._networks:
            self.request_adapters = RequestAdapters(self, vllm_config.lora_config)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the backbone's embeddings, `(num_tokens, hidden_size)`."""
        return self.backbone.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the last hidden states of all networks, side by side: `(num_tokens, sum of hidden sizes)`."""
        hidden = [self.backbone(input_ids, positions)]
        for name in self._networks:
            ids = self.readers[name](input_ids) if name in self.readers else input_ids
            hidden.append(getattr(self, name)(ids, positions))
        return torch.cat(hidden, -1)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Return log-probabilities, `(num_rows, vocab_size)` in float32; None on ranks that do not sample."""
        hidden = hidden_states.split(self._sizes, -1)
        backbone, *others = [
            network.compute_logits(states.contiguous())
            for network, states in zip(self._modules_in_order, hidden, strict=True)
        ]
        if backbone is None:
            return None
        scores = {
            name: self.readers[name].scores(logits) if name in self.readers else logits
            for name, logits in zip(self._networks, others, strict=True)
        }
        names_of_rewards = self.parts.names_of_rewards
        rewards = [
            signed_sum([self._networks[name].sign for name in names], [scores[name].float() for name in names])
            for names in names_of_rewards
        ]
        neutral = [self.readers[name].neutral if name in self.readers else None for name, *_ in names_of_rewards]
        named_strengths = None if self.request_adapters is None else self.request_adapters.strengths_of_rows()
        return self._steps.combine(backbone, rewards, named_strengths, neutral)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the weights of all networks, and merge adapters into theirs; return the names of what was loaded."""
        own = tuple(f"{name}." for name in self._networks)
        loaded = AutoWeightsLoader(self).load_weights(
            (name if name.startswith(own) else f"backbone.{name}", tensor) for name, tensor in weights
        )
        for name, network in self._networks.items():
            if network.is_adapted:
                _check_own_head(getattr(self, name))
                if network.adapter is None:
                    found = weights_of_base(network.folder)
                else:
                    found = merged_weights(network.adapter, network.folder)
                loaded |= AutoWeightsLoader(self).load_weights((f"{name}.{key}", tensor) for key, tensor in found)
        return loaded

    @property
    def _modules_in_order(self) -> list[nn.Module]:
        """The backbone, then the other networks."""
        return [self.backbone, *(getattr(self, name) for name in self._networks)]


def _width(config: PreTrainedConfig) -> int:
    """Return the width of the last hidden states, which OPT projects for its head."""
    return getattr(config, "word_embed_proj_dim", config.hidden_size)


def _own_text_config(vllm_config: VllmConfig, config: PreTrainedConfig) -> VllmConfig:
    """Return the engine's configuration with a network's own: some architectures read the vocabulary there."""
    own = copy.copy(vllm_config)
    own.model_config = copy.copy(vllm_config.model_config)
    own.model_config.hf_text_config = get_hf_text_config(config)
    return own


def _own_cache_config(vllm_config: VllmConfig, config: PreTrainedConfig) -> VllmConfig:
    """Return the engine's configuration with a network's own sliding window, which its layers read there."""
    own = _own_text_config(vllm_config, config)
    own.cache_config = copy.copy(vllm_config.cache_config)
    own.cache_config.sliding_window = window_of(config)
    return own


def _check_own_head(network: nn.Module) -> None:
    """Refuse networks whose head is always the embedding."""
    if not any(isinstance(module, ParallelLMHead) for module in network.modules()):
        raise UnsupportedError(
            f"vLLM's {type(network).__name__} has no head but its embeddings, and an adapter changes the head alone.",
            remedy="tune a full reward, or a reward on another architecture",
        )
