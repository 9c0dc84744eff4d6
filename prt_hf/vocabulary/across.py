"""The map between two vocabularies that share no ids: which tokens of one stand for which of the other."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import PRTValueError
from .byte_tokens import ByteTokens
from .contract import VocabularyContract

_REMEMBERED = 1 << 17  # continuations of a text by a token


class Tables(NamedTuple):
    """The map as tensors on one device; "stands for" is explained at [`VocabularyMap`].

    Attributes:
        columns (`torch.LongTensor` of shape `(target.size,)`): its own id for each of the backbone's tokens; -1 for
            those that no source token stands for, which are neutral.
        first (`torch.LongTensor` of shape `(target.size,)`): the first source token that each is spelled with.
        second (`torch.LongTensor` of shape `(target.size,)`): the second one, if there is one.
        is_single (`torch.BoolTensor` of shape `(target.size,)`): tokens that both vocabularies have.
        pushing, pushed (`torch.LongTensor` of shape `(pairs,)`): source tokens, and what they stand for as indices
            into `several`.
        several (`torch.LongTensor`): the backbone's tokens that another source token stands for than the same.
        waiting (`torch.LongTensor`): the backbone's tokens that are spelled with several, in the order of the first.
    """

    columns: torch.LongTensor
    first: torch.LongTensor
    second: torch.LongTensor
    is_single: torch.BoolTensor
    pushing: torch.LongTensor
    pushed: torch.LongTensor
    several: torch.LongTensor
    waiting: torch.LongTensor


class VocabularyMap:
    """How the tokens of a reward, the source, and those of a backbone, the target, spell the same texts.

    A source token *stands for* the token with which the target's tokenizer begins to write the same text: itself where
    both have it. Every source token stands for one token, so probabilities of source tokens become probabilities of
    the target's, which add up to the same sum. Conversely, each of the target's tokens is *spelled* with one or several
    source tokens.

    Args:
        source: the reward's tokens.
        target: the backbone's tokens.
        counterparts (mapping of `int` to `int`): special tokens of the target -> those of the source;
            those that are text to both are left out.
    """

    def __init__(self, source: ByteTokens, target: ByteTokens, counterparts: Mapping[int, int]):
        self.source, self.target = source, target
        self.counterparts = {
            new: old for new, old in counterparts.items() if target.bytes[new] is None or source.bytes[old] is None
        }
        to_target, spelled = self._identical()
        self._shared = frozenset(to_target)
        self.same = [-1] * target.size
        for token, ids in spelled.items():
            self.same[token] = ids[0]
        unlike = [v for v, text in enumerate(target.bytes) if text and v not in spelled]
        encoded = source.encode_many([target.bytes[v] for v in unlike])
        spelled |= {v: ids for v, ids in zip(unlike, encoded, strict=True) if ids}
        unlike = [y for y, text in enumerate(source.bytes) if text and y not in to_target]
        begun = target.first_of_many([source.bytes[y] for y in unlike])
        to_target |= {y: v for y, v in zip(unlike, begun, strict=True) if v >= 0}
        self._tables = {torch.device("cpu"): self._tabulated(to_target, spelled)}
        self._continued = lru_cache(_REMEMBERED)(self._continuation)

    @classmethod
    def between(
        cls,
        reward: VocabularyContract,
        backbone: VocabularyContract,
        tokenizer: PreTrainedTokenizerBase | None,
        backbone_tokenizer: PreTrainedTokenizerBase,
        token_map: Mapping[str, str] | None = None,
    ) -> "VocabularyMap":
        """Return the map from a reward's tokens to a backbone's.

        Args:
            reward: contract of the reward.
            backbone: contract of the backbone.
            tokenizer: the reward's.
            backbone_tokenizer: the backbone's.
            token_map (*optional*): as in [`VocabularyContract.match`].

        Raises:
            UnsupportedError: a tokenizer that is slow or changes texts.
            PRTValueError: the reward has no tokenizer, or `token_map` is wrong.
        """
        if tokenizer is None:
            raise PRTValueError(
                "The reward has no tokenizer, and cannot read texts of another vocabulary.",
                expected="the tokenizer that it was tuned with",
                remedy="save it beside the reward: tokenizer.save_pretrained(folder)",
            )
        return cls(ByteTokens(tokenizer), ByteTokens(backbone_tokenizer), reward.counterparts(backbone, token_map))

    def in_place(self, ids: Sequence[int]) -> int:
        """Return how many of the target's tokens of a text are one source token each where the source reads it."""
        text = self.target.text(ids)
        source = self.source.encode(text)
        ours, theirs = (
            {*pairwise(accumulate((len(side.bytes[index] or b"") for index in tokens), initial=0))}
            for side, tokens in ((self.source, source), (self.target, ids))
        )
        return sum(end > start for start, end in ours & theirs)

    def _identical(self) -> tuple[dict[int, int], dict[int, list[int]]]:
        """Return the tokens that both have: source -> target, and target -> source."""
        source, target = self.source, self.target
        ours, theirs = source.tokenizer.get_vocab(), target.tokenizer.get_vocab()
        spelled = {new: [old] for new, old in self.counterparts.items()}
        to_target = {old: new for new, old in self.counterparts.items()}
        for name, new in theirs.items():  # by name first: several tokens may stand for the same bytes
            old = ours.get(name)
            if old is not None and source.bytes[old] and source.bytes[old] == target.bytes[new]:
                spelled.setdefault(new, [old])
                to_target.setdefault(old, new)
        for new, text in enumerate(target.bytes):
            if text and text in source.ids:
                spelled.setdefault(new, [source.ids[text]])
        for old, text in enumerate(source.bytes):
            if text and text in target.ids:
                to_target.setdefault(old, target.ids[text])
        return to_target, spelled

    def _tabulated(self, to_target: Mapping[int, int], spelled: Mapping[int, Sequence[int]]) -> Tables:
        size = self.target.size
        same = torch.tensor(self.same)
        first, second, lengths = torch.full((3, size), -1)
        tokens = torch.tensor(list(spelled), dtype=torch.long)
        lengths[tokens] = torch.tensor([len(ids) for ids in spelled.values()])
        first[tokens] = torch.tensor([ids[0] for ids in spelled.values()])
        second[tokens] = torch.tensor([ids[1] if len(ids) > 1 else -1 for ids in spelled.values()])
        pushing = torch.tensor(list(to_target), dtype=torch.long)
        pushed = torch.tensor(list(to_target.values()), dtype=torch.long)
        several = pushed[same[pushed] != pushing].unique()
        places = torch.full((size,), -1)
        places[several] = torch.arange(len(several))
        is_kept = places[pushed] >= 0
        waiting = (lengths > 1).nonzero()[:, 0]
        return Tables(
            columns=torch.arange(size).masked_fill(first < 0, -1),
            first=first.clamp(min=0),
            second=second.clamp(min=0),
            is_single=same >= 0,
            pushing=pushing[is_kept],
            pushed=places[pushed[is_kept]],
            several=several,
            waiting=waiting[first[waiting].argsort(stable=True)],
        )

    def on(self, device: torch.device) -> Tables:
        """Return the tables on a device."""
        if device not in self._tables:
            self._tables[device] = Tables(*(table.to(device) for table in self._tables[torch.device("cpu")]))
        return self._tables[device]

    def continuations(self, history: tuple[int, ...], known: int, tokens: Sequence[int]) -> list[int]:
        """Return the token with which the target goes on when it reads what source tokens add to its text.

        Args:
            history: the target's last tokens.
            known: number of bytes of the source tokens that these stand for already.
            tokens: source tokens.

        Returns:
            `list[int]`: -1 where the target would have written its history with other tokens.
        """
        sizes = accumulate(len(self.target.bytes[index]) for index in reversed(history))
        is_whole = known in sizes  # so the target would have written what both have as it is
        return [
            -1 if is_whole and token in self._shared else self._continued(history, self.source.bytes[token][known:])
            for token in tokens
        ]

    def _continuation(self, history: tuple[int, ...], rest: bytes) -> int:
        text = self.target.text(history) + rest
        ids = self.target.encode(text)
        length = len(history)
        if tuple(ids[:length]) != history or len(ids) == length:
            return -1
        return ids[length]
