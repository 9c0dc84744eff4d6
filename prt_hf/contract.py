"""The contract: what a reward needs of a backbone. It is stored in `prt_config.json`.

A reward is one number per token or label (Eq. 5): it fits any backbone whose tokens or labels mean the same, and no
other.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, fields
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from .errors import LabelMismatchError, PRTValueError, RewardFileError, VocabularyMismatchError

logger = logging.get_logger(__name__)

PRT_CONFIG_NAME = "prt_config.json"
FORMAT_VERSION = "1.0"
NETWORK, MINUS_BASE = "network", "-base"  # terms of a reward
_SUMS = ((NETWORK,), (NETWORK, MINUS_BASE))
TEXT_GENERATION = "text-generation"
TEXT_CLASSIFICATION = "text-classification"
IMAGE_CLASSIFICATION = "image-classification"
SHOWN = 5  # differences that an error shows
_MOST_BYTES = 2**26  # of prt_config.json; 100,000 labels with long names take some 10 MB
_MOST_TOKENS = 2**31
_MOST_LETTERS, _MOST_BYTES_OF_NAME = 4096, 255  # of a path, and of each name in it


def unwrap_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a tokenizer or a multimodal processor; None for image processors and None."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


@dataclass(frozen=True)
class VocabularyContract:
    """The token -> id map that a language model's logits are indexed by.

    Args:
        size (`int`): largest token id plus one; model heads may be padded beyond it.
        fingerprint (`str`): SHA-256 of the map, ordered by id.
        special_tokens (`dict`): role (`"eos_token"`, ...) -> token.
        vocabulary (`Mapping[str, int]`, *optional*): the map itself, to name differences; not written to files.
    """

    kind: ClassVar[str] = "vocabulary"

    size: int
    fingerprint: str
    special_tokens: dict[str, str] = field(default_factory=dict)
    vocabulary: Mapping[str, int] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "VocabularyContract":
        """Read the map of a tokenizer.

        Raises:
            PRTValueError: it has no tokens.
        """
        vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))
        if not vocabulary:
            raise PRTValueError(f"{type(tokenizer).__name__} has no tokens.", expected="a tokenizer with a vocabulary")
        roles = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {role: str(token) for role in roles if (token := getattr(tokenizer, role, None)) is not None}
        fingerprint = hashlib.sha256(json.dumps(list(vocabulary.items())).encode()).hexdigest()
        return cls(max(vocabulary.values()) + 1, fingerprint, special, vocabulary)

    def check(self, backbone: "VocabularyContract", owner: str = "backbone") -> None:
        """Accept a backbone with the same map; its head may be padded, and it may end or pad with other tokens.

        Args:
            backbone: its contract.
            owner: whose vocabulary it is, for the error.

        Raises:
            VocabularyMismatchError: the maps differ; shows sizes and a few differing tokens.
        """
        if not isinstance(backbone, VocabularyContract):
            raise VocabularyMismatchError(
                "The reward scores vocabulary tokens, the backbone does not.",
                expected="a causal language model",
                found=f"a backbone with a {backbone.kind} contract",
            )
        if (self.fingerprint, self.size) != (backbone.fingerprint, backbone.size):
            raise VocabularyMismatchError(
                f"The vocabulary of the {owner} is not the reward's.",
                expected=f"the {self.size} tokens that the reward was tuned with",
                found=f"{backbone.size} tokens{self._differences(backbone)}",
                remedy=f"use a {owner} with the same tokenizer, or tune a reward for this one",
            )
        ours, theirs = (contract.special_tokens.get("eos_token") for contract in (self, backbone))
        if ours and theirs and ours != theirs:
            logger.warning(
                f"The reward was tuned with the end token {ours!r}, the backbone stops at {theirs!r}: pass "
                f"`eos_token_id` to `generate` for both if texts do not end."
            )

    def check_head(self, columns: int, owner: str = "backbone") -> None:
        """Accept logits with at least as many columns as there are tokens; more are padding.

        Args:
            columns: number of logits per position.
            owner: whose head it is, for the error.

        Raises:
            VocabularyMismatchError: some tokens have no column.
        """
        if columns < self.size:
            raise VocabularyMismatchError(
                f"The {owner}'s head has fewer rows than its tokenizer has tokens.",
                expected=f"at least {self.size} logits per position",
                found=str(columns),
                remedy="use the tokenizer that belongs to the model",
            )

    def _differences(self, backbone: "VocabularyContract") -> str:
        """Name a few tokens that differ, if both maps are known."""
        if self.vocabulary is None or backbone.vocabulary is None:
            return ", in which at least one differs"
        missing = object()
        differing = [
            f"{token!r} ({self.vocabulary.get(token, 'absent')} -> {backbone.vocabulary.get(token, 'absent')})"
            for token in dict.fromkeys([*self.vocabulary, *backbone.vocabulary])
            if self.vocabulary.get(token, missing) != backbone.vocabulary.get(token, missing)
        ]
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        return f"; {len(differing)} differ, as token (id in the reward -> id in the backbone): " + (
            ", ".join(differing[:SHOWN]) + more
        )


@dataclass(frozen=True)
class LabelContract:
    """The label names that a classifier's logits are indexed by, in order."""

    kind: ClassVar[str] = "labels"

    names: tuple[str, ...]

    @classmethod
    def from_model_config(cls, config: PreTrainedConfig) -> "LabelContract":
        """Read `id2label` of a model's configuration.

        Raises:
            LabelMismatchError: the ids are not 0 ... n - 1.
        """
        id2label = {int(index): str(name) for index, name in (config.id2label or {}).items()}
        if sorted(id2label) != list(range(len(id2label))) or not id2label:
            raise LabelMismatchError(
                "The classifier's labels are not numbered from 0.",
                expected="`config.id2label` with ids 0 ... n - 1",
                found=str(sorted(id2label))[:80],
            )
        names = tuple(id2label[index] for index in range(len(id2label)))
        if all(name == f"LABEL_{index}" for index, name in enumerate(names)):
            logger.warning_once(
                "Labels are the placeholders LABEL_0, LABEL_1, ...: whether two such models mean the same cannot be "
                "checked. Set `config.id2label` and `config.label2id` to real names."
            )
        return cls(names)

    def check(self, backbone: "LabelContract") -> list[int]:
        """Match labels by name.

        Returns:
            `list[int]`: `order`, such that `reward[..., order]` has the backbone's order of labels.

        Raises:
            LabelMismatchError: the names differ, or two labels of differently ordered models share a name.
        """
        if not isinstance(backbone, LabelContract):
            raise LabelMismatchError(
                "The reward scores class labels, the backbone does not.",
                expected="a classifier with the reward's labels",
                found=f"a backbone with a {backbone.kind} contract",
            )
        if self.names == backbone.names:
            return list(range(len(self.names)))
        if Counter(self.names) != Counter(backbone.names):
            absent = [name for name in self.names if name not in backbone.names]
            extra = [name for name in backbone.names if name not in self.names]
            raise LabelMismatchError(
                "The backbone's labels are not the reward's.",
                expected=f"the {len(self.names)} labels that the reward was tuned with",
                found=f"{len(backbone.names)} labels; absent: {absent[:SHOWN]}, unknown: {extra[:SHOWN]}",
                remedy="use a backbone with these labels, or rename them in `config.id2label` if they mean the same",
            )
        if twice := [name for name, count in Counter(self.names).items() if count > 1]:
            raise LabelMismatchError(
                "Two labels share a name, and the two models order their labels differently.",
                expected="a distinct name for each label",
                found=f"{twice[:SHOWN]} more than once",
                remedy="give the labels distinct names in both models' `config.id2label`",
            )
        return [self.names.index(name) for name in backbone.names]


Contract = VocabularyContract | LabelContract
CONTRACTS = {contract.kind: contract for contract in (VocabularyContract, LabelContract)}
TASKS = {
    TEXT_GENERATION: VocabularyContract,
    TEXT_CLASSIFICATION: LabelContract,
    IMAGE_CLASSIFICATION: LabelContract,
}


def contract_to_dict(contract: Contract) -> dict[str, Any]:
    """Return the entries of a contract in files, which leave out the names of tokens."""
    return {"kind": contract.kind} | {name: value for name, value in vars(contract).items() if name != "vocabulary"}


def contract_from_dict(entries: dict[str, Any]) -> Contract:
    """Read a contract from its entries.

    Raises:
        ValueError, TypeError, KeyError: no contract.
    """
    contract_class = CONTRACTS[entries["kind"]]
    contract = contract_class(**_known(contract_class, entries, besides={"kind"}))
    if isinstance(contract, LabelContract):
        _check(contract, names=isinstance(contract.names, list) and contract.names and _are_strings(contract.names))
        return LabelContract(tuple(contract.names))
    special = contract.special_tokens
    _check(
        contract,
        size=type(contract.size) is int and 0 < contract.size <= _MOST_TOKENS,
        fingerprint=isinstance(contract.fingerprint, str),
        special_tokens=isinstance(special, dict) and _are_strings(special) and _are_strings(special.values()),
    )
    return contract


def _known(kind: type, entries: dict[str, Any], besides: Set[str] = frozenset()) -> dict[str, Any]:
    """Return the entries that this version knows; a newer minor version may have added others."""
    names = {entry.name for entry in fields(kind)} - {"vocabulary"}
    if unknown := sorted(set(entries) - names - besides):
        logger.warning(f"{PRT_CONFIG_NAME} has entries that this version does not know and ignores: {unknown}")
    return {name: value for name, value in entries.items() if name in names}


def _check(owner: Any, **is_right: bool) -> None:
    """Raise `ValueError` with the first entry that is not right."""
    for name, holds in is_right.items():
        if not holds:
            raise ValueError(f"{name} = {str(getattr(owner, name))[:80]}")


def _are_strings(values: Iterable) -> bool:
    """Return whether all values are strings."""
    return all(isinstance(value, str) for value in values)


@dataclass(frozen=True)
class ModelReference:
    """A pretrained model by its Hub id or path, commit, class, and a fingerprint of its weights."""

    id: str | None = None
    revision: str | None = None
    architecture: str | None = None
    weights: str | None = None

    def __str__(self) -> str:
        name = self.id or f"a {self.architecture} that was made in memory"
        return f"{name}{f' at {self.revision}' if self.revision else ''} (weights {(self.weights or 'unknown')[:12]})"


@dataclass(frozen=True)
class RewardConfig:
    """The contents of `prt_config.json`: all that a reward knows beside its weights.

    Args:
        task (`str`): `"text-generation"`, `"text-classification"` or `"image-classification"`.
        contract: vocabulary or labels.
        reward_base (`ModelReference`): the model that the reward started from, and that a reward adapter sits on.
        source_backbone (`ModelReference`, *optional*): pi_pt in training; None while untrained.
        more_source_backbones (tuple of `ModelReference`): further ones, if training drew one of several for each step.
        is_adapter (`bool`): a PEFT adapter, or a full network.
        kl_coef (`float`): lambda in training.
        entropy_coef (`float`): alpha of Eq. 12 in training.
        reward_init (`str`): `"pretrained"` (r starts as the base's logits, as in the paper) or `"zero"`.
        terms (tuple of `str`): networks whose logits add up to r: `("network",)`, or `("network", "-base")` for an
            ordinary adapter that was carried over, log pi_ft - log pi_pt of emulated fine-tuning.
        distilled_from (`ModelReference`, *optional*): the fine-tuned model whose distribution it was tuned to, or the
            adapter that was carried over.
        format_version (`str`): that of the file it was read from.
    """

    task: str
    contract: Contract
    reward_base: ModelReference
    source_backbone: ModelReference | None = None
    more_source_backbones: tuple[ModelReference, ...] = ()
    is_adapter: bool = True
    kl_coef: float = 1.0
    entropy_coef: float = 0.0
    reward_init: str = "pretrained"
    terms: tuple[str, ...] = (NETWORK,)
    distilled_from: ModelReference | None = None
    format_version: str = FORMAT_VERSION

    @property
    def strength(self) -> float:
        """1 / lambda, the strength at which the reward was tuned."""
        return 1 / self.kl_coef

    @property
    def sources(self) -> list[ModelReference]:
        """The models that it was tuned on; before any training, the pretrained model that it starts from."""
        return [self.source_backbone or self.reward_base, *self.more_source_backbones]

    def to_json_string(self) -> str:
        """Return the text of `prt_config.json`, in the format that this version writes."""
        written = {"contract": contract_to_dict(self.contract), "format_version": FORMAT_VERSION}
        return json.dumps(vars(self) | written, indent=2, default=vars) + "\n"

    @classmethod
    def from_json_file(cls, path: str | Path) -> "RewardConfig":
        """Read `prt_config.json`. Keys of newer minor versions are ignored with a warning.

        Raises:
            RewardFileError: no such file, not JSON, a missing or malformed entry, or a newer major version.
        """
        path = Path(path)
        if not path.is_file():
            names = sorted(entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else []
            raise RewardFileError(
                f"{path.parent} holds no reward.",
                expected=f"a folder with {PRT_CONFIG_NAME}, as `RewardModel.save_pretrained` writes it",
                found=", ".join(names[:10]) or "no such folder, or an empty one",
            )
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes")
            return cls._from_dict(json.loads(path.read_text(encoding="utf-8")))
        except RewardFileError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise RewardFileError.unreadable(
                path,
                error,
                expected=f"the entries of a {FORMAT_VERSION} reward",
                remedy="download or save the reward again",
            ) from error

    @classmethod
    def _from_dict(cls, entries: dict[str, Any]) -> "RewardConfig":
        """Read and check all entries."""
        version = str(entries["format_version"])
        if int(version.split(".")[0]) > int(FORMAT_VERSION.split(".")[0]):
            raise RewardFileError(
                "The reward was saved by a newer prt_hf.",
                expected=f"format version {FORMAT_VERSION}, or a newer one of the same major version",
                found=version,
                remedy="pip install --upgrade prt_hf",
            )
        known = _known(cls, entries)
        known["contract"] = contract = contract_from_dict(entries["contract"])
        for name in ("reward_base", "source_backbone", "distilled_from"):
            if known.get(name) is not None:
                known[name] = _reference(known[name])
        if "terms" in known:
            known["terms"] = tuple(known["terms"])
        known["more_source_backbones"] = tuple(map(_reference, entries.get("more_source_backbones", ())))
        config = cls(**known)
        _check(
            config,
            task=TASKS.get(config.task) is type(contract),
            reward_base=config.reward_base is not None,
            is_adapter=isinstance(config.is_adapter, bool),
            kl_coef=_is_number(config.kl_coef) and config.kl_coef > 0 and isfinite(1 / config.kl_coef),
            entropy_coef=_is_number(config.entropy_coef) and config.entropy_coef >= 0,
            reward_init=isinstance(config.reward_init, str),
            terms=config.terms in (_SUMS if config.is_adapter and config.task == TEXT_GENERATION else _SUMS[:1]),
        )
        return config


def is_name(value: Any) -> bool:
    """Return whether an entry can be a path or an id at all, for a file system or the Hub."""
    if not isinstance(value, str) or not value.isprintable() or len(value) > _MOST_LETTERS:
        return False
    return all(len(part.encode()) <= _MOST_BYTES_OF_NAME for part in value.split("/"))


def _reference(entries: dict[str, Any]) -> ModelReference:
    """Read a reference that names a model."""
    reference = ModelReference(**_known(ModelReference, entries))
    _check(
        reference,
        **{
            name: value is None or (isinstance(value, str) and is_name(value))
            for name, value in vars(reference).items()
        },
    )
    if not any(vars(reference).values()):
        raise ValueError(f"{entries} names no model")
    return reference


def _is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
