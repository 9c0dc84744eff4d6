"""Reward logits inside `generate(logits_processor=[...])`."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import CompileConfig, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import PRTValueError, UnsupportedError
from ..functional import as_strength, combine, signed_sum, strength_of_rows
from ..networks.adapters import bare_base
from ..networks.anatomy import unwrap_adapter
from ..networks.auto import load_base, processing_class_of
from ..networks.mixed_pass import lock_of
from ..reward.model import RewardModel, Term
from ..vocabulary import MOVED, OTHER, VocabularyContract, VocabularyMatch, unwrap_tokenizer
from ..vocabulary.across import VocabularyMap
from .across import AcrossVocabularies
from .context import Prompt, RewardContext
from .terms import TermStates


class TermProcessor(LogitsProcessor):
    """Adds `strength * r` to the backbone's log-probabilities and normalises; r is the signed sum of terms."""

    # Continuous batching passes single tokens, and the reward's caches know rows by their content.
    supports_continuous_batching = False

    def __init__(
        self,
        terms: Sequence[Term],
        match: VocabularyMatch,
        contract: VocabularyContract,
        tokenizer: PreTrainedTokenizerBase,
        strength: float | torch.Tensor | list[float],
        attention_mask: torch.LongTensor | None,
        compile_config: CompileConfig | None = None,
        across: AcrossVocabularies | None = None,
    ):
        self._match, self._contract, self._across = match, contract, across
        self._context = RewardContext(tokenizer, match) if across is None else across.contexts
        self.tokenizer = tokenizer
        self._signs = [term.sign for term in terms]
        self._states = TermStates(*(term.network.eval() for term in terms), compile_config=compile_config)
        self.strength = strength
        self.attention_mask = attention_mask

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
        return self._context.attention_mask

    @attention_mask.setter
    def attention_mask(self, mask: torch.LongTensor | None) -> None:
        self._context.attention_mask = mask

    @property
    def prompt(self) -> torch.LongTensor | None:
        """The reward's own prompts, `(batch_size, length)`, in its tokenizer's tokens; None to read the backbone's.

        A reward that was tuned with another chat template reads what it knows, then what is generated, as the expert of
        proxy-tuning does. May be set to what the tokenizer returns; set it anew for other prompts.
        """
        return self._context.prompt

    @prompt.setter
    def prompt(self, prompt: Prompt | None) -> None:
        self._context.prompt = prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return log-probabilities of the backbone with the reward.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): prompt and generated tokens.
            scores (`torch.FloatTensor` of shape `(batch_size, backbone_vocab_size)`): the backbone's logits, or their
                log-softmax.

        Returns:
            `torch.FloatTensor` of the shape of `scores`: normalised log-probabilities (so beam scores are exact);
            `-inf` in columns that pad the vocabulary. Tokens that the reward does not know keep their probability, see
            [`~prt_hf.functional.combine`].

        Raises:
            VocabularyMismatchError: the tokenizer is not the backbone's.
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
        size, device = self._match.size, scores.device
        output = torch.full_like(scores, -torch.inf, dtype=torch.float32)
        if self._across is not None:
            rewards = self._across(input_ids, scores[:, :size], self.strength)
            output[:, :size] = combine(scores[:, :size], rewards, columns=self._across.columns_on(device))
            return output
        strength = strength_of_rows(self.strength, len(scores))[:, None].to(device)
        columns = self._match.columns_on(device)
        output[:, :size] = combine(scores[:, :size], self._rewards(input_ids).to(device), strength, columns)
        return output

    @property
    def vocabularies(self) -> VocabularyMap | None:
        """The map to a backbone with another vocabulary; None where the backbone has the reward's."""
        return None if self._across is None else self._across.vocabularies

    @property
    def tokens_computed(self) -> int:
        """Tokens that the source has read for a backbone with another vocabulary, over all calls."""
        return 0 if self._across is None else self._across.tokens_computed

    def score(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        positions: torch.LongTensor,
        scores: torch.Tensor,
    ) -> torch.Tensor:
        """Return log-probabilities at several positions of one text, for a reward of another vocabulary.

        Args:
            input_ids: `(sequence_length,)`.
            attention_mask: of the same shape, 0 at padding.
            positions: of the tokens after which they are wanted, `(n,)`, in ascending order.
            scores: the backbone's logits there, `(n, match.size)`.
        """
        rho = self._across.score(input_ids, attention_mask, positions, scores, self.strength)
        return combine(scores, rho, columns=self._across.columns_on(scores.device))

    def _rewards(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Return r for the tokens after each row, `(batch_size, reward_size)`."""
        rows = self._context.read(input_ids)
        logits = self._states(rows.input_ids, rows.attention_mask, slice(len(self._signs)))
        rewards = signed_sum(self._signs, [self._scored(each) for each in logits])
        if rows.is_empty is None:
            return rewards
        return rewards.masked_fill(rows.is_empty.to(rewards.device)[:, None], 0.0)

    def _scored(self, logits: torch.Tensor) -> torch.Tensor:
        """Cut off the columns that pad the reward's vocabulary."""
        return logits[:, : self._match.reward_size].float()

    def reset(self) -> None:
        """Free the caches.

        They follow the prompts by themselves, and the weights and adapters as far as
        [`~prt_hf.inference.versions.Versions`] sees changes.
        """
        self._states.reset()
        if self._across is not None:
            self._across.reset()


def view_across(
    contract: VocabularyContract,
    backbone: VocabularyContract,
    tokenizers: tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase],
    terms: Sequence[Term],
    untuned: PreTrainedModel,
    token_map: Mapping[str, str] | None,
    lookahead: int,
) -> AcrossVocabularies:
    """Return the view of a reward, or of an old model, from another vocabulary; tokenizers are its own, then that."""
    vocabularies = VocabularyMap.between(contract, backbone, *tokenizers, token_map)
    signs = [term.sign for term in terms]
    return AcrossVocabularies(vocabularies, signs, terms[0].network, untuned, lookahead)


def checked_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer that is given for a backbone."""
    tokenizer = unwrap_tokenizer(processing_class)
    if tokenizer is None:
        raise PRTValueError(
            "A logits processor needs the backbone's tokenizer, which defines the vocabulary.",
            expected="a transformers tokenizer",
            found=type(processing_class).__name__,
        )
    return tokenizer


class PRTLogitsProcessor(TermProcessor):
    r"""Portable Reward Tuning at inference (Eq. 10, Algorithm 2): log pi_pt + strength * r_theta, normalised.

    It equals a full recomputation of the reward in every mode of `generate`: greedy, sampling, beams,
    `num_return_sequences`, left padding, assisted decoding, prompt lookup. The reward's KV cache follows the rows by
    their content, so one object may be used again, for other prompts and batch sizes, and by several threads at once,
    which take turns at the reward. `strength` and `attention_mask` hold for all of them.

    Args:
        reward ([`RewardModel`]): on any device, in any precision. Several rewards are several processors. Their order
            matters only for tokens that are neutral to one of them, and across vocabularies.
        tokenizer: the backbone's own, whose vocabulary is the reward's or an update of it.
            [`RewardModel.processor`] finds it.
        strength (`float`, or one per prompt, *optional*): 1 / lambda; by default the one that the reward was tuned
            with, 1 in the paper. Below 0, the tuned behaviour is subtracted.
        attention_mask (`torch.LongTensor` of shape `(batch_size, prompt_length)`, *optional*): the mask given to
            `generate`. By default left padding is inferred from the tokenizer's pad token.
        token_map (`dict[str, str]`, *optional*): the backbone's tokens -> the reward's tokens that they stand for,
            where names and roles do not tell: `{"<|im_end|>": "<|eot_id|>"}`.
        source_backbone (`PreTrainedModel`, *optional*): drafts for [`~prt_hf.speculative_decoding`] with a full reward;
            by default loaded as `prt_config.json` names it. An adapter drafts with its own base.
        compile_config (`CompileConfig`, *optional*): compile the reward's step, for GPUs on which a small network waits
            for its launches; `CompileConfig()` uses CUDA graphs.
        across_vocabularies (`bool`): accept a tokenizer of another vocabulary, see [`~prt_hf.inference.across`]. It
            changes nothing where the vocabulary is the reward's or an update of it.
        lookahead (`int`): rows of a further pass of the reward at each step, at most, for tokens of another vocabulary
            that are several of the reward's; 0 for none.

    Attributes:
        match ([`~prt_hf.vocabulary.VocabularyMatch`]): of the two vocabularies.

    Raises:
        VocabularyMismatchError: the tokenizer has another vocabulary than the reward, and no update of it.
        UnsupportedError: with `across_vocabularies`, a tokenizer that is slow or changes texts, or a recurrent source.
        PRTValueError: `token_map` names unknown tokens, or maps two onto one; or the reward is on the device `meta`.

    Example:

    ```python
    reward = RewardModel.from_pretrained("me/gsm8k-reward")
    backbone.generate(**inputs, logits_processor=[reward.processor(backbone)])
    ```
    """

    def __init__(
        self,
        reward: RewardModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        strength: float | torch.Tensor | list[float] | None = None,
        attention_mask: torch.LongTensor | None = None,
        token_map: Mapping[str, str] | None = None,
        source_backbone: PreTrainedModel | None = None,
        compile_config: CompileConfig | None = None,
        across_vocabularies: bool = False,
        lookahead: int = 8,
    ):
        if not isinstance(reward, RewardModel):
            raise PRTValueError(
                "`reward` is no reward model.",
                expected="a RewardModel",
                found=type(reward).__name__,
                remedy="RewardModel.from_pretrained(...)",
            )
        if reward.device.type == "meta" and not hasattr(unwrap_adapter(reward.network), "_hf_hook"):  # not offloaded
            raise PRTValueError(
                "The reward has no weights.",
                expected="a device that holds them",
                found="meta",
                remedy="load it again, without the device `meta`",
            )
        tokenizer, contract = checked_tokenizer(tokenizer), reward.contract
        if not isinstance(contract, VocabularyContract):
            raise PRTValueError(
                "Only rewards over a vocabulary work in `generate`.",
                expected="a reward tuned from a causal language model",
                found=f"a reward over {contract.kind}",
                remedy="`PRTForSequenceClassification` or `PRTForImageClassification` adds a classifier's reward",
            )
        theirs = VocabularyContract.from_tokenizer(tokenizer)
        own_tokenizer = unwrap_tokenizer(reward.processing_class)
        match = contract.check(
            theirs, token_map=token_map, tokenizer=own_tokenizer, across_vocabularies=across_vocabularies
        )
        terms, across = reward.terms, None
        if match.kind == OTHER:
            untuned = terms[1].network if len(terms) > 1 else source_of(reward, source_backbone)
            across = view_across(contract, theirs, (own_tokenizer, tokenizer), terms, untuned, token_map, lookahead)
        if compile_config is not None and (len(terms) > 1 or across is not None):
            raise UnsupportedError(
                "The step of two networks cannot be compiled.",
                expected="a reward of one network, and a backbone with its vocabulary",
                found="a backbone with another vocabulary" if across is not None else "log pi_ft - log pi_pt",
                remedy="leave `compile_config` out",
            )
        strength = reward.config.strength if strength is None else strength
        super().__init__(terms, match, theirs, tokenizer, strength, attention_mask, compile_config, across)
        self.match = match
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
        if self._across is not None:
            raise UnsupportedError(
                "A reward with another vocabulary cannot draft for the backbone.",
                expected="a backbone with the reward's vocabulary, or an update of it",
                found=str(self._match),
                remedy="generate without speculation",
            )
        if len(self._signs) > 1:
            return self._states
        source = source_of(self.reward, self._source_backbone)
        return TermStates(self.reward.network, source, compile_config=self._compile_config)

    def source_logits(self, input_ids: torch.LongTensor) -> torch.FloatTensor:
        """Return the source backbone's logits for the tokens after `input_ids`, `(batch_size, match.size)`.

        Only a [`drafter`] has them. Tokens that the source backbone does not know are not drafted.
        """
        rows = self._context.read(input_ids)
        (logits,) = self._states(rows.input_ids, rows.attention_mask, slice(-1, None))
        logits, columns = self._scored(logits), self._match.columns_on(logits.device)
        return logits if columns is None else logits[:, columns.clamp(min=0)].masked_fill(columns < 0, -torch.inf)


def source_of(reward: RewardModel, source_backbone: PreTrainedModel | None = None) -> PreTrainedModel:
    """Return the pretrained model that a reward starts from, on the reward's device.

    Args:
        reward: an adapter has its own base; a full reward is not that model any more.
        source_backbone (*optional*): the model for a full reward; by default loaded as `prt_config.json` names it.

    Raises:
        UnsupportedError: the model has other token ids than the reward.
        PRTValueError: a full reward does not name its source backbone.
    """
    config = reward.config
    if config.is_adapter:
        source = bare_base(reward.network)
    elif source_backbone is None:
        source = load_base(config.sources[0], dtype=reward.dtype)
    else:
        source = source_backbone
    tokenizer = unwrap_tokenizer(processing_class_of(source, config.task))
    # Without a tokenizer its ids are taken to be the reward's.
    is_other = tokenizer is not None and (
        reward.contract.match(VocabularyContract.from_tokenizer(tokenizer)).kind in (MOVED, OTHER)
    )
    if is_other or source.get_input_embeddings().weight.shape[0] < reward.size:
        raise UnsupportedError(
            "The source backbone has other token ids than the reward.",
            expected="a source backbone that reads the reward's tokens",
            found=f"{type(source).__name__} from {source.name_or_path or 'memory'}",
            remedy="name one in `source_backbone=`",
        )
    return source.to(reward.device).eval()
