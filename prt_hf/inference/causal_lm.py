"""Language models with rewards: log-probabilities, one cache for all networks, generation."""

import copy
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
)
from transformers.generation import GenerationMode
from transformers.generation.utils import GenerateOutput
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from ..contract import TEXT_GENERATION
from ..errors import PRTValueError, UnsupportedError
from ..networks.anatomy import CACHE, check_length
from .cache import PRTCache
from .configuration import PRTModelConfig
from .context import Prompt
from .joint_head import JointBase, JointHead, joint_head
from .probe import behaviour_of, check_padding
from .prt_model import PRTPreTrainedModel
from .state import switching_length
from .with_processors import add_rewards_across, generate_with_processors

logger = logging.get_logger(__name__)


class PRTForCausalLM(PRTPreTrainedModel, GenerationMixin):
    """A language model with rewards.

    `logits` are log-probabilities over the contract's tokens, `(batch_size, sequence_length, vocab_size)`, without the
    columns that pad the networks' heads.

    ```python
    model = PRTForCausalLM.from_parts("Qwen/Qwen2.5-7B", rewards=["me/gsm8k-reward"])
    model.generate(**inputs)
    ```

    It has more than 15 methods and 250 lines because `generate()` of transformers asks for ten of them.
    """

    task = TEXT_GENERATION
    main_input_name = "input_ids"
    _can_compile_fullgraph = True  # with PEFT's layers or a mixed pass, in parts

    def __init__(self, config: PRTModelConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.generation_config = copy.deepcopy(self.backbone.generation_config)
        switches = (switching_length(part.run.model.config) for part in self.parts)
        self._switches = [switch for switch in switches if switch is not None]

    @property
    def base_model(self) -> JointBase:
        """The model without its head, for trainers that multiply hidden states by the head themselves, as TRL's do."""
        return JointBase(self)

    def get_output_embeddings(self) -> JointHead:
        """Return the head that belongs to the hidden states of `base_model`."""
        return joint_head(self)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: PRTCache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return log-probabilities of the next tokens, and the loss if there are labels.

        Args:
            input_ids: `(batch_size, sequence_length)`.
            attention_mask (*optional*): `(batch_size, sequence_length)`, 0 at padding.
            position_ids (*optional*): counted from 0, for every network; by default padding is not counted.
            cache ([`~prt_hf.inference.cache.PRTCache`]): of all networks, as returned by an earlier call. Also taken
                as `past_key_values`, its name before transformers 5.24.
            inputs_embeds: refused.
            labels (*optional*): shifted here, as by every causal language model of transformers; -100 is ignored.
            use_cache (*optional*): return a cache.
            logits_to_keep: as for every causal language model of transformers.
            output_hidden_states (*optional*): return those of the backbone.
            output_attentions (*optional*): return those of the backbone.
            num_items_in_batch (*optional*): divides the sum of losses.
            **kwargs: for every network; `shift_labels`, instead of `labels`, are shifted already.

        Returns:
            `CausalLMOutputWithPast`: `logits` normalised, float32.

        Raises:
            UnsupportedError: a prompt given as embeddings; left padding that a network takes for text; training with a
                reward of another vocabulary.
            ContextLengthError: longer than a reward can read.
            NonFiniteRewardError: a reward is NaN or infinite.
        """
        # Not in the signature, where the Trainer would take it for a label that every batch has.
        shift_labels = kwargs.pop("shift_labels", None)
        cache = kwargs.pop("past_key_values", cache)
        if input_ids is None or inputs_embeds is not None:
            raise UnsupportedError(
                "A reward has embeddings of its own, and cannot read the backbone's.",
                expected="`input_ids`",
                found="`inputs_embeds`" if inputs_embeds is not None else "neither",
            )
        if use_cache and self._reads_other_tokens:
            raise UnsupportedError(
                "A reward may read other tokens than the backbone, so that no cache holds both.",
                expected="use_cache=False, or `generate`, where every network has a cache of its own",
                found="use_cache=True",
            )
        if use_cache is None:
            use_cache = not self.training and getattr(self.config, "use_cache", False)
        if cache is not None:
            self._check_cache(cache)
        if use_cache and cache is None:
            cache = self._new_cache()
            use_cache = cache is not None
        self._check_length(input_ids, attention_mask, cache)
        if not torch.compiler.is_compiling():
            position_ids = self._positions(input_ids, attention_mask, position_ids, cache)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        } | kwargs
        asked = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        inputs, asked = ({k: v for k, v in given.items() if v is not None} for given in (inputs, asked))
        if cache is not None:
            cache.rows = len(input_ids)
        logits, beside = self._run(inputs, asked, None if cache is None else cache.parts)
        log_probs = self._combine([_keep(value, logits_to_keep, input_ids.shape[1]) for value in logits])
        if any(match.is_across for match in self.matches):
            positions = torch.arange(input_ids.shape[1])[None].to(input_ids.device)
            positions = _keep(positions, logits_to_keep, input_ids.shape[1])[0]
            log_probs = add_rewards_across(self, input_ids, attention_mask, position_ids, positions, log_probs)
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
            **{CACHE: cache},
            **beside,
        )

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig, attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor | None:
        """Return the mask of tokens, from which every network makes its own mask for its own cache.

        It is padded to the length of a static cache, so that steps are not compiled anew. Recurrent layers and flash
        attention read its end, and get it as it is.
        """
        cache = kwargs[CACHE]
        is_read_from_its_end = any(cache.is_linear) or "flash" in (config._attn_implementation or "")
        if attention_mask is None or is_read_from_its_end:
            return attention_mask
        missing = cache.get_max_length() - attention_mask.shape[1]
        return nn.functional.pad(attention_mask, (0, max(0, missing)))

    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        speculative: bool = False,
        num_draft_tokens: int | None = None,
        reward_inputs: Prompt | Sequence[Prompt | None] | None = None,
        **kwargs,
    ) -> torch.LongTensor | GenerateOutput:
        """Generate text as every model does, see [`~transformers.GenerationMixin.generate`].

        Args:
            inputs: the prompts, `(batch_size, sequence_length)`.
            generation_config (*optional*): by default the backbone's.
            speculative (`bool`): draft with the source backbone and the rewards, verify with the backbone: the same
                greedy text, samples of the same distribution, faster if the reward is smaller than the backbone. One
                prompt at a time. With a full reward, `assistant_model` is its source backbone, by default loaded as the
                reward names it. With `return_dict_in_generate` the drafts are counted
                ([`~prt_hf.inference.speculative.SpeculativeOutput`]).
            num_draft_tokens (`int`, *optional*): most tokens to draft at a time.
            reward_inputs (*optional*): prompts that the rewards read in the place of the backbone's, in the tokens of
                their own tokenizer, as it returns them: one for all, or a list with one or None for each. For a reward
                that was tuned with another chat template.
            **kwargs: as for every model.

        Raises:
            UnsupportedError: continuous batching; options that speculative decoding does not have.
        """
        asked = (kwargs.get("cache_implementation"), getattr(generation_config, "cache_implementation", None))
        if "paged" in asked:
            self._refuse_continuous_batching()
        if num_draft_tokens is not None and not speculative:
            raise PRTValueError("`num_draft_tokens` is for speculative decoding.", remedy="speculative=True")
        if not speculative and reward_inputs is None and not self._reads_other_tokens:
            return super().generate(inputs, generation_config, **kwargs)
        prompts = reward_inputs if isinstance(reward_inputs, list | tuple) else [reward_inputs] * len(self.rewards)
        if len(prompts) != len(self.rewards):
            raise PRTValueError(
                "`reward_inputs` is not usable.",
                expected=f"one, or a list of {len(self.rewards)}",
                found=f"{len(prompts)} of them",
            )
        options = {"num_draft_tokens": num_draft_tokens} if speculative else None
        return generate_with_processors(self, inputs, generation_config, prompts, options, **kwargs)

    def init_continuous_batching(self, *args, **kwargs) -> None:
        """Refuse continuous batching.

        Raises:
            UnsupportedError: always.
        """
        self._refuse_continuous_batching()

    def generate_batch(self, *args, **kwargs) -> None:
        """Refuse continuous batching.

        Raises:
            UnsupportedError: always.
        """
        self._refuse_continuous_batching()

    def _refuse_continuous_batching(self) -> NoReturn:
        raise UnsupportedError(
            "Continuous batching keeps one paged cache for one model, and a PRT model has several.",
            expected="`generate` with a dynamic or static cache",
            remedy="serve with vLLM, or generate in batches",
        )

    @property
    def _is_cached(self) -> bool:
        """Whether all networks can read on from caches of the usual kind."""
        return not self._reads_other_tokens and all(
            part.run.is_cached and behaviour_of(part.run).steps for part in self.parts
        )

    @property
    def _reads_other_tokens(self) -> bool:
        """Whether the rows of a reward may have other lengths than the backbone's, so that no cache holds both."""
        return any(match.is_across or (match.tokens is not None and match.tokens.neutral) for match in self.matches)

    def _new_cache(self) -> PRTCache | None:
        """Return an empty cache for all passes; None if a network cannot read on from one."""
        if not self._is_cached:
            return None
        configs = [run.model.config.get_text_config(decoder=True) for run, _ in self._passes]
        return PRTCache([DynamicCache(config=config) for config in configs], self._blocks)

    @property
    def _blocks(self) -> list[int]:
        """How many parts each of the passes reads."""
        return [len(parts) for _, parts in self._passes]

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put a cache of the asked kind for every pass into `model_kwargs`."""
        given = model_kwargs.get(CACHE)
        if given is not None:
            self._check_cache(given)
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        if not self._is_cached:
            if generation_config.use_cache:
                logger.warning_once("One of the networks has no cache of the usual kind: every step reads all tokens.")
            generation_config.use_cache = False
        if not generation_config.use_cache:
            return None
        caches = []
        for run, parts in self._passes:
            made = {}
            run.model._prepare_cache_for_generation(
                generation_config, made, generation_mode, batch_size * len(parts), max_cache_length
            )
            caches.append(made[CACHE])
        model_kwargs[CACHE] = PRTCache(caches, self._blocks)

    def _check_cache(self, cache: Cache) -> None:
        """Refuse caches of other models, or of other passes of this one."""
        if not isinstance(cache, PRTCache) or cache.blocks != self._blocks:
            raise UnsupportedError(
                "The cache is not one of this PRT model's passes.",
                expected=f"`{CACHE}` as an earlier call of this model returned them, with gradients where there "
                f"are now: blocks of rows {self._blocks}",
                found=f"{type(cache).__name__}{f' of {cache.blocks}' if isinstance(cache, PRTCache) else ''}",
            )

    def _check_length(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, cache: PRTCache | None
    ) -> None:
        """Refuse texts that are longer than a reward can read."""
        if not self._limits or torch.compiler.is_compiling():
            return
        limit = min(self._limits)
        length = input_ids.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
        if length > limit and isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            length = int(attention_mask.sum(1).max())
        check_length(length, limit)

    def _positions(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        cache: PRTCache | None,
    ) -> torch.LongTensor | None:
        """Return positions that continue the cache's and skip padding; None if every network counts so on its own.

        Raises:
            UnsupportedError: a network cannot tell padding from text, or reads short and long texts in other ways.
        """
        length = 0 if cache is None else int(cache.get_seq_length())
        end = length + input_ids.shape[1]
        mask = attention_mask if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2 else None
        for switch in self._switches:
            if end > switch and (0 < length <= switch or (mask is not None and bool((mask.sum(1) <= switch).any()))):
                raise UnsupportedError(
                    "Short and long texts are read with different frequencies of longrope.",
                    expected=f"at most {switch} tokens (original_max_position_embeddings), or more from the first pass "
                    "on and in every row",
                    found=f"{length} tokens in the cache, {end} with the new ones, in {len(input_ids)} rows",
                    remedy="use_cache=False, for one prompt at a time",
                )
        is_padded = length == 0 and mask is not None and bool((mask[:, 0] == 0).any())
        if is_padded and not self.training:
            for part in self.parts:
                check_padding(part.run)
        if position_ids is not None or not (length or is_padded):
            return position_ids
        if mask is None:
            return torch.arange(length, end, device=input_ids.device)[None]
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, length:end]


def _keep(logits: torch.Tensor, logits_to_keep: int | torch.Tensor, length: int) -> torch.Tensor:
    """Cut the logits of a network that does not know `logits_to_keep`."""
    if isinstance(logits_to_keep, int):
        return logits[:, -logits_to_keep:]  # all for 0
    return logits[:, logits_to_keep] if logits.shape[1] == length else logits
