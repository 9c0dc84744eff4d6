"""A reward on a backbone with another vocabulary, against ordinary PRT, brute force over texts, and recomputation."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import texts
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor, LogitsProcessorList

from prt_hf import EFTLogitsProcessor, PRTLogitsProcessor, RewardModel, UnsupportedError, VocabularyContract, combine
from prt_hf.errors import PRTValueError, VocabularyMismatchError
from prt_hf.inference import across
from prt_hf.inference.across import AcrossVocabularies
from prt_hf.inference.text_context import TextContext
from prt_hf.networks.adapters import bare_base
from prt_hf.vocabulary.across import VocabularyMap
from prt_hf.vocabulary.byte_tokens import ByteTokens

unhurried = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


UNUSED = tiny.llama()


@cache
def reward_of(tokenizer, seed=2, dtype=torch.float32):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    reward = RewardModel.from_base(texts.model(tokenizer, seed=seed).to(dtype), tokenizer, config)
    reward.network.eval()
    return reward


def view(source, target, reward=None, lookahead=8, token_map=None):
    """A reward's view from another vocabulary; or one whose logits are given by hand."""
    one, other = map(VocabularyContract.from_tokenizer, (source, target))
    vocabularies = VocabularyMap(ByteTokens(source), ByteTokens(target), one.counterparts(other, token_map))
    network = UNUSED if reward is None else reward.network
    untuned = network if reward is None else bare_base(network)
    return AcrossVocabularies(vocabularies, [1.0], network, untuned, lookahead)


# Exactness within one vocabulary: what ordinary PRT gives.

ALIKE = {
    "the same": (texts.byte_level(420, "grouped"), texts.byte_level(420, "grouped")),
    "SentencePiece": (texts.sentencepiece(), texts.sentencepiece()),
    "Unigram": (texts.unigram(), texts.unigram()),
    "other ids": (texts.byte_level(420, "grouped"), texts.permuted(texts.byte_level(420, "grouped"))),
    "tokens that it never writes": (texts.without_merges([b"th", b"Once", b" upon"]),) * 2,
    "superset": (
        texts.byte_level(380),
        texts.byte_level(380, special=("<pad>", "<s>", "</s>", "<think>", "<tool>", "<new>")),
    ),
}


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("strength", [1.0, -0.5])
@torch.no_grad()
def test_vocabularies_with_the_same_tokens(kind, strength):
    source, target = ALIKE[kind]
    reward, backbone = reward_of(source, dtype=torch.float64), texts.model(target, seed=1).double()
    seen = view(source, target, reward)
    ours, theirs = source.get_vocab(), target.get_vocab()
    columns = torch.tensor([ours.get(name, -1) for name in sorted(theirs, key=theirs.get)])
    scored = columns >= 0
    ids = torch.tensor([target.encode(texts.TEXT, add_special_tokens=False)[:40]])
    rewards, scores = reward.network(columns[ids]).logits[0], backbone(ids).logits[0]
    for length in range(1, ids.shape[1] + 1):
        rho = seen(ids[:, :length], scores[length - 1 : length], strength)[0]
        log_backbone = scores[length - 1].log_softmax(-1)
        r = strength * rewards[length - 1][columns.clamp(min=0)]
        expected = (log_backbone + r).masked_fill(~scored, -torch.inf).log_softmax(-1)
        found = (log_backbone + rho).masked_fill(~scored, -torch.inf).log_softmax(-1)
        torch.testing.assert_close(found[scored], expected[scored], atol=1e-12, rtol=1e-12)
        given = combine(scores[length - 1], rho, columns=seen.columns_on(rho.device))
        neutral = combine(scores[length - 1], strength * rewards[length - 1], columns=columns)
        torch.testing.assert_close(given, neutral, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(given[~scored], log_backbone[~scored].float(), atol=1e-6, rtol=0)


# Exactness across vocabularies, where it can be had: against sums over all texts.


class TextModel:
    """Log-probabilities of a tuned and an untuned source after each text, made up; it may write some tokens only."""

    def __init__(self, tokens, seed, writes=lambda path, token: True, alphabet=b"ab."):
        self.tokens, self.seed, self.writes = tokens, seed, writes
        self.known = [index for index, text in enumerate(tokens.bytes) if text and set(text) <= set(alphabet)]
        self.logits = cache(self._logits)

    def _logits(self, path):
        """The reward, and the logits of the untuned model, `(2, size)`."""
        generator = torch.Generator().manual_seed(hash((self.seed, path)) % 2**31)
        found = torch.randn(2, self.tokens.size, generator=generator, dtype=torch.float64)
        allowed = [token for token in self.known if self.writes(path, token)]
        found[1] += torch.full((self.tokens.size,), -1e9, dtype=torch.float64).index_fill(0, torch.tensor(allowed), 0.0)
        return found

    def log_probs(self, path):
        """Of the tuned and the untuned model, `(2, size)`."""
        reward, untuned = self.logits(tuple(path))
        return torch.stack([untuned + reward, untuned]).log_softmax(-1)

    def read(self, paths, wanted):
        return [torch.stack([self.logits(tuple(p[:n])) for n in range(len(p) + 1)][-wanted:], 1) for p in paths]

    peek = read

    def written(self, text):
        """The probabilities that either model writes a text which starts so, by all its tokenisations, `(2,)`."""

        def write(path, so_far):
            if len(so_far) >= len(text):
                return torch.ones(2, dtype=torch.float64)
            total = torch.zeros(2, dtype=torch.float64)
            probs = self.log_probs(path).exp()
            for token in self.known:
                longer = so_far + self.tokens.bytes[token]
                if (longer.startswith(text) or text.startswith(longer)) and bool(probs[:, token].any()):
                    total += probs[:, token] * write([*path, token], longer)
            return total

        return write([], b"")


def ratios(seen, model, text, scores, strength=1.0):
    """rho after a text, of which the source has read nothing else."""
    path, history = seen.vocabularies.source.encode(text), seen.vocabularies.target.encode(text)
    seen._state = model
    return seen._ratios([TextContext(path, 0, history)], model.read, scores[None], torch.tensor([strength]))[0]


def some_scores(size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PAIRS_OF_LETTERS = st.lists(st.text("ab.", min_size=2, max_size=2).map(str.encode), min_size=1, max_size=5)
PIECES = st.lists(st.text("ab", min_size=2, max_size=4).map(str.encode), max_size=6, unique=True)


@unhurried
@given(pieces=PIECES, text=st.text("ab.", max_size=5), seed=st.integers(0, 99))
def test_bytes_of_a_source_with_longer_tokens(pieces, text, seed):
    """Push and heal are exact where every token ends at a token of the target, and the source writes a text in one way.

    Then they are the ratio of the probabilities that the tuned and the untuned source write a text that goes on so.
    """
    source, target = texts.greedy(pieces), texts.greedy()
    seen, text = view(source, target, lookahead=0), text.encode()
    tokens = seen.vocabularies.source
    model = TextModel(tokens, seed, lambda path, token: tokens.encode(tokens.text([*path, token])) == [*path, token])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(across, "_LEAST", 0.0)
        rho = ratios(seen, model, text, some_scores(len(target)))
    before, exact = model.written(text), {}
    for letter in (b"a", b"b", b"."):
        both = model.written(text + letter) / before
        if bool((both > 0).all()):
            exact[letter] = float(both[0].log() - both[1].log())
    found = {letter: float(rho[seen.vocabularies.target.ids[letter]]) for letter in exact}
    # rho is known up to a constant: the probability of the text itself.
    (reference, *others) = exact
    for letter in others:
        assert found[letter] - found[reference] == pytest.approx(exact[letter] - exact[reference], abs=1e-9)


@unhurried
@given(pieces=PAIRS_OF_LETTERS, seed=st.integers(0, 99))
def test_tokens_of_two_bytes_on_a_source_of_bytes(pieces, seed):
    """The look-ahead is exact for what is two source tokens, but for the damping; for one of them it is not.

    A target that has a token "ab" writes "a" only where no "b" follows. rho of "a" is that of any text with "a".
    """
    source, target = texts.greedy(), texts.greedy(pieces)
    seen = view(source, target, lookahead=9)
    model, scores = TextModel(seen.vocabularies.source, seed), some_scores(len(target), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(across, "_WAITING", 0.0)
        rho = ratios(seen, model, b"ab", scores)
    before, log_backbone = model.written(b"ab"), scores.log_softmax(-1)
    for text in {*pieces, b"a", b"b", b"."}:
        token = seen.vocabularies.target.ids[text]
        both = model.written(b"ab" + text) / before
        if len(text) == 2:
            both = both + across._DAMPING * log_backbone[token].exp()
        assert float(rho[token]) == pytest.approx(float(both[0].log() - both[1].log()), abs=1e-9)


def by_formula(seen, model, text):
    """Push and heal, written out: the masses of the target's tokens under both models; 0 where no source token is."""
    source, target = seen.vocabularies.source, seen.vocabularies.target
    path, history = source.encode(text), target.encode(text)
    masses = torch.zeros(2, target.size, dtype=torch.float64)
    now = model.log_probs(path).exp()
    for token, begun in enumerate(source.bytes):
        if begun:
            index = target.ids[begun] if begun in target.ids else target.encode(begun)[0]
            masses[:, index] += now[:, token]
    weight = torch.ones(2, dtype=torch.float64)
    for back in range(1, min(across.HEALED, len(path)) + 1):
        before = model.log_probs(path[:-back]).exp()
        weight = weight * before[:, path[-back]]
        spanned = source.text(path[-back:])
        for token, begun in enumerate(source.bytes):
            if not begun or not begun.startswith(spanned) or begun == spanned:
                continue
            ids = target.encode(text + begun[len(spanned) :])
            start = len(target.text(target.encode(text))) - len(spanned)
            starts = {len(target.text(history[:n])) for n in range(len(history) + 1)}
            if begun in target.ids and start in starts:
                continue  # the target has the token as well, and would have written it
            if ids[: len(history)] == history:
                masses[:, ids[len(history)]] += before[:, token] / weight
    return masses


@unhurried
@given(ours=PIECES, theirs=PIECES, text=st.text("ab.", max_size=6), seed=st.integers(0, 99))
def test_push_and_heal_of_any_two_tokenizers(ours, theirs, text, seed):
    """The sums that they stand for, term by term; as probabilities over texts these are an approximation."""
    seen, text = view(texts.greedy(ours), texts.greedy(theirs), lookahead=0), text.encode()
    model = TextModel(seen.vocabularies.source, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(across, "_LEAST", 0.0)
        rho = ratios(seen, model, text, some_scores(seen.vocabularies.target.size))
    masses = by_formula(seen, model, text)
    for token, (tuned, untuned) in enumerate(masses.T.tolist()):
        if tuned > 0 and untuned > 0:
            expected = torch.tensor(tuned).log() - torch.tensor(untuned).log()
            assert float(rho[token]) == pytest.approx(float(expected), abs=1e-5), seen.vocabularies.target.bytes[token]


@unhurried
@given(ours=PIECES, theirs=PIECES, text=st.text("ab.", max_size=6), seed=st.integers(0, 99))
def test_look_ahead_of_any_two_tokenizers(ours, theirs, text, seed):
    """The first two source tokens of a target's token, beside what push and heal give it; damped by the backbone."""
    seen, text = view(texts.greedy(ours), texts.greedy(theirs), lookahead=1000), text.encode()
    source, target = seen.vocabularies.source, seen.vocabularies.target
    model, scores = TextModel(source, seed), some_scores(target.size, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(across, "_LEAST", 0.0)
        patch.setattr(across, "_WAITING", 0.0)
        rho = ratios(seen, model, text, scores)
    masses, damping = by_formula(seen, model, text), across._DAMPING * scores.softmax(-1)
    totals, path = masses.sum(-1), source.encode(text)
    for token, begun in enumerate(target.bytes):
        if begun and set(begun) <= set(b"ab.") and begun not in source.ids:
            first, second, *_ = source.encode(begun)
            chain = model.log_probs(path)[:, first].exp() * model.log_probs([*path, first])[:, second].exp()
            # Of all that either model writes next, so that the damping is a share of both.
            tuned, untuned = (chain + masses[:, token]) / totals + damping[token]
            expected = (tuned * totals[0]).log() - (untuned * totals[1]).log()
            assert float(rho[token]) == pytest.approx(float(expected), abs=1e-9), begun


@unhurried
@given(ours=PIECES, theirs=PIECES, text=st.text("ab.", max_size=6), seed=st.integers(0, 99))
def test_without_strength_the_backbone_stays(ours, theirs, text, seed):
    seen = view(texts.greedy(ours), texts.greedy(theirs))
    model = TextModel(seen.vocabularies.source, seed)
    assert not ratios(seen, model, text.encode(), some_scores(seen.vocabularies.target.size), strength=0.0).any()


def test_a_history_that_begins_inside_of_a_letter():
    """What is read of it again begins before the letter, or its tokens would not be the same."""
    target = texts.greedy(["ö".encode() + b"\xc3", b"\x9fe"])
    seen = view(texts.greedy([b"ef"]), target, lookahead=0)
    history = seen.vocabularies.target.encode("ößee".encode()[:-1])
    assert across._covering(history, 1, seen.vocabularies) == tuple(history)
    (token,) = seen.vocabularies.source.longer_than(b"e").tolist()
    assert seen.vocabularies.continuations(tuple(history), 1, [token]) == [seen.vocabularies.target.ids[b"f"]]


# Numbers.

SUMS = {"101": 0.5, "100": 0.2, "123": 0.1, "456": 0.1}
GROUPS = {
    "greedy": (texts.greedy([number.encode() for number in SUMS]), texts.greedy()),
    "byte-level BPE": (texts.byte_level(600, "grouped"), texts.byte_level(360, "alone")),
}


class Sums(TextModel):
    """The tuned model writes sums after "=", as single tokens; the untuned one any token."""

    def _logits(self, path):
        found = torch.zeros(2, self.tokens.size, dtype=torch.float64)
        if self.tokens.text(path).endswith(b"="):
            probs = torch.full((self.tokens.size,), 1e-7, dtype=torch.float64)
            for number, probability in SUMS.items():
                probs[self.tokens.ids[number.encode()]] = probability
            probs[self.tokens.ids[b"7"]] = 0.1
            found[0] = probs.log()
        return found


@pytest.mark.parametrize("kind", GROUPS)
def test_numbers_of_a_source_that_groups_digits(kind):
    """The target writes them digit by digit, which the source never does: a map from token to token knows nothing."""
    source, target = GROUPS[kind]
    seen = view(source, target)
    tokens, model = seen.vocabularies.source, Sums(seen.vocabularies.source, 0)
    assert tokens.encode(b"x=101+")[2:] == [tokens.ids[b"101"], tokens.ids[b"+"]]
    assert seen.vocabularies.target.encode(b"x=101")[2:] == [
        seen.vocabularies.target.ids[digit] for digit in (b"1", b"0", b"1")
    ]
    digits, scores = [seen.vocabularies.target.ids[b"%d" % digit] for digit in range(10)], torch.zeros(len(target))

    def digit_probs(text):
        return ratios(seen, model, text, scores)[digits].softmax(-1)

    def mapped(text):
        tuned, untuned = model.log_probs(tokens.encode(text))
        return (tuned - untuned)[[tokens.ids[b"%d" % digit] for digit in range(10)]].softmax(-1)

    found = {text: digit_probs(text) for text in (b"x=", b"x=1", b"x=10")}
    for text, probs in found.items():
        masses = by_formula(seen, model, text)[:, digits]
        is_begun = masses[0] > 1e-4  # by a sum
        expected = (masses[0] / masses[1])[is_begun]
        torch.testing.assert_close(probs[is_begun] / probs[is_begun].sum(), expected / expected.sum())
    # The untuned model writes any of the source's tokens alike, and the backbone any digit.
    begun = [sum(text.startswith(b"%d" % digit) for text in tokens.ids) for digit in range(10)]
    shares = {1: 0.8 / begun[1], 4: 0.1 / begun[4], 7: 0.1 / begun[7]}
    for digit, share in shares.items():
        assert float(found[b"x="][digit]) == pytest.approx(share / sum(shares.values()), rel=1e-4)
    assert float(found[b"x=1"][0] + found[b"x=1"][2]) > 0.99 and float(found[b"x=1"].argmax()) == 0
    # Up to what else the untuned model would write after "10": eight tokens of the BPE begin with "1", two with "0".
    assert float(found[b"x=10"][1] / found[b"x=10"][0]) == pytest.approx(0.5 / 0.2, rel=0.02)
    assert float(found[b"x=10"][1] + found[b"x=10"][0]) > 0.99
    assert float(mapped(b"x=")[7]) > 0.99, "the one number of one digit"
    torch.testing.assert_close(mapped(b"x=10"), torch.full((10,), 0.1, dtype=torch.float64))


# Through `generate`: what a call gives does not depend on other rows, other calls or caches.

SOURCE, TARGET = texts.byte_level(380, "grouped"), texts.sentencepiece(230)
PAIRS = {
    "byte-level on SentencePiece": (SOURCE, TARGET),
    "SentencePiece on byte-level": (texts.sentencepiece(200, "Prepend"), texts.byte_level(350, "alone")),
    "Unigram on byte-level": (texts.unigram(), texts.byte_level(420, "grouped")),
}
PROMPTS = ["Once upon a ti", "The dog said: 12", "x y", "Größe 🙂 ☃"]
MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "several samples returned": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def encoded(tokenizer, prompts=PROMPTS):
    return tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)


def generate(backbone, processors, inputs, **mode):
    processors = processors if isinstance(processors, list) else [processors]
    mode = {"do_sample": False, "max_new_tokens": 6} | mode
    torch.manual_seed(3)
    return backbone.generate(**inputs, logits_processor=LogitsProcessorList(processors), **mode)


class RowByRow(LogitsProcessor):
    """Each row alone, without padding, by a processor that remembers nothing."""

    def __init__(self, processor, length, mask, strengths=None):
        self.processor, self.length, self.mask, self.strengths = processor, length, mask.bool(), strengths

    def __call__(self, input_ids, scores):
        found, copies = [], len(input_ids) // len(self.mask)
        for row, (ids, each) in enumerate(zip(input_ids, scores, strict=True)):
            self.processor.reset()
            if self.strengths is not None:
                self.processor.strength = self.strengths[row // copies]
            ids = torch.cat([ids[: self.length][self.mask[row // copies]], ids[self.length :]])
            found.append(self.processor(ids[None], each[None]))
        return torch.cat(found)


@pytest.fixture(scope="module", params=PAIRS)
def pair(request):
    source, target = PAIRS[request.param]
    return reward_of(source), texts.model(target, seed=1), target


def across_processor(reward, target, **settings):
    return PRTLogitsProcessor(reward, target, across_vocabularies=True, **settings)


@pytest.mark.parametrize("mode", MODES)
def test_modes(pair, mode):
    """Prompts of several lengths, which end with a word, inside of one, and inside of a letter."""
    reward, backbone, target = pair
    inputs = encoded(target, PROMPTS[-1:] if mode == "prompt lookup" else PROMPTS[1:])
    if mode != "prompt lookup":
        inputs["input_ids"][-1] = inputs["input_ids"][-1].roll(1)  # without its last token
        inputs["attention_mask"][-1, 0] = 0
        inputs["input_ids"][-1, 0] = target.pad_token_id
    processor = across_processor(reward, target)
    alone = RowByRow(across_processor(reward, target), inputs["input_ids"].shape[1], inputs["attention_mask"])
    expected = generate(backbone, alone, inputs, **MODES[mode])
    assert torch.equal(generate(backbone, processor, inputs, **MODES[mode]), expected)
    processor.attention_mask = inputs["attention_mask"]
    assert torch.equal(generate(backbone, processor, inputs, **MODES[mode]), expected)


def test_strengths(pair):
    """One for each row; 0 gives the backbone."""
    reward, backbone, target = pair
    inputs, strengths = encoded(target), [0.0, 1.0, -0.5, 0.3]
    processor = across_processor(reward, target, strength=strengths)
    length = inputs["input_ids"].shape[1]
    alone = RowByRow(across_processor(reward, target), length, inputs["attention_mask"], strengths)
    for mode in ("greedy", "several samples returned"):
        expected = generate(backbone, alone, inputs, **MODES[mode])
        assert torch.equal(generate(backbone, processor, inputs, **MODES[mode]), expected)
    processor.strength = 0.0
    bare = generate(backbone, [], inputs, **MODES["greedy"])
    assert torch.equal(generate(backbone, processor, inputs, **MODES["greedy"]), bare)
    assert not torch.equal(bare, generate(backbone, across_processor(reward, target), inputs, **MODES["greedy"]))
    scores = torch.randn(4, len(target), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(processor(inputs["input_ids"], scores), scores.log_softmax(-1), atol=1e-5, rtol=1e-5)


CALLS = st.lists(
    st.tuples(st.sampled_from(["on", "other", "again", "back", "reorder"]), st.integers(0, 999)), max_size=6
)


@settings(unhurried, max_examples=8)
@given(calls=CALLS)
def test_a_used_processor_is_as_good_as_new(pair, calls):
    reward, _, target = pair
    used, new = across_processor(reward, target), across_processor(reward, target)
    rows = encoded(target, PROMPTS[:2])["input_ids"]
    ordinary = torch.tensor([index for index, text in enumerate(used._across.vocabularies.target.bytes) if text])
    for step, seed in [("again", 0), *calls]:
        generator = torch.Generator().manual_seed(seed)
        random = ordinary[torch.randint(0, len(ordinary), (len(rows), 3), generator=generator)]
        if step == "on":
            rows = torch.cat([rows, random[:, :1]], 1)
        elif step == "other":
            rows = random
        elif step == "back":
            rows = torch.cat([rows[:, : 1 + seed % rows.shape[1]], random[:, :2]], 1)
        elif step == "reorder":
            rows = torch.cat([rows[torch.randint(0, len(rows), (1 + seed % 3,), generator=generator)]], 1)
        scores = torch.randn(len(rows), len(target), generator=generator)
        found = used(rows, scores)
        new.reset()
        torch.testing.assert_close(found, new(rows, scores), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(rows)), atol=1e-5, rtol=0)


def test_threads(pair):
    reward, backbone, target = pair
    processor = across_processor(reward, target)
    inputs = [encoded(target, [prompt]) for prompt in PROMPTS * 2]
    expected = [generate(backbone, processor, each) for each in inputs]
    processor.reset()
    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(lambda each: generate(backbone, processor, each), inputs), expected))


def test_the_rewards_own_prompt(pair):
    """It stands in the place of the backbone's; what is generated follows it."""
    reward, backbone, target = pair
    own = reward.processing_class("the girl: ", return_tensors="pt")
    processor = across_processor(reward, target)
    processor.prompt = own
    inputs = encoded(target, PROMPTS[:1])
    source = processor._across.vocabularies.source
    ids = torch.cat([inputs["input_ids"], encoded(target, ["dog"])["input_ids"]], 1)
    processor(inputs["input_ids"], torch.zeros(1, len(target)))
    (text,) = processor._across.contexts.texts(ids)
    generated = processor._across.vocabularies.target.text(ids[0, inputs["input_ids"].shape[1] :].tolist())
    assert text.path == own["input_ids"][0].tolist() + source.encode(generated)
    assert text.fixed == own["input_ids"].shape[1]
    first, second = generate(backbone, processor, inputs), generate(backbone, processor, inputs)
    assert torch.equal(first, second)
    with pytest.raises(PRTValueError, match="`prompt` belongs to other prompts"):
        generate(backbone, processor, encoded(target, ["another"]))


def test_special_tokens_of_a_prompt():
    """Those that the reward does not know are refused in a prompt, each time; generated ones are left out."""
    special = ("<unk>", "<pad>", "<s>", "</s>", "<user>", "<tool>")
    source, target = (
        texts.byte_level(380, special=("<pad>", "<s>", "</s>", "<person>")),
        texts.sentencepiece(201, special=special),
    )
    reward = reward_of(source)
    processor = across_processor(reward, target)
    user, scores = target.convert_tokens_to_ids("<user>"), torch.zeros(1, len(target))
    chat = torch.tensor([[user, *target.encode("hello")]])
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="(?s)does not know.*found: '<user>'.*processor.prompt.*token_map"):
            processor(chat, scores)
    plain = chat[:, 1:]
    processor(plain, scores)
    with pytest.raises(UnsupportedError, match="<user>"):
        processor(chat, scores), "as long as a continuation of the last rows"
    (text,) = processor._across.contexts.texts(plain)
    generated = torch.cat([plain, torch.tensor([[user]])], 1)
    processor(generated, scores)
    (after,) = processor._across.contexts.texts(torch.cat([generated, plain], 1)[:, : generated.shape[1] + 1])
    assert after.path[: len(text.path)] == text.path and after.fixed == len(text.path)
    mapped = across_processor(reward, target, token_map={"<user>": "<person>"})
    (text,) = mapped._across.contexts.texts(chat)
    tokens = mapped._across.vocabularies.source
    assert text.path == [source.convert_tokens_to_ids("<person>"), *tokens.encode(b" hello")] and text.fixed == 1
    mapped(chat, scores)


def test_the_beginning_of_a_text():
    """A token that begins texts is read once, whichever of the two tokenizers writes it by itself."""
    source = texts.starting(texts.byte_level(380))
    reward = reward_of(source)
    bos, hello = source.bos_token_id, ByteTokens(source).encode(b"hello")
    for target in (TARGET, texts.starting(texts.sentencepiece(202))):
        processor = across_processor(reward, target)
        plain = target.encode("hello", add_special_tokens=False)
        for ids in (plain, [target.bos_token_id, *plain]):
            (text,) = processor._across.contexts.texts(torch.tensor([ids]))
            assert text.path == [bos, *hello] and text.fixed == 1
            assert text.history == plain


def test_a_text_of_which_the_reward_can_read_nothing():
    reward = reward_of(SOURCE)
    target = texts.starting(texts.sentencepiece(202))
    scores = torch.randn(2, len(target), generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[target.pad_token_id, target.bos_token_id], [target.bos_token_id, *target.encode("x")[-1:]]])
    found = across_processor(reward, target)(ids, scores)
    torch.testing.assert_close(found[0], scores[0].log_softmax(-1), atol=1e-6, rtol=1e-6)
    assert float((found[1] - scores[1].log_softmax(-1)).abs().max()) > 0.1


# Other rewards.


def test_an_adapter_that_is_carried_over(tmp_path):
    """As emulated fine-tuning: by RewardModel and EFTLogitsProcessor alike, and by hand."""
    base = texts.model(SOURCE, seed=2)
    base.save_pretrained(tmp_path / "base")
    SOURCE.save_pretrained(tmp_path / "base")
    loaded = type(base).from_pretrained(tmp_path / "base")
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    network = get_peft_model(loaded, config).eval()
    network.save_pretrained(tmp_path / "lora")
    reward = RewardModel.from_adapter(tmp_path / "lora")
    backbone, inputs = texts.model(TARGET, seed=1), encoded(TARGET)
    processors = {
        "reward": across_processor(reward, TARGET, strength=0.7),
        "EFT": EFTLogitsProcessor(network, TARGET, source_tokenizer=SOURCE, strength=0.7, across_vocabularies=True),
        "two models": EFTLogitsProcessor(
            network, TARGET, pretrained=base, source_tokenizer=SOURCE, strength=0.7, across_vocabularies=True
        ),
        "folder": EFTLogitsProcessor.from_adapter(tmp_path / "lora", TARGET, strength=0.7, across_vocabularies=True),
    }
    scores = torch.randn(len(PROMPTS), len(TARGET), generator=torch.Generator().manual_seed(0))
    found = {name: processor(inputs["input_ids"], scores) for name, processor in processors.items()}
    for name in ("EFT", "two models", "folder"):
        torch.testing.assert_close(found[name], found["reward"], atol=1e-4, rtol=1e-4)
    texts_of_all = [generate(backbone, each, inputs) for each in processors.values()]
    assert all(torch.equal(each, texts_of_all[0]) for each in texts_of_all)

    # By hand, through a map onto itself.
    same = view(SOURCE, SOURCE)
    same = AcrossVocabularies(same.vocabularies, [1.0, -1.0], network, base, 8)
    ids = torch.tensor([SOURCE.encode(PROMPTS[1])])
    scores = torch.randn(1, len(SOURCE), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        r = (network(ids).logits - base(ids).logits)[:, -1]
    known = same.columns_on(r.device) >= 0
    torch.testing.assert_close(
        combine(scores, same(ids, scores, 0.7), columns=same.columns_on(r.device))[:, known],
        (scores.log_softmax(-1) + 0.7 * r)[:, known].log_softmax(-1),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_full_reward():
    """It needs the model that it was tuned from."""
    network = texts.model(SOURCE, seed=2)
    reward, source = RewardModel.from_base(network, SOURCE), texts.model(SOURCE, seed=4)
    with pytest.raises((PRTValueError, OSError)):
        across_processor(reward, TARGET)
    processor = across_processor(reward, TARGET, source_backbone=source)
    inputs = encoded(TARGET)
    length = inputs["input_ids"].shape[1]
    alone = RowByRow(across_processor(reward, TARGET, source_backbone=source), length, inputs["attention_mask"])
    backbone = texts.model(TARGET, seed=1)
    assert torch.equal(generate(backbone, processor, inputs), generate(backbone, alone, inputs))
    ids = encoded(TARGET, ["Once upon a time"])["input_ids"]
    scores = torch.zeros(1, len(TARGET))
    rho = processor._across(ids, scores, 1.0)
    tokens = processor._across.vocabularies
    with torch.no_grad():
        path = torch.tensor([tokens.source.encode(b"Once upon a time")])
        logits = source(path).logits[0, -1].double(), network(path).logits[0, -1].double()
    gap = (logits[0] + logits[1]).log_softmax(-1) - logits[0].log_softmax(-1)
    several = set(tokens.on(rho.device).several.tolist())
    alone = [
        v
        for v, y in enumerate(tokens.same)
        if y >= 0 and v not in several and (tokens.target.bytes[v] or b"").startswith(b" ")
    ]
    assert len(alone) > 20
    torch.testing.assert_close(rho[0, alone], gap[[tokens.same[v] for v in alone]], atol=1e-4, rtol=1e-4)


def test_rewards_of_different_vocabularies_together():
    backbone, inputs = texts.model(TARGET, seed=1), encoded(TARGET)
    rewards = [reward_of(SOURCE), reward_of(texts.unigram(), seed=4), reward_of(TARGET, seed=5)]
    processors = [across_processor(reward, TARGET, strength=0.5) for reward in rewards]
    assert [each._across is None for each in processors] == [False, False, True]
    scores = torch.randn(len(PROMPTS), len(TARGET), generator=torch.Generator().manual_seed(0))
    ids = inputs["input_ids"]
    alone = [each(ids, scores) - scores.log_softmax(-1) for each in processors]
    in_order = scores
    for each in processors:
        in_order = each(ids, in_order)
    # What each adds does not depend on the others, up to a constant for each row, but for tokens that one of them does
    # not know, which keep the probability that they have by then, and for the damping, which looks at it.
    known = torch.tensor([each >= 0 for each in processors[0]._across.vocabularies.same])
    known &= torch.tensor([each >= 0 for each in processors[1]._across.vocabularies.same])
    expected = (scores.log_softmax(-1) + sum(alone))[:, known].log_softmax(-1)
    torch.testing.assert_close(in_order[:, known].log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(in_order.exp().sum(-1), torch.ones(len(ids)), atol=1e-5, rtol=0)
    assert torch.equal(generate(backbone, processors, inputs), generate(backbone, processors, inputs))


def test_it_has_to_be_asked_for():
    with pytest.raises(VocabularyMismatchError, match="across_vocabularies=True"):
        PRTLogitsProcessor(reward_of(SOURCE), TARGET)
    recurrent = RewardModel.from_base(
        texts.model(SOURCE, tiny.mamba, seed=2), SOURCE, LoraConfig(r=2, target_modules=["in_proj"])
    )
    with pytest.raises(UnsupportedError, match="cannot take back"):
        across_processor(recurrent, TARGET)
