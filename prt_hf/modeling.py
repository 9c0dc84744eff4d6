"""PRT models: a backbone and its rewards as one transformers model, for everything that takes a model."""

import copy
import shutil
from dataclasses import asdict
from functools import partial
from math import isfinite
from numbers import Real
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.modeling_outputs import CausalLMOutputWithPast, ImageClassifierOutput, SequenceClassifierOutput
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.generic import can_return_tuple

from .contract import PRT_CONFIG_NAME, Contract, LabelContract, ModelReference, RewardConfig, VocabularyContract
from .errors import PRTValueError, UnsupportedError
from .functional import combine
from .generation.cache import PRTCache
from .generation.logits_processor import PRTLogitsProcessor
from .generation.speculative import speculative_decoding
from .hub import local_folder
from .joint_head import JointBase, JointHead, joint_head
from .passes import MixedPass, Pass, bare_base, can_mix
from .pretrained import (
    AUTO_CLASSES,
    IMAGE_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    check_bare,
    check_length,
    context_length,
    load_pretrained,
    reference_to,
    task_of,
    tie_parameters,
    unwrap_adapter,
)
from .recipe import (
    PRTModelConfig,
    check_complete,
    check_place,
    digest,
    load_from_recipe,
    load_reward,
    save_beside,
    write_recipe,
)
from .reward_model import RewardModel, check_same_model, load_base, load_processing_class

logger = logging.get_logger(__name__)

# What Auto classes hand over besides the arguments of a load.
_AUTO_KWARGS = ("_from_auto", "adapter_kwargs", "_commit_hash", "state_dict", "code_revision")


class PRTPreTrainedModel(PreTrainedModel):
    """pi(y | x) proportional to pi_pt(y | x) exp(sum_i strength_i r_i(x, y)), Eq. 10 of the paper.

    Made by [`from_parts`]; saved as a recipe, which names its parts, and loaded from one by `from_pretrained` or the
    Auto classes. The backbone stays frozen and in evaluation mode; what training moves are the rewards.

    Attributes:
        backbone (`PreTrainedModel`): pi_pt.
        rewards (`list[RewardModel]`): r_1, r_2, ...; their networks are sub-modules of the model.
        strengths (`list[float]`): 1 / lambda of each, read at every forward pass.
        processing_class: tokenizer or image processor, saved with the recipe.
    """

    config_class = PRTModelConfig
    task: str
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
        self.bases = nn.ModuleList()
        self._hub_digests = {}
        self._is_tuned = self._is_joint = False
        self._limits = [limit for network in self.reward_networks if (limit := context_length(network)) is not None]
        self._separate = [Pass(network) for network in (backbone, *self.reward_networks)]
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
        orders = [reward.order_for(backbone, processing_class) for reward in rewards]
        strengths = [reward.config.strength for reward in rewards] if strengths is None else strengths
        _check_strengths(strengths, len(rewards))
        if processing_class is None:
            place = backbone.name_or_path
            processing_class = load_processing_class(place, cls.task) if place else None
            processing_class = processing_class or rewards[0].processing_class
        contract = rewards[0].contract
        config = PRTModelConfig(
            architectures=[cls.__name__],
            backbone_reference=asdict(reference_to(backbone)),
            backbone_config=copy.deepcopy(backbone.config),
            reward_references=[
                {"id": None, "revision": None, "weights": None, "folder": None}
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
        if not isinstance(config, PRTModelConfig):
            config = AutoConfig.from_pretrained(folder)
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
        model = cls._assemble(backbone, loaded, strengths, load_processing_class(folder, cls.task))
        model.config.name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
        if model.can_generate() and (folder / GENERATION_CONFIG_NAME).exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
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
        ([`RewardModel.from_pretrained`]). The backbone is named, not copied.

        Raises:
            RewardFileError: the folder holds something else.
        """
        if push_to_hub:
            raise UnsupportedError("Recipes are not pushed while saving.", remedy="model.push_to_hub(repo_id)")
        if not is_main_process:
            return
        folder = Path(save_directory)
        check_place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _check_strengths(self.strengths, len(self.rewards))
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        for index, (reward, strength) in enumerate(zip(self.rewards, self.strengths, strict=True)):
            if self._is_tuned and strength > 0:
                source = ModelReference(**self.config.backbone_reference)
                reward.trained_with(source, kl_coef=1 / strength, entropy_coef=reward.config.entropy_coef)
            entry = self.config.reward_references[index]
            if self._hub_digests.get(index) != digest(reward.network):
                prefix = f"reward_networks.{index}."
                place = folder / f"reward-{index}"
                entry = save_beside(reward, place, state_dict and _without_prefix(state_dict, prefix))
            config.reward_references[index] = entry | {"strength": float(strength)}
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        if self.can_generate():
            self.generation_config.save_pretrained(folder)
        if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):  # a Trainer resumes from these, by their names
            save_file(self._tuned(state_dict), folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        write_recipe(config, folder)
        kept = {entry["folder"] for entry in config.reward_references}
        for earlier in folder.glob("reward-*"):
            if earlier.name not in kept and (earlier / PRT_CONFIG_NAME).exists():
                shutil.rmtree(earlier)

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
            # Batch statistics of frozen layers are the base's, which others share.
            for module in reward.network.modules() if reward.config.is_adapter else ():
                is_frozen = not any(parameter.requires_grad for parameter in module.parameters())
                if is_frozen and getattr(module, "running_mean", None) is not None:
                    module.eval()
        return self

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
        ours = ModelReference(**self.config.backbone_reference or {}).weights
        keys = [(ours, self.backbone.dtype, self.backbone.device)]
        for reward in self.rewards:
            base = reward.config.reward_base.weights if can_mix(reward.network) else None
            keys.append((base, reward.dtype, reward.device))
        groups: dict = {}
        for index, key in enumerate(keys):
            groups.setdefault(key if key[0] else index, []).append(index)
        passes = []
        for first, *others in groups.values():
            if not others:
                passes.append(self._separate[first])
                continue
            base = self.backbone
            if first:
                base = bare_base(self.reward_networks[first - 1])
                self.bases.append(base)
            blocks = [self.reward_networks[index - 1] if index else None for index in (first, *others)]
            passes.append(MixedPass(base, blocks))
        order = [index for members in groups.values() for index in members]
        return passes, sorted(range(len(order)), key=order.__getitem__)

    @property
    def _passes(self) -> list[Pass]:
        """The first has the backbone's rows first."""
        return self._separate if self.training or torch.is_grad_enabled() else self._mixed

    def _run(self, inputs: dict, of_backbone: dict, caches: list[Cache | None] | None = None):
        """The logits of the backbone and of every reward, and the backbone's output beside its logits."""
        passes = self._passes
        blocks = []
        for index, (run, cache) in enumerate(zip(passes, caches or [None] * len(passes), strict=True)):
            given = inputs if cache is None else inputs | {"past_key_values": cache}
            # The backbone is frozen: no graph for it.
            with torch.set_grad_enabled(torch.is_grad_enabled() and index > 0):
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
        """log pi over the backbone's labels, or the contract's tokens (Eq. 10); float32."""
        backbone, *rewards = logits
        if isinstance(self.orders[0], slice):
            backbone = backbone[..., self.orders[0]]
        total = sum(
            strength * reward[..., order].to(backbone.device).float()
            for strength, order, reward in zip(self.strengths, self.orders, rewards, strict=True)
        )
        return combine(backbone, total)


class PRTForCausalLM(PRTPreTrainedModel, GenerationMixin):
    """A language model with rewards. `logits` are log-probabilities over the contract's tokens, of shape
    `(batch_size, sequence_length, vocab_size)`, without the columns that pad the networks' heads.

    ```python
    model = PRTForCausalLM.from_parts("Qwen/Qwen2.5-7B", rewards=["me/gsm8k-reward"])
    model.generate(**inputs)
    ```
    """

    task = TEXT_GENERATION
    main_input_name = "input_ids"
    _can_compile_fullgraph = True  # with PEFT's layers or a mixed pass, in parts

    def __init__(self, config, backbone=None, rewards=None, processing_class=None):
        super().__init__(config, backbone, rewards, processing_class)
        self.generation_config = copy.deepcopy(self.backbone.generation_config)

    @property
    def base_model(self) -> JointBase:
        """For trainers that multiply hidden states by the head themselves, as TRL's do."""
        return JointBase(self)

    def get_output_embeddings(self) -> JointHead:
        return joint_head(self)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: PRTCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            past_key_values ([`~prt_hf.generation.cache.PRTCache`]): of all networks, as returned by an earlier call.
            output_hidden_states, output_attentions: of the backbone.
            labels: shifted here, as by every causal language model of transformers; -100 is ignored.
            kwargs: for every network; `shift_labels`, instead of `labels`, are shifted already.

        Returns:
            `CausalLMOutputWithPast`: `logits` normalised, float32.

        Raises:
            UnsupportedError: a prompt given as embeddings.
            ContextLengthError: longer than a reward can read.
            NonFiniteRewardError: a reward is NaN or infinite.
        """
        # Not in the signature, where the Trainer would take it for a label that every batch has.
        shift_labels = kwargs.pop("shift_labels", None)
        if input_ids is None or inputs_embeds is not None:
            raise UnsupportedError(
                "A reward has embeddings of its own, and cannot read the backbone's.",
                expected="`input_ids`",
                found="`inputs_embeds`" if inputs_embeds is not None else "neither",
            )
        if use_cache is None:
            use_cache = not self.training and getattr(self.config, "use_cache", False)
        if past_key_values is not None:
            self._check_cache(past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = self._new_cache()
            use_cache = past_key_values is not None
        self._check_length(input_ids, attention_mask, past_key_values)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        } | kwargs
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        inputs, asked = ({k: v for k, v in given.items() if v is not None} for given in (inputs, asked))
        if past_key_values is not None:
            past_key_values.rows = len(input_ids)
        logits, beside = self._run(inputs, asked, None if past_key_values is None else past_key_values.parts)
        log_probs = self._combine([_keep(value, logits_to_keep, input_ids.shape[1]) for value in logits])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=log_probs,
                labels=labels,
                vocab_size=log_probs.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=log_probs,
            past_key_values=past_key_values,
            **beside,
        )

    @staticmethod
    def create_masks_for_generate(config, attention_mask=None, past_key_values=None, **kwargs):
        """Every network makes its own mask for its own cache of the mask of tokens, which is as long at every step as a
        static cache, lest every step be compiled anew. Recurrent layers and flash attention read its end, and have it
        as it is."""
        is_read_from_its_end = any(past_key_values.is_linear) or "flash" in (config._attn_implementation or "")
        if attention_mask is None or is_read_from_its_end:
            return attention_mask
        missing = past_key_values.get_max_length() - attention_mask.shape[1]
        return nn.functional.pad(attention_mask, (0, max(0, missing)))

    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        speculative: bool = False,
        num_draft_tokens: int | None = None,
        **kwargs,
    ):
        """As every model's, see [`~transformers.GenerationMixin.generate`].

        Args:
            speculative (`bool`): draft with the source backbone and the rewards, verify with the backbone: the same
                greedy text, samples of the same distribution, faster where the reward is smaller than the backbone. One
                prompt at a time. With a full reward, `assistant_model` is its source backbone, by default loaded as the
                reward names it. `return_dict_in_generate` tells what became of the drafts
                ([`~prt_hf.generation.speculative.SpeculativeOutput`]).
            num_draft_tokens (`int`, *optional*): the most to draft at a time.

        Raises:
            UnsupportedError: continuous batching; what cannot be speculative.
        """
        asked = (kwargs.get("cache_implementation"), getattr(generation_config, "cache_implementation", None))
        if "paged" in asked:
            self._refuse_continuous_batching()
        if speculative:
            return self._generate_speculatively(inputs, generation_config, num_draft_tokens, **kwargs)
        if num_draft_tokens is not None:
            raise PRTValueError("`num_draft_tokens` is for speculative decoding.", remedy="speculative=True")
        return super().generate(inputs, generation_config, **kwargs)

    def _generate_speculatively(
        self,
        inputs,
        generation_config,
        num_draft_tokens,
        *,
        assistant_model=None,
        streamer=None,
        tokenizer=None,
        stop_strings=None,
        stopping_criteria=None,
        **kwargs,
    ):
        generation_config = copy.deepcopy(generation_config or self.generation_config)
        kwargs = generation_config.update(**kwargs)
        stopping_criteria = StoppingCriteriaList(stopping_criteria or ())
        stop_strings = stop_strings or generation_config.stop_strings
        if stop_strings:
            # transformers keeps the tokenizer from a `custom_generate`, and cannot make these without it.
            stopping_criteria.append(StopStringCriteria(tokenizer or self.processing_class, stop_strings))
            generation_config.stop_strings = None
        rewards = [
            PRTLogitsProcessor(
                reward,
                self.processing_class,
                strength=strength,
                attention_mask=kwargs.get("attention_mask"),
                source_backbone=assistant_model,
            )
            for reward, strength in zip(self.rewards, self.strengths, strict=True)
        ]
        decode = partial(
            speculative_decoding, rewards=rewards, num_draft_tokens=num_draft_tokens, streamer=streamer
        )
        return self.backbone.generate(
            inputs,
            generation_config,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            custom_generate=decode,
            **kwargs,
        )

    def init_continuous_batching(self, *args, **kwargs):
        self._refuse_continuous_batching()

    def generate_batch(self, *args, **kwargs):
        self._refuse_continuous_batching()

    def _refuse_continuous_batching(self):
        raise UnsupportedError(
            "Continuous batching keeps one paged cache for one model, and a PRT model has several.",
            expected="`generate` with a dynamic or static cache",
            remedy="serve with vLLM, or generate in batches",
        )

    @property
    def _is_cached(self) -> bool:
        return all(run.is_cached for run in self._separate)

    def _new_cache(self) -> PRTCache | None:
        if not self._is_cached:
            return None
        parts = [DynamicCache(config=run.model.config.get_text_config(decoder=True)) for run in self._passes]
        return PRTCache(parts, [len(run.blocks) for run in self._passes])

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        given = model_kwargs.get("past_key_values")
        if given is not None:
            self._check_cache(given)
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if not self._is_cached:
            if generation_config.use_cache:
                logger.warning_once(
                    "One of the networks keeps no cache of the usual kind: every step reads all tokens."
                )
            generation_config.use_cache = False
        if not generation_config.use_cache:
            return None
        parts = []
        for run in self._passes:
            made = {}
            run.model._prepare_cache_for_generation(
                generation_config, made, generation_mode, batch_size * len(run.blocks), max_cache_length
            )
            parts.append(made["past_key_values"])
        model_kwargs["past_key_values"] = PRTCache(parts, [len(run.blocks) for run in self._passes])

    def _check_cache(self, cache) -> None:
        blocks = [len(run.blocks) for run in self._passes]
        if not isinstance(cache, PRTCache) or cache.blocks != blocks:
            raise UnsupportedError(
                "The cache is not one of this PRT model's passes.",
                expected="`past_key_values` as an earlier call of this model returned them, with gradients where there "
                f"are now: blocks of rows {blocks}",
                found=f"{type(cache).__name__}{f' of {cache.blocks}' if isinstance(cache, PRTCache) else ''}",
            )

    def _check_length(self, input_ids, attention_mask, cache) -> None:
        if not self._limits or torch.compiler.is_compiling():
            return
        limit = min(self._limits)
        length = input_ids.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
        if length > limit and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            length = int(attention_mask.sum(1).max())
        check_length(length, limit)


class PRTForSequenceClassification(PRTPreTrainedModel):
    """A text classifier with rewards. `logits` are log-probabilities over the backbone's labels,
    `(batch_size, num_labels)`; the rewards' labels are matched to them by name."""

    task = TEXT_CLASSIFICATION
    main_input_name = "input_ids"

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """`labels` of shape `(batch_size,)` in the backbone's order; hidden states and attentions are its own."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
        }
        return SequenceClassifierOutput(
            **self._classify(inputs, labels, output_hidden_states, output_attentions, kwargs)
        )

    def _classify(self, inputs, labels, output_hidden_states, output_attentions, kwargs) -> dict:
        num_items = kwargs.pop("num_items_in_batch", None)
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        inputs, asked = ({k: v for k, v in given.items() if v is not None} for given in (inputs | kwargs, asked))
        logits, beside = self._run(inputs, asked)
        log_probs = self._combine(logits)
        loss = None
        if labels is not None:
            reduction = "mean" if num_items is None else "sum"
            loss = nn.functional.nll_loss(log_probs, labels.to(log_probs.device), reduction=reduction)
            loss = loss if num_items is None else loss / num_items
        return {"loss": loss, "logits": log_probs} | beside


class PRTForImageClassification(PRTForSequenceClassification):
    """An image classifier with rewards. `logits` are log-probabilities over the backbone's labels,
    `(batch_size, num_labels)`; the rewards' labels are matched to them by name."""

    task = IMAGE_CLASSIFICATION
    main_input_name = "pixel_values"

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """`labels` of shape `(batch_size,)` in the backbone's order; hidden states and attentions are its own."""
        return ImageClassifierOutput(
            **self._classify({"pixel_values": pixel_values}, labels, output_hidden_states, output_attentions, kwargs)
        )


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


def _keep(logits: torch.Tensor, logits_to_keep: int | torch.Tensor, length: int) -> torch.Tensor:
    """Cut the logits of a network that does not know `logits_to_keep`."""
    if isinstance(logits_to_keep, int):
        return logits[:, -logits_to_keep:]  # all for 0
    return logits[:, logits_to_keep] if logits.shape[1] == length else logits


AutoConfig.register(PRTModelConfig.model_type, PRTModelConfig)
AutoModelForCausalLM.register(PRTModelConfig, PRTForCausalLM)
AutoModelForSequenceClassification.register(PRTModelConfig, PRTForSequenceClassification)
AutoModelForImageClassification.register(PRTModelConfig, PRTForImageClassification)
