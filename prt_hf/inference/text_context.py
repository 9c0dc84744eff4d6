"""Read the rows of a backbone as texts in the tokens of another vocabulary."""

from typing import NamedTuple

import torch

from ..errors import UnsupportedError
from ..vocabulary import OTHER, VocabularyMatch
from ..vocabulary.across import VocabularyMap
from ..vocabulary.translation import check_ids
from .context import RewardContext

_REMEMBERED = 4096  # rows


class TextContext(NamedTuple):
    """The text of one row.

    Attributes:
        path (`list[int]`): source tokens of the whole text.
        fixed (`int`): number of them that end with a special token or the reward's own prompt.
        history (`list[int]`): the backbone's tokens for the text after these.
    """

    path: list[int]
    fixed: int
    history: list[int]


class TextContexts(RewardContext):
    """The text of each row, written with the tokens of the source's tokenizer.

    Args:
        vocabularies: the map from the reward's tokens to the backbone's.
    """

    def __init__(self, vocabularies: VocabularyMap):
        self._map = vocabularies
        self._seen: dict[int, None] = {}  # hashes of rows
        match = VocabularyMatch(OTHER, vocabularies.target.size, vocabularies.source.size)
        super().__init__(vocabularies.target.tokenizer, match)

    def texts(self, input_ids: torch.LongTensor) -> list[TextContext]:
        """Return the texts of rows of the backbone's tokens, `(batch_size, sequence_length)`.

        Raises:
            VocabularyMismatchError: an id that the tokenizer does not have.
            PRTValueError: the mask or prompt belongs to other rows.
            UnsupportedError: a prompt holds a special token that the reward does not know.
        """
        check_ids(input_ids, self._map.target.size)
        if self._prompt.value is not None:
            copies = self._prompt.copies(input_ids, None, "prompt")
            starts = [
                ids[mask.bool()].tolist()
                for ids, mask in zip(self._prompt.value, self._prompt.mask, strict=True)
                for _ in range(copies)
            ]
            generated = input_ids[:, self._prompt.prompts.shape[1] :].tolist()
            return [self._text(start, ids, is_prompt=False) for start, ids in zip(starts, generated, strict=True)]
        mask = self._mask_of(input_ids)
        mask = torch.ones_like(input_ids) if mask is None else mask
        rows = [ids[each.bool()].tolist() for ids, each in zip(input_ids, mask, strict=True)]
        # A row that follows from an earlier one by one token is generated, others are prompts.
        is_prompt = [not {hash(tuple(ids)), hash(tuple(ids[:-1]))} & self._seen.keys() for ids in rows]
        texts = [self._text(None, ids, each) for ids, each in zip(rows, is_prompt, strict=True)]
        self._seen |= dict.fromkeys(hash(tuple(ids)) for ids in rows)
        for earlier in list(self._seen)[:-_REMEMBERED]:
            self._seen.pop(earlier, None)
        return texts

    def prefixes(
        self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor, positions: torch.LongTensor
    ) -> list[TextContext]:
        """Return a row, `(sequence_length,)`, up to each of several positions, as texts.

        Raises:
            VocabularyMismatchError: an id that the tokenizer does not have.
            UnsupportedError: it holds a special token that the reward does not know.
        """
        ids, is_text = input_ids.tolist(), attention_mask.bool().tolist()
        check_ids(input_ids[attention_mask.bool()], self._map.target.size)
        ends = (position + 1 for position in positions.tolist())
        rows = ([index for index, kept in zip(ids[:end], is_text[:end], strict=True) if kept] for end in ends)
        return [self._text(None, row, is_prompt=True) for row in rows]

    def _text(self, prompt: list[int] | None, ids: list[int], is_prompt: bool) -> TextContext:
        source, target = self._map.source, self._map.target
        ids = self._without_end(ids)
        path = list(source.start) if prompt is None else list(prompt)
        if prompt is None:
            ids = ids[len(target.start) :] if ids[: len(target.start)] == target.start else ids
            if path and ids and self._map.counterparts.get(ids[0]) == path[0]:  # as chat templates write it
                ids = ids[1:]
        fixed, history, is_start = len(path), [], prompt is None
        for index in ids:
            if index not in self._map.counterparts and target.bytes[index] is not None:
                history.append(index)
                continue
            if history:
                path += self._spelled(history, is_start)
            if index in self._map.counterparts:
                path.append(self._map.counterparts[index])
            elif is_prompt:
                raise _unknown(target.tokenizer.convert_ids_to_tokens(index))
            fixed, history, is_start = len(path), [], False
        return TextContext(path + self._spelled(history, is_start), fixed, history)

    def _spelled(self, history: list[int], is_start: bool) -> list[int]:
        """Return the source tokens for a part of a text; the space before its first word is each tokenizer's own."""
        source, target = self._map.source, self._map.target
        text = target.text(history)
        if is_start and (history or not target.prefix):
            text = source.prefix + text.removeprefix(target.prefix)
        return source.encode(text)

    def _without_end(self, ids: list[int]) -> list[int]:
        """Leave out what pads a row that has ended; a token that pads and ends stands once."""
        tokenizer = self._map.target.tokenizer
        pad, length = tokenizer.pad_token_id, len(ids)
        while length and ids[length - 1] == pad:
            length -= 1
        return ids[: length + (length < len(ids) and pad == tokenizer.eos_token_id)]


def _unknown(token: str) -> UnsupportedError:
    return UnsupportedError(
        "The prompt holds a special token that the reward does not know.",
        expected="text, or special tokens of both vocabularies",
        found=repr(token),
        remedy="give the reward its own prompt, `processor.prompt = reward.processing_class(..., return_tensors='pt')` "
        "or `reward_inputs=` of a PRT model; or say in `token_map=` what the token is to it",
    )
