"""The weights of a reward adapter as those of a plain model."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from ..reward_model import RewardModel
from .parts import ServedReward


def merged_weights(reward: ServedReward) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors as in a checkpoint of the reward's base, with the adapter added to them; float32.

    The reward is loaded as everywhere, with all its checks, and let go of when the last tensor is taken.
    """
    loaded = RewardModel.from_pretrained(reward.folder, base_model=reward.network, dtype=torch.float32)
    network = loaded.network
    _untie(network.get_base_model())
    merged = network.merge_and_unload()
    yield from revert_weight_conversion(merged, merged.state_dict()).items()


def _untie(model: nn.Module) -> None:
    """Merging into a head that is also the embedding would change both."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head, embedding = (getattr(layer, "base_layer", layer) for layer in (head, embedding))
    if head.weight.data_ptr() == embedding.weight.data_ptr():
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
