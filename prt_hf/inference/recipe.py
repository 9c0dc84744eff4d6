"""The recipe of a PRT model: which backbone, which rewards, how strong. Its `config.json`; no backbone weights."""

import os
import shutil
from collections.abc import Sequence
from functools import partial
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from ..contract import PRT_CONFIG_NAME, ModelReference, RewardConfig
from ..errors import RewardFileError
from ..hub.card import PRT_CLASSES, render_recipe_card
from ..hub.client import Branch, local_folder
from ..hub.folder import (
    ADAPTER_CONFIG,
    RECIPE,
    RECIPE_TYPE,
    check_files,
    check_unclaimed,
    folder_to_read,
    is_reward_folder,
    known_files,
    link_or_copy,
    reward_digest,
    reward_folders,
)
from ..hub.publishing import check_pushed, publish, reward_files_to_push, warn_of_local_base
from ..networks.adapter_config import read_peft_config
from ..networks.auto import load_base, load_pretrained
from ..networks.checkpoints import check_counts
from ..networks.identity import reference_to
from ..reward.loading import read_ordinary_adapter
from ..reward.model import RewardModel

logger = logging.get_logger(__name__)

RECIPE_VERSION = "1.0"
_MOST_REWARDS = 256  # each is loaded, and may bring a base of its own
_BACKBONE_ENTRY = dict.fromkeys(("id", "revision", "architecture", "weights"), str | None)
_REWARD_ENTRY = dict.fromkeys(("id", "revision", "digest", "folder"), str | None) | {"strength": Real}


class PRTModelConfig(PreTrainedConfig):
    """Configuration of a PRT model. What it does not say itself (sizes, special tokens, ...) is the backbone's.

    Args:
        backbone_reference (`dict`): id, revision, architecture and weight fingerprint of the backbone.
        backbone_config (`PreTrainedConfig` or `dict`): the backbone's own configuration.
        reward_references (`list[dict]`): for each reward its `strength`, the SHA-256 `digest` of its files
            ([`~prt_hf.hub.folder.reward_digest`]), and where it lies: `id` and `revision` on the Hub, or a `folder`
            beside this file.
        reward_configs (`list`): configurations of the rewards' networks.
        vocab_size (`int`, *optional*): tokens of the vocabulary, without the rows that pad the models' heads.

    Raises:
        RewardFileError: written by a newer major version, or malformed.
    """

    model_type = RECIPE_TYPE
    auto_map = {}  # the backbone's would make the Auto classes load its code in the place of this model

    recipe_version: str = RECIPE_VERSION
    backbone_reference: dict | None = None
    backbone_config: PreTrainedConfig | dict | None = None
    reward_references: list | None = None
    reward_configs: list | None = None
    vocab_size: int | None = None
    tie_word_embeddings: bool = False  # of this model's own heads, which it has not

    def __post_init__(self, **kwargs):
        check_counts(kwargs, "the recipe", RewardFileError)
        _check_version(self.recipe_version)
        _check_entries(self)
        self.reward_references = self.reward_references or []
        # Set last: PreTrainedConfig would take the backbone's settings for this model's own.
        backbone_config, self.backbone_config = self.backbone_config, None
        super().__post_init__(**kwargs)
        self.backbone_config = _as_config(backbone_config)
        self.reward_configs = [_as_config(config) for config in self.reward_configs or []]
        if self.backbone_config is not None:
            self.id2label, self.label2id = self.backbone_config.id2label, self.backbone_config.label2id
            self.problem_type = self.backbone_config.problem_type
            if self.vocab_size is None:
                self.vocab_size = getattr(self.backbone_config.get_text_config(), "vocab_size", None)

    def __getattr__(self, name):
        config = self.__dict__.get("backbone_config")
        if name.startswith("_") or not isinstance(config, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(config.get_text_config(), name)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {
            "backbone_config": self.backbone_config and self.backbone_config.to_dict(),
            "reward_configs": [config.to_dict() for config in self.reward_configs],
        }

    def to_diff_dict(self) -> dict[str, Any]:
        entries = self.to_dict()
        entries.pop("_name_or_path", None)  # where this recipe was read from
        return entries


def check_complete(config: PRTModelConfig) -> None:
    """Check that a recipe says where all its parts are.

    Raises:
        RewardFileError: it does not, or names more rewards than anybody adds up.
    """
    rewards = config.reward_references
    if rewards and len(rewards) > _MOST_REWARDS:
        raise RewardFileError(
            "The recipe names too many rewards.", expected=f"at most {_MOST_REWARDS}", found=str(len(rewards))
        )
    if not rewards or not all(_REWARD_ENTRY.keys() <= entry.keys() for entry in rewards):
        raise RewardFileError(
            "The recipe is incomplete.",
            expected=f"`reward_references`: one reward or more, each with {', '.join(_REWARD_ENTRY)}",
            found=str(rewards)[:200],
            remedy="save or download the recipe again",
        )


def reward_folder(folder: Path, entry: dict) -> Path:
    """Where a reward that was saved beside its recipe lies.

    Raises:
        RewardFileError: it is gone, or would be outside of the recipe's folder.
    """
    name = entry["folder"]
    if not is_reward_folder(name):
        raise RewardFileError(
            "The recipe's reward is not where rewards are saved.",
            expected="a folder reward-0, reward-1, ... beside the recipe",
            found=repr(name),
            remedy="save or download the recipe again",
        )
    path = folder / name
    if not path.is_dir() or path.is_symlink():
        raise RewardFileError(
            "The recipe's reward is gone.",
            expected=f"a folder {name} in {folder}",
            found=", ".join(sorted(item.name for item in folder.iterdir() if item.is_dir())) or "no folders",
            remedy="save or download the recipe again",
        )
    return path


def recipe_card(config: PRTModelConfig, name: str) -> str:
    """The card of a recipe; `name` is where its lines load it from."""
    rewards = [(entry["id"] or entry["folder"], entry["strength"]) for entry in config.reward_references]
    task = next(task for task, name in PRT_CLASSES.items() if name in config.architectures)
    return render_recipe_card(name, task, ModelReference(**config.backbone_reference or {}), rewards)


def recipe_files_to_push(folder: Path, include: Sequence[str] = ()) -> list[str]:
    """Return the names of the files of a saved recipe that [`push_recipe`] pushes.

    Args:
        include: of further files.

    Raises:
        RewardFileError: it is not whole, or one of the files is a link.
    """
    config = PRTModelConfig.from_pretrained(folder)
    check_complete(config)
    names = [name for name in known_files(folder) if not name.endswith(".safetensors")]
    for entry in config.reward_references:
        if entry["id"] is None:
            place = reward_folder(folder, entry)
            names += [f"{place.name}/{name}" for name in reward_files_to_push(place)]
    return check_pushed(folder, [*names, *include])


def push_recipe(folder: str | Path, repo_id: str, include: Sequence[str] = (), **where) -> CommitInfo:
    """Push the recipe that was saved in a folder, without loading its models.

    Args:
        include: names of further files of the folder.
        where: `private`, `revision`, `commit_message`, `token`, `create_pr`, as of [`Shareable.push_to_hub`].

    Raises:
        RewardFileError: the folder holds no whole recipe, or the repository something else.
    """
    folder = folder_to_read(Path(folder))
    names = recipe_files_to_push(folder, include)
    config = PRTModelConfig.from_pretrained(folder)
    places = [reward_folder(folder, entry) for entry in config.reward_references if entry["id"] is None]
    warn_of_local_base(ModelReference(**config.backbone_reference or {}), "backbone=")

    def replaced(branch: Branch) -> list[str]:
        named = reward_folders(branch.read(CONFIG_NAME))
        there = {name.partition("/")[0] for name in branch.files if "/" in name}
        check_unclaimed(branch.repo_id, ({place.name for place in places} & there) - named)
        return [f"{name}/{pattern}" for name in named for pattern in ("*", "*/*")]

    return publish(
        RECIPE,
        {name: folder / name for name in names},
        partial(recipe_card, config),
        folder,
        repo_id,
        replaced=replaced,
        **where,
    )


def load_reward(place: str | Path | RewardModel, bases: list[PreTrainedModel], load_kwargs: dict):
    """A reward, and where it lies on the Hub if it does; its base is taken from `bases`, or added to them.

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
    """Of an ordinary adapter: the one of `bases` that it names, else loaded and added; None where it names none."""
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


def place_of_reward(folder: Path, entry: dict, token: str | bool | None) -> Path:
    """Where a recipe's reward lies on this machine, fetched if it has to be.

    Raises:
        RewardFileError: the reward is gone, incomplete, or not the one that the recipe was written with.
    """
    if entry["id"] is None:
        place = reward_folder(folder, entry)
    else:
        place = local_folder(entry["id"], revision=entry["revision"], token=token)
    config = RewardConfig.from_json_file(place / PRT_CONFIG_NAME)
    check_files(place, config)
    found = reward_digest(place, config)
    if found != entry["digest"]:
        raise RewardFileError(
            "The recipe's reward has changed.",
            expected=f"files with SHA-256 {entry['digest']}",
            found=f"{found} in {place}",
            remedy="use that reward with `from_parts`, if it is what you want",
        )
    return place


def load_from_recipe(folder: Path, entry: dict, bases: list[PreTrainedModel], load_kwargs: dict):
    """
    Raises:
        RewardFileError: as of [`place_of_reward`].
    """
    place = place_of_reward(folder, entry, load_kwargs["token"])
    reward, _ = load_reward(place, bases, load_kwargs)
    return reward, None if entry["id"] is None else {name: entry[name] for name in ("id", "revision", "digest")}


def save_beside(reward: RewardModel, place: Path, earlier: Path, state_dict: dict | None) -> dict:
    """Save a reward into a folder of its own, and say so for the recipe. What else lies beside the reward that was
    saved there before, in `earlier`, is kept, and so is what users have written into its card."""
    if earlier.is_dir():
        shutil.copytree(earlier, place, symlinks=True, copy_function=link_or_copy)
    reward.save_pretrained(place, state_dict=state_dict)
    return {"id": None, "revision": None, "digest": reward_digest(place, reward.config), "folder": place.name}


def _check_entries(config: PRTModelConfig) -> None:
    def is_made_of(entry, types) -> bool:
        return isinstance(entry, dict) and all(
            name in types and isinstance(value, types[name]) and (types[name] is not Real or isfinite(value))
            for name, value in entry.items()
        )

    rewards, configs = config.reward_references or [], config.reward_configs or []
    parts = [config.backbone_config or {}, *(configs if isinstance(configs, list) else [None])]
    are_right = {
        "backbone_reference": is_made_of(config.backbone_reference or {}, _BACKBONE_ENTRY),
        "reward_references": isinstance(rewards, list) and all(is_made_of(entry, _REWARD_ENTRY) for entry in rewards),
        "backbone_config": isinstance(parts[0], dict | PreTrainedConfig),
        "reward_configs": all(isinstance(part, dict | PreTrainedConfig) for part in parts[1:]),
    }
    if wrong := [name for name, is_right in are_right.items() if not is_right]:
        raise RewardFileError(
            f"The recipe's {wrong[0]} cannot be read.",
            expected=f"the entries of a {RECIPE_VERSION} recipe",
            found=str(getattr(config, wrong[0]))[:200],
            remedy="save or download the recipe again",
        )


def _check_version(version: str) -> None:
    try:
        is_known = int(str(version).split(".")[0]) <= int(RECIPE_VERSION.split(".")[0])
    except ValueError:
        is_known = False
    if not is_known:
        raise RewardFileError(
            "The recipe was written by a newer prt_hf, or is none.",
            expected=f"recipe version {RECIPE_VERSION} or older",
            found=repr(version),
            remedy="pip install --upgrade prt_hf",
        )


def _as_config(config) -> PreTrainedConfig | None:
    if not isinstance(config, dict):
        return config
    entries = dict(config)
    model_type = entries.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise RewardFileError(
            "The recipe's models are not known to this transformers.",
            expected="a model_type of an installed or imported architecture",
            found=repr(model_type),
        )
    check_counts(entries, "the recipe", RewardFileError)
    return AutoConfig.for_model(model_type, **entries)
