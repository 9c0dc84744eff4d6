"""Find the networks of a served PRT model on disk, with the checks of a load by transformers."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open

from ..contract import (
    MINUS_BASE,
    PRT_CONFIG_NAME,
    TEXT_GENERATION,
    ModelReference,
    RewardConfig,
    VocabularyContract,
)
from ..errors import PRTValueError, RewardFileError, UnsupportedError
from ..functional import check_strengths
from ..hub.client import local_folder
from ..hub.folder import ADAPTER_CONFIG, check_files
from ..inference.recipe import PRTModelConfig, check_complete, place_of_reward
from ..networks.adapter_config import read_peft_config
from ..networks.auto import load_config, load_processing_class, load_skeleton
from ..networks.checkpoints import read_entries
from ..networks.identity import check_same_reference, fingerprint_of
from ..reward.full import check_full
from . import ADAPTER_BASE

ADAPTERS = "adapters"  # name of the network for the reward adapters that requests name


@dataclass(frozen=True)
class PretrainedFolder:
    """A pretrained model on this machine.

    Attributes:
        folder: where it is stored.
        reference: names it.
    """

    folder: str
    reference: ModelReference


@dataclass(frozen=True)
class ServedNetwork:
    """A network that runs beside the backbone: a term of a reward, or the base of those that requests name.

    Attributes:
        folder: of its `config.json`, and of its weights unless an adapter is added to them.
        is_adapted: its head has weights of its own, those of the embeddings with an adapter's added to them.
        adapter: folder of the reward whose adapter is merged into it; None where requests name theirs.
        sign: of the term.
    """

    folder: str
    is_adapted: bool = False
    adapter: str | None = None
    sign: float = 1.0


@dataclass(frozen=True)
class ServedReward:
    """A reward as a signed sum of networks.

    Attributes:
        terms: its networks.
        strength: 1 / lambda, for requests that name none.
    """

    terms: list[ServedNetwork]
    strength: float

    @classmethod
    def of(cls, folder: Path, config: RewardConfig, network: str, strength: float) -> "ServedReward":
        """Return the reward in a folder, whose network, or the base of it, is described in the folder `network`."""
        terms = [
            ServedNetwork(network, sign=-1.0)
            if name == MINUS_BASE
            else ServedNetwork(network, config.is_adapter, str(folder) if config.is_adapter else None)
            for name in config.terms
        ]
        return cls(terms, float(strength))


@dataclass(frozen=True)
class ServedParts:
    """All networks of a served PRT model.

    Attributes:
        backbone: folder of the backbone.
        rewards: those that are always on.
        contract: of the tokenizer, without the tokens' names; its size is the PRT model's, heads may be padded beyond.
        adapter_base: base of the reward adapters that requests name; None if none can be named.
    """

    backbone: str
    rewards: list[ServedReward]
    contract: VocabularyContract
    adapter_base: PretrainedFolder | None

    @property
    def networks(self) -> dict[str, ServedNetwork]:
        """The networks that run beside the backbone, in this order, by the names of their modules."""
        terms = [term for reward in self.rewards for term in reward.terms]
        found = {f"term_{index}": term for index, term in enumerate(terms)}
        if self.adapter_base is not None:
            found[ADAPTERS] = ServedNetwork(self.adapter_base.folder, is_adapted=True)
        return found

    def to_dict(self) -> dict:
        """Return entries for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: dict) -> "ServedParts":
        """Read what [`to_dict`] returned."""
        rewards = [
            ServedReward([ServedNetwork(**term) for term in reward["terms"]], reward["strength"])
            for reward in entries["rewards"]
        ]
        contract = VocabularyContract(**entries["contract"])
        if (base := entries["adapter_base"]) is not None:
            base = PretrainedFolder(base["folder"], ModelReference(**base["reference"]))
        return cls(**entries | {"rewards": rewards, "contract": contract, "adapter_base": base})


def parts_of_recipe(
    folder: Path, config: PRTModelConfig, tokenizer: str, *, token: str | bool | None = None
) -> ServedParts:
    """Find the parts of a recipe.

    Args:
        folder: of the recipe.
        config: of the recipe.
        tokenizer: folder or Hub id of the tokenizer that the engine uses.
        token: for the Hub.

    Raises:
        RewardFileError: incomplete, or a reward is gone or changed.
        BaseModelMismatchError: the backbone, or the base of a reward, is not what it was.
        VocabularyMismatchError: a reward was tuned with another vocabulary.
    """
    check_complete(config)
    backbone = _pretrained(ModelReference(**config.backbone_reference or {}), token).folder
    rewards = []
    for entry in config.reward_references:
        place = place_of_reward(folder, entry, token)
        rewards.append((place, RewardConfig.from_json_file(place / PRT_CONFIG_NAME), entry["strength"]))
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
    """Find parts that are named one by one.

    Args:
        backbone: folder or Hub id.
        rewards: folders or Hub ids.
        strengths: 1 / lambda of each reward, by default as it was tuned.
        tokenizer: folder or Hub id of the tokenizer that the engine uses.
        adapter_base: folder or Hub id of the base of rewards that requests name; by default the base of `rewards`.
        revision: of the backbone.
        token: for the Hub.

    Raises:
        PRTValueError: neither rewards nor a base for those of requests, or not one strength for each.
        RewardFileError: no reward there, or an incomplete one.
        BaseModelMismatchError, VocabularyMismatchError: as raised by [`parts_of_recipe`].
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
    check_strengths(strengths, len(rewards), "prt_strengths")
    backbone_folder = local_folder(backbone, revision=revision, token=token)
    base = None
    if adapter_base is not None:
        folder = local_folder(adapter_base, token=token)
        base = PretrainedFolder(str(folder), _reference_to(folder, adapter_base, None))
    return _checked(backbone_folder, list(zip(folders, configs, strengths, strict=True)), tokenizer, token, base)


def strength_of_adapter(folder: Path, parts: ServedParts) -> float:
    """Return the strength that a request's own reward was tuned with, after checking that it can be served.

    Raises:
        RewardFileError: no reward there, or an incomplete one.
        UnsupportedError: a reward that is not an adapter alone.
        BaseModelMismatchError, VocabularyMismatchError: an adapter of another base, or for another vocabulary.
    """
    config = RewardConfig.from_json_file(folder / PRT_CONFIG_NAME)
    is_carried_over = MINUS_BASE in config.terms
    if not config.is_adapter or is_carried_over:
        raise UnsupportedError(
            "The rewards that requests name share one base.",
            expected="a LoRA reward",
            found=f"{folder}: " + ("a LoRA that is carried over" if is_carried_over else "a full reward"),
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
    contract = _contract_of(tokenizer, token)
    contract.check_head(_vocab_size(backbone))
    served, bases = [], {}
    for folder, config, strength in rewards:
        _check_reward(folder, config, contract)
        network = str(folder)
        if config.is_adapter:
            if config.reward_base not in bases:
                bases[config.reward_base] = _pretrained(config.reward_base, token)
            network = bases[config.reward_base].folder
        contract.check_head(_vocab_size(network), owner="reward")
        served.append(ServedReward.of(folder, config, network, strength))
    if adapter_base is not None:
        contract.check_head(_vocab_size(adapter_base.folder), owner="base of reward adapters")
    elif len({base.folder for base in bases.values()}) == 1:
        adapter_base = next(iter(bases.values()))
    return ServedParts(str(backbone), served, replace(contract, vocabulary=None), adapter_base)


def _contract_of(tokenizer: str, token: str | bool | None) -> VocabularyContract:
    """Return the contract of the tokenizer that the engine uses."""
    processing_class = load_processing_class(tokenizer, TEXT_GENERATION, token=token)
    if processing_class is None:
        raise PRTValueError("The vocabulary is defined by the tokenizer.", expected="a tokenizer", found=tokenizer)
    return VocabularyContract.from_tokenizer(processing_class)


def _check_reward(folder: Path, config: RewardConfig, contract: VocabularyContract) -> None:
    """Check the files of a reward, and that it is one over the engine's vocabulary."""
    if config.task != TEXT_GENERATION:
        raise PRTValueError(
            "vLLM serves language models.", expected=f"a reward for {TEXT_GENERATION}", found=config.task
        )
    check_files(folder, config)
    if config.is_adapter:
        read_peft_config(folder, config.reward_base.id)
    else:
        check_full(folder, config)
    config.contract.check(contract)


def _pretrained(reference: ModelReference, token: str | bool | None) -> PretrainedFolder:
    """Return the folder of a pretrained model, after checking its weights against the reference's fingerprint.

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
    """Return the reference that names the model in a folder."""
    architecture = (load_config(str(folder)).architectures or [None])[0]
    return ModelReference(name, revision, architecture, _weights_fingerprint(folder))


def _weights_fingerprint(folder: Path) -> str | None:
    """Return [`~networks.identity.weights_fingerprint`] of the model in a folder, reading only its samples.

    None if the files hold the weights in another form than the model does.
    """
    skeleton = load_skeleton(str(folder))
    wanted = {name for name, _ in skeleton.named_parameters()}
    files = sorted(folder.glob("model*.safetensors"))
    try:
        found = {name: tensor for file in files for name, tensor in _tensors(file) if name in wanted}
    except OSError:
        return None
    return fingerprint_of(found.values()) if found.keys() == wanted else None


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a file, mapped into memory, so that only what is used is read."""
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)


def _vocab_size(folder: str | Path) -> int:
    """Return the number of rows of a model's head."""
    return load_config(str(folder)).get_text_config().vocab_size
