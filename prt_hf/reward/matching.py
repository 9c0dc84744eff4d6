"""Match a reward with a backbone: its columns with the backbone's, and the tokens of texts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..contract import IMAGE_CLASSIFICATION, LabelContract, Match, RewardConfig
from ..errors import PRTValueError
from ..hub.folder import RECIPE_TYPE
from ..networks.anatomy import contract_of, task_of
from ..networks.auto import processing_class_of
from ..vocabulary import VocabularyContract, VocabularyMatch, unwrap_tokenizer

logger = logging.get_logger(__name__)


class RewardOrder(NamedTuple):
    """Where a backbone's logits stand in the reward's order of tokens or labels.

    Attributes:
        columns (`slice` or `torch.LongTensor`): the backbone's column for each of the reward's.
        absent (`torch.LongTensor`, *optional*): the reward's columns that the backbone lacks, and therefore rules out.
    """

    columns: slice | torch.LongTensor
    absent: torch.LongTensor | None = None

    @classmethod
    def of(cls, match: Match, size: int | None) -> "RewardOrder":
        """Return the order of a match with a reward of `size` columns; None if all columns of its head are used."""
        if match.columns is None:
            return cls(slice(size))
        size = size or int(match.columns.max()) + 1
        places = torch.full((size,), -1)
        scored = (match.columns >= 0).nonzero()[:, 0]
        places[match.columns[scored]] = scored
        absent = (places < 0).nonzero()[:, 0]
        is_in_place = size <= len(match.columns) and bool(((places < 0) | (places == torch.arange(size))).all())
        return cls(slice(size) if is_in_place else places.clamp(min=0), absent if len(absent) else None)

    def take(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits in the reward's order, `(..., backbone columns)` -> `(..., reward columns)`."""
        columns = self.columns if isinstance(self.columns, slice) else self.columns.to(logits.device)
        found = logits[..., columns]
        return found if self.absent is None else found.index_fill(-1, self.absent.to(logits.device), -torch.inf)


def match_backbone(
    config: RewardConfig,
    reward_processing_class: Any,
    backbone: PreTrainedModel,
    processing_class: Any,
    token_map: Mapping[str, str] | None,
    label_map: Mapping[str, str] | None,
    allow_partial: bool,
    across_vocabularies: bool,
) -> Match:
    """Match a reward of this configuration and tokenizer with a backbone, as [`RewardModel.match_with`] does."""
    task = config.task
    if task_of(backbone) != task:
        raise PRTValueError("The backbone is made for another task.", expected=task, found=task_of(backbone))
    if processing_class is None:
        processing_class = processing_class_of(backbone, task)
    if processing_class is None and task != IMAGE_CLASSIFICATION:
        logger.warning("The backbone's tokenizer is not known; it is taken to be the reward's.")
        processing_class = reward_processing_class
    if isinstance(config.contract, VocabularyContract):
        theirs = contract_of(backbone, processing_class)
        tokenizer = unwrap_tokenizer(reward_processing_class)
        tokens = config.contract.check(theirs, token_map, tokenizer, across_vocabularies)
        return Match(tokens.columns, tokens)
    labels = config.contract.match(LabelContract.from_model_config(backbone.config), label_map, allow_partial)
    columns = None if labels == list(range(config.contract.size)) else torch.tensor(labels)
    if task == IMAGE_CLASSIFICATION:  # pixels may differ, see networks/pixels.py
        return Match(columns)
    return Match(columns, _match_texts(reward_processing_class, backbone, processing_class, token_map))


def tokenizer_of(backbone: PreTrainedModel, task: str, tokenizer: Any = None) -> Any:
    """Return the tokenizer of a backbone that will generate, by default the one saved with its weights.

    Raises:
        PRTValueError: the backbone has rewards of its own, or its tokenizer is not known.
        VocabularyMismatchError: its head does not belong to the tokenizer.
    """
    if backbone.config.model_type == RECIPE_TYPE:
        raise PRTValueError(
            "The backbone is a PRT model, which adds its rewards by itself.",
            expected="a pretrained model",
            found=type(backbone).__name__,
            remedy="PRTForCausalLM.from_parts(model.backbone, rewards=[*model.rewards, reward])",
        )
    if tokenizer is None:
        tokenizer = processing_class_of(backbone, task)
    if tokenizer is None:
        raise PRTValueError(
            "The backbone's tokenizer is not known.",
            expected="a backbone that was loaded with its tokenizer beside it, or `tokenizer=`",
            found=f"{type(backbone).__name__} from {backbone.name_or_path or 'memory'}",
        )
    contract_of(backbone, tokenizer)  # which checks that the two belong together
    return tokenizer


def _match_texts(
    reward_processing_class: Any, backbone: PreTrainedModel, processing_class: Any, token_map: Mapping[str, str] | None
) -> VocabularyMatch | None:
    """Match the tokens that two text classifiers read; None if one of the tokenizers is not known."""
    ours, theirs = unwrap_tokenizer(reward_processing_class), unwrap_tokenizer(processing_class)
    if ours is None or theirs is None:
        return None
    found = VocabularyContract.from_tokenizer(theirs)
    found.check_head(backbone.get_input_embeddings().weight.shape[0])
    return VocabularyContract.from_tokenizer(ours).check(found, token_map=token_map, tokenizer=ours)
