"""Rivals that need no training: what tuning changed in the old model, laid on the target's weights."""

import copy
from functools import cached_property

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from ..networks.adapters import bare_base, wrap
from ..networks.auto import CONFIG_KWARGS, load_skeleton
from ..reward.backbones import Backbone
from ..reward.finetuned import TunedModel
from ..reward.model import RewardModel
from .store import key_of


class Transplanted(Backbone):
    """The target with the old model's adapter, or with the difference that full fine-tuning made to the old model.

    Args:
        reward ([`RewardModel`]): The reward that it is compared with.
        target ([`~prt_hf.reward.backbones.Backbone`]): The target; a model in memory is left as it is.
        source ([`~prt_hf.reward.backbones.Backbone`]): The source.
        tuned ([`~prt_hf.reward.finetuned.TunedModel`]): The fine-tuned source.
    """

    def __init__(self, reward: RewardModel, target: Backbone, source: Backbone, tuned: TunedModel):
        super().__init__(reward, "the target with the change of the source")
        self._target, self._tuned, self._source = target, tuned, source

    @cached_property
    def identity(self) -> dict[str, str]:
        """Key of the weights of all three."""
        return {"transplanted": key_of([each.identity for each in (self._target, self._tuned, self._source)])}

    def load(self) -> None:
        """Load target and change, and put the change on the target.

        Raises:
            BaseModelMismatchError: The adapter was tuned from another model than the source.
        """
        parts = [self._target, self._tuned, self._source]
        loaded = [each for each in parts if each.network is None]
        for each in parts:
            each.load()
        self._tuned.check_base(self._source)
        source = self._source.network
        source = bare_base(source) if isinstance(source, PeftModel) else source
        self._take(transplant(self._target.network, self._tuned.network, source), self._target.processing_class)
        for each in loaded:
            each.network = None


@torch.no_grad()
def transplant(target: PreTrainedModel, tuned: PreTrainedModel | PeftModel, source: PreTrainedModel) -> nn.Module:
    """Return the target with the adapter of `tuned`, or with weights `target + (tuned - source)`, computed in float32.

    The shapes must be the same; the models are left as they are.
    """
    if isinstance(tuned, PeftModel):
        network = wrap(target, copy.deepcopy(tuned.active_peft_config))
        adapter = get_peft_model_state_dict(tuned, adapter_name=tuned.active_adapter, save_embedding_layers=False)
        set_peft_model_state_dict(network, adapter)
        return network.eval()
    network = copy.deepcopy(target)
    before, after = (dict(model.named_parameters()) for model in (source, tuned))
    for name, weight in network.named_parameters():
        change = after[name].float() - before[name].to(after[name].device).float()
        weight.copy_(weight.float() + change.to(weight.device))
    return network


def why_not_transplanted(
    reward: RewardModel,
    target: str | PreTrainedModel,
    source: Backbone,
    tuned: TunedModel,
    load_kwargs: dict,
    target_kwargs: dict,
) -> str | None:
    """Return why what tuning changed cannot be laid on a target, by the shapes of all weights; None if it can be.

    Models that are not in memory are not loaded for it; the arguments of `from_pretrained` name their revisions.
    """
    named = reward.config.sources[0]
    pinned = load_kwargs | ({"revision": named.revision} if named.revision else {})
    there = _skeleton(target, target_kwargs)
    if target_kwargs.get("quantization_config") or getattr(there.config, "quantization_config", None):
        return "its weights are quantised"
    theirs = _shapes(there)
    olds = _skeleton(source.network or named.id, pinned), _skeleton(tuned.network or tuned.base, load_kwargs)
    for ours in map(_shapes, olds):
        differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if differing:
            name = differing[0]
            return f"{len(differing)} weights differ in shape, such as {name}: {ours.get(name)}, {theirs.get(name)}"
    return None


def _skeleton(model: str | PreTrainedModel | PeftModel, load_kwargs: dict) -> PreTrainedModel:
    """Return a model without its adapter; of an id, without its weights."""
    if isinstance(model, str):
        return load_skeleton(model, **{name: load_kwargs[name] for name in CONFIG_KWARGS if name in load_kwargs})
    return bare_base(model) if isinstance(model, PeftModel) else model


def _shapes(model: PreTrainedModel) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in model.named_parameters()}
