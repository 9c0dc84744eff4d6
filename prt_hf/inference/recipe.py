"""Recipes: how a PRT model is written, read and pushed as the names of its parts; no backbone weights."""

import copy
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import CommitInfo
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from ..contract import PRT_CONFIG_NAME, ModelReference, RewardConfig
from ..errors import PRTValueError, RewardFileError, UnsupportedError
from ..functional import check_strengths
from ..hub.card import PRT_CLASSES, render_recipe_card
from ..hub.card_merge import read_card, write_card
from ..hub.client import Branch, local_folder
from ..hub.folder import (
    RECIPE,
    SAVED,
    check_files,
    check_unclaimed,
    folder_to_read,
    is_reward_folder,
    known_files,
    link_or_copy,
    replacing_files,
    reward_digest,
    reward_folders,
)
from ..hub.publishing import check_pushed, publish, reward_files_to_push, warn_of_local_base
from ..networks.auto import load_base, save_processing_class
from ..networks.checkpoints import check_attention, unreadable
from ..networks.identity import check_same_model, digest
from ..networks.quantization import is_quantized, not_installed
from ..reward.model import RewardModel
from .configuration import PRTModelConfig, check_complete
from .loading import load_backbone, load_rewards

if TYPE_CHECKING:
    from .prt_model import PRTPreTrainedModel

logger = logging.get_logger(__name__)


def reward_folder(folder: Path, entry: dict) -> Path:
    """Return the folder of a reward that was saved beside its recipe.

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
    """Return the card of a recipe; `name` is what its lines load it by."""
    rewards = [(entry["id"] or entry["folder"], entry["strength"]) for entry in config.reward_references]
    task = next(task for task, name in PRT_CLASSES.items() if name in config.architectures)
    return render_recipe_card(name, task, ModelReference(**config.backbone_reference or {}), rewards)


def recipe_files_to_push(folder: Path, config: PRTModelConfig, include: Sequence[str] = ()) -> list[str]:
    """Return the names of the files of a saved recipe that [`push_recipe`] pushes.

    Args:
        folder: of the recipe.
        config: its configuration.
        include: names of further files.

    Raises:
        RewardFileError: it is not whole, or one of the files is a link.
    """
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
        folder: of the recipe.
        repo_id: `"user/name"`; created if it does not exist.
        include: names of further files of the folder.
        **where: `private`, `revision`, `commit_message`, `token`, `create_pr`, as for [`Shareable.push_to_hub`].

    Raises:
        RewardFileError: the folder holds no whole recipe, or the repository something else.
    """
    folder = folder_to_read(Path(folder))
    config = PRTModelConfig.from_pretrained(folder)
    names = recipe_files_to_push(folder, config, include)
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


def place_of_reward(folder: Path, entry: dict, token: str | bool | None) -> Path:
    """Return the folder of a recipe's reward on this machine, and download it if needed.

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


def find_recipe(
    model_class: type[PreTrainedModel], place: str | Path, config: PreTrainedConfig | None, **where
) -> tuple[Path, PRTModelConfig]:
    """Return the folder of a recipe, on this machine, and its configuration.

    Args:
        model_class: that the recipe must be one of.
        place: folder or Hub id.
        config: what an Auto class has read of it already.
        **where: `revision` and `token` for the Hub.

    Raises:
        PRTValueError: no recipe of that class.
        RewardFileError: an incomplete one, or one of a newer version.
    """
    folder = local_folder(place, **where)
    # What a killed save left is newer than the configuration that the Auto classes have read.
    if folder.name == SAVED or not isinstance(config, PRTModelConfig):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(config, PRTModelConfig) or config.architectures != [model_class.__name__]:
        raise PRTValueError(
            f"{place} holds no recipe of a {model_class.__name__}.",
            expected=f"the recipe of a {model_class.__name__}",
            found=f"{config.model_type}: {config.architectures}",
        )
    check_complete(config)
    return folder, config


def load_parts(
    folder: Path, config: PRTModelConfig, backbone: str | Path | PreTrainedModel | None, **load_kwargs
) -> tuple[PreTrainedModel, list[tuple[RewardModel, dict | None]]]:
    """Load the backbone and the rewards of a recipe, these with their places on the Hub.

    Raises:
        BaseModelMismatchError: the backbone is not the recipe's any more.
        RewardFileError: as raised by [`place_of_reward`].
    """
    if config._attn_implementation and "attn_implementation" not in load_kwargs:
        check_attention(config.get_config_dict(folder)[0], folder, RewardFileError)
        load_kwargs["attn_implementation"] = config._attn_implementation  # moved there by the Auto classes
    reference = ModelReference(**config.backbone_reference or {})
    if "quantization_config" not in load_kwargs and not isinstance(backbone, PreTrainedModel):
        load_kwargs["quantization_config"] = _quantization_of(folder, config)
    quantization_config = load_kwargs.pop("quantization_config", None)
    if backbone is None:
        backbone = load_base(reference, quantization_config=quantization_config, **load_kwargs)
    else:
        backbone = load_backbone(backbone, quantization_config, load_kwargs)
        check_same_model(reference, backbone)
    entries = config.reward_references
    places = [place_of_reward(folder, entry, load_kwargs["token"]) for entry in entries]
    rewards = [reward for reward, _ in load_rewards(places, backbone, load_kwargs)]
    on_hub = [
        None if entry["id"] is None else {name: entry[name] for name in ("id", "revision", "digest")}
        for entry in entries
    ]
    return backbone, list(zip(rewards, on_hub, strict=True))


def _quantization_of(folder: Path, config: PRTModelConfig) -> Any:
    """Return how the recipe's backbone was quantised when it was loaded; None if it was not.

    Raises:
        RewardFileError: the entry cannot be read.
        UnsupportedError: the library that it needs is not installed.
    """
    entries = getattr(config.backbone_config, "quantization_config", None)
    if entries is None:
        return None
    try:
        return AutoQuantizationConfig.from_dict(dict(entries))
    except ImportError as error:
        raise not_installed("The recipe's backbone", error) from error
    except Exception as error:  # its classes raise errors of many kinds
        raise unreadable(folder / CONFIG_NAME, error) from error


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """Return the generation settings that are saved with a recipe; None if there are none.

    Raises:
        RewardFileError: they cannot be read.
    """
    if not (folder / GENERATION_CONFIG_NAME).exists():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # its class raises errors of many kinds
        raise unreadable(folder / GENERATION_CONFIG_NAME, error) from error


def write_recipe(model: "PRTPreTrainedModel", folder: Path, state_dict: dict[str, torch.Tensor] | None) -> None:
    """Write the recipe of a PRT model, see [`PRTPreTrainedModel.save_pretrained`].

    Raises:
        RewardFileError: the folder holds something else, or a `reward-0`, ... that is no part of the recipe there.
        UnsupportedError: the backbone was quantised by hand.
    """
    check_strengths(model.strengths, len(model.rewards))
    if is_quantized(model.backbone) and not hasattr(model.backbone.config, "quantization_config"):
        raise UnsupportedError(
            "The backbone was quantised by hand, which no recipe can repeat.",
            expected="a backbone that was loaded with `quantization_config`, or from a quantised checkpoint",
            found=type(model.backbone).__name__,
            remedy="from_parts(backbone_id, rewards, quantization_config=...)",
        )
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    changed = [i for i, reward in enumerate(model.rewards) if model.hub_digests.get(i) != digest(reward.network)]
    names = {index: f"reward-{index}" for index in changed}
    with replacing_files(folder, RECIPE, names.values()) as staged:
        for index, (reward, strength) in enumerate(zip(model.rewards, model.strengths, strict=True)):
            if model.is_tuned and strength > 0:
                source = ModelReference(**model.config.backbone_reference)
                reward.trained_with(source, kl_coef=1 / strength, entropy_coef=reward.config.entropy_coef)
            entry = model.config.reward_references[index]
            if name := names.get(index):
                prefix = f"reward_networks.{index}."
                state = state_dict and {
                    key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)
                }
                entry = save_beside(reward, staged / name, folder / name, state)
            config.reward_references[index] = entry | {"strength": float(strength)}
        save_processing_class(model.processing_class, staged)
        if model.can_generate():
            model.generation_config.save_pretrained(staged)
        if folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):  # a Trainer resumes from these, by their names
            save_file(model.tuned_state(state_dict), staged / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        card = recipe_card(config, folder.absolute().name)
        write_card(staged, card, read_card(folder))
        (staged / CONFIG_NAME).write_text(config.to_json_string(), encoding="utf-8")


def save_beside(reward: RewardModel, place: Path, earlier: Path, state_dict: dict | None) -> dict:
    """Save a reward into a folder of its own, and return its entry for the recipe.

    Other files beside the reward that was saved there before, in `earlier`, are kept, and so is what users have written
    into its card.
    """
    if earlier.is_dir():
        shutil.copytree(earlier, place, symlinks=True, copy_function=link_or_copy)
    reward.save_pretrained(place, state_dict=state_dict)
    return {"id": None, "revision": None, "digest": reward_digest(place, reward.config), "folder": place.name}
