"""Reward logits inside `generate(logits_processor=[...])`."""

import copy
from abc import abstractmethod
from pathlib import Path

import torch
from peft import PeftModel
from transformers import CompileConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..contract import VocabularyContract, unwrap_tokenizer
from ..errors import PRTValueError, UnsupportedError
from ..functional import as_strength, combine, strength_of_rows
from ..networks.adapter_config import changes_base, check_is_of_layers
from ..networks.anatomy import contract_of, unwrap_adapter
from ..networks.auto import load_base
from ..networks.mixed_pass import can_mix, lock_of
from ..reward.model import RewardModel
from .difference import DifferenceState
from .state import RewardState

logger = logging.get_logger(__name__)


class _Masked:
    """A mask, and the prompts that it was first used for."""

    def __init__(self, mask: torch.LongTensor | None):
        self.mask, self.prompts = mask, None


class _RewardProcessor(LogitsProcessor):
    """Adds `strength * _rewards(rows, mask)` to the backbone's log-probabilities and normalises."""

    # Continuous batching hands over single tokens, and reward caches know rows by their content.
    supports_continuous_batching = False

    def __init__(self, contract, tokenizer, strength, attention_mask):
        self._tokenizer = unwrap_tokenizer(tokenizer)
        if self._tokenizer is None:
            raise PRTValueError(
                "A logits processor needs the backbone's tokenizer, which tells its vocabulary.",
                expected="a transformers tokenizer",
                found=type(tokenizer).__name__,
            )
        if not isinstance(contract, VocabularyContract):
            raise PRTValueError(
                "Only rewards over a vocabulary take part in `generate`.",
                expected="a reward tuned from a causal language model",
                found=f"a reward over {contract.kind}",
                remedy="add a classifier's reward with `prt_hf.functional.combine`",
            )
        contract.check(VocabularyContract.from_tokenizer(self._tokenizer))
        self._contract = contract
        self.strength = strength
        self.attention_mask = attention_mask
        self._warned_of_padding = False

    @property
    def strength(self) -> float | torch.Tensor:
        """1 / lambda of Eq. 10; a number, or one per prompt."""
        return self._strength

    @strength.setter
    def strength(self, value):
        self._strength = as_strength(value)

    @property
    def attention_mask(self) -> torch.LongTensor | None:
        """`(batch_size, prompt_length)`, the mask given to `generate`; set it anew for other prompts."""
        return self._masked.mask

    @attention_mask.setter
    def attention_mask(self, mask):
        if mask is not None and mask.ndim != 2:
            raise PRTValueError(
                "`attention_mask` is not usable.",
                expected="shape (batch_size, prompt_length)",
                found=str(tuple(mask.shape)),
            )
        self._masked = _Masked(mask)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """
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
        rewards = self._rewards(input_ids, self._mask(input_ids))[:, :size].to(scores.device)
        strength = strength_of_rows(self.strength, len(scores))[:, None].to(scores.device)
        output = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        output[:, :size] = combine(scores[:, :size], rewards, strength)
        return output

    @abstractmethod
    def reset(self) -> None:
        """Free the caches. Of themselves, they follow the prompts, and the weights and adapters as far as
        [`~prt_hf.inference.versions.Versions`] tells."""

    @abstractmethod
    def _rewards(self, input_ids, attention_mask) -> torch.Tensor:
        """r(x, .) of shape `(batch_size, at least contract.size)`."""

    def _mask(self, input_ids):
        masked = self._masked
        mask = self._inferred_mask(input_ids) if masked.mask is None else self._extended_mask(masked, input_ids)
        return None if mask is None or bool(mask.all()) else mask

    def _extended_mask(self, masked, input_ids):
        """The prompts' mask for every row that `generate` made of them, with ones for what was generated."""
        mask = masked.mask.to(input_ids.device)
        rows, (prompts, length) = len(input_ids), mask.shape
        is_fitting = rows % prompts == 0 and input_ids.shape[1] >= length
        if is_fitting:
            copies = rows // prompts
            start = input_ids[:, :length]
            if masked.prompts is None and input_ids.shape[1] == length:  # else of a text begun under another mask
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

    def _inferred_mask(self, input_ids):
        """Left padding: the run of pad tokens that a row starts with."""
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


class PRTLogitsProcessor(_RewardProcessor):
    r"""Portable Reward Tuning at inference (Eq. 10, Algorithm 2): log pi_pt + strength * r_theta, normalised.

    Exactly what a full recomputation of the reward gives, in every mode of `generate`: greedy, sampling, beams,
    `num_return_sequences`, left padding, assisted decoding, prompt lookup. The reward's KV cache follows the rows by
    their content, so one object may be used again, for other prompts and batch sizes, and by several threads at once,
    which take turns at the reward. `strength` and `attention_mask` hold for all of them.

    Args:
        reward ([`RewardModel`]): on any device, in any precision. Several rewards are several processors, in any order:
            each normalises, and what it takes off a row does not change what the next gives.
        tokenizer: the backbone's; must have the reward's vocabulary.
        strength (`float`, or one per prompt, *optional*): 1 / lambda; by default the one that the reward was tuned
            with, 1 in the paper. Below 0, what the reward was tuned for is taken away.
        attention_mask (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*): the mask given to
            `generate`. By default left padding is inferred from the tokenizer's pad token.
        source_backbone (`PreTrainedModel`, *optional*): drafts for [`~prt_hf.speculative_decoding`] with a full reward;
            by default loaded as `prt_config.json` names it. The source backbone of an adapter is its own base.
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
        super().__init__(
            reward.contract, tokenizer, reward.config.strength if strength is None else strength, attention_mask
        )
        self.reward = reward
        network = reward.network.eval()
        if not reward.config.minus_base:
            self._state = RewardState(network, compile_config=compile_config)
        elif compile_config is None:
            self._state = DifferenceState(network)
        else:
            raise UnsupportedError(
                "The step of an adapter that was carried over cannot be compiled.",
                expected="a reward of one network",
                found="log pi_ft - log pi_pt, of two",
                remedy="leave `compile_config` out, or distil it into a reward",
            )
        self._source_backbone = source_backbone
        self._drafting: tuple[RewardState, RewardState] | None = None  # of rewards and source

    def reset(self) -> None:
        for state in (self._state, *(self._drafting or ())):
            state.reset()

    def drafter(self) -> "PRTLogitsProcessor":
        """Return this processor able to give `source_logits`: of an adapter, in the pass that gives its rewards.

        It is another object, since this one may be at work in other threads; the caches are kept from call to call.
        """
        network = self.reward.network
        with lock_of(unwrap_adapter(network)):
            is_mixed = can_mix(network)
            if self._drafting is None or self._is_mixed != is_mixed:
                self._drafting, self._is_mixed = self._draft_states(is_mixed), is_mixed
            drafter = copy.copy(self)
        drafter._state = drafter._drafting[0]
        return drafter

    def _draft_states(self, is_mixed: bool) -> tuple[RewardState, RewardState]:
        network, config = self.reward.network, self.reward.config
        if config.minus_base:
            return self._state, self._state
        if is_mixed:
            return (RewardState(network, of="both"),) * 2
        if config.is_adapter:
            return self._state, RewardState(network, of="base")
        source = self._source_backbone
        if source is None:
            source = load_base(config.sources[0], dtype=self.reward.dtype)
        return self._state, RewardState(source.to(self.reward.device).eval())

    def source_logits(self, input_ids: torch.LongTensor) -> torch.FloatTensor:
        """The source backbone's logits for the tokens after `input_ids`, `(batch_size, contract.size)`."""
        logits = self._drafting[1].blocks(input_ids, self._mask(input_ids))[-1]
        return logits[:, : self._contract.size].float()

    def _rewards(self, input_ids, attention_mask):
        return self._state(input_ids, attention_mask)


class EFTLogitsProcessor(_RewardProcessor):
    r"""Emulated fine-tuning / proxy-tuning, the baseline with three models (Mitchell et al. 2024; Liu et al. 2024).

    log pi_new + strength * (log pi_ft_old - log pi_pt_old), normalised. Any LoRA of the Hub is carried over so, without
    training: [`from_adapter`].

    Args:
        finetuned (`PeftModel` or `PreTrainedModel`): pi_ft_old. Of a `PeftModel`, the adapter on and off are two rows
            of one pass; two passes where it is no plain LoRA.
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
        if pretrained is None and not isinstance(finetuned, PeftModel):
            raise PRTValueError(
                "EFT needs the old model before and after fine-tuning.",
                expected="`pretrained=`, or a PeftModel whose adapter can be switched off",
                found=type(finetuned).__name__,
            )
        for peft_config in finetuned.peft_config.values() if isinstance(finetuned, PeftModel) else ():
            check_is_of_layers(peft_config)
            if pretrained is None and changes_base(peft_config):
                raise UnsupportedError(
                    "The adapter has changed its base, which is not the old model any more without it.",
                    expected="`pretrained=`, or an adapter beside its base (LoRA with bias='none')",
                    found=", ".join(
                        f"{name}={getattr(peft_config, name, None)!r}"
                        for name in ("bias", "init_lora_weights", "layer_replication")
                    ),
                    remedy="pretrained=AutoModelForCausalLM.from_pretrained(...)",
                )
        super().__init__(contract_of(finetuned, tokenizer), tokenizer, strength, attention_mask)
        if pretrained is not None:
            contract_of(pretrained, tokenizer)
        self._state = DifferenceState(finetuned.eval(), None if pretrained is None else pretrained.eval())

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
            path_or_repo: folder, or repository id, of a LoRA or another adapter of layers; its base is loaded as
                `adapter_config.json` names it.
            tokenizer: the backbone's.
            strength, attention_mask: as for [`PRTLogitsProcessor`].
            load_kwargs: of [`RewardModel.from_adapter`]: `base_model`, `revision`, `token`, `subfolder`, `dtype`, ...

        Raises:
            VocabularyMismatchError: the tokenizer is another one than the adapter's.
            Those of [`RewardModel.from_adapter`].
        """
        reward = RewardModel.from_adapter(path_or_repo, **load_kwargs)
        reward.contract.check(VocabularyContract.from_tokenizer(unwrap_tokenizer(tokenizer)))
        return cls(reward.network, tokenizer, strength=strength, attention_mask=attention_mask)

    def reset(self) -> None:
        self._state.reset()

    def _rewards(self, input_ids, attention_mask):
        return self._state(input_ids, attention_mask)
