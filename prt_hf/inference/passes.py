"""The networks of a PRT model, and the fewest passes that read all of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from ..contract import TEXT_GENERATION, Match
from ..errors import UnsupportedError
from ..networks.adapters import bare_base
from ..networks.anatomy import check_length, context_length, pad_id, pretrained_parameters, unwrap_adapter
from ..networks.mixed_pass import MixedPass, Pass, can_mix
from ..reward.model import RewardModel
from ..vocabulary import VocabularyMatch
from ..vocabulary.translation import TranslatedRows


@dataclass(eq=False)
class Part:
    """One network of a PRT model: the backbone, or a term of a reward.

    Attributes:
        run ([`Pass`]): a pass of this network alone.
        columns (`slice`): the columns of its logits, without those that pad a vocabulary.
        reward (`int`, *optional*): index of the reward that it is a term of; None for the backbone.
        sign (`float`): the sign of the term.
        is_frozen (`bool`): a pretrained model without adapter: the backbone, or the base of an adapter.
        tokens ([`~prt_hf.vocabulary.VocabularyMatch`], *optional*): how its tokens differ from the backbone's.
    """

    run: Pass
    columns: slice
    reward: int | None = None
    sign: float = 1.0
    is_frozen: bool = False
    tokens: VocabularyMatch | None = None


def parts_of(
    backbone: PreTrainedModel, rewards: list[RewardModel], matches: list[Match], size: int | None
) -> list[Part]:
    """Return the backbone and the terms of all rewards as parts; rewards of another vocabulary are read in other ways.

    `size` is the number of the backbone's columns that stand for tokens; None for labels.
    """
    parts = [Part(Pass(backbone), slice(size), is_frozen=True)]
    for index, (reward, match) in enumerate(zip(rewards, matches, strict=True)):
        tokens = None if match.tokens is None or match.tokens.is_identical else match.tokens
        for term in reward.terms if not match.is_across else ():
            is_frozen = term.network is not reward.network
            parts.append(Part(Pass(term.network), reward.columns, index, term.sign, is_frozen, tokens))
    return parts


class PartsPass(NamedTuple):
    """One forward pass.

    Attributes:
        run ([`Pass`]): the pass.
        parts (`list[Part]`): the parts that its blocks of rows belong to, in order.
    """

    run: Pass
    parts: list[Part]

    @property
    def is_current(self) -> bool:
        """Whether the adapters that the pass mixes are still switched on."""
        return not isinstance(self.run, MixedPass) or self.run.is_current


def separate_passes(parts: Sequence[Part]) -> list[PartsPass]:
    """Return one pass for each part."""
    return [PartsPass(part.run, [part]) for part in parts]


def fewest_passes(parts: Sequence[Part]) -> list[PartsPass]:
    """Return passes in which adapters of one base are blocks of one pass, together with that base if it is a part.

    The first pass has the backbone's rows first.
    """
    groups: dict = {}
    for index, part in enumerate(parts):
        network = part.run.network
        is_shared = part.is_frozen or can_mix(network)
        key = (base_key(network), part.tokens and id(part.tokens)) if is_shared else index
        groups.setdefault(key, []).append(part)
    return [PartsPass(_pass_of(group), group) for group in groups.values()]


def _pass_of(group: list[Part]) -> Pass:
    if len(group) == 1:
        return group[0].run
    base = next((part.run.network for part in group if part.is_frozen), None) or bare_base(group[0].run.network)
    return MixedPass(base, [None if part.is_frozen else part.run.network for part in group])


def base_key(network: nn.Module) -> tuple:
    """Return a key that is equal for networks that run the very same pretrained weights in the same way."""
    model = unwrap_adapter(network)
    config = model.config.to_dict() | {"_attn": model.config._attn_implementation}
    for name in ("_name_or_path", "architectures", "transformers_version", "use_cache", "dtype"):
        config.pop(name, None)
    weights = sorted(value.data_ptr() for value in pretrained_parameters(network).values())
    return tuple(weights), json.dumps(config, sort_keys=True, default=str)


def translated(part: Part, inputs: dict, task: str) -> tuple[dict, TranslatedRows | None]:
    """Return a network's own inputs, and the rows if they have other lengths than the backbone's.

    Raises:
        UnsupportedError: several documents in one row, with a token that the reward does not know.
        ContextLengthError: the translated text is longer than the network can read.
    """
    if part.tokens is None or "input_ids" not in inputs:
        return inputs, None
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    is_usual = mask is None or (mask.ndim == 2 and mask.shape == ids.shape)
    pad = pad_id(part.run.model)
    found = part.tokens.to_reward.one_to_one(ids, mask if is_usual else None)
    if found is not None:
        if mask is not None and is_usual:
            found = found.masked_fill(mask.to(found.device) == 0, pad)
        return inputs | {"input_ids": found}, None
    given = dict(inputs)
    positions = given.pop("position_ids", None)
    if positions is not None:
        usual = (torch.ones_like(ids) if mask is None else mask).cumsum(1).sub(1).clamp(min=0)
        if not is_usual or not torch.equal(positions.expand_as(usual), usual):
            raise UnsupportedError(
                "A row of several documents holds a token that the reward does not know.",
                expected="one document in each row, or tokens that both vocabularies have",
                found="`position_ids` that start anew",
            )
    if not is_usual:
        raise UnsupportedError(
            "The mask does not say which tokens a reward of another vocabulary may read.",
            expected=f"a mask of the shape of the tokens, {tuple(ids.shape)}",
            found=str(tuple(mask.shape)),
        )
    rows = part.tokens.to_reward.rows(ids, mask)
    check_length(rows.input_ids.shape[1], context_length(part.run.model))
    given["input_ids"] = rows.input_ids.masked_fill(rows.attention_mask == 0, pad)
    given["attention_mask"] = rows.attention_mask
    if given.get("token_type_ids") is not None:
        given["token_type_ids"] = given["token_type_ids"].gather(1, rows.sources)
    if task != TEXT_GENERATION:
        return given, None
    given.pop("logits_to_keep", None)
    return given, rows
