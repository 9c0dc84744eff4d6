"""The map between two vocabularies: which tokens of one stand for which of the other."""

import pytest
import texts
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from prt_hf import VocabularyContract
from prt_hf.errors import PRTValueError
from prt_hf.inference.across import Step
from prt_hf.vocabulary.across import VocabularyMap
from prt_hf.vocabulary.byte_tokens import ByteTokens

KINDS = {
    "byte-level": texts.byte_level(),
    "larger": texts.byte_level(420, "grouped"),
    "digits alone": texts.byte_level(360, "alone"),
    "SentencePiece": texts.sentencepiece(),
    "Unigram": texts.unigram(),
    "bytes": texts.greedy(),
}
TOKENS = {name: ByteTokens(tokenizer) for name, tokenizer in KINDS.items()}
PAIRS = pytest.mark.parametrize(("source", "target"), [(one, other) for one in KINDS for other in KINDS])


def vocabularies(source, target, token_map=None):
    one, other = (VocabularyContract.from_tokenizer(each.tokenizer) for each in (source, target))
    return VocabularyMap(source, target, one.counterparts(other, token_map))


def stands_for(tokens):
    """Probabilities of the target's tokens, one row for each source token, which has probability 1."""
    now = torch.eye(tokens.source.size, dtype=torch.float64).log().expand(2, -1, -1)
    tables = tokens.on(now.device)
    return torch.where(alone(tokens), now[0][:, tables.first].exp(), Step(now, tables).masses[0])


def alone(tokens):
    """Tokens that a single source token stands for; not a byte's where there is an ordinary one of the same text."""
    tables, target, ours = tokens.on(torch.device("cpu")), tokens.target, tokens.source.tokenizer.get_vocab()
    is_alone = tables.is_single.clone()
    is_alone[tables.several] = False
    for index, text in enumerate(target.bytes):
        if text and target.ids[text] != index:
            is_alone[index] &= target.tokenizer.convert_ids_to_tokens(index) in ours
    return is_alone


@PAIRS
def test_every_source_token_stands_for_one_token(source, target):
    source, target = TOKENS[source], TOKENS[target]
    tokens = vocabularies(source, target)
    names, matrix = target.tokenizer.get_vocab(), stands_for(tokens)
    known = {old: new for new, old in tokens.counterparts.items()}
    for index, text in enumerate(source.bytes):
        probabilities = matrix[index]
        if text is None and index not in known:
            assert not probabilities.any()
            continue
        (token,) = probabilities.nonzero()[:, 0].tolist()
        assert probabilities[token] == 1.0
        if text is None:
            assert token == known[index]
            continue
        same = names.get(source.tokenizer.convert_ids_to_tokens(index))
        if same is None or target.bytes[same] != text:
            same = target.ids.get(text)
        assert token == (target.encode(text)[0] if same is None else same)


@PAIRS
def test_target_tokens_are_spelled_with_source_tokens(source, target):
    source, target = TOKENS[source], TOKENS[target]
    tokens = vocabularies(source, target)
    tables = tokens.on(torch.device("cpu"))
    waiting = set(tables.waiting.tolist())
    for index, text in enumerate(target.bytes):
        assert tables.columns[index] == (index if text or index in tokens.counterparts else -1)
        if not text:
            continue
        spelled = [tokens.same[index]] if tokens.same[index] >= 0 else source.encode(text)
        assert source.text(spelled) == text
        assert tables.first[index] == spelled[0]
        assert tables.is_single[index] == (len(spelled) == 1) == (index not in waiting)
        if len(spelled) > 1:
            assert tables.second[index] == spelled[1]
    firsts = tables.first[tables.waiting]
    assert torch.equal(firsts, firsts.sort().values)


@PAIRS
def test_pushed_probabilities_add_up(source, target):
    source, target = TOKENS[source], TOKENS[target]
    tokens = vocabularies(source, target)
    generator = torch.Generator().manual_seed(0)
    now = torch.randn(2, 3, source.size, generator=generator, dtype=torch.float64).log_softmax(-1)
    tables = tokens.on(now.device)
    step = Step(now, tables)
    total = step.masses.sum(-1) + now[:, :, tables.first[alone(tokens)]].exp().sum(-1)
    is_known = torch.tensor(
        [text is not None or old in tokens.counterparts.values() for old, text in enumerate(source.bytes)]
    )
    torch.testing.assert_close(total, now.exp()[:, :, is_known].sum(-1), atol=1e-14, rtol=0)
    assert torch.equal(step.totals, torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_one_vocabulary_is_mapped_onto_itself(kind):
    tokens = vocabularies(TOKENS[kind], TOKENS[kind])
    tables, size = tokens.on(torch.device("cpu")), TOKENS[kind].size
    known = [index for index in range(size) if tables.columns[index] >= 0]
    assert set(range(size)) - set(known) <= set(KINDS[kind].all_special_ids)
    assert [tokens.same[index] for index in known] == known == tables.first[known].tolist()
    assert not len(tables.several) and not len(tables.waiting)


def test_tokens_at_other_ids():
    source = TOKENS["larger"]
    target = ByteTokens(texts.permuted(source.tokenizer))
    tokens = vocabularies(source, target)
    ours, theirs = source.tokenizer.get_vocab(), target.tokenizer.get_vocab()
    assert all(tokens.same[new] == ours[name] for name, new in theirs.items())
    tables = tokens.on(torch.device("cpu"))
    assert not len(tables.several) and not len(tables.waiting)
    assert tokens.same != [*range(target.size)]


def test_a_superset():
    """Its own special tokens are neutral; its own text is spelled."""
    larger = texts.byte_level(301, special=(*texts.SPECIAL, "<think>", "<tool>"))
    source, target = ByteTokens(texts.byte_level(301)), ByteTokens(larger)
    tokens = vocabularies(source, target)
    tables = tokens.on(torch.device("cpu"))
    extra = [larger.convert_tokens_to_ids(name) for name in ("<think>", "<tool>")]
    assert (tables.columns < 0).nonzero()[:, 0].tolist() == extra
    assert tokens.same == [*range(source.size), -1, -1] and not len(tables.waiting) and not len(tables.several)
    larger.add_tokens([AddedToken("<th>", special=False)])
    target = ByteTokens(larger)
    added = vocabularies(source, target).on(torch.device("cpu"))
    token = larger.convert_tokens_to_ids("<th>")
    assert added.waiting.tolist() == [token] and added.first[token] == source.ids[b"<"]
    assert added.second[token] == source.encode(b"<th>")[1]


def test_counterparts():
    """By name, by role, and as `token_map` says."""
    source = ByteTokens(texts.byte_level(302, special=("<pad>", "<s>", "</s>", "<user>", "<old>")))
    special = ("<user>", "<|pad|>", "<|end|>", "<new>", "<bos>")
    roles = {"pad_token": "<|pad|>", "eos_token": "<|end|>", "bos_token": "<bos>"}
    target = ByteTokens(texts.byte_level(302, "alone", special, **roles))

    def found(token_map=None):
        ours, theirs = source.tokenizer, target.tokenizer
        return {
            theirs.convert_ids_to_tokens(new): ours.convert_ids_to_tokens(old)
            for new, old in vocabularies(source, target, token_map).counterparts.items()
        }

    by_themselves = {"<user>": "<user>", "<|pad|>": "<pad>", "<|end|>": "</s>", "<bos>": "<s>"}
    assert found() == by_themselves
    assert found({"<new>": "<old>"}) == by_themselves | {"<new>": "<old>"}
    assert found({"<|end|>": "<old>"}) == by_themselves | {"<|end|>": "<old>"}
    with pytest.raises(PRTValueError, match="no token of the reward"):
        found({"<new>": "<unknown>"})
    tokens = vocabularies(source, target, {"<new>": "<old>"})
    new, old = target.tokenizer.convert_tokens_to_ids("<new>"), source.tokenizer.convert_tokens_to_ids("<old>")
    assert stands_for(tokens)[old].nonzero()[:, 0].tolist() == [new] and tokens.same[new] == old


def test_names_that_are_text_to_both_are_no_counterparts():
    tokenizers = [texts.byte_level(size, special=tuple(texts.SPECIAL)) for size in (303, 304)]
    for tokenizer in tokenizers:
        tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokens = vocabularies(*map(ByteTokens, tokenizers))
    old, new = (tokenizer.convert_tokens_to_ids("<think>") for tokenizer in tokenizers)
    assert new not in tokens.counterparts and tokens.same[new] == old


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.text("ab1 é", min_size=2, max_size=3), max_size=6),
    history=st.text("ab1 é", min_size=1, max_size=4),
    token=st.text("ab1 é", min_size=1, max_size=5),
)
def test_continuations(pieces, history, token):
    """Against the greedy reading of the whole text, where history has been written by the target or has not."""
    target = ByteTokens(texts.greedy([piece.encode() for piece in pieces]))
    source = ByteTokens(texts.greedy([token.encode()]))
    tokens = vocabularies(source, target)
    index = source.ids[token.encode()]
    for known in range(len(token.encode())):
        written = target.encode(history.encode() + token.encode()[:known])
        whole = target.encode(history.encode() + token.encode())
        is_followed = whole[: len(written)] == written and len(whole) > len(written)
        expected = whole[len(written)] if is_followed else -1
        assert tokens.continuations(tuple(written), known, [index]) == [expected]


def test_what_both_have_is_never_continued():
    """Its own tokenizer never writes this token; to another model that has it as well, it is one token."""
    pieces = [b"abcd", b"abc", b"cd", b"d"]
    tokens = ByteTokens(texts.without_merges(pieces))
    index = tokens.ids[b"abcd"]
    assert len(tokens.encode(b"abcd")) == 4, "unreachable"
    same = vocabularies(tokens, tokens)
    history = tuple(tokens.encode(b"ab"))
    assert same.continuations(history, 2, [index]) == [-1]
    assert same.continuations((tokens.ids[b"x"], *history), 2, [index]) == [-1]
    inside = ByteTokens(texts.greedy([b"xa", b"abcd"]))  # which wrote "xa" before "b"
    other = vocabularies(tokens, inside)
    assert other.continuations(tuple(inside.encode(b"xab")), 2, [index]) == [inside.ids[b"c"]]
