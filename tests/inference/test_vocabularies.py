"""Rewards on backbones whose vocabulary is an update of theirs: every path against brute force."""

import copy
import pickle

import families
import pytest
import tiny
import torch
from families import BACKBONES, REWARD, BruteForce
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import logging

from prt_hf import (
    EFTLogitsProcessor,
    PRTForCausalLM,
    PRTLogitsProcessor,
    RewardModel,
    VocabularyMismatchError,
    speculative_decoding,
)
from prt_hf.errors import PRTValueError, UnsupportedError

KINDS = ["extended", "renamed", "moved", "reduced"]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def reward_of(seed=7, model=tiny.llama, adapter=False):
    base = model(seed, vocab_size=-(-len(REWARD) // 8) * 8, pad_token_id=REWARD.pad_token_id)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear") if adapter else None
    torch.manual_seed(seed)
    return RewardModel.from_base(base, REWARD, config)


@pytest.fixture(scope="module")
def reward():
    return reward_of()


def rows_of(tokenizer, count=2, length=9, seed=0):
    """Random rows, every third token of which is an added one."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(tokenizer), (count, length), generator=generator)
    added = torch.tensor([i for i in tokenizer.added_tokens_decoder if i != tokenizer.pad_token_id])
    rows[:, ::3] = added[torch.randint(len(added), rows[:, ::3].shape, generator=generator)]
    rows[:, -1] = tokenizer.get_vocab()["a"]
    return rows.where(rows != tokenizer.pad_token_id, tokenizer.get_vocab()["b"])


def neutral_ids(processor):
    return (processor.match.columns < 0).nonzero()[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind, reward):
    match = PRTLogitsProcessor(reward, BACKBONES[kind]).match
    assert match.kind == {"reduced": "renamed"}.get(kind, kind)
    tokenizer, names = BACKBONES[kind], {index: name for name, index in REWARD.get_vocab().items()}
    expected = BruteForce(None, tokenizer).pairs
    assert {i: int(column) for i, column in enumerate(match.columns) if column >= 0} == expected
    for name, other in match.renamed.items():
        assert names[expected[tokenizer.get_vocab()[name]]] == other


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=6),
    rows=st.integers(1, 3),
    strength=st.sampled_from([0.5, 1.0, -1.0, 2.0]),
)
def test_any_rows_in_any_order(kind, seed, lengths, rows, strength):
    """One processor, asked for prefixes of changing length and order: the content decides, not the calls before."""
    tokenizer, reward = BACKBONES[kind], _KEPT.setdefault("reward", reward_of())
    processor = PRTLogitsProcessor(reward, tokenizer, strength=strength)
    expected = BruteForce(reward.network, tokenizer, strength=strength)
    text = rows_of(tokenizer, rows, max(lengths), seed)
    for step, length in enumerate(lengths):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + step))
        ids = text[order, :length]
        scores = torch.randn(rows, len(tokenizer) + 3, generator=torch.Generator().manual_seed(step)) * 3
        found, wanted = processor(ids, scores), expected(ids, scores)
        torch.testing.assert_close(found, wanted, **CLOSE)
        bare = scores[:, : len(tokenizer)].log_softmax(-1)
        neutral = neutral_ids(processor)
        torch.testing.assert_close(found[:, neutral].exp(), bare[:, neutral].exp(), atol=1e-6, rtol=1e-5)


_KEPT: dict = {}
_NAMES = [*families.ADDED, "<|end|>", "<think>", "<|tool|>", "[A]", "<pad2>", "<s>"]


@st.composite
def tokenizers(draw):
    """Any added tokens before and after the ordinary ones, three of which have a role."""
    names = draw(st.permutations(_NAMES))[: draw(st.integers(3, len(_NAMES)))]
    place = draw(st.integers(0, len(names)))
    pad, bos, eos = draw(st.permutations(names))[:3]
    roles = {"pad_token": pad, "bos_token": bos, "eos_token": eos}
    return families.tokenizer(names[:place], names[place:], **roles)


@settings(max_examples=60, deadline=None)
@given(tokenizers(), tokenizers(), st.integers(0, 10**6))
def test_any_two_vocabularies_with_the_same_ordinary_tokens(ours, theirs, seed):
    network = _KEPT.setdefault("network", tiny.llama(7, vocab_size=80))
    processor = PRTLogitsProcessor(RewardModel.from_base(network, ours), theirs)
    assert processor.match.kind != "other"
    rows, scores = rows_of(theirs, 2, 7, seed), torch.randn(2, len(theirs) + 2) * 3
    found = processor(rows, scores)
    torch.testing.assert_close(found, BruteForce(network, theirs, ours)(rows, scores), **CLOSE)
    if not processor.match.is_identical:
        neutral, bare = neutral_ids(processor), scores[:, : len(theirs)].softmax(-1)
        torch.testing.assert_close(found[:, neutral].exp(), bare[:, neutral], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("model", tiny.LANGUAGE_MODELS)
@pytest.mark.parametrize("kind", ["extended", "moved"])
def test_every_architecture_reads_spelled_tokens(kind, model):
    reward, tokenizer = reward_of(model=tiny.LANGUAGE_MODELS[model]), BACKBONES[kind]
    processor, expected = PRTLogitsProcessor(reward, tokenizer), BruteForce(reward.network, tokenizer)
    text = rows_of(tokenizer, 1, 12)
    for length in (3, 4, 5, 9, 6, 12):
        scores = torch.randn(1, len(tokenizer))
        torch.testing.assert_close(processor(text[:, :length], scores), expected(text[:, :length], scores), **CLOSE)


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
}


def generated(backbone, rows, mask, processors, way, **more):
    torch.manual_seed(1)
    options = WAYS[way] | {"max_new_tokens": 6, "eos_token_id": None, "logits_processor": processors} | more
    return backbone.generate(rows, attention_mask=mask, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_generate(kind, way, reward):
    tokenizer, backbone = BACKBONES[kind], families.build(kind)
    rows = rows_of(tokenizer, 1 if "prompt" in way or "chunk" in way else 2)
    mask = torch.ones_like(rows)
    if len(rows) > 1:
        mask[1, :4] = 0
        rows[1, :4] = tokenizer.pad_token_id
    found = generated(backbone, rows, mask, [PRTLogitsProcessor(reward, tokenizer, attention_mask=mask)], way)
    assert torch.equal(found, generated(backbone, rows, mask, [BruteForce(reward.network, tokenizer, mask=mask)], way))


def test_assisted_generation(reward):
    tokenizer, backbone, assistant = (
        BACKBONES["extended"],
        families.build("extended"),
        families.build("extended", seed=4),
    )
    rows = rows_of(tokenizer, 1)
    mask = torch.ones_like(rows)
    found = generated(
        backbone, rows, mask, [PRTLogitsProcessor(reward, tokenizer)], "greedy", assistant_model=assistant
    )
    assert torch.equal(found, generated(backbone, rows, mask, [BruteForce(reward.network, tokenizer)], "greedy"))


@pytest.mark.parametrize("kind", KINDS)
def test_as_one_model(kind, reward, tmp_path):
    """All positions of padded rows, with gradients, and generation, before and after a recipe."""
    tokenizer, backbone = BACKBONES[kind], families.build(kind)
    backbone.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    model = PRTForCausalLM.from_parts(str(tmp_path / "backbone"), [copy.deepcopy(reward)])
    rows = rows_of(tokenizer, 2, 8)
    mask = torch.ones_like(rows)
    mask[1, :3] = 0
    rows[1, :3] = tokenizer.pad_token_id
    expected = BruteForce(reward.network, tokenizer)
    with torch.no_grad():
        labels = rows.masked_fill(mask.cumsum(1) < 2, -100)  # nothing is predicted by padding
        output = model(rows, attention_mask=mask, labels=labels)
    kept = []
    for row, start in ((0, 0), (1, 3)):
        bare = backbone(rows[row : row + 1, start:]).logits[0]
        for end in range(start, 8):
            wanted = expected.log_probs(rows[row, start : end + 1].tolist(), bare[end - start])
            torch.testing.assert_close(output.logits[row, end].double(), wanted, **CLOSE)
            if end < 7:
                kept.append(-wanted[rows[row, end + 1]])
    torch.testing.assert_close(output.loss.double(), torch.stack(kept).mean(), **CLOSE)
    model(rows, attention_mask=mask, labels=rows).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.reward_networks.parameters() if p.grad is not None)
    model.zero_grad()
    prompts = [PRTLogitsProcessor(reward, tokenizer, attention_mask=mask)]
    for way in ("greedy", "beams"):  # samples depend on the number of columns
        wanted = generated(backbone, rows, mask, prompts, way)
        assert torch.equal(generated(model, rows, mask, [], way), wanted)
    model.save_pretrained(tmp_path / "recipe")
    again = PRTForCausalLM.from_pretrained(tmp_path / "recipe")
    assert again.matches[0].tokens.kind == model.matches[0].tokens.kind
    assert torch.equal(again(rows, attention_mask=mask).logits, model(rows, attention_mask=mask).logits)


def test_processors_of_generate_see_the_reward_first(reward):
    """A penalty acts on log pi, as in the PRT models whose parts share one cache."""
    tokenizer, backbone = BACKBONES["extended"], families.build("extended")
    model = PRTForCausalLM.from_parts(backbone, [reward], tokenizer=tokenizer)
    rows = rows_of(tokenizer, 1)
    mask, more = torch.ones_like(rows), {"repetition_penalty": 1.7, "max_new_tokens": 4}
    found = generated(model, rows, mask, [], "greedy", **more)
    text = rows
    for _ in range(4):
        scores = BruteForce(reward.network, tokenizer)(text, backbone(text).logits[:, -1])
        score = scores.gather(1, text)
        scores = scores.scatter(1, text, torch.where(score < 0, score * 1.7, score / 1.7))
        text = torch.cat([text, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(found, text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_speculation(kind, do_sample):
    """The same text; drafts are made and kept, though neutral tokens are never drafted."""
    reward, tokenizer, backbone = reward_of(adapter=True), BACKBONES[kind], families.build(kind)
    processor = PRTLogitsProcessor(reward, tokenizer)
    rows = rows_of(tokenizer, 1)
    options = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": do_sample}
    settings = {
        "custom_generate": speculative_decoding,
        "logits_processor": [processor],
        "return_dict_in_generate": True,
    }
    torch.manual_seed(0)
    output = backbone.generate(rows, **options, **settings)
    assert output.num_drafted > 0
    if not do_sample:
        assert torch.equal(output.sequences, backbone.generate(rows, **options, logits_processor=[processor]))
        model = PRTForCausalLM.from_parts(backbone, [reward], tokenizer=tokenizer)
        assert torch.equal(model.generate(rows, speculative=True, **options), output.sequences)


def test_several_rewards_of_different_vocabularies():
    """Each of them keeps what the one before gave to tokens that it does not know."""
    newer = families.tokenizer(after=[*families.ADDED, "<think>", "</think>"])
    backbone, tokenizer = families.build("extended"), BACKBONES["extended"]
    first = reward_of()
    second = RewardModel.from_base(tiny.llama(9, vocab_size=len(newer)), newer)
    rows = rows_of(tokenizer, 2, 7)
    scores = torch.randn(2, len(tokenizer))
    found, expected = scores, scores
    for reward, theirs, strength in ((first, REWARD, 0.7), (second, newer, 1.2)):
        found = PRTLogitsProcessor(reward, tokenizer, strength=strength)(rows, found)
        expected = BruteForce(reward.network, tokenizer, theirs, strength)(rows, expected)
    torch.testing.assert_close(found, expected, **CLOSE)
    model = PRTForCausalLM.from_parts(backbone, [first, second], strengths=[0.7, 1.2], tokenizer=tokenizer)
    with torch.no_grad():
        logits = model(rows).logits[:, -1]
        expected = backbone(rows).logits[:, -1]
    for reward, theirs, strength in ((first, REWARD, 0.7), (second, newer, 1.2)):
        expected = BruteForce(reward.network, tokenizer, theirs, strength)(rows, expected)
    torch.testing.assert_close(logits, expected[:, : len(tokenizer)], **CLOSE)


def test_eft_and_a_lora_that_is_carried_over():
    tuned = reward_of(adapter=True).network
    base = tiny.llama(7, vocab_size=tuned.config.vocab_size, pad_token_id=REWARD.pad_token_id)
    tokenizer = BACKBONES["renamed"]
    processor = EFTLogitsProcessor(tuned, tokenizer, source_tokenizer=REWARD, strength=0.8)
    rows, scores = rows_of(tokenizer, 2), torch.randn(2, len(tokenizer))

    class Difference(torch.nn.Module):
        def forward(self, ids):
            found = tuned(ids)
            found.logits = found.logits - base(ids).logits
            return found

    expected = BruteForce(Difference(), tokenizer, strength=0.8)(rows, scores)
    torch.testing.assert_close(processor(rows, scores), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["identical", "extended", "renamed"])
def test_a_prompt_of_its_own(kind, reward):
    tokenizer, backbone = BACKBONES[kind], families.build(kind)
    rows = rows_of(tokenizer, 2, 6)
    own = REWARD(["<|user|>hello there", "<|user|>hi"], padding=True, return_tensors="pt")
    expected = []
    for row in range(2):
        prompt = own["input_ids"][row][own["attention_mask"][row] == 1]
        brute = BruteForce(reward.network, tokenizer, prompt=prompt, length=6)
        expected.append(generated(backbone, rows[row : row + 1], None, [brute], "greedy"))
    processor = PRTLogitsProcessor(reward, tokenizer)
    processor.prompt = own
    assert torch.equal(generated(backbone, rows, torch.ones_like(rows), [processor], "greedy"), torch.cat(expected))
    processor.prompt = own
    generated(backbone, rows, torch.ones_like(rows), [processor], "beams")
    with pytest.raises(PRTValueError, match="(?s)`prompt` belongs to other prompts.*processor.prompt"):
        generated(backbone, rows.flip(1), torch.ones_like(rows), [processor], "greedy")
    model = PRTForCausalLM.from_parts(backbone, [reward], tokenizer=tokenizer)
    found = generated(model, rows, torch.ones_like(rows), [], "greedy", reward_inputs=own)
    assert torch.equal(found, torch.cat(expected))
    single = {name: value[:1] for name, value in own.items()}
    for adapter in (reward_of(adapter=True),):
        model = PRTForCausalLM.from_parts(backbone, [adapter], tokenizer=tokenizer)
        options = {"max_new_tokens": 6, "eos_token_id": None, "do_sample": False, "reward_inputs": [single]}
        plain = model.generate(rows[:1], **options)
        assert torch.equal(model.generate(rows[:1], speculative=True, **options), plain)


def test_bad_prompts(reward):
    processor = PRTLogitsProcessor(reward, REWARD)
    for wrong in ("text", torch.zeros(3, dtype=torch.long), {"text": 1}, torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(PRTValueError, match="`prompt` is not usable"):
            processor.prompt = wrong
    with pytest.raises(VocabularyMismatchError, match="ids below"):
        processor.prompt = torch.tensor([[len(REWARD)]])


def test_token_map(reward, tmp_path):
    tokenizer = BACKBONES["renamed"]
    token_map = {"<|person|>": "<|user|>"}
    processor = PRTLogitsProcessor(reward, tokenizer, token_map=token_map)
    rows, scores = rows_of(tokenizer, 2), torch.randn(2, len(tokenizer))
    expected = BruteForce(reward.network, tokenizer, token_map=token_map)
    torch.testing.assert_close(processor(rows, scores), expected(rows, scores), **CLOSE)
    backbone = families.build("renamed")
    backbone.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    PRTForCausalLM.from_parts(str(tmp_path / "backbone"), [reward], token_map=token_map).save_pretrained(tmp_path / "r")
    again = PRTForCausalLM.from_pretrained(tmp_path / "r")
    assert again.matches[0].tokens.renamed == {"<|end|>": "<eos>", "<|person|>": "<|user|>"}
    assert again.config.token_map == token_map


def test_the_tokenizer_must_be_the_backbones(reward):
    """What used to be an IndexError, or text that was quietly wrong."""
    processor = PRTLogitsProcessor(reward, REWARD)
    with pytest.raises(VocabularyMismatchError, match=f"ids below {len(REWARD)}"):
        processor(torch.tensor([[5, len(REWARD)]]), torch.randn(1, len(REWARD) + 3))
    with pytest.raises(VocabularyMismatchError, match="does not belong to its tokenizer"):
        processor(torch.tensor([[5, 6]]), torch.randn(1, 50_000))


def test_the_door_at_the_reward(reward, tmp_path):
    backbone = families.build("extended")
    with pytest.raises(PRTValueError, match="tokenizer is not known"):
        reward.processor(backbone)
    assert reward.processor(backbone, BACKBONES["extended"], strength=0.5).strength == 0.5
    backbone.save_pretrained(tmp_path)
    BACKBONES["extended"].save_pretrained(tmp_path)
    loaded = type(backbone).from_pretrained(tmp_path)
    processor = reward.processor(loaded)
    assert processor.match.kind == "extended"
    rows = rows_of(BACKBONES["extended"], 1)
    expected = generated(loaded, rows, None, [BruteForce(reward.network, BACKBONES["extended"])], "greedy")
    assert torch.equal(generated(loaded, rows, None, [processor], "greedy"), expected)


def test_unknown_tokens_are_told_once(reward, monkeypatch):
    seen = []
    monkeypatch.setattr(logging.get_logger("prt_hf.inference.context"), "warning", seen.append)
    tokenizer = BACKBONES["extended"]
    processor = PRTLogitsProcessor(reward, tokenizer)
    plain = torch.tensor([tokenizer.encode("hello", add_special_tokens=False)])
    processor(plain, torch.randn(1, len(tokenizer)))
    assert not seen
    for _ in range(2):
        processor(
            torch.tensor([tokenizer.encode("<think>a", add_special_tokens=False)]), torch.randn(1, len(tokenizer))
        )
    assert len(seen) == 1 and "does not know" in seen[0]


def test_a_row_of_which_nothing_can_be_read(reward):
    """The backbone stays as it is after a beginning that the reward does not know."""
    tokenizer = families.tokenizer(after=[*families.ADDED, "<begin>"], bos_token="<begin>")
    rows = torch.tensor([[len(tokenizer) - 1], [5]])
    scores = torch.randn(2, len(tokenizer))
    found = PRTLogitsProcessor(reward, tokenizer)(rows, scores)
    torch.testing.assert_close(found[0], scores[0].log_softmax(-1))
    torch.testing.assert_close(found, BruteForce(reward.network, tokenizer)(rows, scores), **CLOSE)
    backbone = tiny.llama(vocab_size=len(tokenizer))
    model = PRTForCausalLM.from_parts(backbone, [reward], tokenizer=tokenizer)
    torch.testing.assert_close(model(rows[:1]).logits, backbone(rows[:1]).logits.log_softmax(-1), **CLOSE)


def test_packed_documents_with_unknown_tokens_are_refused(reward):
    tokenizer = BACKBONES["extended"]
    model = PRTForCausalLM.from_parts(families.build("extended"), [reward], tokenizer=tokenizer)
    rows = rows_of(tokenizer, 1, 6)
    rows[0, 1] = tokenizer.get_vocab()["<think>"]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(UnsupportedError, match="several documents"):
        model(rows, position_ids=positions)


def test_trainers_that_multiply_by_the_head_are_refused(reward):
    model = PRTForCausalLM.from_parts(families.build("extended"), [reward], tokenizer=BACKBONES["extended"])
    with pytest.raises(UnsupportedError, match="no rows for some of the backbone's tokens"):
        model.base_model(torch.tensor([[5, 6]]))


@pytest.fixture
def extended(reward):
    backbone, tokenizer = families.build("extended"), BACKBONES["extended"]
    return PRTForCausalLM.from_parts(backbone, [copy.deepcopy(reward)], tokenizer=tokenizer)


def test_scores_are_of_the_models_own_tokens(extended):
    rows = rows_of(BACKBONES["extended"], 2)
    settings = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": None, "max_new_tokens": 4}
    output = extended.generate(rows, do_sample=False, **settings)
    found = extended.compute_transition_scores(output.sequences, output.scores)
    with torch.no_grad():
        log_probs = extended(output.sequences).logits[:, rows.shape[1] - 1 : -1]
    expected = log_probs.gather(-1, output.sequences[:, rows.shape[1] :, None])[..., 0]
    torch.testing.assert_close(found, expected, **CLOSE)
    with pytest.raises(UnsupportedError, match="`output_scores`"):
        extended.generate(rows, output_logits=True, **settings)


def test_what_an_extended_vocabulary_refuses(extended):
    rows = rows_of(BACKBONES["extended"], 1)
    with pytest.raises(UnsupportedError, match="use_cache=False"):
        extended(rows, use_cache=True)
    with pytest.raises(UnsupportedError, match="embeddings of its own"):
        extended.generate(rows, inputs_embeds=torch.zeros(1, 9, 32))
    for wrong in (torch.tensor([[5, -1]]), torch.tensor([[5, len(BACKBONES["extended"])]])):
        with pytest.raises(VocabularyMismatchError, match="ids below"):
            PRTLogitsProcessor(extended.rewards[0], BACKBONES["extended"])(wrong, torch.zeros(1, 80))


def test_generation_leaves_the_mode_and_pickles(extended):
    extended.train()
    extended.generate(rows_of(BACKBONES["extended"], 1), max_new_tokens=2)
    assert extended.training and extended.reward_networks[0].training and not extended.backbone.training
    again = pickle.loads(pickle.dumps(extended.eval()))
    rows = rows_of(BACKBONES["extended"], 1)
    assert torch.equal(again(rows).logits, extended(rows).logits)


def test_one_map_for_rewards_of_different_vocabularies(reward):
    tokenizer, token_map = BACKBONES["renamed"], {"<|person|>": "<|user|>"}
    backbone, newer = families.build("renamed"), RewardModel.from_base(families.build("renamed", seed=3), tokenizer)
    model = PRTForCausalLM.from_parts(backbone, [newer, reward], tokenizer=tokenizer, token_map=token_map)
    assert model.matches[0].tokens.is_identical and "<|person|>" in model.matches[1].tokens.renamed
    rows, options = rows_of(tokenizer, 1), {"max_new_tokens": 4, "eos_token_id": None, "do_sample": False}
    processors = [newer.processor(backbone, tokenizer), reward.processor(backbone, tokenizer, token_map=token_map)]
    assert torch.equal(model.generate(rows, **options), backbone.generate(rows, logits_processor=processors, **options))
    with pytest.raises(PRTValueError, match="names an unknown token"):
        PRTForCausalLM.from_parts(backbone, [newer, reward], tokenizer=tokenizer, token_map={"<think>": "<nowhere>"})
