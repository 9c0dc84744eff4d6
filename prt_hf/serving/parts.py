"""Where the networks of a served PRT model lie, checked as transformers' load of the recipe checks them."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from math import isfinite
from numbers import Real
from pathlib import Path

import torch
from safetensors import safe_open

from ..contract import PRT_CONFIG_NAME, TEXT_GENERATION, ModelReference, RewardConfig, VocabularyContract
from ..errors import PRTValueError, RewardFileError, UnsupportedError
from ..hub.client import local_folder
from ..hub.folder import ADAPTER_CONFIG, check_files
from ..inference.recipe import PRTModelConfig, check_complete, place_of_reward
from ..networks.adapter_config import read_peft_config
from ..networks.auto import load_config, load_processing_class, load_skeleton
from ..networks.checkpoints import read_entries
from ..networks.identity import check_same_reference, fingerprint_of
from ..reward.full import check_full
from . import ADAPTER_BASE

ADAPTERS = "adapters"  # the network that requests' own reward adapters are put on


@dataclass(frozen=True)
class ServedReward:
    """
    Attributes:
        folder: of the reward, as [`RewardModel.save_pretrained`] writes it.
        network: folder whose `config.json` describes the network: its base's, or its own.
        strength: 1 / lambda, of requests that name none.
        minus_base: r is what the adapter adds to its base's logits, so that the base runs as well.
    """

    folder: str
    network: str
    is_adapter: bool
    strength: float
    minus_base: bool = False


@dataclass(frozen=True)
class PretrainedFolder:
    """
    Attributes:
        reference: to what lies there.
    """

    folder: str
    reference: ModelReference


@dataclass(frozen=True)
class ServedNetwork:
    """
    Attributes:
        folder: of its `config.json`, and of its weights if it is not adapted.
        is_adapted: its head has weights of its own, those of the embeddings with an adapter's added to them.
        merged: the reward whose adapter that is; None where requests name theirs.
    """

    folder: str
    is_adapted: bool
    merged: ServedReward | None = None


@dataclass(frozen=True)
class ServedParts:
    """
    Attributes:
        backbone: folder of the backbone.
        contract: of the tokenizer, without the tokens' names; its size is the PRT model's, heads may be padded beyond.
        adapter_base: of the reward adapters that requests name; None if none can be named.
    """

    backbone: str
    rewards: list[ServedReward]
    contract: VocabularyContract
    adapter_base: PretrainedFolder | None

    @property
    def networks(self) -> dict[str, ServedNetwork]:
        """Those that run beside the backbone, in this order, by the names of their modules."""
        found = {}
        for index, reward in enumerate(self.rewards):
            merged = reward if reward.is_adapter else None
            found[f"reward_{index}"] = ServedNetwork(reward.network, reward.is_adapter, merged)
            if reward.minus_base:
                found[f"reward_{index}_base"] = ServedNetwork(reward.network, False)
        if self.adapter_base is not None:
            found[ADAPTERS] = ServedNetwork(self.adapter_base.folder, True)
        return found

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: dict) -> "ServedParts":
        rewards = [ServedReward(**reward) for reward in entries["rewards"]]
        contract = VocabularyContract(**entries["contract"])
        if (base := entries["adapter_base"]) is not None:
            base = PretrainedFolder(base["folder"], ModelReference(**base["reference"]))
        return cls(**entries | {"rewards": rewards, "contract": contract, "adapter_base": base})


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
    check_complete(config)
    backbone = _pretrained(ModelReference(**config.backbone_reference or {}), token).folder
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
    adapter_base: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ServedParts:
    """
    Args:
        backbone, rewards, adapter_base: folders or Hub ids.
        strengths: 1 / lambda of each reward, by default as it was tuned.
        adapter_base: of the rewards of single requests, by default the base of `rewards`.

    Raises:
        PRTValueError: neither rewards nor a base for those of requests, or not one strength for each.
        RewardFileError: no reward there, or an incomplete one.
        BaseModelMismatchError, VocabularyMismatchError: as of [`parts_of_recipe`].
    """
    is_usable = isinstance(rewards, list) and all(isinstance(place, str) for place in rewards)
    if not is_usable or not (rewards or adapter_base):
        raise PRTValueError(
            "`prt_rewards` is not usable.",
            expected=f"a list of folders or ids, which only with `{ADAPTER_BASE}` may be empty",
            found=repr(rewards),
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
    base = None
    if adapter_base is not None:
        folder = local_folder(adapter_base, token=token)
        base = PretrainedFolder(str(folder), _reference_to(folder, adapter_base, None))
    return _checked(of_backbone, list(zip(folders, configs, strengths, strict=True)), tokenizer, token, base)


def strength_of_adapter(folder: Path, parts: ServedParts) -> float:
    """The strength that a request's own reward was tuned with, once it is known that it can be served.

    Raises:
        RewardFileError: no reward there, or an incomplete one.
        UnsupportedError: a reward that is not an adapter alone.
        BaseModelMismatchError, VocabularyMismatchError: an adapter of another base, or for another vocabulary.
    """
    config = RewardConfig.from_json_file(folder / PRT_CONFIG_NAME)
    if not config.is_adapter or config.minus_base:
        raise UnsupportedError(
            "A request's own reward is put on the base that all of them share.",
            expected="a LoRA reward",
            found=f"{folder}: " + ("a LoRA that is carried over" if config.minus_base else "a full reward"),
            remedy="name it in `prt_rewards`",
        )
    _check_reward(folder, config, parts.contract)
    if isinstance(read_entries(folder / ADAPTER_CONFIG).get("target_modules"), str):
        raise UnsupportedError(
            "The engine would run the reward's regular expression, which may be anybody's.",
            expected="`target_modules` as a list of names",
            found=f"a text in {folder / ADAPTER_CONFIG}",
            remedy="name the reward in `prt_rewards`, or write the names there",
        )
    check_same_reference(config.reward_base, parts.adapter_base.reference)
    return config.strength


def _checked(
    backbone: str | Path,
    rewards: list[tuple[Path, RewardConfig, float]],
    tokenizer: str,
    token: str | bool | None,
    adapter_base: PretrainedFolder | None = None,
) -> ServedParts:
    of_tokenizer = _contract_of(tokenizer, token)
    of_tokenizer.check_head(_vocab_size(backbone))
    served, bases = [], {}
    for folder, config, strength in rewards:
        _check_reward(folder, config, of_tokenizer)
        network = str(folder)
        if config.is_adapter:
            if config.reward_base not in bases:
                bases[config.reward_base] = _pretrained(config.reward_base, token)
            network = bases[config.reward_base].folder
        of_tokenizer.check_head(_vocab_size(network), owner="reward")
        served.append(ServedReward(str(folder), network, config.is_adapter, float(strength), config.minus_base))
    if adapter_base is not None:
        of_tokenizer.check_head(_vocab_size(adapter_base.folder), owner="base of reward adapters")
    elif len({base.folder for base in bases.values()}) == 1:
        adapter_base = next(iter(bases.values()))
    return ServedParts(str(backbone), served, replace(of_tokenizer, vocabulary=None), adapter_base)


def _contract_of(tokenizer: str, token: str | bool | None) -> VocabularyContract:
    processing_class = load_processing_class(tokenizer, TEXT_GENERATION, token=token)
    if processing_class is None:
        raise PRTValueError("The vocabulary is told by the tokenizer.", expected="a tokenizer", found=tokenizer)
    return VocabularyContract.from_tokenizer(processing_class)


def _check_reward(folder: Path, config: RewardConfig, of_tokenizer: VocabularyContract) -> None:
    if config.task != TEXT_GENERATION:
        raise PRTValueError(
            "vLLM serves language models.", expected=f"a reward for {TEXT_GENERATION}", found=config.task
        )
    check_files(folder, config)
    if config.is_adapter:
        read_peft_config(folder, config.reward_base.id)
    else:
        check_full(folder, config)
    config.contract.check(of_tokenizer)


def _pretrained(reference: ModelReference, token: str | bool | None) -> PretrainedFolder:
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
    found = _reference_to(folder, reference.id, reference.revision)
    check_same_reference(reference, found)
    return PretrainedFolder(str(folder), found)


def _reference_to(folder: Path, name: str, revision: str | None) -> ModelReference:
    architecture = (load_config(str(folder)).architectures or [None])[0]
    return ModelReference(name, revision, architecture, _weights_fingerprint(folder))


def _weights_fingerprint(folder: Path) -> str | None:
    """As [`~networks.identity.weights_fingerprint`] of the loaded model, of which it reads the samples only; None where
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


def _vocab_size(folder: str | Path) -> int:
    return load_config(str(folder)).get_text_config().vocab_size
