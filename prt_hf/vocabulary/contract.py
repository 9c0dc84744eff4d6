"""Read the vocabulary of a tokenizer, and match that of a backbone with a reward's."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from json.encoder import encode_basestring_ascii
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import PRTValueError, VocabularyMismatchError
from .match import EXTENDED, IDENTICAL, MOVED, OTHER, RENAMED, VocabularyMatch
from .spelling import speller, spelling

logger = logging.get_logger(__name__)

SHOWN = 5  # differences that an error shows
_ROLES = ("eos_token", "bos_token", "pad_token")  # in the order in which tokens of other names are matched
_SHARE = 0.99  # of the ordinary tokens of either vocabulary that both must have
_MOST_PADDING = 4096  # rows of a head, or a sixteenth of the vocabulary: DeepSeek V2 has 2,398

# The contract of each tokenizer, with all that its methods may change: 150,000 tokens take half a second to read.
_READ: "WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple, VocabularyContract]]" = WeakKeyDictionary()


def unwrap_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a tokenizer or a multimodal processor; None for image processors and None."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


@dataclass(frozen=True)
class VocabularyContract:
    """The tokens that a language model's logits are indexed by.

    Args:
        size (`int`): largest token id plus one; model heads may be padded beyond it.
        fingerprint (`str`): SHA-256 of the map, ordered by id.
        special_tokens (`dict`): role (`"eos_token"`, ...) -> token.
        ordinary (`str`): SHA-256 of the ordinary tokens in the order of their ids, as bytes of text.
        added (`dict`): added token -> id.
        vocabulary (`Mapping[bytes, int]`, *optional*): ordinary token, as bytes of text -> id, in the order of ids; not
            written to files.
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
        """Read the map of a tokenizer; one that was read before is only read again if tokens or roles were added.

        Raises:
            PRTValueError: it has no tokens.
        """
        roles = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {role: str(token) for role in roles if (token := getattr(tokenizer, role, None)) is not None}
        added = {str(token): index for index, token in sorted(tokenizer.added_tokens_decoder.items())}
        state = len(tokenizer), added, special
        if tokenizer not in _READ or _READ[tokenizer][0] != state:
            _READ[tokenizer] = state, cls._read(tokenizer, added, special)
        return _READ[tokenizer][1]

    @classmethod
    def _read(
        cls, tokenizer: PreTrainedTokenizerBase, added: dict[str, int], special: dict[str, str]
    ) -> "VocabularyContract":
        ids = tokenizer.get_vocab()
        if not ids:
            raise PRTValueError(f"{type(tokenizer).__name__} has no tokens.", expected="a tokenizer with a vocabulary")
        has_two_names = len(set(ids.values())) < len(ids)  # for one id
        in_order = sorted(ids, key=(lambda token: (ids[token], token)) if has_two_names else ids.get)
        listed = ", ".join([f"[{encode_basestring_ascii(token)}, {ids[token]}]" for token in in_order])
        fingerprint = hashlib.sha256(f"[{listed}]".encode()).hexdigest()  # of JSON
        as_bytes = spelling(tokenizer, ids)
        # An added token hides an ordinary one of its name or id: the tokenizer decodes to it.
        hidden = set(added.values())
        ordinary = {
            as_bytes(token): ids[token] for token in in_order if token not in added and ids[token] not in hidden
        }
        digest = hashlib.sha256(b"".join([len(token).to_bytes(4, "big") + token for token in ordinary])).hexdigest()
        return cls(max(ids.values()) + 1, fingerprint, special, digest, added, ordinary)

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
        if not token_map and self.has_same_ids(backbone):
            return VocabularyMatch(IDENTICAL, backbone.size, self.size)
        ordinary = self._ordinary_beside(backbone), backbone._ordinary_beside(self)
        if None in ordinary:
            found = f"{backbone.size:,} tokens, in which at least one ordinary token differs"
            return VocabularyMatch(OTHER, backbone.size, self.size, difference=found)
        # The tokenizer encodes to an added token where an ordinary one stands for the same text.
        ours, theirs = (
            tokens | {token.encode(): index for token, index in contract.added.items()}
            for contract, tokens in zip((self, backbone), ordinary, strict=True)
        )
        if problem := self._conflict(backbone, ordinary, (ours, theirs)):
            return VocabularyMatch(OTHER, backbone.size, self.size, difference=problem)
        if not token_map and self.size == backbone.size and ours == theirs:  # spelled in another way
            return VocabularyMatch(IDENTICAL, backbone.size, self.size)
        columns = torch.full((backbone.size,), -1)
        columns[torch.tensor(list(theirs.values()))] = torch.tensor([ours.get(token, -1) for token in theirs])
        is_shared, is_in_place = columns >= 0, columns == torch.arange(backbone.size)
        added = {token.encode() for token in (*self.added, *backbone.added)}
        is_moved = is_shared & ~is_in_place
        is_moved[[theirs[token] for token in added & theirs.keys()]] = False

        renamed = self._renamed(backbone, ours, theirs, token_map or {})
        for old in renamed.values():  # before all others are set: one may be the name of another
            if old.encode() in theirs:
                columns[theirs[old.encode()]] = -1
        for new, old in renamed.items():
            columns[theirs[new.encode()]] = ours[old.encode()]
        if bool(is_moved.any()):
            kind = MOVED
        else:
            kind = EXTENDED if not renamed and int(is_in_place.sum()) == len(ours) else RENAMED
        is_neutral = (columns < 0).tolist()
        names = {index: token for token, index in theirs.items() if is_neutral[index]}
        spell = speller(tokenizer, backbone.special_tokens)
        neutral = [index for index in range(backbone.size) if is_neutral[index]]
        spelled = {index: spell(names[index]) if index in names else () for index in neutral}
        dropped = len(ours) - (backbone.size - len(neutral))
        return VocabularyMatch(kind, backbone.size, self.size, columns, renamed, spelled, dropped)

    def check(
        self,
        backbone: "VocabularyContract",
        token_map: Mapping[str, str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        across_vocabularies: bool = False,
    ) -> VocabularyMatch:
        """Match the tokens of a backbone, and refuse another vocabulary. See [`match`].

        Args:
            backbone: its contract; its head may be padded, and it may end or pad with other tokens.
            token_map: as in [`match`].
            tokenizer: as in [`match`].
            across_vocabularies: accept another vocabulary, in a match of the kind `other`.

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
        if match.kind == OTHER and across_vocabularies:
            self.counterparts(backbone, token_map)  # refuses a wrong map
            return replace(match, renamed=dict(token_map or {}))
        if match.kind == OTHER:
            raise VocabularyMismatchError(
                "The vocabulary of the backbone is not the reward's.",
                expected=f"the {self.size} tokens that the reward was tuned with, or an update of that vocabulary",
                found=match.difference,
                remedy="`across_vocabularies=True` in a language model, a backbone of the same family, or a reward "
                "that is tuned for this one",
            )
        ours, theirs = (contract.special_tokens.get("eos_token") for contract in (self, backbone))
        end = None if theirs is None else backbone.id_of(theirs)
        if end is not None and match.columns is not None and int(match.columns[end]) < 0:
            logger.warning_once(
                f"The reward does not know the backbone's end token {theirs!r}, so it cannot end a text: "
                f"token_map={{{theirs!r}: {ours or '<its end token>'!r}}} says which of its tokens that is."
            )
        elif match.renamed:
            logger.warning_once(f"The vocabulary of the backbone is the reward's with other names. {match}.")
        elif ours and theirs and ours != theirs:
            logger.warning_once(
                f"The reward was tuned with the end token {ours!r}, the backbone stops at {theirs!r}: pass "
                f"`eos_token_id` to `generate` for both if texts do not end."
            )
        return match

    def has_same_ids(self, other: "VocabularyContract") -> bool:
        """Return whether all tokens have the same ids, without matching them one by one."""
        return (self.fingerprint, self.size) == (other.fingerprint, other.size)

    def named_by(self, tokenizer: PreTrainedTokenizerBase) -> "VocabularyContract":
        """Return this contract with the names of tokens, from the tokenizer that it was made of.

        Raises:
            VocabularyMismatchError: it is another tokenizer.
        """
        found = VocabularyContract.from_tokenizer(tokenizer)
        if not self.has_same_ids(found):
            raise VocabularyMismatchError(
                "The reward's own tokenizer is not the one that it was tuned with.",
                expected=f"the same {self.size} tokens",
                found=str(self.match(found)),
            )
        return replace(found, special_tokens=self.special_tokens)

    def id_of(self, token: str) -> int | None:
        """Return the id of a token as it stands in a text; None if there is none, or names are not known."""
        return self.added.get(token, (self.vocabulary or {}).get(token.encode()))

    def counterparts(
        self, backbone: "VocabularyContract", token_map: Mapping[str, str] | None = None
    ) -> dict[int, int]:
        """Return the added tokens of a backbone with another vocabulary -> the reward's, of the same name or role.

        Args:
            backbone: its contract.
            token_map: as in [`match`].

        Raises:
            PRTValueError: as in [`match`].
        """
        ours, theirs = (
            {**(contract.vocabulary or {}), **{token.encode(): index for token, index in contract.added.items()}}
            for contract in (self, backbone)
        )
        names = {token: token for token in backbone.added if token in self.added}
        names |= self._renamed(backbone, ours, theirs, token_map or {})
        return {theirs[new.encode()]: ours[old.encode()] for new, old in names.items()}

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

    def _ordinary_beside(self, other: "VocabularyContract") -> Mapping[bytes, int] | None:
        """Return the ordinary tokens; a contract that is read from a file takes equal ones from the other's."""
        if self.vocabulary is not None or other.vocabulary is None or self.ordinary != other.ordinary:
            return self.vocabulary
        taken = set(self.added.values())
        if self.size - len(taken) != len(other.vocabulary):  # ids are left out, and the file does not tell which
            return None
        free = (index for index in range(self.size) if index not in taken)
        return dict(zip(other.vocabulary, free, strict=True))

    def _renamed(
        self,
        backbone: "VocabularyContract",
        ours: Mapping[bytes, int],
        theirs: Mapping[bytes, int],
        token_map: Mapping[str, str],
    ) -> dict[str, str]:
        """Return the backbone's tokens -> the reward's tokens of other names, as `token_map` says or by their roles."""
        for new, old in token_map.items():
            _check_mapped(new, theirs, "backbone")
            _check_mapped(old, ours, "reward")
        if len(set(token_map.values())) < len(token_map):
            raise PRTValueError(
                "`token_map` maps two tokens onto one.",
                expected="another token of the reward for each of the backbone's",
                found=str(dict(token_map)),
            )
        same_role = _same_roles(self, backbone, ours, theirs).items()
        taken = {*token_map, *token_map.values()}
        return {new: old for new, old in same_role if new not in taken and old not in taken} | dict(token_map)

    def _conflict(
        self,
        backbone: "VocabularyContract",
        ordinary: tuple[Mapping[bytes, int], Mapping[bytes, int]],
        tokens: tuple[Mapping[bytes, int], Mapping[bytes, int]],
    ) -> str | None:
        """Return why the ordinary tokens, of reward and backbone, are not the same; None if they are."""
        if self.ordinary and self.ordinary == backbone.ordinary:
            return None
        ours, theirs = tokens
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
    # A tokenizer may name a token that it does not have.
    old_tokens, new_tokens = (
        {role: token for role in _ROLES if (token := contract.special_tokens.get(role, "")).encode() in tokens}
        for contract, tokens in ((reward, ours), (backbone, theirs))
    )
    at_one_id = [
        (new, old)
        for new in new_tokens.values()
        for old in old_tokens.values()
        if theirs[new.encode()] == ours[old.encode()]
    ]
    same_role = [(new, old_tokens[role]) for role, new in new_tokens.items() if role in old_tokens]
    renamed: dict[str, str] = {}
    for new, old in same_role + at_one_id:
        is_free = new.encode() not in ours and old.encode() not in theirs
        if is_free and new not in renamed and old not in renamed.values():
            renamed[new] = old
    return renamed


def _check_mapped(token: str, tokens: Mapping[bytes, int], owner: str) -> None:
    if not isinstance(token, str) or token.encode("utf-8", "surrogatepass") not in tokens:
        raise PRTValueError(
            "`token_map` names an unknown token.",
            expected="{token of the backbone: token of the reward}",
            found=f"{token!r}, which is no token of the {owner}",
        )


def _shown(token: bytes) -> str:
    return repr(token.decode("utf-8", "replace"))
