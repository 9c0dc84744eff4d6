"""Vocabularies: the tokens that a language model's logits are indexed by, and how those of two models match.

A reward is one number per token (Eq. 5). Updates of a model family rename, append and move tokens that were never
ordinary text: every other token means the same, and the reward acts on it. The rest is neutral, see
[`~prt_hf.functional.combine`].
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

from .errors import PRTValueError, VocabularyMismatchError
from .translation import Translation

logger = logging.get_logger(__name__)

SHOWN = 5  # differences that an error shows
IDENTICAL, RENAMED, EXTENDED, MOVED, OTHER = "identical", "renamed", "extended", "moved", "other"
_ROLES = ("eos_token", "bos_token", "pad_token")  # in the order in which tokens of other names are matched
_SHARE = 0.99  # of the ordinary tokens of either vocabulary that both must have
_MOST_PADDING = 4096  # rows of a head, or a sixteenth of the vocabulary: DeepSeek V2 has 2,398
_BYTES = {ord(letter): byte for byte, letter in bytes_to_unicode().items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def unwrap_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a tokenizer or a multimodal processor; None for image processors and None."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


@dataclass(frozen=True)
class VocabularyMatch:
    """How the tokens of a backbone's vocabulary follow from a reward's.

    - `identical`: all tokens have the same ids.
    - `extended`: the backbone has all tokens of the reward at the same ids, and more.
    - `renamed`: the ordinary tokens have the same ids; added ones differ.
    - `moved`: at least 99 % of the ordinary tokens are the same, at other ids.
    - `other`: another vocabulary, which a reward cannot be added to.

    Attributes:
        kind (`str`): one of these.
        size (`int`): the number of the backbone's token ids.
        reward_size (`int`): the number of the reward's token ids.
        columns (`torch.LongTensor` of shape `(size,)`, *optional*): the reward's token for each of the backbone's, -1
            where it is neutral; None if they are identical.
        renamed (`dict[str, str]`): the backbone's token -> the reward's, of the same role and another name, or as
            `token_map` says.
        spelled (`dict[int, tuple[int, ...]]`): neutral token -> the reward's tokens that it is read as; none if it is
            left out.
        dropped (`int`): the number of the reward's tokens that the backbone lacks.
        difference (`str`): what differs, for errors.
    """

    kind: str
    size: int
    reward_size: int
    columns: torch.LongTensor | None = field(default=None, repr=False)
    renamed: dict[str, str] = field(default_factory=dict)
    spelled: dict[int, tuple[int, ...]] = field(default_factory=dict, repr=False)
    dropped: int = 0
    difference: str = ""

    @property
    def is_identical(self) -> bool:
        """Whether nothing has to be translated."""
        return self.kind == IDENTICAL

    @property
    def neutral(self) -> int:
        """The number of the backbone's tokens that the reward does not score."""
        return len(self.spelled)

    def __str__(self) -> str:
        if self.kind == OTHER:
            return f"{OTHER}: {self.difference}"
        if self.is_identical:
            return f"{IDENTICAL}: {self.size:,} tokens"
        parts = [f"{self.kind}: {self.size - self.neutral:,} of {self.size:,} tokens are the reward's"]
        if self.renamed:
            names = ", ".join(f"{new!r} = {old!r}" for new, old in self.renamed.items())
            parts.append(f"of them by another name {names}")
        if self.neutral:
            parts.append(f"{self.neutral:,} keep the backbone's probability")
        if self.dropped:
            parts.append(f"{self.dropped:,} of the reward's are not used")
        return "; ".join(parts)

    @cached_property
    def to_reward(self) -> Translation:
        """The translation of the backbone's token ids for the reward."""
        return Translation(self.columns, self.spelled)

    @cached_property
    def to_backbone(self) -> Translation:
        """The translation of the reward's token ids for the backbone; tokens that it lacks are refused."""
        ids = torch.full((self.reward_size,), -1)
        shared = self.columns >= 0
        ids[self.columns[shared]] = torch.arange(self.size)[shared]
        return Translation(ids)

    def columns_on(self, device: torch.device) -> torch.LongTensor | None:
        """Return `columns` on a device."""
        return None if self.columns is None else self.to_reward.ids_on(device)


@dataclass(frozen=True)
class VocabularyContract:
    """The token -> id map that a language model's logits are indexed by.

    Args:
        size (`int`): largest token id plus one; model heads may be padded beyond it.
        fingerprint (`str`): SHA-256 of the map, ordered by id.
        special_tokens (`dict`): role (`"eos_token"`, ...) -> token.
        ordinary (`str`): SHA-256 of the ordinary tokens in the order of their ids, as bytes of text.
        added (`dict`): added token -> id.
        vocabulary (`Mapping[bytes, int]`, *optional*): the map of all tokens, as bytes of text; not written to files.
    """

    kind: ClassVar[str] = "vocabulary"

    size: int
    fingerprint: str
    special_tokens: dict[str, str] = field(default_factory=dict)
    ordinary: str = ""
    added: dict[str, int] = field(default_factory=dict)
    vocabulary: Mapping[bytes, int] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> "VocabularyContract":
        """Read the map of a tokenizer.

        Raises:
            PRTValueError: it has no tokens.
        """
        tokens = dict(sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])))
        if not tokens:
            raise PRTValueError(f"{type(tokenizer).__name__} has no tokens.", expected="a tokenizer with a vocabulary")
        roles = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {role: str(token) for role in roles if (token := getattr(tokenizer, role, None)) is not None}
        fingerprint = hashlib.sha256(json.dumps(list(tokens.items())).encode()).hexdigest()
        added = {str(token): index for index, token in sorted(tokenizer.added_tokens_decoder.items())}
        as_bytes = _spelling(tokenizer)
        # An added token hides an ordinary one of its name or id: the tokenizer decodes to it.
        hidden = set(added.values())
        ordinary = {
            as_bytes(token, tokens): index
            for token, index in tokens.items()
            if token not in added and index not in hidden
        }
        digest = hashlib.sha256(b"".join(len(token).to_bytes(4, "big") + token for token in ordinary)).hexdigest()
        vocabulary = ordinary | {token.encode(): index for token, index in added.items()}
        return cls(max(tokens.values()) + 1, fingerprint, special, digest, added, vocabulary)

    def match(
        self,
        backbone: "VocabularyContract",
        token_map: Mapping[str, str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> VocabularyMatch:
        """Match the tokens of a backbone with the reward's.

        Tokens of the same string are the same, and tokens of the same role (end, beginning, padding) that have no
        namesake. All others are neutral.

        Args:
            backbone: its contract.
            token_map (*optional*): the backbone's tokens -> the reward's tokens that they stand for; goes before names
                and roles.
            tokenizer (*optional*): the reward's, which spells tokens that the reward does not know, where they stand in
                a text; without it they are left out.

        Raises:
            PRTValueError: `token_map` names an unknown token, or maps two tokens onto one.
        """
        if not token_map and (self.fingerprint, self.size) == (backbone.fingerprint, backbone.size):
            return VocabularyMatch(IDENTICAL, backbone.size, self.size)
        ours, theirs = self._tokens_beside(backbone), backbone._tokens_beside(self)
        if ours is None or theirs is None:
            found = f"{backbone.size:,} tokens, in which at least one ordinary token differs"
            return VocabularyMatch(OTHER, backbone.size, self.size, difference=found)
        common = ours.keys() & theirs.keys()
        pairs = {token: token for token in common}  # the backbone's token -> the reward's
        if problem := self._conflict(backbone, ours, theirs):
            return VocabularyMatch(OTHER, backbone.size, self.size, difference=problem)
        mapped = dict(token_map or {})
        for new, old in mapped.items():
            _check_mapped(new, theirs, "backbone")
            _check_mapped(old, ours, "reward")
        if len(set(mapped.values())) < len(mapped):
            raise PRTValueError(
                "`token_map` maps two tokens onto one.",
                expected="another token of the reward for each of the backbone's",
                found=str(mapped),
            )
        same_role = _same_roles(self, backbone, ours, theirs).items()
        taken = {*mapped, *mapped.values()}
        renamed = {new: old for new, old in same_role if new not in taken and old not in taken} | mapped
        for new, old in renamed.items():
            pairs.pop(old.encode(), None)
            pairs[new.encode()] = old.encode()
        columns = torch.full((backbone.size,), -1)
        new_ids, old_ids = torch.tensor([(theirs[new], ours[old]) for new, old in pairs.items()]).T
        columns[new_ids] = old_ids
        added = {token.encode() for token in (*self.added, *backbone.added)}
        if any(ours[token] != theirs[token] for token in common - added):
            kind = MOVED
        elif not renamed and all(theirs.get(token) == index for token, index in ours.items()):
            kind = EXTENDED
        else:
            kind = RENAMED
        names = {index: token for token, index in theirs.items()}
        neutral = (columns < 0).nonzero()[:, 0].tolist()
        spell = _speller(tokenizer, backbone.special_tokens)
        spelled = {index: spell(names[index]) if index in names else () for index in neutral}
        dropped = len(ours) - len(pairs)
        return VocabularyMatch(kind, backbone.size, self.size, columns, renamed, spelled, dropped)

    def check(
        self,
        backbone: "VocabularyContract",
        owner: str = "backbone",
        token_map: Mapping[str, str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> VocabularyMatch:
        """Match the tokens of a backbone, and refuse another vocabulary. See [`match`].

        Args:
            backbone: its contract; its head may be padded, and it may end or pad with other tokens.
            owner: whose vocabulary it is, for the error.
            token_map: as in [`match`].
            tokenizer: as in [`match`].

        Raises:
            VocabularyMismatchError: another vocabulary; shows sizes and a few differing tokens.
            PRTValueError: as in [`match`].
        """
        if not isinstance(backbone, VocabularyContract):
            raise VocabularyMismatchError(
                "The reward scores vocabulary tokens, the backbone does not.",
                expected="a causal language model",
                found=f"a backbone with a {backbone.kind} contract",
            )
        match = self.match(backbone, token_map, tokenizer)
        if match.kind == OTHER:
            raise VocabularyMismatchError(
                f"The vocabulary of the {owner} is not the reward's.",
                expected=f"the {self.size} tokens that the reward was tuned with, or an update of that vocabulary",
                found=match.difference,
                remedy=f"use a {owner} of the same family, or tune a reward for this one",
            )
        ours, theirs = (contract.special_tokens.get("eos_token") for contract in (self, backbone))
        end = (backbone._tokens_beside(self) or {}).get(theirs.encode()) if theirs else None
        if end is not None and match.columns is not None and int(match.columns[end]) < 0:
            logger.warning(
                f"The reward does not know the backbone's end token {theirs!r}, so it cannot end a text: "
                f"token_map={{{theirs!r}: {ours or '<its end token>'!r}}} says which of its tokens that is."
            )
        elif match.renamed:
            logger.warning(f"The vocabulary of the {owner} is the reward's with other names. {match}.")
        elif ours and theirs and ours != theirs:
            logger.warning(
                f"The reward was tuned with the end token {ours!r}, the backbone stops at {theirs!r}: pass "
                f"`eos_token_id` to `generate` for both if texts do not end."
            )
        return match

    def check_head(self, columns: int, owner: str = "backbone") -> None:
        """Accept logits with at least as many columns as there are tokens, and as many more as may be padding.

        Args:
            columns: number of logits per position.
            owner: whose head it is, for the error.

        Raises:
            VocabularyMismatchError: some tokens have no column, or too many columns have no token.
        """
        most = self.size + max(_MOST_PADDING, self.size // 16)
        if not self.size <= columns <= most:
            raise VocabularyMismatchError(
                f"The {owner}'s head does not belong to its tokenizer of {self.size} tokens.",
                expected=f"{self.size} to {most} logits per position",
                found=str(columns),
                remedy="use the tokenizer that belongs to the model",
            )

    def _tokens_beside(self, other: "VocabularyContract") -> Mapping[bytes, int] | None:
        """Return the token -> id map; one that is read from a file takes equal ordinary tokens from the other's."""
        if self.vocabulary is not None or other.vocabulary is None or self.ordinary != other.ordinary:
            return self.vocabulary
        taken, ordinary = set(self.added.values()), other._ordinary_of(other.vocabulary)
        if self.size - len(taken) != len(ordinary):
            return None
        free = [index for index in range(self.size) if index not in taken]
        return dict(zip(ordinary, free, strict=True)) | {token.encode(): index for token, index in self.added.items()}

    def _ordinary_of(self, tokens: Mapping[bytes, int]) -> dict[bytes, int]:
        """Return all but the added tokens."""
        added = {token.encode() for token in self.added}
        return {token: index for token, index in tokens.items() if token not in added}

    def _conflict(
        self, backbone: "VocabularyContract", ours: Mapping[bytes, int], theirs: Mapping[bytes, int]
    ) -> str | None:
        """Return why the ordinary tokens are not the same; None if they are."""
        if self.ordinary and self.ordinary == backbone.ordinary:
            return None
        ordinary = self._ordinary_of(ours), backbone._ordinary_of(theirs)
        lost = {token: index for token, index in ordinary[0].items() if token not in theirs}
        new = {token: index for token, index in ordinary[1].items() if token not in ours}
        share = min(1 - len(lost) / max(1, len(ordinary[0])), 1 - len(new) / max(1, len(ordinary[1])))
        if share >= _SHARE and not set(lost.values()) & set(new.values()):
            return None
        differing = [f"{_shown(token)} ({index} -> {theirs.get(token, 'absent')})" for token, index in lost.items()]
        differing += [f"{_shown(token)} (absent -> {index})" for token, index in new.items()]
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        return (
            f"{backbone.size} tokens, {100 * share:.2f} % of the ordinary ones shared; {len(differing)} differ, as "
            f"token (id in the reward -> id in the backbone): {', '.join(differing[:SHOWN])}{more}"
        )


def _same_roles(
    reward: VocabularyContract, backbone: VocabularyContract, ours: Mapping[bytes, int], theirs: Mapping[bytes, int]
) -> dict[str, str]:
    """Return the backbone's end, beginning and padding tokens -> the reward's, where these have no namesake."""
    old_tokens, new_tokens = (
        {role: tokens[role] for role in _ROLES if role in tokens}
        for tokens in (reward.special_tokens, backbone.special_tokens)
    )
    at_one_id = [
        (new, old)
        for new in new_tokens.values()
        for old in old_tokens.values()
        if theirs.get(new.encode()) == ours.get(old.encode())
    ]
    renamed: dict[str, str] = {}
    for new, old in [*((new_tokens[role], old_tokens[role]) for role in new_tokens.keys() & old_tokens), *at_one_id]:
        is_free = new.encode() not in ours and old.encode() not in theirs
        if is_free and new not in renamed and old not in renamed.values():
            renamed[new] = old
    return renamed


def _check_mapped(token: str, tokens: Mapping[bytes, int], owner: str) -> None:
    if token.encode() not in tokens:
        raise PRTValueError(
            "`token_map` names an unknown token.",
            expected="{token of the backbone: token of the reward}",
            found=f"{token!r}, which is no token of the {owner}",
        )


def _speller(
    tokenizer: PreTrainedTokenizerBase | None, special_tokens: Mapping[str, str]
) -> Callable[[bytes], tuple[int, ...]]:
    """Return a function from a token of a backbone to the tokens of `tokenizer` for the same text.

    Tokens that only begin or end a text are none of it, nor is what the tokenizer has no tokens for. Padding stands
    where a text has ended, and is read as one token, so that all rows of a batch grow alike.
    """
    roles = {token.encode(): role for role, token in special_tokens.items()}

    def spell(token: bytes) -> tuple[int, ...]:
        if tokenizer is None:
            return ()
        if token in roles:
            ends = [tokenizer.pad_token_id, tokenizer.eos_token_id]
            return tuple(index for index in ends if index is not None)[:1] if roles[token] == "pad_token" else ()
        try:
            ids = tokenizer.encode(token.decode(), add_special_tokens=False)
        except UnicodeDecodeError:
            return ()
        return () if tokenizer.unk_token_id in ids else tuple(ids)

    return spell


def _spelling(tokenizer: PreTrainedTokenizerBase) -> Callable[[str, Mapping[str, int]], bytes]:
    """Return a function from an ordinary token to the bytes of text that it stands for.

    Byte-level BPE writes a space as "Ġ", SentencePiece as "▁", and a byte that no token holds as "<0x0A>".
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    form = "" if decoder is None else decoder.__getstate__().decode()

    def byte_level(token: str, tokens: Mapping[str, int]) -> bytes:
        try:
            return token.translate(_BYTES).encode("latin-1")
        except UnicodeEncodeError:
            return token.encode()

    def sentencepiece(token: str, tokens: Mapping[str, int]) -> bytes:
        found = _BYTE_TOKEN.fullmatch(token)
        if found is None:
            return token.replace("▁", " ").encode()
        byte = int(found[1], 16)
        return token.encode() if byte < 128 and chr(byte).replace(" ", "▁") in tokens else bytes([byte])

    if "ByteLevel" in form:
        return byte_level
    return sentencepiece if "▁" in form or "\\u2581" in form else lambda token, _: token.encode()


def _shown(token: bytes) -> str:
    return repr(token.decode("utf-8", "replace"))
