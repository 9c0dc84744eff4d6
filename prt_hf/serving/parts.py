"""Find the networks of a served PRT model on disk, with the checks of a load by transformers."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..contract import MINUS_BASE, PRT_CONFIG_NAME, TEXT_GENERATION, ModelReference, RewardConfig
from ..errors import PRTValueError, RewardFileError, UnsupportedError, VocabularyMismatchError
from ..functional import check_strengths
from ..hub.client import local_folder
from ..hub.folder import ADAPTER_CONFIG, check_files
from ..inference.configuration import PRTModelConfig, check_complete
from ..inference.recipe import place_of_reward
from ..networks.adapter_config import read_peft_config
from ..networks.auto import load_config, load_processing_class, load_skeleton
from ..networks.checkpoints import read_entries
from ..networks.identity import check_same_reference, fingerprint_of_files
from ..reward.full import check_full
from ..vocabulary import VocabularyContract
from . import ADAPTER_BASE
from .tokens import ServedTokens, match_tokens

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
class AdapterBase(PretrainedFolder):
    """The base of the reward adapters that requests name, all of which have one vocabulary.

    Attributes:
        contract: of that vocabulary, without the tokens' names.
        tokens: its tokens for the backbone's; None if they are the same.
    """

    contract: VocabularyContract
    tokens: ServedTokens | None


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
        tokens: its tokens for the backbone's; None if they are the same.
    """

    terms: list[ServedNetwork]
    strength: float
    tokens: ServedTokens | None = None

    @classmethod
    def of(
        cls, folder: Path, config: RewardConfig, network: str, strength: float, tokens: ServedTokens | None
    ) -> "ServedReward":
        """Return the reward in a folder, whose network, or the base of it, is described in the folder `network`."""
        terms = [
            ServedNetwork(network, sign=-1.0)
            if name == MINUS_BASE
            else ServedNetwork(network, config.is_adapter, str(folder) if config.is_adapter else None)
            for name in config.terms
        ]
        return cls(terms, float(strength), tokens)


@dataclass(frozen=True)
class ServedParts:
    """All networks of a served PRT model.

    Attributes:
        backbone: folder of the backbone.
        rewards: those that are always on.
        size: number of the tokenizer's tokens, which is the PRT model's; heads may be padded beyond.
        adapter_base: base of the reward adapters that requests name; None if none can be named.
    """

    backbone: str
    rewards: list[ServedReward]
    size: int
    adapter_base: AdapterBase | None

    @property
    def networks(self) -> dict[str, ServedNetwork]:
        """The networks that run beside the backbone, in this order, by the names of their modules."""
        terms = [term for reward in self.rewards for term in reward.terms]
        found = {f"term_{index}": term for index, term in enumerate(terms)}
        if self.adapter_base is not None:
            found[ADAPTERS] = ServedNetwork(self.adapter_base.folder, is_adapted=True)
        return found

    @property
    def names_of_rewards(self) -> list[list[str]]:
        """The names of each reward's networks; last that of the reward which a request names, if any can be."""
        names = iter(self.networks)
        found = [[next(names) for _ in reward.terms] for reward in self.rewards]
        return [*found, *([name] for name in names)]

    @property
    def tokens(self) -> dict[str, ServedTokens]:
        """The tokens of the networks that do not have the backbone's, by their names."""
        owners = [*self.rewards, *([] if self.adapter_base is None else [self.adapter_base])]
        pairs = zip(self.names_of_rewards, owners, strict=True)
        return {name: owner.tokens for names, owner in pairs if owner.tokens is not None for name in names}

    def to_dict(self) -> dict:
        """Return entries for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: dict) -> "ServedParts":
        """Read what [`to_dict`] returned."""

        def read(kind: type, value: dict | None) -> Any:
            return None if value is None else kind(**value)

        rewards = [
            ServedReward(
                [ServedNetwork(**term) for term in reward["terms"]],
                reward["strength"],
                read(ServedTokens, reward["tokens"]),
            )
            for reward in entries["rewards"]
        ]
        if (base := entries["adapter_base"]) is not None:
            kinds = {"reference": ModelReference, "contract": VocabularyContract, "tokens": ServedTokens}
            base = AdapterBase(base["folder"], **{name: read(kind, base[name]) for name, kind in kinds.items()})
        return cls(**entries | {"rewards": rewards, "adapter_base": base})


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
        VocabularyMismatchError: a reward was tuned with another vocabulary, of which the tokenizer's is no update.
        UnsupportedError: the recipe allows other vocabularies.
    """
    check_complete(config)
    if config.across_vocabularies:
        raise UnsupportedError(
            "The engine runs rewards of the backbone's own vocabulary.",
            expected="a recipe without `across_vocabularies`",
            found=str(folder),
            remedy="generate with PRTForCausalLM, or bake the rewards into a LoRA",
        )
    backbone = _pretrained(ModelReference(**config.backbone_reference or {}), token).folder
    rewards = []
    for entry in config.reward_references:
        place = place_of_reward(folder, entry, token)
        rewards.append((place, RewardConfig.from_json_file(place / PRT_CONFIG_NAME), entry["strength"]))
    return _checked(backbone, rewards, tokenizer, token, token_map=config.token_map)


def parts_by_name(
    backbone: str,
    rewards: list[str],
    strengths: list[float] | None,
    tokenizer: str,
    *,
    adapter_base: str | None = None,
    token_map: dict[str, str] | None = None,
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
        token_map: the tokenizer's tokens -> the rewards', where names and roles do not tell.
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
    is_map = isinstance(token_map, dict) and all(isinstance(text, str) for text in (*token_map, *token_map.values()))
    if token_map is not None and not is_map:
        raise PRTValueError(
            "`prt_token_map` is not usable.",
            expected="{token of the backbone: token of the rewards}",
            found=repr(token_map),
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
    rewards = list(zip(folders, configs, strengths, strict=True))
    return _checked(backbone_folder, rewards, tokenizer, token, token_map, base)


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
    _check_reward(folder, config)
    base = parts.adapter_base
    if not config.contract.match(base.contract).is_identical:
        raise VocabularyMismatchError(
            "The reward's vocabulary is not that of the base of the rewards that requests name.",
            expected=f"the {base.contract.size} tokens of the base, in the same order",
            found=f"{folder}: {config.contract.size} tokens, of which at least one differs",
            remedy="name it in `prt_rewards`",
        )
    if isinstance(read_entries(folder / ADAPTER_CONFIG).get("target_modules"), str):
        raise UnsupportedError(
            "The engine would run the reward's regular expression, which may be anybody's.",
            expected="`target_modules` as a list of names",
            found=f"a text in {folder / ADAPTER_CONFIG}",
            remedy="name the reward in `prt_rewards`, or write the names there",
        )
    check_same_reference(config.reward_base, base.reference)
    return config.strength


def _checked(
    backbone: str | Path,
    rewards: list[tuple[Path, RewardConfig, float]],
    tokenizer: str,
    token: str | bool | None,
    token_map: Mapping[str, str] | None,
    adapter_base: PretrainedFolder | None = None,
) -> ServedParts:
    contract = _contract_of(tokenizer, token)
    if contract is None:
        raise PRTValueError("The vocabulary is defined by the tokenizer.", expected="a tokenizer", found=tokenizer)
    contract.check_head(_vocab_size(backbone))
    served, bases, vocabularies = [], {}, {}
    for folder, config, strength in rewards:
        _check_reward(folder, config)
        network = str(folder)
        if config.is_adapter:
            if config.reward_base not in bases:
                bases[config.reward_base] = _pretrained(config.reward_base, token)
            network = bases[config.reward_base].folder
        tokens = match_tokens(config.contract, [str(folder), network], contract, token_map)
        config.contract.check_head(_vocab_size(network), owner="reward")
        vocabularies.setdefault(network, (config.contract, tokens))
        served.append(ServedReward.of(folder, config, network, strength, tokens))
    if adapter_base is None and len({base.folder for base in bases.values()}) == 1:
        adapter_base = next(iter(bases.values()))
    if adapter_base is not None:
        folder = adapter_base.folder
        if folder in vocabularies:  # that of rewards which were tuned on it
            found, tokens = vocabularies[folder]
        else:
            found = _contract_of(folder, token) or contract
            tokens = match_tokens(found, [folder], contract, token_map)
            found.check_head(_vocab_size(folder), owner="base of reward adapters")
        adapter_base = AdapterBase(folder, adapter_base.reference, replace(found, vocabulary=None), tokens)
    return ServedParts(str(backbone), served, contract.size, adapter_base)


def _contract_of(tokenizer: str, token: str | bool | None) -> VocabularyContract | None:
    """Return the contract of a tokenizer; None if there is none."""
    processing_class = load_processing_class(tokenizer, TEXT_GENERATION, token=token)
    return None if processing_class is None else VocabularyContract.from_tokenizer(processing_class)


def _check_reward(folder: Path, config: RewardConfig) -> None:
    """Check the files of a reward, and that it is one over a vocabulary."""
    if config.task != TEXT_GENERATION:
        raise PRTValueError(
            "vLLM serves language models.", expected=f"a reward for {TEXT_GENERATION}", found=config.task
        )
    check_files(folder, config)
    if config.is_adapter:
        read_peft_config(folder, config.reward_base.id)
    else:
        check_full(folder, config)


def _pretrained(reference: ModelReference, token: str | bool | None) -> PretrainedFolder:
    """Return the folder of a pretrained model, after checking its weights against the reference's fingerprint.

    Raises:
        RewardFileError: it was made in memory and has no id.
        BaseModelMismatchError: another model is there.
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
    return ModelReference(name, revision, architecture, fingerprint_of_files(load_skeleton(str(folder)), folder))


def _vocab_size(folder: str | Path) -> int:
    """Return the number of rows of a model's head."""
    return load_config(str(folder)).get_text_config().vocab_size
