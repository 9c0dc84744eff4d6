"""The configuration of a PRT model: which backbone, which rewards, how strong. The `config.json` of a recipe."""

import copy
from dataclasses import asdict
from math import isfinite
from numbers import Real
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from ..contract import ABOUT, TEXT_GENERATION, LabelContract, RewardConfig
from ..errors import RewardFileError
from ..hub.folder import RECIPE_TYPE
from ..networks.anatomy import AUTO_CLASSES, unwrap_adapter
from ..networks.checkpoints import check_counts
from ..networks.identity import reference_to
from ..networks.quantization import is_quantized_in_files
from ..reward.model import RewardModel
from ..vocabulary import VocabularyContract

RECIPE_VERSION = "1.0"
MAPS = ("token_map", "label_map", "allow_partial", "across_vocabularies")  # how rewards are matched with the backbone
_ABOUT_RECIPE = "a recipe of prt_hf: `import prt_hf.inference` before an Auto class of transformers loads it"
_MOST_REWARDS = 256  # each is loaded, and may bring a base of its own
_BACKBONE_ENTRY = dict.fromkeys(("id", "revision", "architecture", "weights"), str | None)
_REWARD_ENTRY = dict.fromkeys(("id", "revision", "digest", "folder"), str | None) | {"strength": Real}


class PRTModelConfig(PreTrainedConfig):
    """Configuration of a PRT model. Attributes that it lacks (sizes, special tokens, ...) are the backbone's.

    Args:
        backbone_reference (`dict`): id, revision, architecture and weight fingerprint of the backbone.
        backbone_config (`PreTrainedConfig` or `dict`): the backbone's own configuration.
        reward_references (`list[dict]`): for each reward its `strength`, the SHA-256 `digest` of its files
            ([`~prt_hf.hub.folder.reward_digest`]), and its place: `id` and `revision` on the Hub, or a `folder`
            beside this file.
        reward_configs (`list`): configurations of the rewards' networks.
        vocab_size (`int`, *optional*): tokens of the vocabulary, without the rows that pad the models' heads.
        token_map (`dict`, *optional*): the backbone's tokens -> the rewards', where names and roles do not tell.
        label_map (`dict`, *optional*): the backbone's labels -> the rewards'.
        allow_partial (`bool`): whether rewards may score some of the backbone's labels only.
        across_vocabularies (`bool`): whether rewards may have other vocabularies than the backbone.

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
    token_map: dict | None = None
    label_map: dict | None = None
    allow_partial: bool = False
    across_vocabularies: bool = False
    tie_word_embeddings: bool = False  # of this model's own heads, which it has not

    def __post_init__(self, **kwargs):
        kwargs.pop(ABOUT, None)
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

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("backbone_config")
        is_own = name.startswith("_") or name == "quantization_config"  # only the backbone is quantised
        if is_own or not isinstance(config, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(config.get_text_config(), name)

    def to_dict(self) -> dict[str, Any]:
        """Return all entries, those of the parts' configurations as well."""
        return super().to_dict() | {
            "backbone_config": self.backbone_config and self.backbone_config.to_dict(),
            "reward_configs": [config.to_dict() for config in self.reward_configs],
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the entries that are written to `config.json`."""
        entries = self.to_dict()
        entries.pop("_name_or_path", None)  # where this recipe was read from
        return {ABOUT: _ABOUT_RECIPE} | entries


def config_of(
    architecture: str,
    backbone: PreTrainedModel,
    rewards: list[RewardModel],
    references: list[dict | None],
    strengths: list[float],
    size: int | None,
    maps: dict[str, Any],
) -> PRTModelConfig:
    """Return the configuration of a PRT model, with an entry for each reward.

    Args:
        architecture: name of the class.
        backbone: the backbone.
        rewards: the rewards.
        references: places of the rewards on the Hub.
        strengths: 1 / lambda of each.
        size: tokens of the backbone's vocabulary; None for labels.
        maps: the entries of `MAPS`.
    """
    backbone_config = copy.deepcopy(backbone.config)
    if is_quantized_in_files(backbone):  # loading them is enough
        backbone_config.__dict__.pop("quantization_config", None)
    config = PRTModelConfig(
        architectures=[architecture],
        backbone_reference=asdict(reference_to(backbone)),
        backbone_config=backbone_config,
        reward_references=[
            {"id": None, "revision": None, "digest": None, "folder": None}
            | (reference or {})
            | {"strength": float(strength)}
            for reference, strength in zip(references, strengths, strict=True)
        ],
        reward_configs=[copy.deepcopy(unwrap_adapter(reward.network).config) for reward in rewards],
        vocab_size=size,
        dtype=backbone.dtype,
        **maps,
    )
    config.name_or_path = backbone.name_or_path
    return config


def maps_of_rewards(rewards: list[RewardModel], maps: dict[str, Any]) -> list[dict[str, Any]]:
    """Return for each reward the entries of `token_map` and `label_map` that name its tokens or labels.

    An entry that no reward knows stays, and is refused where the first reward is matched.
    """
    found = []
    for name in ("token_map", "label_map"):
        entries = maps[name] or {}
        known = [{new: old for new, old in entries.items() if _knows(reward, name, old)} for reward in rewards]
        if entries.keys() - {new for each in known for new in each}:
            known[0] = entries
        found.append(known)
    return [maps | {"token_map": tokens, "label_map": labels} for tokens, labels in zip(*found, strict=True)]


def _knows(reward: RewardModel, name: str, old: str) -> bool:
    contract = reward.contract
    if isinstance(contract, LabelContract):
        return name == "token_map" or old in contract.names
    return contract.vocabulary is None or not isinstance(old, str) or contract.id_of(old) is not None


def new_parts(
    task: str, config: PRTModelConfig, attn_implementation: str | None
) -> tuple[PreTrainedModel, list[RewardModel]]:
    """Return backbone and rewards with new weights, as all models have that are made from a configuration."""
    auto_class = AUTO_CLASSES[task]
    asked = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    backbone, *rewards = (
        auto_class.from_config(part, **asked) for part in (config.backbone_config, *config.reward_configs)
    )
    config.backbone_reference = config.backbone_reference or asdict(reference_to(backbone))
    references = config.reward_references or [{} for _ in rewards]
    config.reward_references = [{"strength": 1.0} | entry for entry in references]
    if task == TEXT_GENERATION:
        contract = VocabularyContract(config.vocab_size, fingerprint="")  # there is no tokenizer
    else:
        contract = LabelContract.from_model_config(config.backbone_config)
    return backbone, [
        RewardModel(network, RewardConfig(task, contract, reference_to(network), is_adapter=False))
        for network in rewards
    ]


def check_complete(config: PRTModelConfig) -> None:
    """Check that a recipe names the places of all its parts.

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


def _check_entries(config: PRTModelConfig) -> None:
    """Check the types of the references and configurations."""

    def is_made_of(entry: Any, types: dict[str, Any]) -> bool:
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
        "allow_partial": isinstance(config.allow_partial, bool),
        "across_vocabularies": isinstance(config.across_vocabularies, bool),
    }
    for name in ("token_map", "label_map"):
        mapped = getattr(config, name) or {}
        is_map = isinstance(mapped, dict)
        are_right[name] = is_map and all(isinstance(text, str) for text in (*mapped, *mapped.values()))
    if wrong := [name for name, is_right in are_right.items() if not is_right]:
        raise RewardFileError(
            f"The recipe's {wrong[0]} cannot be read.",
            expected=f"the entries of a {RECIPE_VERSION} recipe",
            found=str(getattr(config, wrong[0]))[:200],
            remedy="save or download the recipe again",
        )


def _check_version(version: str) -> None:
    """Refuse recipes of newer major versions."""
    try:
        is_known = int(str(version).split(".")[0]) <= int(RECIPE_VERSION.split(".")[0])
    except ValueError:
        is_known = False
    if not is_known:
        raise RewardFileError(
            "The recipe was written by a newer prt_hf, or is none.",
            expected=f"recipe version {RECIPE_VERSION} or older",
            found=repr(version),
            remedy="update your clone of prt_hf",
        )


def _as_config(config: PreTrainedConfig | dict | None) -> PreTrainedConfig | None:
    """Make a configuration of its entries; one of an architecture that needs code is refused."""
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
    if not isinstance(entries.get("quantization_config", {}), dict):
        raise RewardFileError(
            "The recipe's `quantization_config` cannot be read.",
            expected="a JSON object",
            found=str(entries["quantization_config"])[:200],
        )
    return AutoConfig.for_model(model_type, **entries)
