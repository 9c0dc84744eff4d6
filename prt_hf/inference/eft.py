"""Emulated fine-tuning inside `generate(logits_processor=[...])`, on the machinery of rewards."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..networks.anatomy import contract_of
from ..reward.finetuned import check_finetuned, pretrained_of
from ..reward.model import RewardModel, Term
from ..vocabulary import OTHER, VocabularyContract
from .logits_processor import TermProcessor, checked_tokenizer, view_across


class EFTLogitsProcessor(TermProcessor):
    r"""Emulated fine-tuning / proxy-tuning, the baseline with three models (Mitchell et al. 2024; Liu et al. 2024).

    log pi_new + strength * (log pi_ft_old - log pi_pt_old), normalised: the terms (finetuned, -pretrained). Any LoRA on
    the Hub can be carried over in this way, without training: [`from_adapter`].

    Args:
        finetuned (`PeftModel` or `PreTrainedModel`): pi_ft_old. With a `PeftModel`, the adapter on and off are two rows
            of one pass; two passes if it is not a plain LoRA.
        tokenizer: the backbone's.
        pretrained (`PreTrainedModel`, *optional*): pi_pt_old; needed unless `finetuned` is a `PeftModel` that leaves
            its base as it was.
        strength, attention_mask, token_map, across_vocabularies, lookahead: as for [`PRTLogitsProcessor`].
        source_tokenizer (*optional*): the tokenizer of the two old models; by default the backbone's.

    Raises:
        VocabularyMismatchError: one of the models has no logit for some of its tokens, or the vocabularies do not fit.
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
        token_map: Mapping[str, str] | None = None,
        source_tokenizer: PreTrainedTokenizerBase | None = None,
        across_vocabularies: bool = False,
        lookahead: int = 8,
    ):
        check_finetuned(finetuned)
        pretrained = pretrained_of(finetuned) if pretrained is None else pretrained
        tokenizer = checked_tokenizer(tokenizer)
        source_tokenizer = tokenizer if source_tokenizer is None else checked_tokenizer(source_tokenizer)
        contract, _ = (contract_of(network, source_tokenizer) for network in (finetuned, pretrained))
        theirs = VocabularyContract.from_tokenizer(tokenizer)
        match = contract.check(
            theirs, token_map=token_map, tokenizer=source_tokenizer, across_vocabularies=across_vocabularies
        )
        terms, across = (Term(finetuned), Term(pretrained, -1.0)), None
        if match.kind == OTHER:
            tokenizers = source_tokenizer, tokenizer
            across = view_across(contract, theirs, tokenizers, terms, pretrained, token_map, lookahead)
        super().__init__(terms, match, theirs, tokenizer, strength, attention_mask, across=across)

    @classmethod
    def from_adapter(
        cls,
        path_or_repo: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        *,
        strength: float | torch.Tensor | list[float] = 1.0,
        attention_mask: torch.LongTensor | None = None,
        token_map: Mapping[str, str] | None = None,
        across_vocabularies: bool = False,
        **load_kwargs,
    ) -> "EFTLogitsProcessor":
        """Carry an ordinary PEFT adapter of a language model over to a backbone.

        Args:
            path_or_repo: folder or repository id of a LoRA or another adapter of layers; its base is loaded as
                `adapter_config.json` names it.
            tokenizer: the backbone's.
            strength: as for [`PRTLogitsProcessor`].
            attention_mask: as for [`PRTLogitsProcessor`].
            token_map: as for [`PRTLogitsProcessor`].
            across_vocabularies: as for [`PRTLogitsProcessor`].
            **load_kwargs: for [`RewardModel.from_adapter`]: `base_model`, `revision`, `token`, `subfolder`, `dtype`,
                ...

        Raises:
            VocabularyMismatchError: the tokenizer has another vocabulary than the adapter's.
            PRTError: as raised by [`RewardModel.from_adapter`].
        """
        reward = RewardModel.from_adapter(path_or_repo, **load_kwargs)
        return cls(
            reward.network,
            tokenizer,
            strength=strength,
            attention_mask=attention_mask,
            token_map=token_map,
            source_tokenizer=reward.processing_class,
            across_vocabularies=across_vocabularies,
        )
