"""Small tokenizers of the kinds that language models have, trained on a few sentences, and models that read them."""

import json
from functools import cache

import tiny
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SENTENCES = [
    "Once upon a time there was a little girl who lived in a small house by the sea.",
    "The dog said: I am hungry, and the girl gave the dog a big red ball instead.",
    "They played together in the garden until the sun went down, and then they went home.",
    "2024 = 1012 + 1012; 123 + 456 = 579, 3.14159, 100 or 101 and 100+101 are numbers, and so are 55 and 777.",
    "Größe, naïve café; Привет, мир и все другие; 你好,世界,你们好; 🙂🙃😀 and 👩‍👩‍👧.",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n        print(add(i, i))\n",
] * 4
TEXT = (
    "Once upon a time the girl went to the sea, and the dog said: 123 and 2024 are numbers!\n"
    "Größe 你们好 🙂👩‍👩‍👧 \u200b \t x_y  z\r\nÉ Привет 100200300."
)
BYTES = bytes_to_unicode()
SPECIAL = ["<pad>", "<s>", "</s>"]
ROLES = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
SPACE = "▁"

DIGITS = {
    "grouped": [pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")],
    "alone": [pre_tokenizers.Digits(individual_digits=True)],
    "whole": [],
}


def wrapped(backend, special=SPECIAL, **roles):
    """Return a tokenizer with special tokens after the ordinary ones, or where the vocabulary has them."""
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **ROLES | roles)


@cache
def byte_level(size=300, digits="whole", special=tuple(SPECIAL), **roles):
    """Return a byte-level BPE of about `size` tokens, as Qwen's (numbers digit by digit) and Llama 3's (by three)."""
    backend = Tokenizer(models.BPE())
    steps = [*DIGITS[digits], pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    alphabet = [BYTES[byte] for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    return wrapped(backend, special, **roles)


def _byte_tokens():
    return [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def sentencepiece(size=150, prefix="Metaspace", special=("<unk>", *SPECIAL)):
    """Return a BPE with byte fallback of about `size` pieces that puts a space before a text, as Llama 2's and Gemma's.

    Args:
        size: number of pieces, beside bytes and special tokens.
        prefix: what puts the space: "Metaspace", or the normalizer "Prepend"; "" for nothing.
        special: special tokens.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    trained = json.loads(backend.to_str())["model"]
    names = [*special, *_byte_tokens(), *trained["vocab"]]
    merges = [tuple(merge) for merge in trained["merges"]]
    vocabulary = {name: index for index, name in enumerate(names)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    return _with_spaces(backend, prefix, special)


@cache
def unigram(size=150, prefix="Metaspace", special=("<unk>", *SPECIAL)):
    """Return a Unigram model with byte fallback, as those of XGLM and T5 with it."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>")
    backend.train_from_iterator(SENTENCES, trainer)
    trained = json.loads(backend.to_str())["model"]["vocab"]
    pieces = [(name, 0.0) for name in (*special, *_byte_tokens())] + [tuple(each) for each in trained[1:]]
    return _with_spaces(Tokenizer(models.Unigram(pieces, special.index("<unk>"), byte_fallback=True)), prefix, special)


def _with_spaces(backend, prefix, special):
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    if prefix == "Metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    else:
        steps = [normalizers.Prepend(SPACE)] if prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    return wrapped(backend, special, unk_token="<unk>")


def greedy(pieces=(), special=tuple(SPECIAL)):
    """Return a tokenizer of all bytes and more `pieces` that writes the longest piece that a text starts with."""
    names = ["".join(BYTES[byte] for byte in piece) for piece in [*(bytes([b]) for b in range(256)), *pieces]]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    model = models.WordPiece(
        vocabulary | {"[UNK]": len(vocabulary)}, continuing_subword_prefix="", max_input_chars_per_word=10**6
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend, special)


def without_merges(pieces):
    """Return a tokenizer of all bytes that has more `pieces`, but never writes them."""
    names = dict.fromkeys([*BYTES.values(), *("".join(BYTES[byte] for byte in piece) for piece in pieces)])
    backend = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrapped(backend)


def permuted(tokenizer, seed=0):
    """Return a byte-level tokenizer with the same tokens at other ids."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    names = [*settings["model"]["vocab"]]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    settings["model"]["vocab"] = dict(zip(names, order, strict=True))
    return wrapped(Tokenizer.from_str(json.dumps(settings)), [])


@cache
def starting(tokenizer):
    """Return a tokenizer that puts its `bos_token` before a text by itself."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    special = [(tokenizer.bos_token, tokenizer.bos_token_id)]
    backend.post_processor = processors.TemplateProcessing(f"{tokenizer.bos_token} $A", special_tokens=special)
    return wrapped(backend, [])


def model(tokenizer, make=tiny.llama, seed=0, **config):
    """Return a model with one logit for each token."""
    settings = {"vocab_size": len(tokenizer), "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    return make(seed, **settings | config)
