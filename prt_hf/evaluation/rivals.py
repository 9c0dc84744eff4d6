"""Rivals that need no training: what tuning changed in the old model, laid on the target; examples in its context."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from ..functional import IGNORE_INDEX
from ..networks.adapters import bare_base, wrap
from ..networks.auto import CONFIG_KWARGS, load_skeleton
from ..networks.lm_head import Projection
from ..reward.backbones import Backbone, Batch
from ..reward.finetuned import TunedModel
from ..reward.model import RewardModel
from ..training.data import holds_messages
from ..vocabulary import unwrap_tokenizer
from .rows import prepared
from .store import key_of
from .tuned_rivals import SAME_COMPUTE, SAME_STEPS, TunedRival, Tuning


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


class FewShot(Backbone):
    """The target with labelled examples in front of every row.

    Args:
        reward ([`RewardModel`]): The reward that it is compared with, for language models.
        target ([`~prt_hf.reward.backbones.Backbone`]): The target.
        context (list of `int`): The examples, from [`context_of`].
    """

    def __init__(self, reward: RewardModel, target: Backbone, context: list[int]):
        super().__init__(reward, "the target with examples in its context")
        self._target, self._context = target, context

    @cached_property
    def identity(self) -> dict[str, str]:
        """Key of the weights and the examples."""
        return {"few_shot": key_of({"target": self._target.identity, "context": self._context})}

    def load(self) -> None:
        """Load the target."""
        self._target.load()
        self._take(self._target.network, self._target.processing_class)
        self.limit = self.limit and self.limit - len(self._context)

    def place(self, placed: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
        """Place the target."""
        self._target.place(placed)
        self.network = self._target.network

    def unload(self) -> None:
        """Unload the target."""
        self._target.unload()
        self.network = None

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits of the rows' own positions."""
        return super().logits(self._in_context(batch))[:, -batch.inputs["input_ids"].shape[1] :]

    def projection(self, batch: Batch) -> Projection:
        """Return the logits at the supervised positions as a product that is not computed yet."""
        return super().projection(self._in_context(batch))

    def _in_context(self, batch: Batch) -> Batch:
        """Put the examples in front; where rows begin with a start token, the last token of the examples replaces it.

        Nothing is predicted of a row's first token, so the supervised positions are the same.
        """
        ids, labels = batch.inputs["input_ids"], batch.labels
        start = unwrap_tokenizer(self._reward.processing_class).bos_token_id
        context = ids.new_tensor(self._context).expand(len(ids), -1)
        first = int(start is not None and bool((ids[:, 0] == start).all()))
        mask = torch.ones_like(context)
        return Batch(
            {
                "input_ids": torch.cat([context, ids[:, first:]], 1),
                "attention_mask": torch.cat([mask, batch.inputs["attention_mask"][:, first:]], 1),
            },
            torch.cat([torch.full_like(mask, IGNORE_INDEX)[:, first:], labels], 1),
        )


def context_of(examples: Dataset, reward: RewardModel, length: int) -> list[int]:
    """Return the token ids of examples in a row.

    Messages follow one another as the turns of one chat do. Between others, a blank line stands for end and start
    token, at which a model would expect another document.
    """
    tokenizer, is_chat = unwrap_tokenizer(reward.processing_class), holds_messages(examples)
    between = [] if is_chat else tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    context = []
    for row in prepared(examples, reward, length)(1).dataset:
        ids = row["input_ids"]
        ids = ids[1:] if context and ids[0] == tokenizer.bos_token_id else ids
        context += [*(ids if is_chat or ids[-1] != tokenizer.eos_token_id else ids[:-1]), *between]
    return context


def made_rivals(
    reward: RewardModel,
    targets: Mapping[str, str | PreTrainedModel],
    backbones: Mapping[str, Backbone],
    source: Backbone,
    tuned: TunedModel | None,
    methods: Sequence[str],
    *,
    context: list[int],
    longest: int,
    limits: Mapping[str, int | None],
    tuning: Tuning | None,
    load_kwargs: dict,
    target_kwargs: dict,
) -> tuple[dict[str, dict[str, Backbone]], list[str]]:
    """Return target -> method -> the rivals that are made of the target, and notes on what is left out, and why.

    Args:
        reward ([`RewardModel`]): The reward.
        targets: Name -> id, folder or model in memory.
        backbones: Name -> the target.
        source ([`~prt_hf.reward.backbones.Backbone`]): The source.
        tuned ([`~prt_hf.reward.finetuned.TunedModel`], *optional*): The fine-tuned source, for `"transplanted"`.
        methods: Those that are wanted.
        context: The examples for `"few_shot"`; empty for none.
        longest: The number of tokens of the longest row.
        limits: Name -> the number of tokens that the target reads.
        tuning ([`Tuning`], *optional*): For `"lora_steps"` and `"lora_compute"`.
        load_kwargs: Arguments of `from_pretrained`.
        target_kwargs: Those for the targets.
    """
    found, notes = {name: {} for name in targets}, []
    for name, model in targets.items():
        if tuned is not None and "transplanted" in methods:
            if reason := why_not_transplanted(reward, model, source, tuned, load_kwargs, target_kwargs):
                notes.append(f"transplanted is left out at {name}: {reason}")
            else:
                found[name]["transplanted"] = Transplanted(reward, backbones[name], source, tuned)
        if context and "few_shot" in methods:
            needed = len(context) + longest
            if limits[name] is not None and needed > limits[name]:
                notes.append(f"few-shot is left out at {name}: it reads {limits[name]} tokens, and {needed} are needed")
            else:
                found[name]["few_shot"] = FewShot(reward, backbones[name], context)
        if tuning is not None:
            networks = _source_skeleton(reward, source, load_kwargs), _skeleton(model, target_kwargs)
            ways = {SAME_STEPS: tuning, SAME_COMPUTE: tuning.at_same_compute(reward, *networks)}
            found[name] |= {way: TunedRival(reward, backbones[name], ways[way]) for way in ways if way in methods}
            notes.append(f"LoRA at {name}: {tuning.steps} steps, and {ways[SAME_COMPUTE].steps} for as much compute")
    return found, notes


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
    there = _skeleton(target, target_kwargs)
    if target_kwargs.get("quantization_config") or getattr(there.config, "quantization_config", None):
        return "its weights are quantised"
    theirs = _shapes(there)
    olds = _source_skeleton(reward, source, load_kwargs), _skeleton(tuned.network or tuned.base, load_kwargs)
    for ours in map(_shapes, olds):
        differing = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if differing:
            name = differing[0]
            return f"{len(differing)} weights differ in shape, such as {name}: {ours.get(name)}, {theirs.get(name)}"
    return None


def _source_skeleton(reward: RewardModel, source: Backbone, load_kwargs: dict) -> PreTrainedModel:
    named = reward.config.sources[0]
    return _skeleton(source.network or named.id, load_kwargs | ({"revision": named.revision} if named.revision else {}))


def _skeleton(model: str | PreTrainedModel | PeftModel, load_kwargs: dict) -> PreTrainedModel:
    """Return a model without its adapter; of an id, without its weights."""
    if isinstance(model, str):
        return load_skeleton(model, **{name: load_kwargs[name] for name in CONFIG_KWARGS if name in load_kwargs})
    return bare_base(model) if isinstance(model, PeftModel) else model


def _shapes(model: PreTrainedModel) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in model.named_parameters()}
