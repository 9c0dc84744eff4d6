"""Where the networks of a served PRT model lie, checked as transformers' load of the recipe checks them."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import isfinite
from numbers import Real
from pathlib import Path

import torch
from safetensors import safe_open

from ..contract import PRT_CONFIG_NAME, TEXT_GENERATION, ModelReference, RewardConfig, VocabularyContract
from ..errors import PRTValueError, RewardFileError, UnsupportedError
from ..hub import local_folder
from ..loading import check_same_reference, load_processing_class
from ..pretrained import fingerprint_of, load_config, load_skeleton
from ..recipe import PRTModelConfig, check_complete, place_of_reward
from ..reward_files import check_files, recover


@dataclass(frozen=True)
class ServedReward:
    """
    Attributes:
        folder: of the reward, as [`RewardModel.save_pretrained`] writes it.
        network: folder whose `config.json` describes the network: its base's, or its own.
        strength: 1 / lambda, of requests that name none.
    """

    folder: str
    network: str
    is_adapter: bool
    strength: float


@dataclass(frozen=True)
class ServedParts:
    """
    Attributes:
        backbone: folder of the backbone.
        vocab_size: tokens of the contract, and of the PRT model; heads may be padded beyond it.
    """

    backbone: str
    rewards: list[ServedReward]
    vocab_size: int

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: dict) -> "ServedParts":
        return cls(**entries | {"rewards": [ServedReward(**reward) for reward in entries["rewards"]]})


def parts_of_recipe(
    folder: Path, config: PRTModelConfig, tokenizer: str, *, token: str | bool | None = None
) -> ServedParts:
    """
    Args:
        folder: of the recipe, with its `config`.
        tokenizer: folder or Hub id of the tokenizer that the engine uses.

    Raises:
        RewardFileError: incomplete, or a reward is gone or changed.
        BaseModelMismatchError: the backbone, or the base of a reward, is not what it was.
        VocabularyMismatchError: a reward was tuned with another vocabulary.
    """
    recover(folder)
    check_complete(config)
    backbone = _network_folder(ModelReference(**config.backbone_reference or {}), token)
    rewards = []
    for entry in config.reward_references:
        of_reward = place_of_reward(folder, entry, token)
        rewards.append((of_reward, RewardConfig.from_json_file(of_reward / PRT_CONFIG_NAME), entry["strength"]))
    return _checked(backbone, rewards, tokenizer, token)


def parts_by_name(
    backbone: str,
    rewards: list[str],
    strengths: list[float] | None,
    tokenizer: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ServedParts:
    """
    Args:
        backbone, rewards: folders or Hub ids.
        strengths: 1 / lambda of each reward, by default as it was tuned.

    Raises:
        PRTValueError: no rewards, or not one strength for each.
        RewardFileError: no reward there, or an incomplete one.
        BaseModelMismatchError, VocabularyMismatchError: as of [`parts_of_recipe`].
    """
    if not isinstance(rewards, list) or not rewards or not all(isinstance(place, str) for place in rewards):
        raise PRTValueError(
            "`prt_rewards` is not usable.", expected="a list with one folder or id or more", found=repr(rewards)
        )
    folders = [local_folder(place, token=token) for place in rewards]
    configs = [RewardConfig.from_json_file(folder / PRT_CONFIG_NAME) for folder in folders]
    if strengths is None:
        strengths = [config.strength for config in configs]
    if (
        not isinstance(strengths, list)
        or len(strengths) != len(rewards)
        or not all(isinstance(value, Real) and isfinite(value) for value in strengths)
    ):
        raise PRTValueError(
            "`prt_strengths` is not usable.",
            expected=f"{len(rewards)} finite numbers, one for each reward",
            found=str(strengths),
        )
    of_backbone = local_folder(backbone, revision=revision, token=token)
    return _checked(of_backbone, list(zip(folders, configs, strengths, strict=True)), tokenizer, token)


def _checked(
    backbone: Path, rewards: list[tuple[Path, RewardConfig, float]], tokenizer: str, token: str | bool | None
) -> ServedParts:
    served = []
    processing_class = load_processing_class(tokenizer, TEXT_GENERATION, token=token)
    if processing_class is None:
        raise PRTValueError("The vocabulary is told by the tokenizer.", expected="a tokenizer", found=tokenizer)
    of_tokenizer = VocabularyContract.from_tokenizer(processing_class)
    of_tokenizer.check_head(_vocab_size(backbone))
    for folder, config, strength in rewards:
        if config.task != TEXT_GENERATION:
            raise PRTValueError(
                "vLLM serves language models.", expected=f"a reward for {TEXT_GENERATION}", found=config.task
            )
        if config.minus_base:
            raise UnsupportedError(
                "A LoRA that is carried over needs its base beside it at every step, which the engine does not run.",
                expected="rewards that were tuned or distilled",
                found=str(folder),
                remedy="`prt-hf train --distill_from` makes a reward of it",
            )
        check_files(folder, config)
        network = _network_folder(config.reward_base, token) if config.is_adapter else folder
        config.contract.check(of_tokenizer)
        config.contract.check_head(_vocab_size(network), owner="reward")
        served.append(ServedReward(str(folder), str(network), config.is_adapter, float(strength)))
    return ServedParts(str(backbone), served, rewards[0][1].contract.size)


def _network_folder(reference: ModelReference, token: str | bool | None) -> Path:
    """Where a pretrained model that a file names lies, once its weights are checked against the fingerprint there.

    Raises:
        RewardFileError: it was made in memory and has no id.
        BaseModelMismatchError: what lies there is another model.
    """
    if reference.id is None:
        raise RewardFileError(
            "The pretrained model was made in memory and has no id to load it by.",
            expected="a model that was loaded from a folder or the Hub",
            found=str(reference),
            remedy="save it, load it from there, and put the PRT model together again",
        )
    folder = local_folder(reference.id, revision=reference.revision, token=token)
    found = ModelReference(
        reference.id,
        reference.revision,
        (load_config(str(folder)).architectures or [None])[0],
        _weights_fingerprint(folder),
    )
    check_same_reference(reference, found)
    return folder


def _weights_fingerprint(folder: Path) -> str | None:
    """As [`~prt_hf.pretrained.weights_fingerprint`] of the loaded model, of which it reads the samples only; None where
    the files hold the weights in another form than the model does."""
    skeleton = load_skeleton(str(folder))
    wanted = {name for name, _ in skeleton.named_parameters()}
    files = sorted(folder.glob("model*.safetensors"))
    try:
        found = {name: tensor for file in files for name, tensor in _tensors(file) if name in wanted}
    except OSError:
        return None
    return fingerprint_of(found.values()) if found.keys() == wanted else None


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Mapped into memory, of which only what is looked at is read."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)


def _vocab_size(folder: Path) -> int:
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
