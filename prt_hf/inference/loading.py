"""Load the parts of a PRT model: its backbone, and its rewards, on bases that they share."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging

from ..contract import PRT_CONFIG_NAME, RewardConfig
from ..errors import PRTValueError
from ..hub.client import local_folder
from ..hub.folder import ADAPTER_CONFIG, reward_digest
from ..networks.adapter_config import read_peft_config
from ..networks.adapters import check_bare
from ..networks.anatomy import task_of
from ..networks.auto import load_base, load_pretrained
from ..networks.identity import reference_to
from ..networks.quantization import is_quantized
from ..reward.loading import read_ordinary_adapter
from ..reward.model import RewardModel

logger = logging.get_logger(__name__)


def as_list(rewards: Any) -> list[str | Path | RewardModel]:
    """Return the rewards of a PRT model, one or several, as a list.

    Raises:
        PRTValueError: there are none, or one is neither a folder, nor an id, nor a [`RewardModel`].
    """
    rewards = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    if not rewards or not all(isinstance(reward, str | Path | RewardModel) for reward in rewards):
        raise PRTValueError(
            "`rewards` is not usable.",
            expected="one reward or more: folders, Hub ids, or rewards in memory (RewardModel)",
            found=", ".join(type(reward).__name__ for reward in rewards) or "none",
            remedy="save a PeftModel in memory, and name its folder: an ordinary LoRA is carried over",
        )
    return rewards


def load_backbone(
    backbone: str | Path | PreTrainedModel, quantization_config: Any, load_kwargs: dict
) -> PreTrainedModel:
    """Load a backbone, quantised if that is asked for; return one in memory as it is.

    Raises:
        PRTValueError: it is in memory, and to be quantised.
    """
    if isinstance(backbone, str | Path):
        return load_pretrained(str(backbone), quantization_config=quantization_config, **load_kwargs)
    if quantization_config is not None:
        raise PRTValueError(
            "A model in memory is not quantised.",
            expected="the backbone's id or path with `quantization_config`",
            found=type(backbone).__name__,
            remedy="pass `quantization_config` to its own `from_pretrained`",
        )
    return backbone


def load_rewards(
    places: Sequence[str | Path | RewardModel], backbone: PreTrainedModel, load_kwargs: dict
) -> list[tuple[RewardModel, dict | None]]:
    """Load rewards, and return each with its place on the Hub, if any.

    Their bases are loaded once, and not at all where the backbone is the base, unless that is quantised.
    """
    bases = [] if is_quantized(backbone) else [backbone]
    return [load_reward(place, bases, load_kwargs) for place in places]


def load_reward(
    place: str | Path | RewardModel, bases: list[PreTrainedModel], load_kwargs: dict
) -> tuple[RewardModel, dict | None]:
    """Load a reward, and return it with its place on the Hub, if any. Its base is taken from `bases`, or added to them.

    An ordinary adapter is carried over, and saved with the recipe: its own files do not pin the base.
    """
    if isinstance(place, RewardModel):
        return place, None
    folder = local_folder(place, token=load_kwargs.get("token"))
    if (folder / ADAPTER_CONFIG).exists() and not (folder / PRT_CONFIG_NAME).exists():
        logger.warning(f"{place} has no {PRT_CONFIG_NAME}: taken for an ordinary adapter, log pi_ft - log pi_pt.")
        base = _base_of_adapter(folder, bases, load_kwargs)
        return RewardModel.from_adapter(folder, base_model=base, **load_kwargs), None
    config = RewardConfig.from_json_file(folder / PRT_CONFIG_NAME)
    kwargs = load_kwargs
    if config.is_adapter:
        read_peft_config(folder, config.reward_base.id)  # before a base is loaded for it
        known = config.reward_base.weights
        base = next((base for base in bases if known and reference_to(base).weights == known), None)
        if base is None:
            base = load_base(config.reward_base, **load_kwargs)
            bases.append(base)
        kwargs = {"base_model": base}
    reward = RewardModel.from_pretrained(folder, **kwargs)
    if Path(place).is_dir():
        return reward, None
    return reward, {"id": str(place), "revision": folder.name, "digest": reward_digest(folder, config)}


def _base_of_adapter(folder: Path, bases: list[PreTrainedModel], load_kwargs: dict) -> PreTrainedModel | None:
    """Return the base that an ordinary adapter names, from `bases` or loaded and added; None if it names none."""
    peft_config = read_ordinary_adapter(folder)
    name, revision = peft_config.base_model_name_or_path, peft_config.revision
    if not name:
        return None
    for base in bases:
        found = reference_to(base)
        is_there = Path(name).is_dir() and found.id == os.path.abspath(name)
        if is_there or (found.id == name and revision in (None, found.revision)):
            return base
    kwargs = {key: value for key, value in load_kwargs.items() if key != "revision"}
    bases.append(load_pretrained(name, **kwargs | ({"revision": revision} if revision else {})))
    return bases[-1]


def check_parts(class_name: str, task: str, backbone: PreTrainedModel, rewards: list[RewardModel]) -> None:
    """Check that the backbone of a class of PRT models is a pretrained model of its task, and none of the rewards.

    Raises:
        PRTValueError: it is not.
    """
    check_bare(backbone)
    if task_of(backbone) != task:
        raise PRTValueError(
            f"{class_name} is for {task}.",
            expected=f"a backbone for {task}",
            found=task_of(backbone),
        )
    if any(reward.network is backbone for reward in rewards):
        raise PRTValueError(
            "A full reward and its backbone are one object, of which one is tuned and the other frozen.",
            expected="two models",
            remedy="load the backbone again, or copy.deepcopy it",
        )
