"""Families of vocabularies: what of a reward fits the next model of its family, and what is another vocabulary."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, logging
from transformers.convert_slow_tokenizer import bytes_to_unicode

from prt_hf import RewardConfig, VocabularyContract, VocabularyMismatchError
from prt_hf.contract import ModelReference
from prt_hf.errors import PRTValueError
from prt_hf.vocabulary.spelling import speller

ASSETS = Path(os.environ.get("PRT_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))

BYTES = [bytes([byte]) for byte in range(256)]
WORDS = ["he", "ll", "hell", "hello", " w", " wo", "rl", "  ", "th", " th", " the", "in", "er", "an", "re", "on", "at"]
ORDINARY = [*BYTES, *(word.encode() for word in WORDS)]
N = len(ORDINARY)

QWEN2 = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN2_5 = [
    *QWEN2,
    *(f"<|{name}|>" for name in ("object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start")),
    *(f"<|{name}|>" for name in ("quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")),
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]
QWEN3 = [*QWEN2_5, "<tool_response>", "</tool_response>", "<think>", "</think>"]
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
R1 = [EOS, "<｜User｜>", "<｜Assistant｜>", BOS, "<|EOT|>", "<think>", "</think>", *QWEN2_5[7:]]


def _reserved(first, last):
    return [f"<|reserved_special_token_{index}|>" for index in range(first, last)]


_HEADERS = ["<|start_header_id|>", "<|end_header_id|>"]
_TEXT = ["<|begin_of_text|>", "<|end_of_text|>"]
LLAMA3_0 = [*_TEXT, *_reserved(0, 4), *_HEADERS, *_reserved(4, 5), "<|eot_id|>", *_reserved(5, 251)]
LLAMA3_1 = [*_TEXT, *_reserved(0, 2), "<|finetune_right_pad_id|>", *_reserved(2, 3), *_HEADERS, "<|eom_id|>"]
LLAMA3_1 += ["<|eot_id|>", "<|python_tag|>", *_reserved(3, 248)]
LLAMA2 = ["<unk>", "<s>", "</s>"]
MISTRAL3 = [*LLAMA2, "[INST]", "[/INST]", "[TOOL_CALLS]", *(f"[control_{index}]" for index in range(8, 773))]


def byte_level(after=(), before=(), ordinary=ORDINARY, **roles):
    """Return a tokenizer that writes a space as "Ġ", as Qwen's and Llama 3's; added tokens before or after the rest."""
    letters = bytes_to_unicode()
    backend = _bpe(["".join(letters[byte] for byte in piece) for piece in ordinary], before)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _with_added(backend, [*before, *after], roles)


def sentencepiece(after=(), before=LLAMA2, ordinary=ORDINARY, **roles):
    """Return a tokenizer that writes a space as "▁", and bytes that are no letters as "<0x0A>", as Llama 2's."""

    def spelled(piece):
        is_byte = len(piece) == 1 and (piece[0] >= 128 or piece[0] < 32)
        return f"<0x{piece[0]:02X}>" if is_byte else piece.decode().replace(" ", "▁")

    backend = _bpe([spelled(piece) for piece in ordinary], before, byte_fallback=True)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_added(backend, [*before, *after], {"bos_token": "<s>", "eos_token": "</s>"} | roles)


def _bpe(pieces, before, **options):
    vocabulary = {token: index for index, token in enumerate([*before, *pieces])}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary and "<0x" not in piece
    ]
    return Tokenizer(models.BPE(vocabulary, merges, **options))


def _with_added(backend, added, roles):
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def qwen(added, eos="<|im_end|>", pad="<|endoftext|>", **roles):
    return byte_level(added, eos_token=eos, pad_token=pad, **roles)


def llama3(added, **roles):
    return byte_level(added, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", **roles)


def deepseek():
    return qwen(R1, EOS, EOS, bos_token=BOS)


# reward, backbone, kind, neutral tokens, dropped tokens, other names
FAMILIES = {
    "Qwen2 -> Qwen2.5": (qwen(QWEN2), qwen(QWEN2_5), "extended", 19, 0, {}),
    "Qwen2.5 -> Qwen2": (qwen(QWEN2_5), qwen(QWEN2), "renamed", 0, 19, {}),
    "Qwen2.5 -> Qwen3": (qwen(QWEN2_5), qwen(QWEN3), "extended", 4, 0, {}),
    "Qwen2.5 -> R1-Distill": (qwen(QWEN2_5), deepseek(), "renamed", 6, 6, {EOS: "<|im_end|>"}),
    "R1-Distill -> Qwen3": (deepseek(), qwen(QWEN3), "renamed", 8, 4, {"<|im_end|>": EOS}),
    "Llama 3.0 -> 3.1": (llama3(LLAMA3_0), llama3(LLAMA3_1), "renamed", 3, 3, {}),
    "Llama 3.1 -> 3.0": (llama3(LLAMA3_1), llama3(LLAMA3_0), "renamed", 3, 3, {}),
    "Llama 2, one appended": (sentencepiece(), sentencepiece(["<pad>"], pad_token="<pad>"), "extended", 1, 0, {}),
    "Mistral v0.1 -> v0.3": (sentencepiece(), sentencepiece(before=MISTRAL3), "moved", 768, 0, {}),
    "Mistral v0.3 -> v0.1": (sentencepiece(before=MISTRAL3), sentencepiece(), "moved", 0, 768, {}),
    "a padding token added": (qwen(QWEN2_5), qwen([*QWEN2_5, "[PAD]"], pad="[PAD]"), "extended", 1, 0, {}),
    "spelled by SentencePiece": (byte_level(before=LLAMA2), sentencepiece(), "identical", 0, 0, {}),
    "an added token in the place of an ordinary one": (qwen(QWEN2), qwen([*QWEN2, "  "]), "renamed", 1, 0, {}),
}
BASE = ModelReference("me/base")
PAIRS = pytest.mark.parametrize("pair", FAMILIES)


def contract(tokenizer):
    return VocabularyContract.from_tokenizer(tokenizer)


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(logging.get_logger("prt_hf.vocabulary.contract"), "warning_once", said.append)
    return said


def id_of(tokenizer, token):
    return tokenizer.get_vocab()[token]


@PAIRS
def test_the_tokens_of_a_family_are_matched(pair):
    reward, backbone, kind, neutral, dropped, renamed = FAMILIES[pair]
    match = contract(reward).match(contract(backbone), tokenizer=reward)
    assert (match.kind, match.neutral, match.dropped, match.renamed) == (kind, neutral, dropped, renamed)
    assert (match.size, match.reward_size) == (len(backbone), len(reward))
    if match.columns is None:
        return
    ours, theirs = reward.get_vocab(), backbone.get_vocab()
    names = {index: token for token, index in theirs.items()}
    found = {names[new]: old for new, old in enumerate(match.columns.tolist()) if old >= 0}
    shared = {token: ours[token] for token in ours.keys() & theirs.keys()} | {
        new: ours[old] for new, old in renamed.items()
    }
    if "in the place" in pair:
        shared["  "] = shared.pop("ĠĠ")
    else:
        shared = {token: index for token, index in shared.items() if token not in renamed.values()}
    assert found == shared


@PAIRS
def test_a_contract_from_a_file_matches_as_one_with_names(pair, tmp_path):
    reward, backbone, *_ = FAMILIES[pair]
    ours, theirs = contract(reward), contract(backbone)
    (tmp_path / "config.json").write_text(RewardConfig("text-generation", ours, BASE).to_json_string())
    for nameless in (replace(ours, vocabulary=None), RewardConfig.from_json_file(tmp_path / "config.json").contract):
        assert nameless == ours and nameless.vocabulary is None
        expected, found = (each.match(theirs, tokenizer=reward) for each in (ours, nameless))
        assert str(found) == str(expected) and found.spelled == expected.spelled
        assert found.columns is expected.columns is None or torch.equal(found.columns, expected.columns)


@PAIRS
def test_a_text_reaches_the_reward_in_its_own_tokens(pair):
    """Ordinary text is encoded alike, and an unknown token is read as the reward reads its text."""
    reward, backbone, _, neutral, *_ = FAMILIES[pair]
    match = contract(reward).match(contract(backbone), tokenizer=reward)
    text = "hello  world\n the 1.5 \u00e9"
    encode = [lambda text, each=each: each.encode(text, add_special_tokens=False) for each in (reward, backbone)]
    if match.is_identical:
        assert encode[0](text) == encode[1](text)
        return
    ids = torch.tensor([encode[1](text)])
    read = match.to_reward.one_to_one(ids, None)[0].tolist()
    assert reward.decode(read) == text
    if "in the place" not in pair:  # an added token cuts the text before others are merged
        assert read == encode[0](text)
    unknown = [index for index in range(match.size) if match.columns[index] < 0]
    assert len(unknown) == neutral
    roles = {backbone.bos_token_id, backbone.eos_token_id, backbone.pad_token_id}
    for index in [index for index in unknown if index not in roles][:3]:
        token = backbone.convert_ids_to_tokens(index)
        rows = match.to_reward.rows(torch.tensor([[*encode[1](" the"), index, *encode[1](" world")]]))
        spelled = encode[0](token) if token != "ĠĠ" else []  # no text is encoded to a token that is hidden
        assert rows.input_ids[0].tolist() == encode[0](" the") + spelled + encode[0](" world"), token


def test_a_chat_reaches_the_reward_whatever_the_turns_are_called():
    reward, backbone = FAMILIES["Qwen2.5 -> R1-Distill"][:2]
    match = contract(reward).match(contract(backbone), tokenizer=reward)
    ids = backbone(f"{BOS}<｜User｜>hello<｜Assistant｜><think>\nthe{EOS}", return_tensors="pt")["input_ids"]
    read = reward.decode(match.to_reward.rows(ids).input_ids[0])
    assert read == "<｜User｜>hello<｜Assistant｜><think>\nthe<|im_end|>"
    assert len(match.spelled[id_of(backbone, "<think>")]) > 1 and match.spelled[id_of(backbone, BOS)] == ()
    assert match.columns[id_of(backbone, "<tool_call>")] == id_of(reward, "<tool_call>")


# What is said of it


def test_a_match_reads_as_a_sentence():
    def said(pair):
        reward, backbone, *_ = FAMILIES[pair]
        return str(contract(reward).match(contract(backbone)))

    assert said("spelled by SentencePiece") == f"identical: {N + 3} tokens"
    assert said("Qwen2.5 -> Qwen3") == (
        "extended: 295 of 299 tokens are the reward's; 4 keep the backbone's probability"
    )
    assert said("Qwen2.5 -> R1-Distill") == (
        f"renamed: 289 of 295 tokens are the reward's; of them by another name {EOS!r} = '<|im_end|>'; "
        "6 keep the backbone's probability; 6 of the reward's are not used"
    )
    assert said("Mistral v0.1 -> v0.3") == (
        "moved: 276 of 1,044 tokens are the reward's; 768 keep the backbone's probability"
    )
    assert said("Mistral v0.3 -> v0.1") == "moved: 276 of 276 tokens are the reward's; 768 of the reward's are not used"
    assert said("a padding token added").endswith("; 1 keeps the backbone's probability")


# Another vocabulary


def test_other_ordinary_tokens_are_another_vocabulary():
    """One ordinary token of another string at the same id is enough; so are too many that are new."""
    reward = contract(qwen(QWEN2))
    renamed = [*ORDINARY[:-1], b" a"]
    for ordinary, share in ((renamed, 100 * (1 - 1 / N)), ([*ORDINARY, b" a", b" b", b" c"], 100 * (1 - 3 / (N + 3)))):
        other = contract(byte_level(QWEN2, ordinary=ordinary, eos_token="<|im_end|>"))
        match = reward.match(other)
        assert match.kind == "other" and f"{share:.2f} % of the ordinary ones shared" in str(match)
        with pytest.raises(VocabularyMismatchError, match=f"(?s){share:.2f} % of the ordinary.*another|update"):
            reward.check(other)
        with pytest.raises(VocabularyMismatchError, match="at least one ordinary token differs"):
            replace(reward, vocabulary=None).check(other)


def test_a_few_new_ordinary_tokens_are_an_update():
    """At ids that were none before, under one in a hundred."""
    match = contract(qwen(QWEN2)).match(contract(byte_level(ordinary=[*ORDINARY, b" a", b" b"], before=QWEN2)))
    assert (match.kind, match.neutral, match.dropped) == ("moved", 2, 0)


def test_the_same_tokens_in_another_order_are_moved():
    match = contract(qwen(QWEN2)).match(contract(byte_level(QWEN2, ordinary=ORDINARY[::-1], eos_token="<|im_end|>")))
    assert (match.kind, match.neutral, match.dropped) == ("moved", 0, 0)
    assert match.columns.tolist() == [*reversed(range(N)), N, N + 1, N + 2]


# Roles and `token_map`


def test_the_end_token_goes_before_the_padding_token():
    """R1-Distill ends and pads with one token, Qwen2.5 with two."""
    ours, theirs = contract(qwen(QWEN2)), contract(qwen(["<|end|>"], "<|end|>", "<|end|>"))
    assert ours.match(theirs).renamed == {"<|end|>": "<|im_end|>"}
    assert theirs.match(ours).renamed == {"<|im_end|>": "<|end|>"}


def test_a_token_of_one_id_is_the_same_whatever_its_role():
    ours = contract(byte_level(["<a>", "<b>"], eos_token="<a>"))
    theirs = contract(byte_level(["<c>", "<b>"], pad_token="<c>"))
    assert ours.match(theirs).renamed == {"<c>": "<a>"}


def test_roles_of_tokens_that_a_tokenizer_does_not_have(warnings):
    """As after `tokenizer.pad_token = "[PAD]"`, which adds no token."""
    reward, backbone = qwen(QWEN2), qwen(["<|end|>"], "<|end|>", "<|end|>")
    for tokenizer in (reward, backbone):
        tokenizer.pad_token = tokenizer.bos_token = "[PAD]"
        assert "[PAD]" not in tokenizer.get_vocab()
    assert contract(reward).check(contract(backbone)).renamed == {"<|end|>": "<|im_end|>"}
    backbone.eos_token = "[END]"
    assert contract(reward).check(contract(backbone)).renamed == {}


def test_other_names_are_told(warnings):
    contract(qwen(QWEN2_5)).check(contract(deepseek()))
    assert len(warnings) == 1 and f"{EOS!r} = '<|im_end|>'" in warnings[0] and "other names" in warnings[0]


def test_an_unknown_end_token_is_told_with_the_line_that_maps_it(warnings):
    reward, backbone = qwen(QWEN2), qwen([*QWEN2, "<|eot|>"], eos="<|eot|>")
    assert contract(reward).check(contract(backbone)).neutral == 1
    assert warnings == [
        "The reward does not know the backbone's end token '<|eot|>', so it cannot end a text: "
        "token_map={'<|eot|>': '<|im_end|>'} says which of its tokens that is."
    ]
    match = contract(reward).check(contract(backbone), token_map={"<|eot|>": "<|im_end|>"})
    assert match.columns[id_of(backbone, "<|eot|>")] == id_of(reward, "<|im_end|>")
    assert match.columns[id_of(backbone, "<|im_end|>")] == -1, "one of the reward's tokens stands for one token"


def test_a_token_map_goes_before_names_and_roles():
    reward, backbone = qwen(QWEN2), qwen(QWEN2)
    swapped = {"<|im_end|>": "<|endoftext|>", "<|endoftext|>": "<|im_end|>"}
    match = contract(reward).match(contract(backbone), token_map=swapped)
    assert match.columns[-3:].tolist() == [N + 2, N + 1, N] and (match.neutral, match.dropped) == (0, 0)
    match = contract(reward).match(contract(backbone), token_map={"<|im_end|>": "<|endoftext|>"})
    assert match.columns[-3:].tolist() == [-1, N + 1, N] and (match.neutral, match.dropped) == (1, 1)
    assert contract(qwen(QWEN2_5)).match(contract(deepseek()), token_map={EOS: "<|endoftext|>"}).renamed == {
        EOS: "<|endoftext|>"
    }


@pytest.mark.parametrize(
    ("token_map", "problem"),
    [
        ({"<nope>": "<|im_end|>"}, "(?s)unknown token.*'<nope>', which is no token of the backbone"),
        ({EOS: "<nope>"}, "(?s)unknown token.*'<nope>', which is no token of the reward"),
        ({EOS: "<|im_end|>", BOS: "<|im_end|>"}, "(?s)maps two tokens onto one"),
    ],
)
def test_token_maps_that_cannot_be(token_map, problem):
    for reward in (contract(qwen(QWEN2_5)), replace(contract(qwen(QWEN2_5)), vocabulary=None)):
        with pytest.raises(PRTValueError, match=problem):
            reward.check(contract(deepseek()), token_map=token_map)


# The real ones


@pytest.fixture(scope="module")
def real():
    folder = ASSETS / "tokenizers"
    if not folder.is_dir():
        pytest.skip(f"no tokenizers at {folder} (set PRT_ASSETS)")
    entries = json.loads((folder / "qwen3" / "tokenizer.json").read_text())
    families = json.loads((folder / "added_tokens.json").read_text())
    specials = {entry["content"] for entry in entries["added_tokens"]}
    one = entries["added_tokens"][0]
    vocabulary = {token: index for token, index in entries["model"]["vocab"].items() if token not in specials}

    def load(name, eos, pad="<|endoftext|>", **roles):
        added = [one | {"id": int(index), "content": token} for index, token in families[name]["added"].items()]
        changed = entries | {"added_tokens": added, "model": entries["model"] | {"vocab": vocabulary}}
        backend = Tokenizer.from_str(json.dumps(changed))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=pad, **roles)
        return tokenizer, contract(tokenizer)

    return {
        "Qwen2": load("qwen2", "<|endoftext|>"),
        "Qwen2.5": load("qwen2.5", "<|im_end|>"),
        "Qwen3": load("qwen3", "<|im_end|>"),
        "R1-Distill": load("r1-distill-qwen", EOS, EOS, bos_token=BOS),
    }


@pytest.mark.real
@pytest.mark.parametrize(
    ("reward", "backbone", "kind", "shared", "neutral", "dropped", "renamed"),
    [
        ("Qwen2", "Qwen2.5", "extended", 151_646, 19, 0, {}),
        ("Qwen2", "Qwen3", "extended", 151_646, 23, 0, {}),
        ("Qwen2.5", "Qwen2", "renamed", 151_646, 0, 19, {}),
        ("Qwen2.5", "Qwen3", "extended", 151_665, 4, 0, {}),
        ("Qwen3", "Qwen2.5", "renamed", 151_665, 0, 4, {}),
        ("Qwen2", "R1-Distill", "renamed", 151_644, 21, 2, {EOS: "<|endoftext|>"}),
        ("Qwen2.5", "R1-Distill", "renamed", 151_659, 6, 6, {EOS: "<|im_end|>"}),
        ("Qwen3", "R1-Distill", "renamed", 151_661, 4, 8, {EOS: "<|im_end|>"}),
        ("R1-Distill", "Qwen3", "renamed", 151_661, 8, 4, {"<|im_end|>": EOS}),
    ],
)
def test_real_families(real, reward, backbone, kind, shared, neutral, dropped, renamed):
    (ours, our_contract), (_, their_contract) = real[reward], real[backbone]
    match = our_contract.match(their_contract, tokenizer=ours)
    assert (match.kind, match.neutral, match.dropped, match.renamed) == (kind, neutral, dropped, renamed)
    assert match.size - match.neutral == shared
    nameless = replace(our_contract, vocabulary=None).match(their_contract, tokenizer=ours)
    assert torch.equal(nameless.columns, match.columns) and nameless.spelled == match.spelled


@pytest.mark.real
def test_a_real_chat_is_read_by_a_reward_of_another_template(real):
    (ours, our_contract), (theirs, their_contract) = real["Qwen2.5"], real["R1-Distill"]
    match = our_contract.match(their_contract, tokenizer=ours)
    chat = f"{BOS}<｜User｜>Wie viele \u2014 \u4e24?<｜Assistant｜><think>\nTwo.\n</think>\n\nTwo<tool_call>{EOS}"
    rows = match.to_reward.rows(theirs(chat, return_tensors="pt")["input_ids"])
    assert ours.decode(rows.input_ids[0]) == chat.replace(BOS, "").replace(EOS, "<|im_end|>")
    (ours, our_contract), (theirs, their_contract) = real["Qwen3"], real["R1-Distill"]
    match = our_contract.match(their_contract, tokenizer=ours)
    ids = theirs("<think>\nTwo.\n</think>", return_tensors="pt")["input_ids"]
    assert match.to_reward.one_to_one(ids, None)[0].tolist() == ours("<think>\nTwo.\n</think>")["input_ids"]


def test_a_space_that_sentencepiece_puts_before_texts_is_no_part_of_a_token():
    backend = Tokenizer(models.BPE({"▁": 0, "<": 1, "t": 2, ">": 3, "▁t": 4}, [("▁", "t")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(prepend_scheme="always"), decoders.Metaspace()
    spell = speller(PreTrainedTokenizerFast(tokenizer_object=backend), {})
    assert spell(b"<t>") == (1, 2, 3) and spell(b"t") == (2,) and spell(b" t") == (4,)


def test_an_end_token_that_also_pads_is_read_as_an_end():
    backend = Tokenizer(models.BPE({"a": 0, "<pad>": 1, "<eos>": 2}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    assert speller(tokenizer, {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})(b"<|im_end|>") == (2,)
    assert speller(tokenizer, {"pad_token": "<p>"})(b"<p>") == (1,)
