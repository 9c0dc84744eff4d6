"""pi_pt in training: another network than the reward's, or the reward's own with its adapter off."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..contract import IMAGE_CLASSIFICATION, TEXT_GENERATION, ModelReference, RewardConfig, contract_to_dict
from ..errors import PRTValueError, VocabularyMismatchError
from ..hub.client import commit_of
from ..networks.adapters import bare_base, check_bare
from ..networks.anatomy import context_length, contract_of, pad_id
from ..networks.auto import load_base, load_pretrained, processing_class_of
from ..networks.identity import reference_to, weights_digest_of_files, weights_digest_of_model, weights_fingerprint
from ..networks.lm_head import Head, Projection, last_hidden_state, projection, why_not_projected
from ..networks.pixels import PIXELS, is_same_pixels, missing_pixels
from ..networks.shared_trunk import SharedTrunk
from ..vocabulary import VocabularyMatch, unwrap_tokenizer
from .batch import BackboneLogits, Batch
from .matching import RewardOrder
from .model import RewardModel


class Backbone(BackboneLogits):
    """A network pi_pt, frozen and in evaluation mode.

    It has more than 15 methods because training, measuring and storing states each read it in their own way.

    Args:
        reward ([`RewardModel`]): the reward that is tuned on it.
        network (`PreTrainedModel`, `str` or [`~contract.ModelReference`]): an id is not loaded before [`load`], since
            stored states need no model; a model named by a reference is checked. None in subclasses that set it later.
        **load_kwargs: for `from_pretrained` of an id.

    Attributes:
        order ([`~prt_hf.reward.matching.RewardOrder`]): where its logits stand in the reward's order.
        tokens ([`~prt_hf.vocabulary.VocabularyMatch`], *optional*): how its tokens differ from the reward's, in which
            batches are; None if they do not.
        limit (`int`, *optional*): number of tokens that it can read.
        reference ([`~contract.ModelReference`]): names it in the reward's configuration.
        index (`int`): the place of its own inputs in a batch.
        shares_reward_network (`bool`): whether it is the reward's own network, which the reward loads and places.
        processing_class: the tokenizer or image processor saved with its weights, else the reward's.
    """

    index = 0
    shares_reward_network = False
    tokens: VocabularyMatch | None = None

    def __init__(self, reward: RewardModel, network: PreTrainedModel | str | ModelReference | None, **load_kwargs):
        super().__init__(reward)
        self._named, self._load_kwargs = network, load_kwargs
        if isinstance(network, PreTrainedModel | PeftModel):
            check_bare(network)
            self._named = None
            self._take(network)

    @property
    def vocabulary(self) -> str | None:
        """The fingerprint of the reward's vocabulary, in whose order a language model's head is stored."""
        return getattr(self._reward.contract, "fingerprint", None)

    def load(self) -> None:
        """Load the network, unless it is in memory, and match it with the reward.

        Raises:
            VocabularyMismatchError, LabelMismatchError: it does not fit the reward.
        """
        if self.network is not None:
            return
        if isinstance(self._named, ModelReference):
            network = load_base(self._named, **self._load_kwargs)
        else:
            network = load_pretrained(self._named, **self._load_kwargs)
        self._take(network)

    def _take(self, network: PreTrainedModel, processing_class: Any = None) -> None:
        processing_class = processing_class or processing_class_of(network, self.task, **self._load_kwargs)
        match = self._reward.match_with(network, processing_class)
        self.order = RewardOrder.of(match, self._reward.size)
        self.tokens = None if match.tokens is None or match.tokens.is_identical else match.tokens
        self.processing_class = processing_class or self._reward.processing_class
        self.limit, self.reference = context_length(network), reference_to(network)
        self.network = network.eval()

    def place(self, placed: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
        """Replace the network by what `placed` makes of it, such as one on another device."""
        self._home = self.network.device
        self.network = placed(self.network)

    def unload(self) -> None:
        """Free a network that can be loaded again; move a model of the user's back to its device."""
        if self._named is not None:
            self.network = None
        elif self.network.device != self._home:
            self.network.to(self._home)

    @cached_property
    def identity(self) -> dict[str, str]:
        """Key of the weights, computed without loading them."""
        if self._named is None:
            return {"weights": weights_digest_of_model(self.network)}
        name, revision = self._named, self._load_kwargs.get("revision")
        if isinstance(name, ModelReference):
            name, revision = name.id, name.revision
        form = {"dtype": str(self._load_kwargs.get("dtype", "auto"))}
        if (quantization := self._load_kwargs.get("quantization_config")) is not None:
            form["quantization"] = str(quantization if isinstance(quantization, dict) else quantization.to_dict())
        if Path(name).is_dir():
            return {"weights": weights_digest_of_files(name)} | form
        return {"id": name, "revision": commit_of(name, revision, self._load_kwargs.get("token"))} | form

    def logits(self, batch: Batch) -> torch.Tensor:
        """Return logits in the reward's order, see [`BackboneLogits.logits`]."""
        with torch.no_grad(), self._pretrained() as network:
            return self.order.take(network(**self._inputs(batch)).logits)

    def projection(self, batch: Batch) -> Projection:
        """Return a language model's logits at the supervised positions as a product that is not computed yet."""
        with torch.no_grad(), self._pretrained() as network:
            return projection(network, self._hidden(network, batch), *self.order)

    def states(self, batch: Batch) -> torch.Tensor:
        """Return all that is needed of it at the supervised positions, `(n, hidden_size)` or `(n, num_labels)`."""
        with torch.no_grad(), self._pretrained() as network:
            if self.task == TEXT_GENERATION:
                return self._hidden(network, batch)
            return batch.chosen(network(**self._inputs(batch)).logits)

    def companions(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Return tensors and facts that turn its states into logits in the reward's order."""
        with self._pretrained() as network:
            facts = {
                "reference": vars(self.reference),
                # Of a language model the head is stored, in the reward's order.
                "contract": contract_to_dict(
                    self._reward.contract
                    if self.task == TEXT_GENERATION
                    else contract_of(network, self.processing_class)
                ),
            }
            if self.task != TEXT_GENERATION:
                return {}, facts
            head = Head.of(network, *self.order)
        tensors = {"weight": head.weights[0]} | ({} if head.bias is None else {"bias": head.bias})
        return tensors, facts | {"scale": head.scale, "softcap": head.softcap}

    def why_not_projected(self, batch: Batch) -> str | None:
        """Return why [`projection`] would be wrong for this network; None if it is right."""
        with torch.no_grad(), self._pretrained() as network:
            if self.order.absent is not None and Head.of(network).softcap is not None:
                return "a softcap, behind which tokens of the reward are absent"
            return why_not_projected(network, self._inputs(batch))

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the inputs of this backbone.

        Raises:
            UnsupportedError: the backbone needs other pixels than the reward, and the batch has none.
        """
        if self.tokens is not None and "input_ids" in batch.inputs:
            return batch.inputs | {"input_ids": self._translated(batch)}
        own = batch.backbone_inputs[self.index] if batch.backbone_inputs else {}
        if self._wants_own_pixels and PIXELS not in own:
            raise missing_pixels(
                "backbone",
                self.index,
                self._reward.processing_class,
                self.processing_class,
                "data_collator=PixelCollator(reward_processor, [backbone_processor]), which makes them of the rows' "
                "`image`; or that column beside `pixel_values`",
            )
        return batch.inputs | own

    def _translated(self, batch: Batch) -> torch.LongTensor:
        """Return the backbone's ids of a batch of the reward's tokens.

        Raises:
            VocabularyMismatchError: the backbone does not have one of the tokens, of the text or to be predicted.
        """
        ids, mask = batch.inputs["input_ids"], batch.inputs.get("attention_mask")
        mask = mask if mask is None or mask.shape == ids.shape else None
        found = self._known(ids, mask)
        if self.task == TEXT_GENERATION and batch.labels is not None:
            self._known(batch.supervised_labels, None)
        pad = pad_id(self.network)
        return found if mask is None else found.masked_fill(mask == 0, pad)

    def _known(self, ids: torch.LongTensor, mask: torch.Tensor | None) -> torch.LongTensor:
        """Return the backbone's ids for the reward's, and refuse tokens that it does not have."""
        translation = self.tokens.to_backbone
        found = translation.one_to_one(ids, mask)
        if found is None:
            is_unknown = translation.ids_on(ids.device)[ids] < 0
            token = int(ids[is_unknown if mask is None else is_unknown & (mask != 0)][0])
            tokenizer = unwrap_tokenizer(self._reward.processing_class)
            name = "a token" if tokenizer is None else repr(tokenizer.convert_ids_to_tokens(token))
            raise VocabularyMismatchError(
                "The data hold a token that the backbone does not have.",
                expected=f"tokens of both vocabularies: {self.tokens}",
                found=f"{name}, id {token} of the reward",
                remedy="leave out such rows, or take a backbone that has it",
            )
        return found

    def _hidden(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        return batch.chosen(last_hidden_state(network, self._inputs(batch)))

    @cached_property
    def _wants_own_pixels(self) -> bool:
        is_known = self.task == IMAGE_CLASSIFICATION
        return is_known and not is_same_pixels(self._reward.processing_class, self.processing_class)

    @contextmanager
    def _pretrained(self) -> Iterator[nn.Module]:
        yield self.network


class OwnBase(Backbone):
    """The reward's own network with its adapter off.

    There is no second model in memory, and the layers below the first adapted one are computed once for both.
    """

    shares_reward_network = True

    def __init__(self, reward: RewardModel):
        super().__init__(reward, None)
        self._trunk: SharedTrunk | None = None
        self.processing_class = reward.processing_class
        self.network: PeftModel = reward.network
        self.order = RewardOrder(reward.columns)
        self.limit, self.reference = context_length(reward.network), reference_to(reward.network)

    def place(self, placed: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
        """Stay with the reward."""

    def unload(self) -> None:
        """Stay in memory with the reward."""

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        if batch.backbone_inputs and batch.backbone_inputs[self.index]:
            raise PRTValueError(
                "The reward's own base reads what the reward reads.",
                expected="no inputs of its own",
                found=", ".join(f"backbone_{self.index}_{name}" for name in batch.backbone_inputs[self.index]),
                remedy="pass `backbone=` the model that they are for",
            )
        return batch.inputs

    @cached_property
    def _modules(self) -> list[nn.Module]:
        return list(self.network.modules())

    @cached_property
    def _adapted(self) -> list[nn.Module]:
        return [module for module in self._modules if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]

    @cached_property
    def identity(self) -> dict[str, str]:
        """Key of the base's weights."""
        return {"weights": weights_digest_of_model(bare_base(self.network))}

    def prepare(self, batch: Batch) -> None:
        """Find out on the first batch whether the reward can start from the layers that both share."""
        trunk = SharedTrunk.of(self.network)
        if trunk is not None and trunk.is_enough(self.network, self._pretrained(), batch.inputs):
            self._trunk = trunk

    def reused(self) -> AbstractContextManager[None]:
        """Return a context in which the reward starts from the layers that both share."""
        return nullcontext() if self._trunk is None else self._trunk.reused()

    @contextmanager
    def _pretrained(self) -> Iterator[nn.Module]:
        # What `eval()` and PEFT's `disable_adapter()` do, without a walk through all modules, which takes as long as a
        # small model's step, and without touching `requires_grad`, which FSDP2 reads in the first pass.
        modes = [module.training for module in self._modules]
        states = [layer._disable_adapters for layer in self._adapted]
        try:
            for module in self._modules:
                module.training = False
            for layer in self._adapted:
                layer._disable_adapters = True
            with nullcontext() if self._trunk is None else self._trunk.recorded():
                yield self.network
        finally:
            for module, mode in zip(self._modules, modes, strict=True):
                module.training = mode
            for layer, state in zip(self._adapted, states, strict=True):
                layer._disable_adapters = state


def source_backbones(reward: RewardModel, **load_kwargs) -> list[Backbone]:
    """Return the backbones that a reward was tuned on; before any tuning, the pretrained model that it starts from.

    Raises:
        PRTValueError: one of them was made in memory.
    """
    return [_earlier_source(reward, reference, load_kwargs) for reference in reward.config.sources]


def is_own_base(config: RewardConfig, source: ModelReference) -> bool:
    """Return whether a source backbone is the pretrained model that the reward started from."""
    base = config.reward_base
    return source == base or (source.weights is not None and source.weights == base.weights)


def _earlier_source(reward: RewardModel, reference: ModelReference, load_kwargs: dict) -> Backbone:
    is_base = is_own_base(reward.config, reference)
    if is_base and reward.config.is_adapter:
        return OwnBase(reward)
    if is_base and weights_fingerprint(reward.network) == reference.weights:  # a full reward that has not been tuned
        return Backbone(reward, copy.deepcopy(reward.network))
    if reference.id is None:
        raise PRTValueError(
            "A source backbone of this reward is not known by an id.",
            expected="`backbone=` the model that it was tuned against",
            found=str(reference),
        )
    return Backbone(reward, reference, **load_kwargs)
