"""The base class of all PRT models: their parts and their passes. Recipes are read and written by `recipe.py`."""

from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ..contract import IMAGE_CLASSIFICATION, TEXT_GENERATION, Match
from ..errors import PRTValueError, UnsupportedError
from ..functional import as_strength, check_strengths
from ..hub.publishing import Shareable
from ..networks.adapters import tie_parameters
from ..networks.anatomy import CACHE, context_length, frozen_norms, unwrap_adapter
from ..networks.auto import processing_class_of
from ..networks.identity import digest
from ..networks.pixels import PRTImageProcessor
from ..reward.loading import load_saved_processing_class
from ..reward.model import RewardModel
from .combination import combined
from .configuration import MAPS, PRTModelConfig, config_of, maps_of_rewards, new_parts
from .loading import as_list, check_parts, load_backbone, load_rewards
from .passes import PartsPass, fewest_passes, parts_of, separate_passes, translated
from .recipe import find_recipe, load_parts, push_recipe, read_generation_config, write_recipe

if TYPE_CHECKING:
    from typing_extensions import Self

Strength = float | torch.Tensor
# What Auto classes hand over besides the arguments of a load.
_AUTO_KWARGS = ("_from_auto", "adapter_kwargs", "_commit_hash", "state_dict", "code_revision")


class PRTPreTrainedModel(Shareable, PreTrainedModel):
    """pi(y | x) proportional to pi_pt(y | x) exp(sum_i strength_i r_i(x, y)), Eq. 10 of the paper.

    Created by [`from_parts`]; saved as a recipe, which names its parts, and loaded from one by `from_pretrained` or the
    Auto classes. The backbone stays frozen and in evaluation mode; training moves the rewards.

    It has more than 15 methods and 250 lines because transformers asks for eight of them, with their documentation.

    Attributes:
        backbone (`PreTrainedModel`): pi_pt.
        rewards (`list[RewardModel]`): r_1, r_2, ...; their networks are sub-modules of the model.
        strengths (`list`): 1 / lambda of each, read at every forward pass: a number, or one per prompt of the batch;
            also set by a tensor of shape `(rewards, prompts)`. Below 0, the tuned behaviour is subtracted. Recipes keep
            numbers.
        processing_class: tokenizer or image processor, saved with the recipe; where rewards want other pixels than the
            backbone, a [`PRTImageProcessor`], which makes those of all.
        matches (`list[Match]`): how each reward's columns and tokens belong to the backbone's.
        parts (`list[Part]`): the networks whose logits are added up, the backbone first.
        is_tuned (`bool`): whether the model was trained since it was put together.
        hub_digests (`dict[int, str]`): digests of the weights of rewards on the Hub, as they were loaded.
    """

    config_class = PRTModelConfig
    task: str
    _push_folder = staticmethod(push_recipe)
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        config: PRTModelConfig,
        backbone: PreTrainedModel | None = None,
        rewards: list[RewardModel] | None = None,
        processing_class: Any = None,
        matches: list[Match] | None = None,
        hub_digests: dict[int, str] | None = None,
    ):
        if config.backbone_config is None:
            raise PRTValueError(
                "The configuration names no backbone.",
                expected="a PRTModelConfig with `backbone_config`",
                remedy=f"{type(self).__name__}.from_parts(backbone, rewards=[...])",
            )
        attn_implementation = config._attn_implementation  # as asked for; PreTrainedModel fills in its default
        super().__init__(config)
        if backbone is None:
            backbone, rewards = new_parts(self.task, config, attn_implementation)
        self.backbone = backbone.requires_grad_(False)
        self.rewards = rewards
        self.strengths = [entry["strength"] for entry in config.reward_references]
        self.processing_class = processing_class
        for index, reward in enumerate(rewards):
            for part in (backbone, *(earlier.network for earlier in rewards[:index])):
                tie_parameters(reward.network, part)
        self.reward_networks = nn.ModuleList(reward.network for reward in rewards)
        self.matches = matches or [Match() for _ in rewards]
        size = config.vocab_size if self.task == TEXT_GENERATION else None
        self.parts = parts_of(backbone, rewards, self.matches, size)
        self._separate = separate_passes(self.parts)
        # Classifiers have no decoding to speed up, and some call layers on more than rows of the batch.
        self._mixed = fewest_passes(self.parts) if self.task == TEXT_GENERATION else self._separate
        ours = {backbone, *self.reward_networks}
        networks = dict.fromkeys(each.run.network for each in (*self._separate, *self._mixed))
        self.bases = nn.ModuleList(network for network in networks if network not in ours)
        self.hub_digests = hub_digests or {}
        self.is_tuned = False
        limits = (
            context_length(reward.network)
            for reward, match in zip(rewards, self.matches, strict=True)
            if not match.is_across  # which has another number of tokens
        )
        self._limits = [limit for limit in limits if limit is not None]
        self._is_stateful = any(
            getattr(unwrap_adapter(network), "_is_stateful", False) for network in (backbone, *self.reward_networks)
        )
        config._attn_implementation = backbone.config._attn_implementation
        if getattr(backbone, "hf_device_map", None) is not None:
            self.hf_device_map = backbone.hf_device_map
        self.post_init()
        # Named by the recipe instead, so a checkpoint that a Trainer resumes from may lack them.
        self._keys_to_ignore_on_save = self.state_dict().keys() - self.tuned_state().keys()
        self.train(backbone.training)

    @classmethod
    def from_parts(
        cls,
        backbone: str | PreTrainedModel,
        rewards: list[str | Path | RewardModel],
        strengths: list[float] | None = None,
        tokenizer: Any = None,
        *,
        quantization_config: Any = None,
        token_map: dict[str, str] | None = None,
        label_map: dict[str, str] | None = None,
        allow_partial: bool = False,
        across_vocabularies: bool = False,
        **load_kwargs,
    ) -> "Self":
        """Put a backbone and rewards together, after checking that they fit.

        Args:
            backbone: id, path, or a model in memory, which becomes part of this model (frozen, evaluation mode).
            rewards: folders, Hub ids, or rewards in memory; one, or a list. Rewards on one base are loaded on one copy
                of it; a reward whose base is the backbone shares the backbone's weights.
            strengths (*optional*): 1 / lambda for each reward, by default as it was tuned.
            tokenizer (*optional*): the backbone's tokenizer or image processor, by default the one beside its weights.
            quantization_config (*optional*): for `from_pretrained` of the backbone alone; kept in recipes. Rewards stay
                in full precision, on a base of their own if theirs is the backbone.
            token_map (*optional*): the backbone's tokens -> the rewards', where names and roles do not tell, as in
                [`PRTLogitsProcessor`]. Kept in recipes, as the next three.
            label_map (*optional*): the backbone's labels -> the rewards' labels of the same meaning.
            allow_partial: whether the backbone may have labels that a reward does not score, which then keep their
                probability, and lack some that it does.
            across_vocabularies: whether rewards of language models may have other vocabularies than the backbone, as in
                [`PRTLogitsProcessor`].
            **load_kwargs: for `from_pretrained` of what is given by id (`dtype`, `device_map`, `token`, ...).

        Raises:
            VocabularyMismatchError, LabelMismatchError: a reward and the backbone do not fit.
            PRTValueError: no rewards, not one strength for each, or `quantization_config` of a model in memory.
            UnsupportedError: the library that the quantisation needs is not installed.
        """
        rewards = as_list(rewards)
        backbone = load_backbone(backbone, quantization_config, load_kwargs)
        loaded = load_rewards(rewards, backbone, load_kwargs)
        if tokenizer is None:
            tokenizer = processing_class_of(backbone, cls.task, **load_kwargs)
        maps = {
            "token_map": token_map,
            "label_map": label_map,
            "allow_partial": allow_partial,
            "across_vocabularies": across_vocabularies,
        }
        return cls._assemble(backbone, loaded, strengths, tokenizer, maps)

    @classmethod
    def _assemble(
        cls,
        backbone: PreTrainedModel,
        loaded: list[tuple[RewardModel, dict | None]],
        strengths: list[float] | None,
        processing_class: Any,
        maps: dict[str, Any],
    ) -> "Self":
        """Put loaded parts together, the rewards with their places on the Hub."""
        rewards, references = map(list, zip(*loaded, strict=True))
        check_parts(cls.__name__, cls.task, backbone, rewards)
        if isinstance(processing_class, PRTImageProcessor):
            processing_class = processing_class.main
        if processing_class is None:
            processing_class = processing_class_of(backbone, cls.task)
        own_maps = maps_of_rewards(rewards, maps)
        matches = [
            reward.match_with(backbone, processing_class, **own) for reward, own in zip(rewards, own_maps, strict=True)
        ]
        strengths = [reward.config.strength for reward in rewards] if strengths is None else strengths
        check_strengths(strengths, len(rewards))
        if processing_class is None:
            processing_class = rewards[0].processing_class
        if cls.task == IMAGE_CLASSIFICATION:
            joint = PRTImageProcessor.of(processing_class, "reward", [reward.processing_class for reward in rewards])
            processing_class = joint if joint.others else processing_class
        size = matches[0].tokens.size if cls.task == TEXT_GENERATION else None
        config = config_of(cls.__name__, backbone, rewards, references, strengths, size, maps)
        hub_digests = {i: digest(rewards[i].network) for i, reference in enumerate(references) if reference}
        return cls(config, backbone, rewards, processing_class, matches, hub_digests)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *args,
        config: PreTrainedConfig | None = None,
        backbone: str | PreTrainedModel | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **load_kwargs,
    ) -> "Self":
        """Rebuild a PRT model from its recipe, a folder or a Hub id, with every part at the revision named there.

        Args:
            pretrained_model_name_or_path: folder or Hub id.
            *args: none; for the signature of transformers.
            config (*optional*): as the Auto classes have read it.
            backbone (*optional*): the recipe's backbone where it is now, or in memory.
            revision (*optional*): branch, tag or commit of the recipe.
            token (*optional*): for the Hub.
            **load_kwargs: for `from_pretrained` of the parts; `quantization_config` for the backbone alone, in the
                place of the one in the recipe.

        Raises:
            RewardFileError: no recipe, one of a newer version, or one whose reward is gone or changed.
            BaseModelMismatchError: the backbone is not the recipe's any more.
        """
        load_kwargs = {name: value for name, value in load_kwargs.items() if name not in _AUTO_KWARGS}
        if load_kwargs.pop("output_loading_info", False):
            raise UnsupportedError("`output_loading_info` is not supported: a recipe has no weights.")
        place = pretrained_model_name_or_path
        folder, config = find_recipe(cls, place, config, revision=revision, token=token)
        backbone, loaded = load_parts(folder, config, backbone, token=token, **load_kwargs)
        strengths = [entry["strength"] for entry in config.reward_references]
        maps = {name: getattr(config, name) for name in MAPS}
        model = cls._assemble(backbone, loaded, strengths, load_saved_processing_class(folder, cls.task), maps)
        model.config.name_or_path = model.name_or_path = str(place)
        if model.can_generate():
            model.generation_config = read_generation_config(folder) or model.generation_config
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Write the recipe: `config.json`, the tokenizer or image processor, and rewards that are not on the Hub.

        Rewards that were not loaded from the Hub, or have changed since, are saved in `reward-0`, `reward-1`, ..., each
        readable by itself ([`RewardModel.from_pretrained`]). The backbone is named, not copied. An interrupted save
        leaves the recipe that was there before whole; other files of the folder are kept.

        Args:
            save_directory: created if it does not exist.
            is_main_process: other processes write nothing.
            state_dict (*optional*): weights to write in the place of the model's.
            push_to_hub: refused, see [`push_to_hub`].
            **kwargs: ignored; for the signature of transformers.

        Raises:
            RewardFileError: the folder holds something else, or a `reward-0`, ... that is no part of the recipe there.
        """
        if push_to_hub:
            raise UnsupportedError("Recipes are not pushed while saving.", remedy="model.push_to_hub(repo_id)")
        if is_main_process:
            write_recipe(self, Path(save_directory), state_dict)

    def tuned_state(self, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """Return what training changes: trainable parameters, and batch statistics of the rewards."""
        state_dict = state_dict or self.state_dict()
        parameters = [name for name, value in self.named_parameters() if value.requires_grad]
        buffers = [name for name, _ in self.reward_networks.named_buffers("reward_networks")]
        return {name: state_dict[name].contiguous() for name in (*parameters, *buffers) if name in state_dict}

    def train(self, mode: bool = True) -> "Self":
        """Train the rewards; the backbone and frozen batch statistics stay in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        self.bases.eval()
        for reward in self.rewards:
            for norm in frozen_norms(reward.network) if reward.config.is_adapter else ():
                norm.eval()
        return self

    @property
    def strengths(self) -> list[Strength]:
        """1 / lambda of each reward."""
        return self._strengths

    @strengths.setter
    def strengths(self, values: list | tuple | torch.Tensor) -> None:
        if not isinstance(values, list | tuple | torch.Tensor) or len(values) != len(self.rewards):
            raise PRTValueError(
                "`strengths` is not usable.",
                expected=f"{len(self.rewards)}, one for each reward",
                found=str(values),
            )
        self._strengths = [as_strength(each) for each in values]

    @property
    def strength(self) -> Strength | list[Strength]:
        """The strength of the only reward; of several rewards, `strengths`. Setting it sets that of all."""
        return self.strengths[0] if len(self.rewards) == 1 else self.strengths

    @strength.setter
    def strength(self, value: Strength) -> None:
        self.strengths = [value] * len(self.rewards)

    def init_weights(self) -> None:
        """Leave the weights of the parts as they are."""

    def get_input_embeddings(self) -> nn.Module:
        """Return the backbone's input embeddings."""
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """Return None: there is no single head."""
        return None

    def resize_token_embeddings(self, *args, **kwargs) -> None:
        """Refuse to change the vocabulary.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "A PRT model's vocabulary is the contract of its rewards, and cannot change.",
            remedy="tune a reward with the other tokenizer",
        )

    def factors(self) -> list[Strength]:
        """Return what the logits of each part are multiplied by: 1 for the backbone, then signed strengths."""
        strengths = [  # some may have been set one by one
            each if isinstance(each, Real) else torch.as_tensor(each, dtype=torch.float32) for each in self.strengths
        ]
        return [1.0 if part.reward is None else part.sign * strengths[part.reward] for part in self.parts]

    @property
    def _passes(self) -> list[PartsPass]:
        """The passes that fit the present mode; the first has the backbone's rows first."""
        if self.training or torch.is_grad_enabled() or not all(each.is_current for each in self._mixed):
            return self._separate
        return self._mixed

    def _run(
        self,
        inputs: dict,
        backbone_inputs: dict,
        caches: list[Cache | None] | None = None,
        reward_inputs: Sequence[dict] = (),
    ) -> tuple[list[torch.Tensor], dict[str, tuple[torch.Tensor, ...]]]:
        """Return the logits of every part, and the backbone's output beside its logits.

        Args:
            inputs: for every network.
            backbone_inputs: for the backbone alone.
            caches: one for each pass.
            reward_inputs: for single rewards, whose passes are separate.
        """
        passes = self._passes
        logits, beside = {}, {}
        for (run, parts), cache in zip(passes, caches or [None] * len(passes), strict=True):
            first = parts[0]
            given = inputs if cache is None else inputs | {CACHE: cache}
            if first.reward is None:
                given = given | backbone_inputs
            elif reward_inputs:
                given = given | reward_inputs[first.reward]
            given, rows = translated(first, given, self.task)
            with torch.set_grad_enabled(torch.is_grad_enabled() and not first.is_frozen):
                output = run(**given)
            blocks = run.split(output.logits)
            logits |= zip(parts, blocks if rows is None else map(rows.at_ends, blocks), strict=True)
            if first.reward is None:
                for name in ("hidden_states", "attentions"):
                    if output.get(name) is not None:
                        beside[name] = tuple(run.split(tensor)[0] for tensor in output[name])
        self.is_tuned |= self.training and torch.is_grad_enabled()
        return [logits[part] for part in self.parts], beside

    def _combine(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """Return log pi over the backbone's labels, or the contract's tokens (Eq. 10); float32.

        Args:
            logits: of the parts, as [`_run`] returns them.

        Raises:
            PRTValueError: strengths for other rows.
        """
        return combined(self.parts, self.matches, self.factors(), logits)
