"""Spell tokens: ordinary ones as the bytes that they stand for, and unknown ones in the tokens of another tokenizer."""

import re
from collections.abc import Callable, Mapping

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_BYTES = {ord(letter): byte for byte, letter in bytes_to_unicode().items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def speller(
    tokenizer: PreTrainedTokenizerBase | None, special_tokens: Mapping[str, str]
) -> Callable[[bytes], tuple[int, ...]]:
    """Return a function from a token of a backbone to the tokens of `tokenizer` for the same text.

    Tokens that only begin or end a text are left out, as is text that the tokenizer has no tokens for. Padding, which
    follows the end of a text, is read as one token, so that all rows of a batch grow alike.
    """
    roles: dict[bytes, set[str]] = {}
    for role, token in special_tokens.items():
        roles.setdefault(token.encode(), set()).add(role)

    def spell(token: bytes) -> tuple[int, ...]:
        if tokenizer is None:
            return ()
        if token in roles:
            if "pad_token" not in roles[token]:
                return ()
            ends = [tokenizer.pad_token_id, tokenizer.eos_token_id]
            ends = ends[::-1] if "eos_token" in roles[token] else ends
            return tuple(index for index in ends if index is not None)[:1]
        try:
            text = token.decode()
        except UnicodeDecodeError:
            return ()
        ids = tokenizer.encode(text, add_special_tokens=False)
        if tokenizer.unk_token_id in ids:
            return ()
        return tuple(_without_space(tokenizer, ids) if text[0] not in " ▁" else ids)

    return spell


def _without_space(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Take away the space that SentencePiece puts before a text, but not before a part of one."""
    first = tokenizer.convert_ids_to_tokens(ids[0]) if ids else ""
    if not first.startswith("▁"):
        return ids
    rest = first[1:]
    if not rest:
        return ids[1:]
    index = tokenizer.get_vocab().get(rest)
    return ids if index is None else [index, *ids[1:]]


def byte_of(token: str) -> int | None:
    """Return the byte that SentencePiece writes as "<0x0A>"; None for other tokens."""
    found = _BYTE_TOKEN.fullmatch(token)
    return None if found is None else int(found[1], 16)


def is_sentencepiece(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer writes a space as "▁"."""
    form = _decoder(tokenizer)
    return "ByteLevel" not in form and ("▁" in form or "\\u2581" in form)


def _decoder(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the settings of what turns tokens into text; none for a slow tokenizer."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    return "" if decoder is None else decoder.__getstate__().decode()


def spelling(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, int]) -> Callable[[str], bytes]:
    """Return a function from an ordinary one of all `tokens` to the bytes of text that it stands for.

    Byte-level BPE writes a space as "Ġ", SentencePiece as "▁", and a byte that no token holds as "<0x0A>".
    """

    def byte_level(token: str) -> bytes:
        try:
            return token.translate(_BYTES).encode("latin-1")
        except UnicodeEncodeError:
            return token.encode()

    def sentencepiece(token: str) -> bytes:
        byte = byte_of(token)
        if byte is None:
            return token.replace("▁", " ").encode()
        return token.encode() if byte < 128 and chr(byte).replace(" ", "▁") in tokens else bytes([byte])

    if is_sentencepiece(tokenizer):
        return sentencepiece
    return byte_level if "ByteLevel" in _decoder(tokenizer) else str.encode
