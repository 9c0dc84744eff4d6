"""The contract: what a reward needs of a backbone. It is stored in `prt_config.json`.

A reward is one number per token or label (Eq. 5): it fits any backbone whose tokens or labels mean the same, and no
other.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, fields
from functools import cached_property
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from .errors import LabelMismatchError, PRTValueError, RewardFileError
from .vocabulary import OTHER, SHOWN, VocabularyContract, VocabularyMatch

logger = logging.get_logger(__name__)

PRT_CONFIG_NAME = "prt_config.json"
FORMAT_VERSION = "1.0"
ABOUT = "about"  # an entry for people, who may take the files for those of a model; not read
_ABOUT_REWARD = "a reward of prt_hf, not a model: load it with RewardModel.from_pretrained, not with AutoModel or PEFT"
NETWORK, MINUS_BASE = "network", "-base"  # terms of a reward
_SUMS = ((NETWORK,), (NETWORK, MINUS_BASE))
TEXT_GENERATION = "text-generation"
TEXT_CLASSIFICATION = "text-classification"
IMAGE_CLASSIFICATION = "image-classification"
MOST_BYTES = 2**26  # of prt_config.json; 100,000 labels with long names take some 10 MB
_MOST_TOKENS = 2**31
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which cannot be encoded
_MOST_LETTERS, _MOST_BYTES_OF_NAME = 4096, 255  # of a path, and of each name in it


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

    @property
    def size(self) -> int:
        """The number of labels."""
        return len(self.names)

    def match(
        self, backbone: "LabelContract", label_map: Mapping[str, str] | None = None, allow_partial: bool = False
    ) -> list[int]:
        """Match labels by name.

        Args:
            backbone: its contract.
            label_map (*optional*): the backbone's labels -> the reward's labels of the same meaning.
            allow_partial: whether the backbone may have other labels as well, which are neutral (see
                [`~prt_hf.functional.combine`]), and lack some of the reward's.

        Returns:
            `list[int]`: for each of the backbone's labels the reward's, -1 where it has none.

        Raises:
            LabelMismatchError: the names differ, or two labels of differently ordered models share a name.
            PRTValueError: `label_map` names an unknown label, or maps two labels onto one.
        """
        if not isinstance(backbone, LabelContract):
            raise LabelMismatchError(
                "The reward scores class labels, the backbone does not.",
                expected="a classifier with the reward's labels",
                found=f"a backbone with a {backbone.kind} contract",
            )
        names = self._renamed(backbone.names, label_map or {})
        if self.names == names:
            return list(range(len(names)))
        absent = [name for name in self.names if name not in names]
        extra = [name for name in names if name not in self.names]
        is_partial = allow_partial and len(extra) < len(names)
        if Counter(self.names) != Counter(names) and not is_partial:
            raise LabelMismatchError(
                "The backbone's labels are not the reward's.",
                expected=f"the {len(self.names)} labels that the reward was tuned with",
                found=f"{len(names)} labels; absent: {absent[:SHOWN]}, unknown: {extra[:SHOWN]}",
                remedy="name labels of the same meaning in `label_map={backbone's: reward's}`, or pass "
                "`allow_partial=True` to score those that both have",
            )
        if twice := [name for name, count in Counter((*self.names, *names)).items() if count > 2]:
            raise LabelMismatchError(
                "Two labels share a name, and the two models order their labels differently.",
                expected="a distinct name for each label",
                found=f"{twice[:SHOWN]} more than once",
                remedy="give the labels distinct names in both models' `config.id2label`",
            )
        return [self.names.index(name) if name in self.names else -1 for name in names]

    def _renamed(self, names: tuple[str, ...], label_map: Mapping[str, str]) -> tuple[str, ...]:
        """Return the backbone's labels by the reward's names."""
        unknown = [name for name in label_map if name not in names]
        unknown += [name for name in label_map.values() if name not in self.names]
        renamed = tuple(label_map.get(name, name) for name in names)
        twice = [name for name in label_map.values() if renamed.count(name) > 1]
        if unknown or twice:
            raise PRTValueError(
                "`label_map` names an unknown label." if unknown else "`label_map` maps two labels onto one.",
                expected="{label of the backbone: label of the reward}, each label once",
                found=str((unknown or twice)[:SHOWN]),
            )
        return renamed


@dataclass(frozen=True)
class Match:
    """How a reward's columns and tokens belong to those of a backbone.

    Attributes:
        columns (`torch.LongTensor` of shape `(backbone columns,)`, *optional*): the reward's column for each of the
            backbone's, -1 where that is neutral; None if they are the same.
        tokens ([`VocabularyMatch`], *optional*): how the tokens of texts belong together; None if both read the same.
    """

    columns: torch.LongTensor | None = None
    tokens: VocabularyMatch | None = None

    @cached_property
    def has_neutral(self) -> bool:
        """Whether some of the backbone's columns keep their probability."""
        return self.columns is not None and bool((self.columns < 0).any())

    @property
    def is_across(self) -> bool:
        """Whether the backbone has another vocabulary, see [`~prt_hf.inference.across`]."""
        return self.tokens is not None and self.tokens.kind == OTHER

    def columns_on(self, device: torch.device) -> torch.LongTensor | None:
        """Return `columns` on a device."""
        if self.columns is None:
            return None
        is_vocabulary = self.tokens is not None and self.columns is self.tokens.columns
        return self.tokens.columns_on(device) if is_vocabulary else self.columns.to(device)


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
    _check(
        contract,
        size=type(contract.size) is int and 0 < contract.size <= _MOST_TOKENS,
        fingerprint=isinstance(contract.fingerprint, str),
        ordinary=isinstance(contract.ordinary, str),
        added=_is_map(contract.added) and all(_is_id(index, contract.size) for index in contract.added.values()),
        special_tokens=_is_map(contract.special_tokens) and _are_strings(contract.special_tokens.values()),
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


def _is_id(value: Any, size: int) -> bool:
    """Return whether a value is a token id below `size`."""
    return type(value) is int and 0 <= value < size


def _is_map(value: Any) -> bool:
    """Return whether a value is a dictionary with strings as keys."""
    return isinstance(value, dict) and _are_strings(value)


def _are_strings(values: Iterable) -> bool:
    """Return whether all values are strings, and of whole characters."""
    return all(isinstance(value, str) and not _SURROGATE.search(value) for value in values)


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
        is_chat (`bool`): whether it was tuned on messages, in its tokenizer's chat template.
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
    is_chat: bool = False
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
        return json.dumps({ABOUT: _ABOUT_REWARD} | vars(self) | written, indent=2, default=vars) + "\n"

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
            if path.stat().st_size > MOST_BYTES:
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
                remedy="update your clone of prt_hf",
            )
        known = _known(cls, entries, besides={ABOUT})
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
            is_chat=isinstance(config.is_chat, bool),
            kl_coef=is_number(config.kl_coef) and config.kl_coef > 0 and isfinite(1 / config.kl_coef),
            entropy_coef=is_number(config.entropy_coef) and config.entropy_coef >= 0,
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


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
