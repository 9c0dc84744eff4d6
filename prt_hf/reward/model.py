"""The reward model r_theta: its networks, its tokenizer or image processor, and its match with a backbone."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..contract import (
    MINUS_BASE,
    NETWORK,
    PRT_CONFIG_NAME,
    TEXT_GENERATION,
    Contract,
    Match,
    ModelReference,
    RewardConfig,
)
from ..errors import PRTValueError
from ..functional import signed_sum
from ..hub.card import render_card
from ..hub.card_merge import merged_or_new, read_card, write_card
from ..hub.client import local_folder
from ..hub.folder import REWARD, check_files, replacing_files
from ..hub.publishing import Shareable, push_reward
from ..networks.adapters import bare_base, save_adapter
from ..networks.anatomy import check_length, context_length, contract_of, task_of
from ..networks.auto import save_processing_class
from ..networks.identity import origin_of, reference_to
from ..vocabulary import VocabularyContract, unwrap_tokenizer
from .adapter import REWARD_INITS, start
from .full import load_full
from .loading import load_adapter, load_ordinary_adapter, load_own_processing_class, load_start
from .matching import match_backbone, tokenizer_of

if TYPE_CHECKING:
    from ..inference.logits_processor import PRTLogitsProcessor


class Term(NamedTuple):
    """One network of the signed sum that a reward is."""

    network: nn.Module
    sign: float = 1.0


class RewardModel(Shareable):
    """r_theta(x, y): one number per vocabulary token or class label.

    It is no `torch.nn.Module` itself: a Trainer tunes its `network`. It has more than 15 methods and 250 lines because
    its three constructors document all ways to obtain a reward.

    Attributes:
        network (`PeftModel` or `PreTrainedModel`): a reward adapter on its base, or a full reward.
        config ([`RewardConfig`]): contract, base, training coefficients; `prt_config.json`.
        processing_class: tokenizer or image processor, saved beside the weights; may be None for classifiers.
        card (`str`, *optional*): the model card that it was loaded with, or that a trainer wrote; saved with it.
    """

    _push_folder = staticmethod(push_reward)

    def __init__(
        self,
        network: PeftModel | PreTrainedModel,
        config: RewardConfig,
        processing_class: Any = None,
        card: str | None = None,
    ):
        self.network = network
        self.config = config
        self.processing_class = processing_class
        self.card = card
        self._base: tuple[list[int], nn.Module] | None = None  # addresses of the weights, and the base on them

    @classmethod
    def from_base(
        cls,
        model_or_id: str | PreTrainedModel | PeftModel,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        *,
        reward_init: str = "pretrained",
        **load_kwargs,
    ) -> "RewardModel":
        """Start a reward from a pretrained model, with its architecture and weights (Sec. 3 of the paper).

        Args:
            model_or_id: Hub id, path, or a model in memory. With `peft_config` the model is left as it is, and shares
                its weights with the reward; without, it becomes the (full) reward, to be tuned in place. A `PeftModel`
                is taken as the reward adapter that it is.
            processing_class: tokenizer (needed for language models; loaded with an id) or image processor.
            peft_config (`PeftConfig`, *optional*): makes a reward adapter; [`default_peft_config`] is a good one, and
                fills in for a `LoraConfig` without `target_modules`.
            reward_init (`str`): `"pretrained"`, r starts as the base's logits, as in the paper; `"zero"`, r = 0, with
                an output layer of its own.
            **load_kwargs: for `from_pretrained` of an id (`revision`, `dtype`, `trust_remote_code`, ...).

        Raises:
            PRTValueError: the model predicts neither tokens nor labels, or arguments that exclude each other.
        """
        if reward_init not in REWARD_INITS:
            raise PRTValueError("Unknown `reward_init`.", expected=" or ".join(REWARD_INITS), found=repr(reward_init))
        model, processing_class = load_start(model_or_id, processing_class, load_kwargs)
        base, contract = reference_to(model), contract_of(model, processing_class)
        network = start(model, base, peft_config, reward_init)
        config = RewardConfig(
            task=task_of(network),
            contract=contract,
            reward_base=base,
            is_adapter=isinstance(network, PeftModel),
            reward_init=reward_init,
        )
        return cls(network, config, processing_class)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        revision: str | None = None,
        base_model: str | PreTrainedModel | None = None,
        *,
        token: str | bool | None = None,
        subfolder: str | None = None,
        **load_kwargs,
    ) -> "RewardModel":
        """Load a reward from a folder or from the Hub, in evaluation mode.

        Args:
            path_or_repo: folder or repository id.
            revision: branch, tag or commit of the reward.
            base_model: the adapter's base if it is in memory already, or its present place; by default it is loaded as
                `prt_config.json` names it, at the revision named there. A model in memory is left as it is and shares
                its weights. For a full reward of a class that the Auto classes do not know: a model of that class.
            token: for the Hub; by default the one that `hf auth login` stored.
            subfolder: of the folder or repository: a checkpoint (`"last-checkpoint"`), or one reward of a recipe.
            **load_kwargs: for `from_pretrained` of the base, or of the full reward (`dtype`, `device_map`, ...).

        Raises:
            RewardFileError: no reward there, or an incomplete, damaged or pickled one.
            BaseModelMismatchError: the base is not the one that the reward was tuned on.
            VocabularyMismatchError: the tokenizer saved with the reward is not the one that it was tuned with.
        """
        folder = local_folder(path_or_repo, revision=revision, token=token, subfolder=subfolder)
        config = RewardConfig.from_json_file(folder / PRT_CONFIG_NAME)
        check_files(folder, config)
        if config.is_adapter:
            network, source = load_adapter(folder, config, base_model, token, load_kwargs)
        else:
            network, source = load_full(folder, config, base_model, load_kwargs), None
        processing_class = load_own_processing_class(folder, config, source, {"token": token} | load_kwargs)
        reward = cls(network.eval(), config, processing_class, read_card(folder))
        reward.name_tokens()
        return reward

    @classmethod
    def from_adapter(
        cls,
        path_or_repo: str | Path,
        revision: str | None = None,
        base_model: str | PreTrainedModel | None = None,
        *,
        processing_class: Any = None,
        token: str | bool | None = None,
        subfolder: str | None = None,
        **load_kwargs,
    ) -> "RewardModel":
        """Carry an ordinary PEFT adapter of a language model over, without training.

        r = log pi_ft - log pi_pt, as in emulated fine-tuning: two terms, which are two rows of one pass of the base.
        [`PRTTrainer`] makes a reward of half the cost of it (`distill_from`).

        Args:
            path_or_repo: folder or repository id of a LoRA or another adapter of layers.
            revision: branch, tag or commit of the adapter.
            base_model: the model that the adapter was tuned on, in memory or by its present place; by default as
                `adapter_config.json` names it.
            processing_class (*optional*): the tokenizer that the adapter was tuned with; by default the one saved with
                it, else its base's.
            token: for the Hub, as in [`from_pretrained`].
            subfolder: of the folder or repository.
            **load_kwargs: for `from_pretrained` of the base.

        Raises:
            RewardFileError: no adapter there, or a damaged or pickled one.
            BaseModelMismatchError: its weights do not fit its base.
            UnsupportedError: an adapter that cannot be switched off (prompts, tuned biases of the base).
            PRTValueError: a reward; or not of a causal language model; or no base, or no tokenizer is known.
        """
        folder = local_folder(path_or_repo, revision=revision, token=token, subfolder=subfolder)
        load_kwargs = {"token": token} | load_kwargs
        network, processing_class = load_ordinary_adapter(folder, base_model, processing_class, load_kwargs)
        task, contract = task_of(network), contract_of(network, processing_class)
        snapshot = folder.parents[len(Path(subfolder).parts) - 1] if subfolder else folder
        origin = origin_of(path_or_repo, snapshot)
        config = RewardConfig(task, contract, reference_to(network), terms=(NETWORK, MINUS_BASE), distilled_from=origin)
        return cls(network, config, processing_class)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The networks whose logits, with their signs, add up to r; a base is on the very same weights."""
        if MINUS_BASE not in self.config.terms:
            return (Term(self.network),)
        weights = [tensor.data_ptr() for tensor in (*self.network.parameters(), *self.network.buffers())]
        if self._base is None or self._base[0] != weights:  # the base is in memory no second time, but takes a while
            self._base = weights, bare_base(self.network)
        return Term(self.network), Term(self._base[1], -1.0)

    def __repr__(self) -> str:
        kind = "reward adapter" if self.config.is_adapter else "full reward"
        if len(self.config.terms) > 1:
            kind = "adapter that was carried over"
        base, scored = self.config.reward_base, "tokens" if self.config.task == TEXT_GENERATION else "labels"
        return (
            f"RewardModel({self.config.task}, {kind}, base {base.id or base.architecture}, "
            f"strength {self.strength:g}, {self.size} {scored})"
        )

    @property
    def strength(self) -> float:
        """1 / lambda in training; processors and PRT models have strengths of their own, which can be set."""
        return self.config.strength

    @property
    def contract(self) -> Contract:
        """The vocabulary or the labels that the reward scores."""
        return self.config.contract

    @property
    def columns(self) -> slice:
        """The columns of the network's logits that are rewards: all but those that pad a vocabulary."""
        return slice(self.contract.size if isinstance(self.contract, VocabularyContract) else None)

    @property
    def size(self) -> int:
        """The number of tokens or labels that it scores."""
        return self.contract.size

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.network.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network's weights."""
        return self.network.dtype

    def to(self, *args, **kwargs) -> "RewardModel":
        """Move or cast the network, in place, as [`~torch.nn.Module.to`]."""
        self.network.to(*args, **kwargs)
        return self

    def __call__(self, **inputs) -> torch.Tensor:
        """Return r_theta(x, .) for a batch of model inputs, without labels.

        Returns:
            `torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)` or `(batch_size, num_labels)`,
            without columns that pad the vocabulary.

        Raises:
            ContextLengthError: the sequence is longer than the network can read.
        """
        if "input_ids" in inputs:
            check_length(inputs["input_ids"].shape[1], context_length(self.network))
        networks, signs = zip(*self.terms, strict=True)
        return signed_sum(signs, [network(**inputs).logits[..., self.columns] for network in networks])

    def save_pretrained(self, folder: str | Path, *, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write plain PEFT or model files, the tokenizer or image processor, `prt_config.json`, and a model card.

        An interrupted save leaves the reward that was there before whole. Other files of the folder are kept, and so is
        what users have written into its card.

        Args:
            folder: created if it does not exist.
            state_dict (*optional*): weights to write in the place of the network's.

        Raises:
            RewardFileError: the folder holds something else: a model or adapter that is no reward, or a recipe.
            VocabularyMismatchError: `processing_class` is not the tokenizer that the reward was made with.
        """
        self.check_processing_class()
        with replacing_files(folder, REWARD) as staged:
            if self.config.is_adapter:
                save_adapter(self.network, staged, state_dict)
            else:
                self.network.save_pretrained(staged, state_dict=state_dict)
            save_processing_class(self.processing_class, staged)
            (staged / PRT_CONFIG_NAME).write_text(self.config.to_json_string(), encoding="utf-8")
            card = merged_or_new(self.card, render_card(self.config, Path(folder).absolute().name))
            write_card(staged, card, read_card(Path(folder)))  # in the place of PEFT's template

    def trained_with(
        self,
        *source_backbones: ModelReference,
        kl_coef: float,
        entropy_coef: float,
        distilled_from: ModelReference | None = None,
        is_chat: bool | None = None,
    ) -> None:
        """Record in `config` the training that `network` is about to get.

        Args:
            *source_backbones: the models that it is tuned on.
            kl_coef: lambda.
            entropy_coef: alpha of Eq. 12.
            distilled_from (*optional*): the fine-tuned model whose distribution it is tuned to.
            is_chat (*optional*): whether the texts are messages; by default as before.
        """
        first, *others = source_backbones
        self.config = replace(
            self.config,
            source_backbone=first,
            more_source_backbones=tuple(others),
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
            distilled_from=distilled_from or self.config.distilled_from,
            is_chat=self.config.is_chat if is_chat is None else is_chat,
        )

    def match_with(
        self,
        backbone: PreTrainedModel,
        processing_class: Any = None,
        *,
        token_map: Mapping[str, str] | None = None,
        label_map: Mapping[str, str] | None = None,
        allow_partial: bool = False,
        across_vocabularies: bool = False,
    ) -> Match:
        """Return how the reward's columns and tokens belong to a backbone's, after checking that the two fit together.

        Args:
            backbone: pi_pt.
            processing_class (*optional*): the backbone's tokenizer or image processor; by default the one saved with
                its weights, else, with a warning, the reward's.
            token_map (*optional*): the backbone's tokens -> the reward's, where names and roles do not tell; see
                [`~prt_hf.vocabulary.VocabularyContract.match`].
            label_map (*optional*): the backbone's labels -> the reward's.
            allow_partial: whether the backbone may have labels that the reward does not score, and lack some.
            across_vocabularies: whether a language model may have another vocabulary altogether.

        Raises:
            PRTValueError: the backbone is made for another task, or a map names an unknown token or label.
            VocabularyMismatchError, LabelMismatchError: the backbone has other tokens or labels.
        """
        maps = token_map, label_map, allow_partial, across_vocabularies
        return match_backbone(self.config, self.processing_class, backbone, processing_class, *maps)

    def processor(self, backbone: PreTrainedModel, tokenizer: Any = None, **kwargs) -> "PRTLogitsProcessor":
        """Return the logits processor that adds this reward to a backbone in `generate`.

        Args:
            backbone: the model that will generate.
            tokenizer (*optional*): the backbone's; by default the one saved with its weights.
            **kwargs: for [`PRTLogitsProcessor`].

        Raises:
            PRTValueError: the backbone was made in memory, and no tokenizer is given; or it has rewards of its own.
            VocabularyMismatchError: the reward does not fit the backbone.

        Example:

        ```python
        backbone.generate(**inputs, logits_processor=[reward.processor(backbone)])
        ```
        """
        # The one import from a floor above: users expect the processor at the reward.
        from ..inference.logits_processor import PRTLogitsProcessor

        return PRTLogitsProcessor(self, tokenizer_of(backbone, self.config.task, tokenizer), **kwargs)

    def check_processing_class(self) -> VocabularyContract | None:
        """Check that the tokenizer is the reward's, and return its contract; None for labels, or without a tokenizer.

        Raises:
            VocabularyMismatchError: it is another one.
        """
        tokenizer = unwrap_tokenizer(self.processing_class)
        if tokenizer is None or not isinstance(self.contract, VocabularyContract):
            return None
        return self.contract.named_by(tokenizer)

    def name_tokens(self) -> None:
        """Take the names of tokens from the tokenizer: a saved contract has those of added tokens alone.

        Raises:
            VocabularyMismatchError: the tokenizer is not the reward's.
        """
        found = self.check_processing_class()
        if found is not None:
            self.config = replace(self.config, contract=found)
