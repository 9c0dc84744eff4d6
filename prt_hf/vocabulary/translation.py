"""Translation of token ids between two vocabularies that share most of their tokens."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..errors import VocabularyMismatchError


class TranslatedRows(NamedTuple):
    """Rows of token ids for a network with another vocabulary.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(batch_size, new_length)`): the tokens; 0 at padding.
        attention_mask (`torch.LongTensor` of the same shape): 0 at padding.
        sources (`torch.LongTensor` of the same shape): the position that each token comes from.
        ends (`torch.LongTensor` of shape `(batch_size, length)`): for each position, the position of the last token
            that has been read by then; -1 before the first one.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor
    sources: torch.LongTensor
    ends: torch.LongTensor

    def at_ends(self, values: torch.Tensor) -> torch.Tensor:
        """Return values of all new positions at the old ones, 0 before the first token.

        `(batch_size, new_length, n)` -> `(batch_size, length, n)`.
        """
        ends = self.ends.to(values.device)[..., None]
        found = values.gather(1, ends.clamp(min=0).expand(-1, -1, values.shape[-1]))
        return found.masked_fill(ends < 0, 0)


class Translation:
    """The ids of one vocabulary in terms of another.

    Args:
        ids (`torch.LongTensor` of shape `(size,)`): the other vocabulary's id for each token; -1 where it has none.
        spelled (mapping from `int` to a tuple of `int`, *optional*): several ids, or none, for those tokens, which
            [`rows`] needs.
    """

    def __init__(self, ids: torch.LongTensor, spelled: Mapping[int, tuple[int, ...]] | None = None):
        self._tables = {ids.device: ids}
        self._ids = ids
        spelled = spelled or {}
        lengths = torch.ones_like(ids)
        for token, others in spelled.items():
            lengths[token] = len(others)
        self._lengths, self._starts = lengths, lengths.cumsum(0) - lengths
        self._flat = ids.repeat_interleave(lengths)
        for token, others in spelled.items():
            start = int(self._starts[token])
            self._flat[start : start + len(others)] = torch.tensor(others, dtype=ids.dtype)

    def ids_on(self, device: torch.device) -> torch.LongTensor:
        """Return the ids on a device."""
        if device not in self._tables:
            self._tables[device] = self._ids.to(device)
        return self._tables[device]

    def one_to_one(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.LongTensor | None:
        """Return one id for each token, 0 at padding; None if a token has several or none.

        Raises:
            VocabularyMismatchError: an id is beyond the vocabulary.
        """
        table = self.ids_on(input_ids.device)
        check_ids(input_ids, len(table))
        ids = table[input_ids]
        is_unknown = ids < 0
        if attention_mask is not None:
            is_padding = attention_mask.to(ids.device) == 0
            ids, is_unknown = ids.masked_fill(is_padding, 0), is_unknown & ~is_padding
        return None if bool(is_unknown.any()) else ids

    def rows(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None) -> TranslatedRows:
        """Translate rows; padding is left out, and made anew at the right, since rows may differ in length now.

        Args:
            input_ids: `(batch_size, length)`.
            attention_mask (*optional*): of the same shape; 0 at padding.

        Raises:
            VocabularyMismatchError: an id is beyond the vocabulary.
        """
        device, (count, length) = input_ids.device, input_ids.shape
        input_ids = input_ids.cpu()
        check_ids(input_ids, len(self._ids))
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.cpu()
        lengths = self._lengths[input_ids] * (mask != 0)
        counts = lengths.flatten()
        firsts = torch.repeat_interleave(self._starts[input_ids].flatten(), counts)
        within = torch.arange(len(firsts)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        totals = lengths.sum(1, keepdim=True)
        # A row without any token still needs a position to be computed at.
        width = max(1, int(totals.max()))
        places = torch.arange(width)[None].expand(count, -1)
        is_token = places < totals
        found, sources = torch.zeros(2, count, width, dtype=torch.long)
        found[is_token] = self._flat[firsts + within]
        sources[is_token] = torch.repeat_interleave(torch.arange(length).repeat(count), counts)
        ends = lengths.cumsum(1) - 1
        return TranslatedRows(*(each.to(device) for each in (found, is_token.long(), sources, ends)))


def check_ids(input_ids: torch.LongTensor, size: int) -> None:
    """Check that token ids are of a vocabulary.

    Raises:
        VocabularyMismatchError: one is beyond it.
    """
    wrong = input_ids[(input_ids < 0) | (input_ids >= size)]
    if len(wrong):
        raise VocabularyMismatchError(
            "The text holds a token id that the tokenizer does not have.",
            expected=f"ids below {size}",
            found=str(int(wrong[0])),
            remedy="use the backbone's own tokenizer, which the text was encoded with",
        )
