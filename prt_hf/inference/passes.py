"""The networks of a PRT model, and the fewest passes that read all of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..networks.adapters import bare_base
from ..networks.anatomy import pretrained_parameters, unwrap_adapter
from ..networks.mixed_pass import MixedPass, Pass, can_mix
from ..reward.model import RewardModel


@dataclass(eq=False)
class Part:
    """One network of a PRT model: the backbone, or a term of a reward.

    Attributes:
        run ([`Pass`]): a pass of this network alone.
        columns (`slice` or `list[int]`): the columns of its logits, in the order of the PRT model's.
        reward (`int`, *optional*): index of the reward that it is a term of; None for the backbone.
        sign (`float`): the sign of the term.
        is_frozen (`bool`): a pretrained model without adapter: the backbone, or the base of an adapter.
    """

    run: Pass
    columns: slice | list[int]
    reward: int | None = None
    sign: float = 1.0
    is_frozen: bool = False


def parts_of(backbone: PreTrainedModel, rewards: list[RewardModel], orders: list[slice | list[int]]) -> list[Part]:
    """Return the backbone and the terms of all rewards, with the rewards' columns in the backbone's order."""
    # Labels keep the backbone's order, vocabularies lose what pads its head.
    own = orders[0] if isinstance(orders[0], slice) else slice(None)
    parts = [Part(Pass(backbone), own, is_frozen=True)]
    for index, (reward, order) in enumerate(zip(rewards, orders, strict=True)):
        for term in reward.terms:
            is_frozen = term.network is not reward.network
            parts.append(Part(Pass(term.network), order, index, term.sign, is_frozen))
    return parts


class PartsPass(NamedTuple):
    """One forward pass.

    Attributes:
        run ([`Pass`]): the pass.
        parts (`list[Part]`): whose logits its blocks of rows are, in their order.
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
        key = base_key(network) if part.is_frozen or can_mix(network) else index
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
