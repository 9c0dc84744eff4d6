"""Reward logits inside `generate(logits_processor=[...])`."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from transformers import CompileConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..contract import Contract, VocabularyContract, unwrap_tokenizer
from ..errors import PRTValueError, UnsupportedError
from ..functional import as_strength, combine, signed_sum, strength_of_rows
from ..networks.adapters import bare_base
from ..networks.anatomy import contract_of, unwrap_adapter
from ..networks.auto import load_base
from ..networks.mixed_pass import lock_of
from ..reward.finetuned import check_finetuned, pretrained_of
from ..reward.model import RewardModel, Term
from .terms import TermStates

logger = logging.get_logger(__name__)


class _Masked:
    """A mask, and the prompts that it was first used for."""

    def __init__(self, mask: torch.LongTensor | None):
        self.mask = mask
        self.prompts: torch.LongTensor | None = None


class _TermProcessor(LogitsProcessor):
    """Adds `strength * r` to the backbone's log-probabilities and normalises; r is the signed sum of terms."""

    # Continuous batching passes single tokens, and the reward's caches know rows by their content.
    supports_continuous_batching = False

    def __init__(
        self,
        terms: Sequence[Term],
        contract: Contract,
        tokenizer: PreTrainedTokenizerBase,
        strength: float | torch.Tensor | list[float],
        attention_mask: torch.LongTensor | None,
        compile_config: CompileConfig | None = None,
    ):
        self._tokenizer = unwrap_tokenizer(tokenizer)
        if self._tokenizer is None:
            raise PRTValueError(
                "A logits processor needs the backbone's tokenizer, which defines the vocabulary.",
                expected="a transformers tokenizer",
                found=type(tokenizer).__name__,
            )
        if not isinstance(contract, VocabularyContract):
            raise PRTValueError(
                "Only rewards over a vocabulary work in `generate`.",
                expected="a reward tuned from a causal language model",
                found=f"a reward over {contract.kind}",
                remedy="`PRTForSequenceClassification` or `PRTForImageClassification` adds a classifier's reward",
            )
        contract.check(VocabularyContract.from_tokenizer(self._tokenizer))
        self._contract = contract
        self._signs = [term.sign for term in terms]
        self._states = TermStates(*(term.network.eval() for term in terms), compile_config=compile_config)
        self.strength = strength
        self.attention_mask = attention_mask
        self._warned_of_padding = False

    @property
    def strength(self) -> float | torch.Tensor:
        """1 / lambda of Eq. 10; a number, or one per prompt."""
        return self._strength

    @strength.setter
    def strength(self, value: float | torch.Tensor | list[float]) -> None:
        self._strength = as_strength(value)

    @property
    def attention_mask(self) -> torch.LongTensor | None:
        """`(batch_size, prompt_length)`, the mask given to `generate`; set it anew for other prompts."""
        return self._masked.mask

    @attention_mask.setter
    def attention_mask(self, mask: torch.LongTensor | None) -> None:
        if mask is not None and mask.ndim != 2:
            raise PRTValueError(
                "`attention_mask` is not usable.",
                expected="shape (batch_size, prompt_length)",
                found=str(tuple(mask.shape)),
            )
        self._masked = _Masked(mask)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return log-probabilities of the backbone with the reward.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): prompt and generated tokens.
            scores (`torch.FloatTensor` of shape `(batch_size, backbone_vocab_size)`): the backbone's logits, or their
                log-softmax.

        Returns:
            `torch.FloatTensor` of the shape of `scores`: normalised log-probabilities (so beam scores are exact);
            `-inf` in columns that pad the vocabulary.

        Raises:
            UnsupportedError: called by continuous batching, or with a prompt given as embeddings only.
            ContextLengthError: the rows outgrow the reward's context.
            NonFiniteRewardError: a reward is NaN or infinite.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] == 0 or len(input_ids) != len(scores):
            raise UnsupportedError(
                "The reward cannot see the tokens that it has to score.",
                expected="all token ids of every row, as `generate` hands them over",
                found=f"input_ids of shape {tuple(input_ids.shape)} with scores of shape {tuple(scores.shape)}",
                remedy="use `generate` with `input_ids`; not continuous batching, nor `inputs_embeds` alone",
            )
        self._contract.check_head(scores.shape[-1])
        size = self._contract.size
        logits = self._states(input_ids, self._mask(input_ids), slice(len(self._signs)))
        rewards = signed_sum(self._signs, [each[:, :size].float() for each in logits]).to(scores.device)
        strength = strength_of_rows(self.strength, len(scores))[:, None].to(scores.device)
        output = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        output[:, :size] = combine(scores[:, :size], rewards, strength)
        return output

    def reset(self) -> None:
        """Free the caches.

        They follow the prompts by themselves, and the weights and adapters as far as
        [`~prt_hf.inference.versions.Versions`] sees changes.
        """
        self._states.reset()

    def _mask(self, input_ids: torch.LongTensor) -> torch.LongTensor | None:
        masked = self._masked
        mask = self._inferred_mask(input_ids) if masked.mask is None else self._extended_mask(masked, input_ids)
        return None if mask is None or bool(mask.all()) else mask

    def _extended_mask(self, masked: _Masked, input_ids: torch.LongTensor) -> torch.LongTensor:
        """Return the prompts' mask for every row that `generate` made of them, with ones for generated tokens."""
        mask = masked.mask.to(input_ids.device)
        rows, (prompts, length) = len(input_ids), mask.shape
        is_fitting = rows % prompts == 0 and input_ids.shape[1] >= length
        if is_fitting:
            copies = rows // prompts
            start = input_ids[:, :length]
            if masked.prompts is None and input_ids.shape[1] == length:  # else the text began under another mask
                masked.prompts = start[::copies].clone()
            # Beams never leave their prompt, so row i still starts with prompt i // copies.
            is_fitting = masked.prompts is not None and torch.equal(start, masked.prompts.repeat_interleave(copies, 0))
        if not is_fitting:
            raise PRTValueError(
                "`attention_mask` belongs to other prompts than these.",
                expected=f"the rows of {prompts} prompts of {length} tokens",
                found=f"{rows} rows of {input_ids.shape[1]} tokens",
                remedy="set `processor.attention_mask` to the mask of these prompts, or to None to infer it",
            )
        generated = mask.new_ones(rows, input_ids.shape[1] - length)
        return torch.cat([mask.repeat_interleave(copies, 0), generated], 1)

    def _inferred_mask(self, input_ids: torch.LongTensor) -> torch.LongTensor | None:
        """Mask left padding: the run of pad tokens that a row starts with."""
        pad = self._tokenizer.pad_token_id
        if pad is None:
            return None
        leading = (input_ids == pad).long().cumprod(1).sum(1)
        if pad in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            # The token may open the text itself. A batch is padded to its longest prompt, so what all rows share is
            # text.
            if bool(leading.any()) and not self._warned_of_padding:
                self._warned_of_padding = True
                logger.warning(
                    f"Rows start with {self._tokenizer.pad_token!r}, which both pads and starts or ends texts: taken "
                    "as padding where a row has more of them than the row with the fewest. Pass `attention_mask=` to "
                    "be exact."
                )
            leading = leading - leading.min()
        return (torch.arange(input_ids.shape[1], device=input_ids.device) >= leading[:, None]).long()


class PRTLogitsProcessor(_TermProcessor):
    r"""Portable Reward Tuning at inference (Eq. 10, Algorithm 2): log pi_pt + strength * r_theta, normalised.

    It equals a full recomputation of the reward in every mode of `generate`: greedy, sampling, beams,
    `num_return_sequences`, left padding, assisted decoding, prompt lookup. The reward's KV cache follows the rows by
    their content, so one object may be used again, for other prompts and batch sizes, and by several threads at once,
    which take turns at the reward. `strength` and `attention_mask` hold for all of them.

    Args:
        reward ([`RewardModel`]): on any device, in any precision. Several rewards are several processors, in any order:
            each normalises, and a constant per row does not change the output of the next.
        tokenizer: the backbone's; must have the reward's vocabulary.
        strength (`float`, or one per prompt, *optional*): 1 / lambda; by default the one that the reward was tuned
            with, 1 in the paper. Below 0, the tuned behaviour is subtracted.
        attention_mask (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*): the mask given to
            `generate`. By default left padding is inferred from the tokenizer's pad token.
        source_backbone (`PreTrainedModel`, *optional*): drafts for [`~prt_hf.speculative_decoding`] with a full reward;
            by default loaded as `prt_config.json` names it. An adapter drafts with its own base.
        compile_config (`CompileConfig`, *optional*): compile the reward's step, for GPUs on which a small network waits
            for its launches; `CompileConfig()` uses CUDA graphs.

    Raises:
        VocabularyMismatchError: the tokenizer is another one than the reward's.

    Example:

    ```python
    reward = RewardModel.from_pretrained("me/gsm8k-reward")
    backbone.generate(**inputs, logits_processor=[PRTLogitsProcessor(reward, tokenizer)])
    ```
    """

    def __init__(
        self,
        reward: RewardModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        strength: float | torch.Tensor | list[float] | None = None,
        attention_mask: torch.LongTensor | None = None,
        source_backbone: PreTrainedModel | None = None,
        compile_config: CompileConfig | None = None,
    ):
        if not isinstance(reward, RewardModel):
            raise PRTValueError(
                "`reward` is no reward model.",
                expected="a RewardModel",
                found=type(reward).__name__,
                remedy="RewardModel.from_pretrained(...)",
            )
        terms = reward.terms
        if compile_config is not None and len(terms) > 1:
            raise UnsupportedError(
                "The step of an adapter that was carried over cannot be compiled.",
                expected="a reward of one network",
                found="log pi_ft - log pi_pt, of two",
                remedy="leave `compile_config` out, or distil it into a reward",
            )
        strength = reward.config.strength if strength is None else strength
        super().__init__(terms, reward.contract, tokenizer, strength, attention_mask, compile_config)
        self.reward = reward
        self._compile_config, self._source_backbone = compile_config, source_backbone
        self._drafting: TermStates | None = None  # of the reward and its source backbone

    def reset(self) -> None:
        """Free the caches, those of drafts as well."""
        super().reset()
        if self._drafting is not None:
            self._drafting.reset()

    def drafter(self) -> "PRTLogitsProcessor":
        """Return a copy of this processor that can give `source_logits`, for an adapter in the pass of its rewards.

        It is another object, since this one may be at work in other threads; the caches are kept from call to call.
        """
        with lock_of(unwrap_adapter(self.reward.network)):
            if self._drafting is None:
                self._drafting = self._draft_states()
            drafter = copy.copy(self)
        drafter._states = drafter._drafting
        return drafter

    def _draft_states(self) -> TermStates:
        """Return the states of the reward's terms, the last of which, or one more, is the source backbone."""
        if len(self._signs) > 1:
            return self._states
        network, config = self.reward.network, self.reward.config
        if config.is_adapter:
            source = bare_base(network)
        elif self._source_backbone is None:
            source = load_base(config.sources[0], dtype=self.reward.dtype).to(self.reward.device)
        else:
            source = self._source_backbone.to(self.reward.device)
        return TermStates(network, source.eval(), compile_config=self._compile_config)

    def source_logits(self, input_ids: torch.LongTensor) -> torch.FloatTensor:
        """Return the source backbone's logits for the tokens after `input_ids`, `(batch_size, contract.size)`.

        Only a [`drafter`] has them.
        """
        (logits,) = self._states(input_ids, self._mask(input_ids), slice(-1, None))
        return logits[:, : self._contract.size].float()


class EFTLogitsProcessor(_TermProcessor):
    r"""Emulated fine-tuning / proxy-tuning, the baseline with three models (Mitchell et al. 2024; Liu et al. 2024).

    log pi_new + strength * (log pi_ft_old - log pi_pt_old), normalised: the terms (finetuned, -pretrained). Any LoRA on
    the Hub can be carried over in this way, without training: [`from_adapter`].

    Args:
        finetuned (`PeftModel` or `PreTrainedModel`): pi_ft_old. With a `PeftModel`, the adapter on and off are two rows
            of one pass; two passes if it is not a plain LoRA.
        tokenizer: shared by all three models.
        pretrained (`PreTrainedModel`, *optional*): pi_pt_old; needed unless `finetuned` is a `PeftModel` that leaves
            its base as it was.
        strength, attention_mask: as for [`PRTLogitsProcessor`].

    Raises:
        VocabularyMismatchError: one of the models has no logit for some of the tokens.
        UnsupportedError: an adapter of prompts, or one that depends on the text; without `pretrained`, one that has
            changed its base.
        PRTValueError: neither `pretrained` nor a `PeftModel`.
    """

    def __init__(
        self,
        finetuned: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pretrained: PreTrainedModel | None = None,
        strength: float | torch.Tensor | list[float] = 1.0,
        attention_mask: torch.LongTensor | None = None,
    ):
        check_finetuned(finetuned)
        pretrained = pretrained_of(finetuned) if pretrained is None else pretrained
        contract, _ = (contract_of(network, tokenizer) for network in (finetuned, pretrained))
        super().__init__((Term(finetuned), Term(pretrained, -1.0)), contract, tokenizer, strength, attention_mask)

    @classmethod
    def from_adapter(
        cls,
        path_or_repo: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        strength: float | torch.Tensor | list[float] = 1.0,
        attention_mask: torch.LongTensor | None = None,
        **load_kwargs,
    ) -> "EFTLogitsProcessor":
        """Carry an ordinary PEFT adapter of a language model over to any backbone with its base's vocabulary.

        Args:
            path_or_repo: folder or repository id of a LoRA or another adapter of layers; its base is loaded as
                `adapter_config.json` names it.
            tokenizer: the backbone's.
            strength: as for [`PRTLogitsProcessor`].
            attention_mask: as for [`PRTLogitsProcessor`].
            **load_kwargs: for [`RewardModel.from_adapter`]: `base_model`, `revision`, `token`, `subfolder`, `dtype`,
                ...

        Raises:
            VocabularyMismatchError: the tokenizer is another one than the adapter's.
            PRTError: as raised by [`RewardModel.from_adapter`].
        """
        reward = RewardModel.from_adapter(path_or_repo, **load_kwargs)
        reward.contract.check(VocabularyContract.from_tokenizer(unwrap_tokenizer(tokenizer)))
        return cls(reward.network, tokenizer, strength=strength, attention_mask=attention_mask)
