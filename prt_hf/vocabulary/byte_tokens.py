"""The tokens of a tokenizer as bytes of text, and the tokens that it writes in the middle of a text."""

import contextlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import takewhile
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import UnsupportedError
from .spelling import byte_of, is_sentencepiece, spelling

# Words, numbers, code, spaces, letters of two to four bytes, characters of several letters: all composed (NFC).
_PROBES = (
    "Hello, world! It's 3.14159 or 1234567 of them, isn't it? THE END",
    "def f(x):\n    if x:\n\t\treturn  [x, {'a': 1}]   # odd  spaces \n\n\n    pass\r\n",
    "naïve café, Größe, señor; Привет, мир; 你好,世界; こんにちは; 안녕하세요; שלום עולם; مرحبا",
    "f\u0303 ½ ™ ﬁ ﷺ № Ⅷ ² 👩‍👩‍👧 🏳️‍🌈 𝔘𝔫𝔦 \u200b\u00a0\u2028 ａｂｃ",
)
_INVALID = re.compile("([\udc80-\udcff]+)")  # bytes that are no text, as `surrogateescape` decodes them
_WORD = re.compile(rb"(?<=[a-z,.]) (?=[A-Za-z])")  # a space at which tokenizers of words start a token
_ACROSS_WORDS = re.compile(rb"[a-z,.] ")  # in the tokens of others
_CHUNK = 512  # bytes after which a text is divided at the next such space, so that what comes before is read once


class ByteTokens:
    """Tokens as bytes, and the encoding of bytes that stand in the middle of a text.

    Args:
        tokenizer: fast, and lossless: what it writes gives its text back byte for byte.

    Attributes:
        tokenizer: the tokenizer.
        size (`int`): largest id plus one.
        bytes (`list[bytes | None]`): the text of each token; None for special ones and unused ids.
        ids (`dict[bytes, int]`): the token of a text.
        prefix (`bytes`): what is put before the first word of a text: a space with SentencePiece.
        start (`list[int]`): special tokens that it puts before every text.

    Raises:
        UnsupportedError: a slow tokenizer, or one that loses or changes text, as WordPiece does.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not getattr(tokenizer, "is_fast", False):
            raise UnsupportedError(
                "A reward across vocabularies needs to know what its tokenizers write inside of a text.",
                expected="fast tokenizers",
                found=type(tokenizer).__name__,
                remedy="save a fast one beside the model: AutoTokenizer.from_pretrained(..., use_fast=True)",
            )
        self.tokenizer = tokenizer
        settings, self.prefix = _inside_a_text(json.loads(tokenizer.backend_tokenizer.to_str()))
        self._encoder = Tokenizer.from_str(json.dumps(settings))
        self._encoder.encode_special_tokens = True  # their names are text like any other
        vocabulary = tokenizer.get_vocab()
        self.size = max(vocabulary.values()) + 1
        self.bytes = self._bytes_of_all(vocabulary)
        byte_tokens = {index for token, index in vocabulary.items() if byte_of(token) is not None}
        in_order = sorted((index for index, text in enumerate(self.bytes) if text), key=lambda i: i not in byte_tokens)
        self.ids = {self.bytes[index]: index for index in in_order}  # a plain token goes before a byte's
        self.longest = max(map(len, self.ids), default=0)
        self._sorted = sorted(self.ids)
        self._sorted_ids = torch.tensor([self.ids[text] for text in self._sorted], dtype=torch.long)
        self.start = list(takewhile(lambda index: self.bytes[index] is None, tokenizer.encode("a")))
        self._is_of_words = not any(map(_ACROSS_WORDS.search, self.ids))
        self._check()
        self._encode_chunk = lru_cache(1 << 12)(self._encode)

    def _bytes_of_all(self, vocabulary: dict[str, int]) -> list[bytes | None]:
        as_bytes = spelling(self.tokenizer, vocabulary)
        added = self.tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        found: list[bytes | None] = [None] * self.size
        for token, index in vocabulary.items():
            if index not in special:
                text = as_bytes(token)
                byte = byte_of(token) if text == token.encode() and index not in added else None
                found[index] = text if byte is None else bytes([byte])
        spelled = as_bytes if is_sentencepiece(self.tokenizer) else str.encode
        for index, token in added.items():  # the tokenizer decodes to it, whatever else has its id
            if index not in special:
                found[index] = spelled(token.content)
        return found

    def _check(self) -> None:
        for text in _PROBES:
            found = self.text(self._encode(text.encode()))
            if found == text.encode():
                continue
            raise UnsupportedError(
                f"{self.tokenizer.name_or_path or 'The tokenizer'} does not give every text back byte for byte.",
                expected="byte-level BPE, or SentencePiece with a token for every byte, that changes no letters",
                found=f"{type(self.tokenizer.backend_tokenizer.model).__name__} that makes {found!r} of {text!r}",
                remedy="use a reward and a backbone with such tokenizers; others work within one vocabulary only",
            )

    def text(self, ids: Sequence[int]) -> bytes:
        """Return the text of tokens; special ones have none."""
        return b"".join([self.bytes[index] or b"" for index in ids])

    def encode(self, text: bytes) -> list[int]:
        """Return the tokens of bytes in the middle of a text.

        A last letter that is torn is written as if it were whole, other bytes that are no text with the longest tokens.

        A long text is divided at spaces where it makes no difference. What a text is divided into depends on the text
        alone, and all but its end has been encoded before while it grows.
        """
        ids: list[int] = []
        while self._is_of_words and len(text) > _CHUNK and (cut := _WORD.search(text, _CHUNK)):
            ids += self._encode_chunk(text[: cut.start()])
            text = text[cut.start() :]
        return ids + self._encode(text)

    def _encode(self, text: bytes) -> list[int]:
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Return the tokens of each of many short texts."""
        completed = list(map(_completed, texts))
        pieces = [_INVALID.split(text.decode("utf-8", "surrogateescape")) for text in completed]
        valid = iter(self._encoder.encode_batch_fast([piece for each in pieces for piece in each[::2] if piece]))
        found = []
        for text, whole, each in zip(texts, completed, pieces, strict=True):
            ids: list[int] = []
            for number, piece in enumerate(each):
                if number % 2:
                    ids += self._encode_torn(piece.encode("utf-8", "surrogateescape"))
                elif piece:
                    ids += next(valid).ids
            length = len(whole)
            while length > len(text):
                length -= len(self.bytes[ids.pop()])
            found.append(ids + self._encode_torn(text[length:]))
        return found

    def _encode_torn(self, text: bytes) -> list[int]:
        """Return the longest tokens, one after another."""
        ids = []
        while text:
            index = self._longest_start(text)
            if index >= 0:  # bytes that no text has, such as 0xFF, may have no token
                ids.append(index)
            text = text[len(self.bytes[index]) if index >= 0 else 1 :]
        return ids

    def first_of_many(self, texts: Sequence[bytes]) -> list[int]:
        """Return the first token of each of many texts, which may end inside of a letter; -1 if there is none."""
        return [[*ids, -1][0] for ids in self.encode_many(texts)]

    def _longest_start(self, text: bytes) -> int:
        """Return the longest token that a text starts with, -1 if there is none."""
        starts = (text[:length] for length in range(min(len(text), self.longest), 0, -1))
        return next((self.ids[start] for start in starts if start in self.ids), -1)

    def longer_than(self, text: bytes) -> torch.LongTensor:
        """Return the tokens that start with a text and go on, `(tokens,)`."""
        ends_before = text.rstrip(b"\xff")
        low = bisect_right(self._sorted, text)
        if not ends_before:
            return self._sorted_ids[low:]
        after = ends_before[:-1] + bytes([ends_before[-1] + 1])
        return self._sorted_ids[low : bisect_left(self._sorted, after)]


def _completed(text: bytes) -> bytes:
    """Add bytes that make a letter of the last ones, if these begin one."""
    for back in range(1, min(3, len(text)) + 1):
        if text[-back] >= 0xC0:
            lacking = 1 + (text[-back] >= 0xE0) + (text[-back] >= 0xF0) - (back - 1)
            for last in (b"\xa0\x80\x80"[:lacking], b"\x80" * lacking):  # 0xE0 and 0xF0 allow the one, 0xED the other
                with contextlib.suppress(UnicodeDecodeError):
                    (text[-back:] + last).decode()
                    return text + last
    return text


def _inside_a_text(settings: Any) -> tuple[Any, bytes]:
    """Return a tokenizer's settings without what it does to the ends of a text, and what it puts before one.

    Normalisation to composed letters is left out as well: a model may write others.
    """
    prefix = b""

    def changed(part: Any) -> Any:
        nonlocal prefix
        if isinstance(part, list):
            return [each for each in map(changed, part) if each is not None]
        if not isinstance(part, dict):
            return part
        kind = part.get("type")
        if kind == "Prepend":
            prefix = b" "
            return None
        if kind == "NFC":
            return None
        if kind == "Metaspace" and part.get("prepend_scheme") != "never":
            prefix = b" "
            return part | {"prepend_scheme": "never"}
        if kind == "ByteLevel" and part.get("add_prefix_space"):
            prefix = b" "
            return part | {"add_prefix_space": False}
        return {name: changed(value) for name, value in part.items()}

    for name in ("normalizer", "pre_tokenizer"):
        settings[name] = changed(settings[name])
    settings["post_processor"] = settings["truncation"] = settings["padding"] = None
    model = settings["model"]
    if "dropout" in model:
        model["dropout"] = None
    if model["type"] == "Unigram":  # which would write special tokens for their names
        special = {token["content"] for token in settings["added_tokens"] if token["special"]}
        model["vocab"] = [(name + "\ue000" * (name in special), score) for name, score in model["vocab"]]
    return settings, prefix
