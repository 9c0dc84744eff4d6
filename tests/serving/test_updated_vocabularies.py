"""Rewards on a backbone whose vocabulary is an update of theirs: extended, renamed and moved, in one engine."""

import json
from dataclasses import asdict

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_engine import SETTINGS, by_name, configure, sampling
from test_engine_options import PROMPTS, run
from test_engine_options import TOKENS as LENGTH
from vllm import LLM
from vllm.lora.request import LoRARequest

from prt_hf import PRTForCausalLM, RewardModel
from prt_hf.serving.parts import ServedParts
from prt_hf.serving.tokens import ServedTokens, TokenReader
from prt_hf.vocabulary import VocabularyContract, VocabularyMatch

SIZE = tiny.VOCABULARY + 2
THINK, PAIR = SIZE - 2, SIZE - 1  # that no reward knows: one of their tokens for the text, and two
STRENGTHS = [0.7, -0.4, 0.5]
NAMED = 0.8
TOKENS = 6


def backbone_tokenizer():
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<think>", "w5 w6"])
    return tokenizer


def renamed_tokenizer():
    """Its padding has another name, and a reserved token the id of another."""
    tokenizer = tiny.tokenizer(changed={"<pad>": "<padding>"}, pad_token="<padding>")
    tokenizer.add_tokens(["<reserved>"])
    return tokenizer


def moved_tokenizer():
    """Two control tokens stand before the words."""
    names = ["<c0>", "<c1>", *(f"w{index}" for index in range(3, tiny.VOCABULARY))]
    changed = {f"w{index}": name for index, name in enumerate(names, 3)}
    tokenizer = tiny.tokenizer(size=SIZE, changed=changed)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<c0>", "<c1>"]})
    return tokenizer


WORDS = list(range(3, tiny.VOCABULARY))
# What each reward reads the backbone's tokens as, with the columns of those that it scores.
EXTENDED = [0, 1, 2, *WORDS, 2, 6]
RENAMED = EXTENDED
MOVED = [0, 1, 2, *(word + 2 for word in WORDS), 2, 8]


class Family:
    """A recipe of three rewards with three vocabularies, and an adapter that requests may name."""

    def __init__(self, served):
        folder = served.folder / "family"
        self.tokenizer = backbone_tokenizer()
        sizes = {"hidden_size": 64, "head_dim": 64, "vocab_size": 112, "initializer_range": 0.2}
        self.backbone = served.save("family/backbone", tiny.llama(11, **sizes), self.tokenizer)
        self.extended, self.named = str(folder / "extended"), str(folder / "named")
        served.lora_reward(served.base, seed=12).save_pretrained(self.extended)
        served.lora_reward(served.base, seed=13, kl_coef=1 / NAMED).save_pretrained(self.named)
        self.renamed, self.moved = str(folder / "renamed"), str(folder / "moved")
        network = tiny.llama(14, head_dim=32, vocab_size=104)
        RewardModel.from_base(network, renamed_tokenizer()).save_pretrained(self.renamed)
        network = tiny.sliding_window(15, head_dim=32, vocab_size=SIZE)
        RewardModel.from_base(network, moved_tokenizer()).save_pretrained(self.moved)
        self.rewards = [self.extended, self.renamed, self.moved]
        self.model = PRTForCausalLM.from_parts(self.backbone, [*self.rewards, self.named])
        self.recipe = str(folder / "recipe")
        PRTForCausalLM.from_parts(self.backbone, self.rewards, strengths=STRENGTHS).save_pretrained(self.recipe)

    @torch.no_grad()
    def brute_force(self, tokens, strengths):
        """Log-probabilities of the token after each, from the definition, in float64."""
        ids = torch.tensor(tokens)
        probs = self.model.backbone(ids[None]).logits[0, :, :SIZE].double().softmax(-1)
        for reward, reads, strength in zip(
            self.model.rewards, (EXTENDED, RENAMED, MOVED, EXTENDED), strengths, strict=True
        ):
            reads = torch.tensor(reads)
            logits = reward.network(input_ids=reads[ids][None]).logits[0].double()
            scored = probs[:, :THINK] * (strength * logits[:, reads[:THINK]]).exp()
            share = probs[:, :THINK].sum(-1, keepdim=True)
            probs = torch.cat([scored / scored.sum(-1, keepdim=True) * share, probs[:, THINK:]], -1)
        return probs.log()


@pytest.fixture(scope="module")
def family(served):
    return Family(served)


@pytest.fixture(scope="module")
def engine(family):
    return LLM(
        family.recipe,
        enable_lora=True,
        max_logprobs=SIZE,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=40,
        **SETTINGS,
    )


def test_log_probabilities_are_those_of_the_definition(family, engine):
    """With neutral tokens in prompts and in what is generated, strengths of requests, and a reward that some name."""
    prompts = [tiny.prompts(1, length, seed=length)[0].tolist() for length in (1, 12, 33, 70)]
    prompts += [prompts[1] + [THINK] + prompts[0] + [PAIR, PAIR], [PAIR], prompts[2]]
    biases = [None] * 6 + [{PAIR: 100.0}]
    own = [None, [1.0, 0.2, -0.5, 0.0], None, None, [0.3, 1.0, 1.0, 0.6], None, None]
    names = [None, None, "named", None, "named", None, "named"]
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        [
            sampling(value, logprobs=SIZE, max_tokens=TOKENS, logit_bias=bias)
            for value, bias in zip(own, biases, strict=True)
        ],
        lora_request=[name and LoRARequest(name, 1, family.named) for name in names],
    )
    for prompt, output, strengths, name in zip(prompts, outputs, own, names, strict=True):
        strengths = strengths or [*STRENGTHS, NAMED if name else 0.0]
        tokens = prompt + list(output.outputs[0].token_ids)
        log_probs = family.brute_force(tokens, strengths)[len(prompt) - 1 : -1]
        found = torch.tensor(
            [[entry[token].logprob for token in range(SIZE)] for entry in output.outputs[0].logprobs]
        ).double()
        torch.testing.assert_close(found, log_probs, atol=2e-4, rtol=0)
        bare = family.model.backbone(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1, :SIZE]
        neutral = bare.double().softmax(-1)[:, THINK:]
        torch.testing.assert_close(found.exp()[:, THINK:], neutral, atol=1e-6, rtol=1e-4)
        if PAIR not in tokens:
            family.model.strengths = strengths
            with torch.no_grad():
                expected = family.model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1]
            torch.testing.assert_close(found, expected.double(), atol=2e-4, rtol=0)
    assert list(outputs[-1].outputs[0].token_ids) == [PAIR] * TOKENS


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, settings",
    [
        ({"TORCH_COMPILE_DISABLE": "0"}, {"enforce_eager": False}),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, {"tensor_parallel_size": 2}),
        ({}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}}),
    ],
    ids=["compiled", "divided among two ranks", "drafted"],
)
def test_texts_stay_what_they_are(family, environment, settings):
    family.model.strengths = [*STRENGTHS, 0.0]
    expected = [tiny.greedy(family.model, prompt, LENGTH) for prompt in PROMPTS]
    assert not any(PAIR in text for text in expected)  # which transformers would read on from as two tokens
    found, _, _ = run(family.recipe, environment, **settings)
    assert found == expected


def stored(model, **settings):
    entries = configure(model, **settings).model_config.hf_config.prt_parts
    entries = {name: value for name, value in entries.items() if name != "backbone_config"}
    return ServedParts.from_dict(json.loads(json.dumps(entries)))


def test_the_engines_configuration_holds_few_numbers(served, family):
    parts = stored(family.recipe, enable_lora=True)
    assert parts.size == SIZE
    assert [len(reward.tokens.runs) for reward in parts.rewards] == [2, 2, 3]
    assert [reward.tokens.ids().tolist() for reward in parts.rewards] == [EXTENDED, RENAMED, MOVED]
    assert parts.adapter_base.tokens == parts.rewards[0].tokens
    assert list(parts.tokens) == list(parts.networks)
    base = stored(family.backbone, enable_lora=True, **by_name(prt_adapter_base=served.base))
    assert base.adapter_base.tokens == parts.adapter_base.tokens
    assert base.adapter_base.contract == parts.adapter_base.contract


def test_the_same_vocabulary_is_not_translated(served):
    parts = stored(served.recipe, enable_lora=True)
    assert parts.tokens == {} and parts.adapter_base.tokens is None


def test_a_map_of_tokens_is_taken_from_recipes_and_by_name(family):
    mapped = {"<think>": "<reserved>"}
    model = PRTForCausalLM.from_parts(family.backbone, [family.renamed], token_map=mapped)
    model.save_pretrained(f"{family.recipe}-mapped")
    for parts in (
        stored(f"{family.recipe}-mapped"),
        stored(family.backbone, **by_name(family.renamed, prt_token_map=mapped)),
    ):
        assert parts.rewards[0].tokens == ServedTokens([[PAIR, 0], [1, -1]], [6])
    with pytest.raises(ValueError, match="'<c0>', which is no token of the reward"):
        configure(family.backbone, **by_name(family.renamed, prt_token_map={"<think>": "<c0>"}))
    with pytest.raises(ValueError, match="`prt_token_map` is not usable"):
        configure(family.backbone, **by_name(family.renamed, prt_token_map=["<think>"]))


def test_a_reward_beside_another_ones_tokenizer_is_refused(family, tmp_path):
    reward = RewardModel.from_pretrained(family.renamed)
    reward.save_pretrained(tmp_path)
    moved_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The reward's own tokenizer is not the one that it was tuned with"):
        configure(family.backbone, **by_name(str(tmp_path)))


@given(st.lists(st.integers(-1, 9), min_size=1, max_size=30), st.integers(0, 9))
def test_any_columns_are_kept_in_runs(columns, end):
    columns = torch.tensor(columns)
    neutral = (columns < 0).nonzero()[:, 0].tolist()
    spelled = {token: (3, token % 10) if token % 2 else () for token in neutral}
    match = VocabularyMatch("renamed", len(columns), 10, columns, {}, spelled)
    tokens = ServedTokens.of(match, VocabularyContract(10, "", {"eos_token": "</s>"}, "", {"</s>": end}))
    if tokens is None:
        assert columns.tolist() == list(range(len(columns)))
        return
    tokens = ServedTokens(**json.loads(json.dumps(asdict(tokens))))
    assert torch.equal(tokens.columns(), columns)
    ids = [spelled[token][-1:] or (end,) if token in spelled else (columns[token],) for token in range(len(columns))]
    assert tokens.ids().tolist() == [int(index) for (index,) in ids]


def test_tokens_are_read_where_the_engines_graphs_find_them():
    reader = TokenReader(ServedTokens([[2, 3], [1, -1]], [7]), max_tokens=8)
    places = set()
    for tokens in ([0, 1, 2], [2, 2], [1]):
        read = reader(torch.tensor(tokens, dtype=torch.int32))
        assert read.tolist() == [[3, 4, 7][token] for token in tokens] and read.dtype == torch.int32
        places.add(read.data_ptr())
    assert len(places) == 1 and not reader.state_dict()
    assert reader.scores(torch.arange(10.0)[None])[0, :2].tolist() == [3, 4] and reader.neutral.tolist() == [2]
    assert TokenReader(ServedTokens([[2, 3], [1, 0]], []), 8).neutral is None
