"""The match of two vocabularies: which tokens are the same, and how texts and columns are translated."""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from .translation import Translation

IDENTICAL, RENAMED, EXTENDED, MOVED, OTHER = "identical", "renamed", "extended", "moved", "other"


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
            parts.append(f"{self.neutral:,} {'keeps' if self.neutral == 1 else 'keep'} the backbone's probability")
        if self.dropped:
            parts.append(f"{self.dropped:,} of the reward's {'is' if self.dropped == 1 else 'are'} not used")
        return "; ".join(parts)

    @cached_property
    def to_reward(self) -> Translation:
        """The translation of the backbone's token ids for the reward."""
        return Translation(self.columns, self.spelled)

    @cached_property
    def to_backbone(self) -> Translation:
        """The translation of the reward's token ids for the backbone, -1 for tokens that it lacks."""
        ids = torch.full((self.reward_size,), -1)
        shared = self.columns >= 0
        ids[self.columns[shared]] = torch.arange(self.size)[shared]
        return Translation(ids)

    def columns_on(self, device: torch.device) -> torch.LongTensor | None:
        """Return `columns` on a device."""
        return None if self.columns is None else self.to_reward.ids_on(device)
