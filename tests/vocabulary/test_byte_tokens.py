"""Tokens as bytes, and what a tokenizer writes in the middle of a text."""

import os
from pathlib import Path

import pytest
import texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast, PythonBackend

from prt_hf import UnsupportedError
from prt_hf.vocabulary.byte_tokens import ByteTokens

ASSETS = Path(os.environ.get("PRT_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))
KINDS = {
    "byte-level": texts.byte_level(),
    "byte-level, digits alone": texts.byte_level(420, "alone"),
    "byte-level, digits grouped": texts.byte_level(420, "grouped"),
    "SentencePiece, Metaspace": texts.sentencepiece(),
    "SentencePiece, Prepend": texts.sentencepiece(200, "Prepend"),
    "SentencePiece without prefix": texts.sentencepiece(200, ""),
    "Unigram": texts.unigram(),
    "Unigram, Prepend": texts.unigram(150, "Prepend"),
    "greedy": texts.greedy([b"the", b" the", b"girl", "你".encode()[:2]]),
}
TOKENS = {name: ByteTokens(tokenizer) for name, tokenizer in KINDS.items()}
over_kinds = pytest.mark.parametrize("kind", KINDS)
unhurried = settings(max_examples=25, deadline=None, derandomize=True)
TEXTS = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from([*texts.SENTENCES, "123456", " the", "  ", "你好", "<s>", "</s>"])),
    max_size=6,
).map("".join)


@over_kinds
def test_tokens_are_bytes_of_text(kind):
    tokens, tokenizer = TOKENS[kind], KINDS[kind]
    assert len(tokens.bytes) == tokens.size == len(tokenizer)
    for index in tokenizer.all_special_ids:
        assert tokens.bytes[index] is None
    assert all(tokens.bytes[index] == text for text, index in tokens.ids.items())
    assert {bytes([byte]) for byte in range(256)} <= tokens.ids.keys()
    for name, text in {"Ġthe": b" the", "▁the": b" the", "<0x0A>": b"\n", "<0xE4>": b"\xe4", "Ċ": b"\n"}.items():
        if (index := tokenizer.get_vocab().get(name)) is not None:
            assert tokens.bytes[index] == text
    assert tokens.longest == max(len(text) for text in tokens.bytes if text)


@over_kinds
def test_plain_tokens_go_before_those_of_bytes(kind):
    tokens = TOKENS[kind]
    (index,) = tokens.encode(b"e")
    assert tokens.ids[b"e"] == index and KINDS[kind].convert_ids_to_tokens(index) == "e"


@over_kinds
@unhurried
@given(text=TEXTS)
def test_every_text_comes_back(kind, text):
    tokens = TOKENS[kind]
    ids = tokens.encode(text.encode())
    assert tokens.text(ids) == text.encode()
    assert not {*ids} & {*KINDS[kind].all_special_ids}, "names of special tokens are text"


@over_kinds
@unhurried
@given(data=st.data())
def test_a_torn_text_comes_back(kind, data):
    """Bytes that no letter has, letters without their first or last bytes."""
    text = data.draw(st.one_of(TEXTS.map(str.encode), st.binary(max_size=12)))
    start, end = (data.draw(st.integers(0, len(text))) for _ in range(2))
    tokens, torn = TOKENS[kind], text[start:end]
    assert tokens.text(tokens.encode(torn)) == torn


@pytest.mark.parametrize("digits", texts.DIGITS)
def test_a_torn_letter_is_written_as_in_the_whole_text(digits):
    """Tokens that end inside of a letter have a part of the one before, or a space, in them."""
    tokens = ByteTokens(texts.byte_level(420, digits))
    torn = 0
    for text in [*texts.SENTENCES, texts.TEXT]:
        ids = tokens.encode(text.encode())
        for length in range(len(ids)):
            if "\ufffd" in tokens.text(ids[:length]).decode(errors="replace"):
                assert tokens.encode(tokens.text(ids[:length])) == ids[:length]
                torn += 1
    assert torn > 20


def test_bytes_that_are_no_text_are_written_with_the_longest_tokens():
    tokens = ByteTokens(texts.greedy([b"\xf0\x9f", b"\xf0\x9f\x98", b"\x98\x80"]))
    for parts in ([b"a", b"\xf0\x9f\x98"], [b"a", b"\xf0\x9f"], [b"\x98\x80", b"a"], [b"\xf0\x9f", b"\xff", b"\xf0"]):
        assert tokens.encode(b"".join(parts)) == [tokens.ids[part] for part in parts]
        assert tokens.first_of_many([b"".join(parts)]) == [tokens.ids[parts[0]]]
    assert tokens.first_of_many([b""]) == [-1]


@over_kinds
def test_the_middle_of_a_text_has_no_prefix_of_its_own(kind):
    """The tokens of a text from its second word on are those of the whole text."""
    tokens, text = TOKENS[kind], "Once upon a time the girl"
    expected = KINDS[kind].encode(text, add_special_tokens=False)
    assert tokens.encode(tokens.prefix + text.encode()) == expected
    first = len(tokens.encode(tokens.prefix + b"Once"))
    assert tokens.encode(b" upon a time the girl") == expected[first:]
    assert tokens.prefix == (b" " if kind.startswith(("SentencePiece, ", "Unigram")) else b"")


@over_kinds
@pytest.mark.parametrize(
    "words", ["Once upon a time, the dog said. ", "你好世界,这", "in  the sea\n", "the dog ✓ 12 34 "]
)
def test_long_texts_are_divided_where_it_makes_no_difference(kind, words):
    tokens = TOKENS[kind]
    for length in (511, 513, 1100) if kind == "greedy" else (0, 511, 512, 513, 1100, 4000):  # that one is slow
        text = (words * 400).encode()[:length]
        assert tokens.encode(text) == tokens.encode_many([text])[0]


def test_tokens_of_several_words_are_not_divided():
    pieces = [b"a the", b"the a", b"e a"]
    tokens = ByteTokens(texts.greedy(pieces))
    text = b"a the a " * 300
    assert tokens.encode(text) == tokens.encode_many([text])[0]


@over_kinds
@unhurried
@given(text=st.one_of(st.binary(max_size=2), st.sampled_from([b" ", b" t", b"\xff", b"a\xff", b"\xff\xff", b"1"])))
def test_longer_tokens(kind, text):
    tokens = TOKENS[kind]
    found = tokens.longer_than(text).tolist()
    assert {tokens.bytes[index] for index in found} == {
        each for each in tokens.ids if each.startswith(text) and each != text
    }
    assert len(set(found)) == len(found)


def test_added_tokens_are_text_unless_they_are_special():
    tokenizer = texts.byte_level(301, special=("<pad>", "<s>", "</s>", "<tool>"))
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("xé y", special=False)])
    tokens = ByteTokens(tokenizer)
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert tokens.bytes[think] == b"<think>"
    assert tokens.bytes[tokenizer.convert_tokens_to_ids("xé y")] == "xé y".encode()
    assert tokens.bytes[tokenizer.convert_tokens_to_ids("<tool>")] is None
    assert tokens.encode(b"a<think>") == [tokens.ids[b"a"], think]
    assert len(tokens.encode(b"<tool>")) > 1 and tokens.text(tokens.encode(b"<tool>")) == b"<tool>"
    assert tokens.text([think, tokenizer.eos_token_id, think]) == b"<think><think>"


def test_an_added_token_goes_before_an_ordinary_one_of_its_text():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=changed())
    tokenizer.add_tokens([AddedToken(" the", special=False, normalized=False)])
    tokens = ByteTokens(tokenizer)
    ordinary, added = map(tokenizer.convert_tokens_to_ids, ["Ġthe", " the"])
    assert tokens.bytes[ordinary] == tokens.bytes[added] == b" the"
    assert tokens.encode(b"in the")[-1] == tokens.ids[b" the"] == added


@pytest.mark.parametrize("ends", ["<s> $A", "<s> $A </s>", "$A </s>", "$A", "</s> $A"])
def test_start_of_a_text(ends):
    """The last one as OPT and GPT-2's relatives, where one token begins and ends texts."""
    plain = texts.byte_level(302)
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    pairs = [(token, plain.convert_tokens_to_ids(token)) for token in texts.SPECIAL]
    backend.post_processor = TemplateProcessing(ends, special_tokens=pairs)
    tokens = ByteTokens(texts.wrapped(backend, []))
    start = ends.split("$")[0].split()
    assert tokens.start == plain.convert_tokens_to_ids(start)
    assert tokens.text(tokens.encode(texts.TEXT.encode())) == texts.TEXT.encode()


def test_truncation_padding_and_dropout_are_left_out():
    backend = Tokenizer.from_str(texts.byte_level().backend_tokenizer.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.model.dropout = 0.5
    tokens = ByteTokens(texts.wrapped(backend, []))
    assert tokens.encode(texts.TEXT.encode()) == TOKENS["byte-level"].encode(texts.TEXT.encode())


def wordpiece():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    return backend


def changed(kind="byte_level", normalizer=None, **model):
    backend = Tokenizer.from_str(getattr(texts, kind)().backend_tokenizer.to_str())
    if normalizer:
        backend.normalizer = normalizers.Sequence([each for each in (backend.normalizer, normalizer) if each])
    for name, value in model.items():
        setattr(backend.model, name, value)
    return backend


LOSSY = {
    "WordPiece": wordpiece,
    "lower case": lambda: changed(normalizer=normalizers.Lowercase()),
    "NFKC": lambda: changed(normalizer=normalizers.NFKC()),
    "NFD": lambda: changed("sentencepiece", normalizer=normalizers.NFD()),
    "several spaces are one": lambda: changed(normalizer=normalizers.Replace("  ", " ")),
    "ends are stripped": lambda: changed(normalizer=normalizers.Strip()),
    "no byte fallback": lambda: changed("sentencepiece", byte_fallback=False),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_tokenizers_that_lose_text_are_refused(kind):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=LOSSY[kind](), unk_token="<unk>")
    with pytest.raises(UnsupportedError, match="(?s)byte for byte.*expected: byte-level BPE, or SentencePiece.*remedy"):
        ByteTokens(tokenizer)


def test_slow_tokenizers_are_refused():
    class Slow(PythonBackend):
        vocab_size = 1

        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(UnsupportedError, match="(?s)expected: fast tokenizers.*found: Slow.*use_fast=True"):
        ByteTokens(Slow())


def test_composed_letters_stay_as_they_are():
    """Qwen normalises to NFC; a model may write others, one after another."""
    tokens = ByteTokens(PreTrainedTokenizerFast(tokenizer_object=changed(normalizer=normalizers.NFC())))
    assert tokens.text(tokens.encode("e\u0301".encode())) == "e\u0301".encode()


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories-old", "stories260K", "tokenizers/qwen3"])
def test_real_tokenizers(name):
    if not (ASSETS / name).is_dir():
        pytest.skip(f"no {name} at {ASSETS} (set PRT_ASSETS)")
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    tokens = ByteTokens(tokenizer)
    for text in [*texts.SENTENCES, texts.TEXT, "<|im_end|></s><0x0A>"]:
        assert tokens.text(tokens.encode(text.encode())) == text.encode()
    text = " ".join(texts.SENTENCES)
    assert tokens.encode(tokens.prefix + text.encode()) == tokenizer.encode(text, add_special_tokens=False)
    assert tokens.start == tokenizer.encode("")
    known = {index for index, text in enumerate(tokens.bytes) if text is not None}
    assert known == {*tokenizer.get_vocab().values()} - {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    }
