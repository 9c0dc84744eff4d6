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


def spelling(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, int]) -> Callable[[str], bytes]:
    """Return a function from an ordinary one of all `tokens` to the bytes of text that it stands for.

    Byte-level BPE writes a space as "Ġ", SentencePiece as "▁", and a byte that no token holds as "<0x0A>".
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    form = "" if decoder is None else decoder.__getstate__().decode()

    def byte_level(token: str) -> bytes:
        try:
            return token.translate(_BYTES).encode("latin-1")
        except UnicodeEncodeError:
            return token.encode()

    def sentencepiece(token: str) -> bytes:
        found = _BYTE_TOKEN.fullmatch(token)
        if found is None:
            return token.replace("▁", " ").encode()
        byte = int(found[1], 16)
        return token.encode() if byte < 128 and chr(byte).replace(" ", "▁") in tokens else bytes([byte])

    if "ByteLevel" in form:
        return byte_level
    return sentencepiece if "▁" in form or "\\u2581" in form else str.encode
