"""pi_pt in training: another network than the reward's, or the reward's own with its adapter off."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ..contract import IMAGE_CLASSIFICATION, TEXT_GENERATION, ModelReference, RewardConfig, contract_to_dict
from ..errors import PRTValueError, UnsupportedError
from ..functional import IGNORE_INDEX
from ..hub.client import commit_of
from ..networks.adapters import bare_base, check_bare
from ..networks.anatomy import context_length, contract_of
from ..networks.auto import load_base, load_pretrained, processing_class_of
from ..networks.identity import reference_to, weights_digest_of_files, weights_digest_of_model, weights_fingerprint
from ..networks.lm_head import Head, Projection, last_hidden_state, projection, why_not_projected
from ..networks.pixels import PIXELS, is_same_pixels, missing_pixels
from ..networks.shared_trunk import SharedTrunk
from .model import RewardModel


@dataclass
class Batch:
    """What both models read, and where they are judged.

    Attributes:
        inputs (`dict`): of the reward, and of backbones that have no other.
        labels (`torch.LongTensor`): aligned with what is predicted: `(batch_size, sequence_length - 1)` for language
            models, whose last position has no label, `(batch_size,)` for classifiers.
        rows (`torch.LongTensor` of shape `(batch_size,)`, *optional*): places in the data set, for stored states.
        of_backbones (`list[dict]`): inputs of single backbones, in the order of `backbone=`.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.LongTensor
    rows: torch.LongTensor | None = None
    of_backbones: Sequence[dict[str, torch.Tensor]] = ()

    @cached_property
    def supervised(self) -> tuple[torch.LongTensor, ...]:
        """Indices into `labels` of those that are not ignored."""
        return (self.labels != IGNORE_INDEX).nonzero(as_tuple=True)

    @cached_property
    def supervised_labels(self) -> torch.LongTensor:
        """`(n,)`"""
        return self.labels[self.supervised]

    def chosen(self, values: torch.Tensor) -> torch.Tensor:
        """Logits or hidden states of all positions -> of the supervised ones, `(n, ...)`."""
        return self.aligned(values)[tuple(index.to(values.device) for index in self.supervised)]

    def aligned(self, values: torch.Tensor) -> torch.Tensor:
        """Logits or hidden states of all positions -> of those that are judged."""
        return values[:, :-1] if self.labels.ndim > 1 else values


class Backbone:
    """A network pi_pt, frozen and in evaluation mode.

    Args:
        reward ([`RewardModel`]): that is tuned on it.
        network (`PreTrainedModel`, `str` or [`~contract.ModelReference`]): an id is not loaded before [`load`], so that
            stored states do without; what a reference names is checked.
        load_kwargs: for `from_pretrained` of an id.

    Attributes:
        columns: of its logits, in the reward's order.
        limit (`int`, *optional*): tokens that it can read.
        reference ([`~contract.ModelReference`]): for the reward's configuration.
        index (`int`): of its own inputs in a batch.
        shares_reward_network (`bool`): whether it is the reward's own network, which the reward loads and places.
        processing_class: what lies beside its weights, else the reward's.
    """

    index = 0
    shares_reward_network = False

    def __init__(self, reward: RewardModel, network: PreTrainedModel | str | ModelReference, **load_kwargs):
        _check_one_network(reward)
        self._reward, self.network, self._named, self._load_kwargs = reward, None, network, load_kwargs
        if isinstance(network, PreTrainedModel | PeftModel):
            check_bare(network)
            self._named = None
            self._take(network)

    @property
    def task(self) -> str:
        return self._reward.config.task

    def load(self) -> None:
        """
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

    def _take(self, network: PreTrainedModel, processing_class=None) -> None:
        processing_class = processing_class or processing_class_of(network, self.task, **self._load_kwargs)
        order = self._reward.order_for(network, processing_class)
        self.columns = order if isinstance(order, slice) else inverse(order)
        self.processing_class = processing_class or self._reward.processing_class
        self.limit, self.reference = context_length(network), reference_to(network)
        self.network = network.eval()

    def place(self, placed: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
        self._home = self.network.device
        self.network = placed(self.network)

    def unload(self) -> None:
        """Free what can be loaded again; a model of the user's goes back where it was."""
        if self._named is not None:
            self.network = None
        elif self.network.device != self._home:
            self.network.to(self._home)

    @cached_property
    def identity(self) -> dict[str, str]:
        """What tells its weights from all others, without loading it."""
        if self._named is None:
            return {"weights": weights_digest_of_model(self.network)}
        name, revision = self._named, self._load_kwargs.get("revision")
        if isinstance(name, ModelReference):
            name, revision = name.id, name.revision
        dtype = str(self._load_kwargs.get("dtype", "auto"))
        if Path(name).is_dir():
            return {"weights": weights_digest_of_files(name), "dtype": dtype}
        return {"id": name, "revision": commit_of(name, revision, self._load_kwargs.get("token")), "dtype": dtype}

    def logits(self, batch: Batch) -> torch.Tensor:
        """`(batch_size, sequence_length, vocab_size)` or `(batch_size, num_labels)`, in the reward's order."""
        with torch.no_grad(), self._pretrained() as network:
            return network(**self._inputs(batch)).logits[..., self.columns]

    def projection(self, batch: Batch) -> Projection:
        """Of a language model: the logits at the supervised positions, not made yet."""
        with torch.no_grad(), self._pretrained() as network:
            return projection(network, _hidden(network, batch), self.columns)

    def states(self, batch: Batch) -> torch.Tensor:
        """`(n, hidden_size)` or `(n, num_labels)`: all that is ever needed of it at the supervised positions."""
        with torch.no_grad(), self._pretrained() as network:
            if self.task == TEXT_GENERATION:
                return _hidden(network, batch)
            return batch.chosen(network(**self._inputs(batch)).logits)

    def companions(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors and facts that turn its states into logits of the reward's order."""
        with self._pretrained() as network:
            facts = {
                "reference": vars(self.reference),
                "contract": contract_to_dict(contract_of(network, self.processing_class)),
            }
            if self.task != TEXT_GENERATION:
                return {}, facts
            head = Head.of(network, self._reward.columns)
        tensors = {"weight": head.weights[0]} | ({} if head.bias is None else {"bias": head.bias})
        return tensors, facts | {"scale": head.scale, "softcap": head.softcap}

    def prepare(self, batch: Batch) -> None:
        """Look at a first batch."""

    def why_not_projected(self, batch: Batch) -> str | None:
        with torch.no_grad(), self._pretrained() as network:
            return why_not_projected(network, batch.inputs)

    def reused(self) -> AbstractContextManager[None]:
        """Around the reward's pass of the same batch: what both have in common is not computed again."""
        return nullcontext()

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        """
        Raises:
            UnsupportedError: the backbone wants other pixels than the reward's, and the batch has none.
        """
        own = batch.of_backbones[self.index] if batch.of_backbones else {}
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

    @cached_property
    def _wants_own_pixels(self) -> bool:
        is_known = self.task == IMAGE_CLASSIFICATION
        return is_known and not is_same_pixels(self._reward.processing_class, self.processing_class)

    @contextmanager
    def _pretrained(self) -> Iterator[nn.Module]:
        yield self.network


class OwnBase(Backbone):
    """The reward's own network with its adapter off: no second model in memory, and the layers below the first adapted
    one are computed once for both."""

    shares_reward_network = True

    def __init__(self, reward: RewardModel):
        _check_one_network(reward)
        self._reward, self._named, self._trunk = reward, None, None
        self.processing_class = reward.processing_class
        self.network: PeftModel = reward.network
        self.columns = reward.columns
        self.limit, self.reference = context_length(reward.network), reference_to(reward.network)

    def place(self, placed):
        """It is where the reward is, and stays there."""

    def unload(self):
        """It is the reward's."""

    def _inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        if batch.of_backbones and batch.of_backbones[self.index]:
            raise PRTValueError(
                "The reward's own base reads what the reward reads.",
                expected="no inputs of its own",
                found=", ".join(f"backbone_{self.index}_{name}" for name in batch.of_backbones[self.index]),
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
        return {"weights": weights_digest_of_model(bare_base(self.network))}

    def prepare(self, batch: Batch) -> None:
        trunk = SharedTrunk.of(self.network)
        if trunk is not None and trunk.is_enough(self.network, self._pretrained(), batch.inputs):
            self._trunk = trunk

    def reused(self):
        return nullcontext() if self._trunk is None else self._trunk.reused()

    @contextmanager
    def _pretrained(self):
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
    """Those that a reward was tuned on; of one that was not tuned yet, the pretrained model that it starts from.

    Raises:
        PRTValueError: one of them was made in memory.
    """
    return [_earlier_source(reward, reference, load_kwargs) for reference in reward.config.sources]


def is_own_base(config: RewardConfig, source: ModelReference) -> bool:
    """Whether a source backbone of a reward is what the reward started from."""
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


def _hidden(network: nn.Module, batch: Batch) -> torch.Tensor:
    return batch.chosen(last_hidden_state(network, batch.inputs))


def _check_one_network(reward: RewardModel) -> None:
    """Raises:
    UnsupportedError: the reward is not what its network gives.
    """
    if reward.config.minus_base:
        raise UnsupportedError(
            "An adapter that was carried over is a reward of two networks, and neither tuned nor measured as one.",
            expected="a reward that PRTTrainer made",
            found="log pi_ft - log pi_pt",
            remedy="PRTTrainer(base, distill_from=adapter) makes a reward of it; `prt-hf evaluate --eft` measures it",
        )


def inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
