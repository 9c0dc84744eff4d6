"""Weights of reward adapters and of their bases, named as in a checkpoint of a plain model."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from ..networks.auto import load_pretrained
from ..reward.model import RewardModel


def merged_weights(adapter: str, base: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors as in a checkpoint of a reward's base, with the adapter added to them; float32.

    The reward is loaded from its folder with all checks, on the base in its own, and freed when the last tensor is
    taken.
    """
    network = RewardModel.from_pretrained(adapter, base_model=base, dtype=torch.float32).network
    _untie(network.get_base_model())
    yield from _as_in_a_checkpoint(network.merge_and_unload())


def weights_of_base(folder: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of a base that adapters are put on while it is served, its head apart from the embeddings."""
    network = load_pretrained(folder, dtype=torch.float32)
    _untie(network)
    yield from _as_in_a_checkpoint(network)


def _as_in_a_checkpoint(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    return revert_weight_conversion(network, network.state_dict()).items()


def _untie(model: nn.Module) -> None:
    """Give the head weights of its own: merging into one that is also the embedding would change both."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head, embedding = (getattr(layer, "base_layer", layer) for layer in (head, embedding))
    if head.weight.data_ptr() == embedding.weight.data_ptr():
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
