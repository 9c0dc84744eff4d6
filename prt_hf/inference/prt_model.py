"""What all PRT models share: their parts, their recipe, their passes."""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from numbers import Real
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, Cache, GenerationConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from ..contract import (
    IMAGE_CLASSIFICATION,
    TEXT_GENERATION,
    Contract,
    LabelContract,
    ModelReference,
    RewardConfig,
    VocabularyContract,
)
from ..errors import PRTValueError, RewardFileError, UnsupportedError
from ..functional import as_strength, combine, strength_of_rows
from ..hub.card_merge import read_card, write_card
from ..hub.client import local_folder
from ..hub.folder import RECIPE, SAVED, replacing_files
from ..hub.publishing import Shareable
from ..networks.adapters import bare_base, check_bare, tie_parameters
from ..networks.anatomy import (
    AUTO_CLASSES,
    CACHE,
    context_length,
    frozen_norms,
    pretrained_parameters,
    task_of,
    unwrap_adapter,
)
from ..networks.auto import load_base, load_pretrained, processing_class_of, save_processing_class
from ..networks.checkpoints import check_attention, unreadable
from ..networks.identity import check_same_model, digest, reference_to
from ..networks.mixed_pass import MixedPass, Pass, can_mix
from ..networks.pixels import PRTImageProcessor
from ..reward.loading import load_saved_processing_class
from ..reward.model import RewardModel
from .recipe import PRTModelConfig, check_complete, load_from_recipe, load_reward, push_recipe, recipe_card, save_beside

logger = logging.get_logger(__name__)

Strength = float | torch.Tensor
# What Auto classes hand over besides the arguments of a load.
_AUTO_KWARGS = ("_from_auto", "adapter_kwargs", "_commit_hash", "state_dict", "code_revision")


class PRTPreTrainedModel(Shareable, PreTrainedModel):
    """pi(y | x) proportional to pi_pt(y | x) exp(sum_i strength_i r_i(x, y)), Eq. 10 of the paper.

    Made by [`from_parts`]; saved as a recipe, which names its parts, and loaded from one by `from_pretrained` or the
    Auto classes. The backbone stays frozen and in evaluation mode; what training moves are the rewards.

    Attributes:
        backbone (`PreTrainedModel`): pi_pt.
        rewards (`list[RewardModel]`): r_1, r_2, ...; their networks are sub-modules of the model.
        strengths (`list`): 1 / lambda of each, read at every forward pass: a number, or one per prompt of the batch;
            also set by a tensor of shape `(rewards, prompts)`. Below 0, what a reward was tuned for is taken away.
            Recipes keep numbers.
        processing_class: tokenizer or image processor, saved with the recipe; where rewards want other pixels than the
            backbone, a [`PRTImageProcessor`], which makes those of all.
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
        processing_class=None,
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
            backbone, rewards = self._from_configs(config, attn_implementation)
        self.backbone = backbone.requires_grad_(False)
        self.rewards = rewards
        self.strengths = [entry["strength"] for entry in config.reward_references]
        self.processing_class = processing_class
        for index, reward in enumerate(rewards):
            for part in (backbone, *(earlier.network for earlier in rewards[:index])):
                tie_parameters(reward.network, part)
        self.reward_networks = nn.ModuleList(reward.network for reward in rewards)
        self.orders = [reward.columns for reward in rewards]
        self._less_base = [index for index, reward in enumerate(rewards) if reward.config.minus_base]
        # The last ones of the separate passes; mixed passes of other bases follow.
        self.bases = nn.ModuleList(bare_base(rewards[index].network) for index in self._less_base)
        self._hub_digests = {}
        self._is_tuned = self._is_joint = False
        self._limits = [limit for network in self.reward_networks if (limit := context_length(network)) is not None]
        self._separate = [Pass(network) for network in (backbone, *self.reward_networks, *self.bases)]
        self._mixed, self._places = self._mixed_passes()
        self._is_stateful = any(
            getattr(unwrap_adapter(network), "_is_stateful", False) for network in (backbone, *self.reward_networks)
        )
        config._attn_implementation = backbone.config._attn_implementation
        if getattr(backbone, "hf_device_map", None) is not None:
            self.hf_device_map = backbone.hf_device_map
        self.post_init()
        # Named by the recipe instead, so a checkpoint that a Trainer resumes from may lack them.
        self._keys_to_ignore_on_save = self.state_dict().keys() - self._tuned().keys()
        self.train(backbone.training)

    @classmethod
    def from_parts(
        cls,
        backbone: str | PreTrainedModel,
        rewards: list[str | Path | RewardModel],
        strengths: list[float] | None = None,
        tokenizer=None,
        **load_kwargs,
    ):
        """Put a backbone and rewards together, after checking that they fit.

        Args:
            backbone: id, path, or a model in memory, which becomes part of this model (frozen, evaluation mode).
            rewards: folders, Hub ids, or rewards in memory. Rewards on one base are loaded on one copy of it; a reward
                whose base is the backbone shares the backbone's weights.
            strengths (*optional*): 1 / lambda for each reward, by default as it was tuned.
            tokenizer (*optional*): the backbone's tokenizer or image processor, by default what lies beside it.
            load_kwargs: for `from_pretrained` of what is given by id (`dtype`, `device_map`, `token`, ...).

        Raises:
            VocabularyMismatchError, LabelMismatchError: a reward and the backbone do not fit.
            PRTValueError: no rewards, or not one strength for each.
        """
        if isinstance(rewards, str | Path | RewardModel) or not rewards:
            raise PRTValueError(
                "`rewards` is not usable.", expected="a list with one reward or more", found=repr(rewards)
            )
        if isinstance(backbone, str | Path):
            backbone = load_pretrained(str(backbone), **load_kwargs)
        bases = [backbone]
        loaded = [load_reward(place, bases, load_kwargs) for place in rewards]
        if tokenizer is None:
            tokenizer = processing_class_of(backbone, cls.task, **load_kwargs)
        return cls._assemble(backbone, loaded, strengths, tokenizer)

    @classmethod
    def _assemble(cls, backbone, loaded, strengths, processing_class):
        rewards, references = map(list, zip(*loaded, strict=True))
        check_bare(backbone)
        for part in (backbone, *(reward.network for reward in rewards)):
            if task_of(part) != cls.task:
                raise PRTValueError(
                    f"{cls.__name__} is for {cls.task}.", expected=f"models for {cls.task}", found=task_of(part)
                )
        if any(reward.network is backbone for reward in rewards):
            raise PRTValueError(
                "A full reward and its backbone are one object, of which one is tuned and the other frozen.",
                expected="two models",
                remedy="load the backbone again, or copy.deepcopy it",
            )
        if isinstance(processing_class, PRTImageProcessor):
            processing_class = processing_class.main
        if processing_class is None:
            processing_class = processing_class_of(backbone, cls.task)
        orders = [reward.order_for(backbone, processing_class) for reward in rewards]
        strengths = [reward.config.strength for reward in rewards] if strengths is None else strengths
        _check_strengths(strengths, len(rewards))
        if processing_class is None:
            processing_class = rewards[0].processing_class
        if cls.task == IMAGE_CLASSIFICATION:
            joint = PRTImageProcessor.of(processing_class, "reward", [reward.processing_class for reward in rewards])
            processing_class = joint if joint.others else processing_class
        contract = rewards[0].contract
        config = PRTModelConfig(
            architectures=[cls.__name__],
            backbone_reference=asdict(reference_to(backbone)),
            backbone_config=copy.deepcopy(backbone.config),
            reward_references=[
                {"id": None, "revision": None, "digest": None, "folder": None}
                | (reference or {})
                | {"strength": float(strength)}
                for reference, strength in zip(references, strengths, strict=True)
            ],
            reward_configs=[copy.deepcopy(unwrap_adapter(reward.network).config) for reward in rewards],
            vocab_size=contract.size if isinstance(contract, VocabularyContract) else None,
            dtype=backbone.dtype,
        )
        config.name_or_path = backbone.name_or_path
        model = cls(config, backbone, rewards, processing_class)
        model.orders = orders
        model._hub_digests = {
            index: digest(rewards[index].network) for index, reference in enumerate(references) if reference
        }
        return model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, config=None, backbone=None, revision=None, token=None, **load_kwargs
    ):
        """Rebuild a PRT model from its recipe, a folder or a Hub id, with every part at the revision named there.

        Args:
            backbone (`str` or `PreTrainedModel`, *optional*): the recipe's backbone where it is now, or in memory.
            revision, token: of the recipe.
            load_kwargs: for `from_pretrained` of the parts.

        Raises:
            RewardFileError: no recipe, one of a newer version, or one whose reward is gone or changed.
            BaseModelMismatchError: the backbone is not the recipe's any more.
        """
        folder = local_folder(pretrained_model_name_or_path, revision=revision, token=token)
        # What a killed save left is newer than the configuration that the Auto classes have read.
        if folder.name == SAVED or not isinstance(config, PRTModelConfig):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if not isinstance(config, PRTModelConfig) or config.architectures != [cls.__name__]:
            raise PRTValueError(
                f"{pretrained_model_name_or_path} holds no recipe of a {cls.__name__}.",
                expected=f"the recipe of a {cls.__name__}",
                found=f"{config.model_type}: {config.architectures}",
            )
        check_complete(config)
        load_kwargs = {name: value for name, value in load_kwargs.items() if name not in _AUTO_KWARGS}
        if load_kwargs.pop("output_loading_info", False):
            raise UnsupportedError("A recipe has no weights whose loading could be told of.")
        if config._attn_implementation and "attn_implementation" not in load_kwargs:
            check_attention(config.get_config_dict(folder)[0], folder, RewardFileError)
            load_kwargs["attn_implementation"] = config._attn_implementation  # moved there by the Auto classes
        load_kwargs["token"] = token
        reference = ModelReference(**config.backbone_reference or {})
        if backbone is None:
            backbone = load_base(reference, **load_kwargs)
        else:
            if isinstance(backbone, str | Path):
                backbone = load_pretrained(str(backbone), **load_kwargs)
            check_same_model(reference, backbone)
        bases = [backbone]
        loaded = [load_from_recipe(folder, entry, bases, load_kwargs) for entry in config.reward_references]
        strengths = [entry["strength"] for entry in config.reward_references]
        model = cls._assemble(backbone, loaded, strengths, load_saved_processing_class(folder, cls.task))
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        if model.can_generate() and (folder / GENERATION_CONFIG_NAME).exists():
            try:
                model.generation_config = GenerationConfig.from_pretrained(folder)
            except Exception as error:  # whatever its class says of nonsense
                raise unreadable(folder / GENERATION_CONFIG_NAME, error) from error
        return model.eval()

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Write the recipe: `config.json`, the tokenizer or image processor, and in `reward-0`, `reward-1`, ... the
        rewards that were not loaded from the Hub or have changed since, each readable by itself
        ([`RewardModel.from_pretrained`]). The backbone is named, not copied. An interrupted save leaves the recipe that
        was there before whole; other files of the folder are kept.

        Raises:
            RewardFileError: the folder holds something else, or a `reward-0`, ... that is no part of the recipe there.
        """
        if push_to_hub:
            raise UnsupportedError("Recipes are not pushed while saving.", remedy="model.push_to_hub(repo_id)")
        if not is_main_process:
            return
        folder = Path(save_directory)
        _check_strengths(self.strengths, len(self.rewards))
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        changed = [i for i, reward in enumerate(self.rewards) if self._hub_digests.get(i) != digest(reward.network)]
        names = {index: f"reward-{index}" for index in changed}
        with replacing_files(folder, RECIPE, names.values()) as staged:
            for index, (reward, strength) in enumerate(zip(self.rewards, self.strengths, strict=True)):
                if self._is_tuned and strength > 0:
                    source = ModelReference(**self.config.backbone_reference)
                    reward.trained_with(source, kl_coef=1 / strength, entropy_coef=reward.config.entropy_coef)
                entry = self.config.reward_references[index]
                if name := names.get(index):
                    state = state_dict and _without_prefix(state_dict, f"reward_networks.{index}.")
                    entry = save_beside(reward, staged / name, folder / name, state)
                config.reward_references[index] = entry | {"strength": float(strength)}
            save_processing_class(self.processing_class, staged)
            if self.can_generate():
                self.generation_config.save_pretrained(staged)
            if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):  # a Trainer resumes from these, by their names
                save_file(self._tuned(state_dict), staged / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
            card = recipe_card(config, folder.absolute().name)
            write_card(staged, card, read_card(folder))
            (staged / CONFIG_NAME).write_text(config.to_json_string(), encoding="utf-8")

    def _tuned(self, state_dict: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
        """What training changes: trainable parameters, and batch statistics of the rewards."""
        state_dict = state_dict or self.state_dict()
        parameters = [name for name, value in self.named_parameters() if value.requires_grad]
        buffers = [name for name, _ in self.reward_networks.named_buffers("reward_networks")]
        return {name: state_dict[name].contiguous() for name in (*parameters, *buffers) if name in state_dict}

    def train(self, mode: bool = True):
        super().train(mode)
        self.backbone.eval()
        self.bases.eval()
        for reward in self.rewards:
            for norm in frozen_norms(reward.network) if reward.config.is_adapter else ():
                norm.eval()
        return self

    @property
    def strengths(self) -> list[Strength]:
        return self._strengths

    @strengths.setter
    def strengths(self, values):
        if not isinstance(values, list | tuple | torch.Tensor) or len(values) != len(self.rewards):
            raise PRTValueError(
                "`strengths` is not usable.",
                expected=f"{len(self.rewards)}, one for each reward",
                found=str(values),
            )
        self._strengths = [as_strength(each) for each in values]

    def init_weights(self) -> None:
        """Nothing: the parts have their weights."""

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        return None

    def resize_token_embeddings(self, *args, **kwargs):
        raise UnsupportedError(
            "A PRT model's vocabulary is the contract of its rewards, and cannot change.",
            remedy="tune a reward with the other tokenizer",
        )

    def _from_configs(
        self, config: PRTModelConfig, attn_implementation: str | None
    ) -> tuple[PreTrainedModel, list[RewardModel]]:
        """Parts with new weights, as all models have that are made from a configuration."""
        auto_class = AUTO_CLASSES[self.task]
        asked = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        parts = (config.backbone_config, *config.reward_configs)
        networks = [auto_class.from_config(part, **asked) for part in parts]
        config.backbone_reference = config.backbone_reference or asdict(reference_to(networks[0]))
        references = config.reward_references or [{} for _ in networks[1:]]
        config.reward_references = [{"strength": 1.0} | entry for entry in references]
        backbone, *rewards = networks
        contract = _contract_without_tokenizer(self.task, config)
        return backbone, [
            RewardModel(network, RewardConfig(self.task, contract, reference_to(network), is_adapter=False))
            for network in rewards
        ]

    def _mixed_passes(self) -> tuple[list[Pass], list[int]]:
        """The fewest passes: adapters of one base as blocks of one pass, together with the backbone if it is theirs.
        And where the backbone (0) and reward i (i) are among all blocks, one pass after the other."""
        networks = [run.network for run in self._separate]
        is_bare = [not 0 < index <= len(self.rewards) for index in range(len(networks))]
        groups: dict = {}
        for index, network in enumerate(networks):
            # Classifiers have no decoding to speed up, and some call layers on more than rows of the batch.
            is_shared = self.task == TEXT_GENERATION and (is_bare[index] or can_mix(network))
            groups.setdefault(_base_of(network) if is_shared else index, []).append(index)
        passes = []
        for first, *others in groups.values():
            if not others:
                passes.append(self._separate[first])
                continue
            bases = [networks[index] for index in (first, *others) if is_bare[index]]
            if not bases:
                bases = [bare_base(networks[first])]
                self.bases.extend(bases)
            blocks = [None if is_bare[index] else networks[index] for index in (first, *others)]
            base = bases[0]
            passes.append(MixedPass(base, blocks))
        order = [index for members in groups.values() for index in members]
        return passes, sorted(range(len(order)), key=order.__getitem__)

    @property
    def _factors(self) -> list[Strength]:
        """Of the logits of the separate passes."""
        strengths = [  # some may have been set one by one
            each if isinstance(each, Real) else torch.as_tensor(each, dtype=torch.float32) for each in self.strengths
        ]
        return [1.0, *strengths, *(-strengths[index] for index in self._less_base)]

    @property
    def _passes(self) -> list[Pass]:
        """The first has the backbone's rows first."""
        if self.training or torch.is_grad_enabled():
            return self._separate
        is_current = all(run.is_current for run in self._mixed if isinstance(run, MixedPass))
        return self._mixed if is_current else self._separate

    def _run(
        self,
        inputs: dict,
        of_backbone: dict,
        caches: list[Cache | None] | None = None,
        of_rewards: Sequence[dict] = (),
    ):
        """The logits of the backbone and of every reward, and the backbone's output beside its logits.

        Args:
            of_rewards: inputs of single rewards, of a classifier, whose passes are separate.
        """
        passes = self._passes
        blocks = []
        for index, (run, cache) in enumerate(zip(passes, caches or [None] * len(passes), strict=True)):
            given = inputs if cache is None else inputs | {CACHE: cache}
            if index > 0 and of_rewards:
                given = given | of_rewards[index - 1]
            # The backbone and bases are frozen: no graph for them.
            with torch.set_grad_enabled(torch.is_grad_enabled() and 0 < index <= len(self.rewards)):
                output = run(**given | (of_backbone if index == 0 else {}))
            blocks += run.split(output.logits)
            if index == 0:
                beside = {
                    name: tuple(run.split(tensor)[0] for tensor in output[name])
                    for name in ("hidden_states", "attentions")
                    if output.get(name) is not None
                }
        self._is_tuned |= self.training and torch.is_grad_enabled()
        places = range(len(blocks)) if passes is self._separate else self._places
        return [blocks[place] for place in places], beside

    def _combine(self, logits: list[torch.Tensor]) -> torch.Tensor:
        """log pi over the backbone's labels, or the contract's tokens (Eq. 10); float32.

        Raises:
            PRTValueError: strengths for other rows.
        """
        backbone, *others = logits
        if isinstance(self.orders[0], slice):
            backbone = backbone[..., self.orders[0]]
        orders = [*self.orders, *(self.orders[index] for index in self._less_base)]
        total = sum(
            self._for_rows(factor, backbone) * other[..., order].to(backbone.device).float()
            for factor, order, other in zip(self._factors[1:], orders, others, strict=True)
        )
        return combine(backbone, total)

    def _for_rows(self, factor: Strength, logits: torch.Tensor) -> Strength:
        if isinstance(factor, Real):
            return factor
        return strength_of_rows(factor, len(logits)).to(logits.device).view(-1, *[1] * (logits.ndim - 1))


def _base_of(network: nn.Module) -> tuple:
    """Equal for networks that run the very same weights in the same way."""
    config = unwrap_adapter(network).config.to_dict() | {"_attn": unwrap_adapter(network).config._attn_implementation}
    for name in ("_name_or_path", "architectures", "transformers_version", "use_cache", "dtype"):
        config.pop(name, None)
    weights = sorted(value.data_ptr() for value in pretrained_parameters(network).values())
    return tuple(weights), json.dumps(config, sort_keys=True, default=str)


def _check_strengths(strengths: list[float], count: int) -> None:
    is_usable = isinstance(strengths, list | tuple) and len(strengths) == count
    if not is_usable or not all(isinstance(value, Real) and isfinite(value) for value in strengths):
        raise PRTValueError(
            "`strengths` is not usable.", expected=f"{count} finite numbers, one for each reward", found=str(strengths)
        )


def _contract_without_tokenizer(task: str, config: PRTModelConfig) -> Contract:
    if task == TEXT_GENERATION:
        return VocabularyContract(config.vocab_size, fingerprint="")
    return LabelContract.from_model_config(config.backbone_config)


def _without_prefix(state_dict: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
