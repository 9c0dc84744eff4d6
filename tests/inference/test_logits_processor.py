"""`generate()` with a reward equals `generate()` with a brute-force recomputation in float64, in every mode."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import CompileConfig, GPT2LMHeadModel, StaticCache, logging

from prt_hf import (
    ContextLengthError,
    EFTLogitsProcessor,
    NonFiniteRewardError,
    PRTLogitsProcessor,
    RewardModel,
    UnsupportedError,
    VocabularyMismatchError,
    combine,
)
from prt_hf.errors import PRTValueError
from prt_hf.inference.probe import behaviour_of
from prt_hf.networks.anatomy import CACHE
from prt_hf.networks.mixed_pass import Pass

MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.95},
    "beams": {"num_beams": 4},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 3},
    "several samples returned": {"do_sample": True, "num_return_sequences": 3},
    "constraints before the reward": {"repetition_penalty": 1.3, "suppress_tokens": [5, 6, 7], "min_new_tokens": 5},
    "chunked prefill": {"prefill_chunk_size": 3},
    "static cache": {"cache_implementation": "static"},
}
SPECULATIVE = {
    "assisted by another model": {"assistant_model": tiny.llama(7)},
    "assisted by the backbone": {"assistant_model": tiny.llama(1)},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.fixture(scope="module")
def backbone():
    return tiny.llama(1)


@pytest.fixture(scope="module", params=tiny.LANGUAGE_MODELS)
def reward(request, tokenizer):
    return RewardModel.from_base(tiny.LANGUAGE_MODELS[request.param](2), tokenizer)


def generate(backbone, processor, prompts, mask=None, **mode):
    mode = {"do_sample": False, "max_new_tokens": 20} | mode
    torch.manual_seed(3)
    mask = torch.ones_like(prompts) if mask is None else mask
    return backbone.generate(prompts, attention_mask=mask, logits_processor=[processor], **mode)


@pytest.mark.parametrize("mode", MODES)
def test_modes(backbone, reward, tokenizer, mode):
    prompts = tiny.prompts(3)
    expected = generate(backbone, tiny.BruteForce(reward.network), prompts, **MODES[mode])
    assert torch.equal(generate(backbone, PRTLogitsProcessor(reward, tokenizer), prompts, **MODES[mode]), expected)


@pytest.mark.parametrize("mode", SPECULATIVE)
def test_speculative_modes(backbone, reward, tokenizer, mode):
    processor = PRTLogitsProcessor(reward, tokenizer)
    for row in tiny.prompts(3):
        expected = generate(backbone, tiny.BruteForce(reward.network), row[None])
        assert torch.equal(generate(backbone, processor, row[None], **SPECULATIVE[mode]), expected)


@pytest.mark.parametrize("mode", ["greedy", "sampling", "beams", "several beams returned"])
@pytest.mark.parametrize("is_mask_given", [True, False])
def test_left_padding(backbone, reward, tokenizer, mode, is_mask_given):
    prompts = tiny.prompts(4, 9)
    prompts[1, :3] = prompts[2, :5] = tokenizer.pad_token_id
    mask = (prompts != tokenizer.pad_token_id).long()
    expected = generate(backbone, tiny.BruteForce(reward.network, mask), prompts, mask, **MODES[mode])
    processor = PRTLogitsProcessor(reward, tokenizer, attention_mask=mask if is_mask_given else None)
    assert torch.equal(generate(backbone, processor, prompts, mask, **MODES[mode]), expected)


COMPILED = ["greedy", "beams", "several samples returned", "chunked prefill"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "sliding-window"])
def test_compiled_step(backbone, tokenizer, architecture, monkeypatch):
    """A static cache that grows, is rewound by drafts and reordered by beams; the step of one token compiled."""
    monkeypatch.setattr("prt_hf.inference.state.ROOM", 16)
    network = tiny.LANGUAGE_MODELS[architecture](2)
    reward = RewardModel.from_base(network, tokenizer, LoraConfig(init_lora_weights=False))
    reward.network.eval()
    steps = []
    monkeypatch.setattr(torch, "compile", counting(steps))
    processor = PRTLogitsProcessor(reward, tokenizer, compile_config=CompileConfig(backend="eager", mode=None))
    for mode in COMPILED:
        prompts = tiny.prompts(2, 9)
        mask = torch.ones_like(prompts)
        prompts[1, :4], mask[1, :4] = tokenizer.pad_token_id, 0
        processor.attention_mask = mask
        expected = generate(backbone, tiny.BruteForce(reward.network, mask), prompts, mask, **MODES[mode])
        assert torch.equal(generate(backbone, processor, prompts, mask, **MODES[mode]), expected)
    processor.attention_mask = None
    prompt = tiny.prompts(1, 9, seed=4)
    expected = generate(backbone, tiny.BruteForce(reward.network), prompt)
    for mode in SPECULATIVE:
        assert torch.equal(generate(backbone, processor, prompt, **SPECULATIVE[mode]), expected)
    assert len(steps) > 3 * 19, "the compiled step was taken"


def counting(steps):
    """That torch.compile is right is not for us to test; that it is asked, with static shapes, is."""

    def compile(function, **settings):
        assert settings["backend"] == "eager"

        def step(*args, **kwargs):
            assert kwargs["input_ids"].shape[1] == 1 and isinstance(kwargs[CACHE], StaticCache)
            steps.append(1)
            return function(*args, **kwargs)

        return step

    return compile


def test_a_really_compiled_step(backbone, tokenizer):
    reward = RewardModel.from_base(tiny.llama(2), tokenizer)
    processor = PRTLogitsProcessor(reward, tokenizer, compile_config=CompileConfig(backend="eager", mode=None))
    prompts = tiny.prompts(2)
    expected = generate(backbone, tiny.BruteForce(reward.network), prompts, max_new_tokens=6)
    assert torch.equal(generate(backbone, processor, prompts, max_new_tokens=6), expected)
    with pytest.raises(UnsupportedError, match="cannot be compiled"):
        recurrent = RewardModel.from_base(tiny.mamba(2), tokenizer)
        PRTLogitsProcessor(recurrent, tokenizer, compile_config=CompileConfig())


def test_one_object_for_everything(backbone, reward, tokenizer):
    """Other prompts, batch sizes and modes in turn, with drafts in between."""
    processor = PRTLogitsProcessor(reward, tokenizer)
    for seed, mode in enumerate(["greedy", "beams", "several samples returned", "greedy", "sampling", "beams"]):
        prompts = tiny.prompts(1 + seed % 3, 4 + seed, seed)
        expected = generate(backbone, tiny.BruteForce(reward.network), prompts, **MODES[mode])
        assert torch.equal(generate(backbone, processor, prompts, **MODES[mode]), expected), mode
        draft = generate(backbone, processor, prompts[:1], **SPECULATIVE["prompt lookup"])
        assert torch.equal(draft, generate(backbone, tiny.BruteForce(reward.network), prompts[:1])), mode


def test_interleaved_calls(backbone, reward, tokenizer):
    """Two texts that take turns at one processor."""
    processor, reference = PRTLogitsProcessor(reward, tokenizer), tiny.BruteForce(reward.network)
    texts = [tiny.prompts(2, 6, seed=1), tiny.prompts(3, 9, seed=2)]
    for _ in range(4):
        for index, rows in enumerate(texts):
            scores = torch.randn(len(rows), tiny.VOCABULARY)
            torch.testing.assert_close(processor(rows, scores), reference(rows, scores), atol=2e-4, rtol=1e-3)
            texts[index] = torch.cat([rows, scores.argmax(-1, keepdim=True)], 1)


@pytest.mark.parametrize("kind", ["reward", "eft"])
def test_threads(backbone, tokenizer, kind):
    """A server with a pool of threads: many texts through one processor at a time, each as by itself."""
    network = RewardModel.from_base(tiny.llama(2), tokenizer, LoraConfig(init_lora_weights=False)).network.eval()
    if kind == "eft":
        processor = EFTLogitsProcessor(network, tokenizer)
    else:
        processor = PRTLogitsProcessor(RewardModel.from_base(tiny.mamba(2), tokenizer), tokenizer)
    prompts = [tiny.prompts(1 + seed % 2, 5 + seed % 3, seed) for seed in range(12)]
    expected = [generate(backbone, processor, prompt) for prompt in prompts]
    processor.reset()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda prompt: generate(backbone, processor, prompt), prompts))
    assert all(map(torch.equal, found, expected))


def test_a_mask_set_while_a_text_is_decoded_is_not_taken_for_its_own(reward, tokenizer):
    """As another thread might set it."""
    rows, scores = tiny.prompts(2, 8), torch.randn(2, tiny.VOCABULARY)
    processor = PRTLogitsProcessor(reward, tokenizer, attention_mask=torch.ones_like(rows))
    processor(rows, scores)
    processor.attention_mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    with pytest.raises(PRTValueError, match="belongs to other prompts"):
        processor(torch.cat([rows, rows[:, :1]], 1), scores)


def test_beam_scores_are_exact(backbone, reward, tokenizer):
    prompts = tiny.prompts(2)
    out = backbone.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        logits_processor=[PRTLogitsProcessor(reward, tokenizer)],
        num_beams=4,
        do_sample=False,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_scores=True,
        length_penalty=0.0,
    )
    for sequence, score in zip(out.sequences, out.sequences_scores, strict=True):
        logits = [model(sequence[None, :-1]).logits[0].double() for model in (backbone, reward.network)]
        log_probs = combine(*logits).double()[6:]
        chosen = log_probs.gather(1, sequence[7:, None]).sum()
        assert score.item() == pytest.approx(chosen.item(), abs=1e-3)


def test_output_is_normalised_and_scores_are_left_alone(reward, tokenizer):
    scores = 3 * torch.randn(2, tiny.VOCABULARY)
    before = scores.clone()
    output = PRTLogitsProcessor(reward, tokenizer)(tiny.prompts(2), scores)
    torch.testing.assert_close(output.exp().sum(-1), torch.ones(2))
    assert torch.equal(scores, before)


def test_strength_zero_is_the_backbone_alone(backbone, reward, tokenizer):
    prompts = tiny.prompts(2)
    bare = backbone.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=20)
    assert torch.equal(generate(backbone, PRTLogitsProcessor(reward, tokenizer, strength=0), prompts), bare)


@pytest.mark.parametrize("mode", ["greedy", "beams", "several samples returned"])
def test_strength_per_prompt(backbone, reward, tokenizer, mode):
    prompts, strength = tiny.prompts(3), [0.0, 1.0, -0.5]
    expected = generate(backbone, tiny.BruteForce(reward.network, strength=strength), prompts, **MODES[mode])
    for value in (strength, torch.tensor(strength)):
        processor = PRTLogitsProcessor(reward, tokenizer, strength=value)
        assert torch.equal(generate(backbone, processor, prompts, **MODES[mode]), expected)


def test_default_strength_is_the_one_of_training(tokenizer):
    reward = RewardModel.from_base(tiny.llama(2), tokenizer)
    assert PRTLogitsProcessor(reward, tokenizer).strength == 1.0
    reward.trained_with(reward.config.reward_base, kl_coef=4.0, entropy_coef=0.0)
    assert PRTLogitsProcessor(reward, tokenizer).strength == 0.25


@pytest.mark.parametrize(("reward_rows", "backbone_rows"), [(97, 128), (128, 97), (104, 128)])
def test_padded_heads(tokenizer, reward_rows, backbone_rows):
    """Heads padded differently beyond the same 97 tokens, as in Qwen2.5 (151936 and 152064 rows)."""
    reward = RewardModel.from_base(tiny.llama(2, vocab_size=reward_rows), tokenizer)
    backbone, prompts = tiny.llama(1, vocab_size=backbone_rows), tiny.prompts(2)
    processor = PRTLogitsProcessor(reward, tokenizer)
    output = processor(prompts, torch.randn(2, backbone_rows))
    assert output.shape == (2, backbone_rows) and (output[:, 97:] == -torch.inf).all()
    torch.testing.assert_close(output.exp().sum(-1), torch.ones(2))
    expected = generate(backbone, tiny.BruteForce(reward.network), prompts, num_beams=3)
    assert torch.equal(generate(backbone, processor, prompts, num_beams=3), expected)


def test_reward_in_another_precision(backbone, tokenizer):
    network = tiny.llama(2).to(torch.bfloat16)
    reward = RewardModel.from_base(network, tokenizer)
    rows, scores = tiny.prompts(2), torch.randn(2, tiny.VOCABULARY, dtype=torch.float16)
    expected = combine(scores, network(rows, use_cache=False).logits[:, -1])
    output = PRTLogitsProcessor(reward, tokenizer)(rows, scores)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, atol=0.05, rtol=0.02)


def test_reward_adapter_on_the_backbones_own_weights(backbone, tokenizer):
    """One set of weights serves as backbone and, with the adapter, as reward."""
    reward = RewardModel.from_base(backbone, tokenizer, LoraConfig(init_lora_weights=False))
    prompts = tiny.prompts(2)
    bare = backbone(prompts).logits
    expected = generate(backbone, tiny.BruteForce(reward.network), prompts)
    assert torch.equal(generate(backbone, PRTLogitsProcessor(reward, tokenizer), prompts), expected)
    assert torch.equal(backbone(prompts).logits, bare), "the adapter must not leak into the backbone"


def test_eft_equals_its_definition(backbone, tokenizer):
    old = tiny.llama(2)
    adapted = RewardModel.from_base(old, tokenizer, LoraConfig(init_lora_weights=False)).network
    rows, scores = tiny.prompts(2), torch.randn(2, tiny.VOCABULARY)
    tuned, base = (tiny.next_logits(model, rows).double().log_softmax(-1) for model in (adapted, old))
    assert (tuned - base).abs().max() > 0.1
    expected = (scores.double().log_softmax(-1) + 0.5 * (tuned - base)).log_softmax(-1).float()
    for processor in (
        EFTLogitsProcessor(adapted, tokenizer, strength=0.5),
        EFTLogitsProcessor(adapted, tokenizer, pretrained=old, strength=0.5),
    ):
        torch.testing.assert_close(processor(rows, scores), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_eft_is_cached_as_prt_is(backbone, tokenizer, mode):
    adapted = RewardModel.from_base(tiny.llama(2), tokenizer, LoraConfig(init_lora_weights=False)).network
    prompts = tiny.prompts(2)
    one = generate(backbone, EFTLogitsProcessor(adapted, tokenizer), prompts, **MODES[mode])

    def forgetful(rows, scores):
        return EFTLogitsProcessor(adapted, tokenizer)(rows, scores)

    assert torch.equal(one, generate(backbone, forgetful, prompts, **MODES[mode]))


def test_eft_with_a_merged_adapter_is_refused(backbone, tokenizer):
    adapted = RewardModel.from_base(tiny.llama(2), tokenizer, LoraConfig(init_lora_weights=False)).network
    adapted.merge_adapter()
    with pytest.raises(UnsupportedError, match="merged into weights"):
        EFTLogitsProcessor(adapted, tokenizer)(tiny.prompts(1), torch.randn(1, tiny.VOCABULARY))


def test_eft_needs_both_old_models(tokenizer):
    with pytest.raises(PRTValueError, match="`pretrained=`, or a PeftModel"):
        EFTLogitsProcessor(tiny.llama(2), tokenizer)


# Padding that the tokens alone do not tell


@pytest.fixture
def warnings_seen(monkeypatch):
    seen = []
    monkeypatch.setattr(logging.get_logger("prt_hf.inference.context"), "warning", seen.append)
    return seen


def test_pad_token_that_opens_texts(warnings_seen):
    """GPT-2's only special token pads, opens and ends texts: what all rows share is text, the rest padding."""
    tokenizer = tiny.tokenizer(pad_token="<bos>")
    reward = RewardModel.from_base(tiny.gpt2(2), tokenizer)
    rows = tiny.prompts(2, 8)
    rows[0, 0], rows[1, :4] = 1, 1
    processor, scores = PRTLogitsProcessor(reward, tokenizer), torch.randn(2, tiny.VOCABULARY)
    mask = torch.tensor([[1] * 8, [0] * 3 + [1] * 5])
    expected = tiny.BruteForce(reward.network, mask)(rows, scores)
    torch.testing.assert_close(processor(rows, scores), expected, atol=1e-4, rtol=1e-4)
    processor(rows, scores)
    assert len(warnings_seen) == 1 and "attention_mask" in warnings_seen[0]


def test_unambiguous_padding_is_taken_without_a_word(reward, tokenizer, warnings_seen):
    rows = tiny.prompts(2, 8)
    rows[:, :2] = tokenizer.pad_token_id  # padded to a multiple: every row
    processor, scores = PRTLogitsProcessor(reward, tokenizer), torch.randn(2, tiny.VOCABULARY)
    expected = tiny.BruteForce(reward.network, (rows != 0).long())(rows, scores)
    torch.testing.assert_close(processor(rows, scores), expected, atol=1e-4, rtol=1e-4)
    assert not warnings_seen


def test_a_mask_belongs_to_its_prompts(reward, tokenizer):
    rows, scores = tiny.prompts(2, 8), torch.randn(2, tiny.VOCABULARY)
    mask = torch.ones_like(rows)
    mask[1, :3] = 0
    processor = PRTLogitsProcessor(reward, tokenizer, attention_mask=mask)
    processor(rows, scores)
    for other in (tiny.prompts(2, 8, seed=5), rows[:1], rows[:, :5]):
        with pytest.raises(PRTValueError, match="belongs to other prompts"):
            processor(other, scores[: len(other)])
    processor.attention_mask = None
    processor(tiny.prompts(2, 8, seed=5), scores)


# What cannot be right is refused


def test_another_vocabulary_of_the_same_size(reward):
    with pytest.raises(VocabularyMismatchError, match=r"2 differ.*'w7' \(7 -> absent\).*'other' \(absent -> 7\)"):
        PRTLogitsProcessor(reward, tiny.tokenizer(changed={"w7": "other"}))


def test_scores_narrower_than_the_vocabulary(reward, tokenizer):
    with pytest.raises(VocabularyMismatchError, match="(?s)97 to 4193 logits.*found: 90"):
        PRTLogitsProcessor(reward, tokenizer)(tiny.prompts(1), torch.randn(1, 90))


def test_continuous_batching_is_refused(reward, tokenizer):
    processor = PRTLogitsProcessor(reward, tokenizer)
    assert processor.supports_continuous_batching is False
    with pytest.raises(UnsupportedError, match="not continuous batching"):
        processor(torch.tensor([5, 6, 7]), torch.randn(3, tiny.VOCABULARY))


def test_prompts_as_embeddings_are_refused(backbone, reward, tokenizer):
    embeds = backbone.get_input_embeddings()(tiny.prompts(1))
    with pytest.raises(UnsupportedError, match="cannot see the tokens"):
        backbone.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2]),
            logits_processor=[PRTLogitsProcessor(reward, tokenizer)],
            max_new_tokens=2,
        )


def test_prompts_longer_than_the_rewards_context(backbone, tokenizer):
    reward = RewardModel.from_base(tiny.gpt2(2, n_positions=10), tokenizer)
    with pytest.raises(ContextLengthError, match="at most 10 tokens"):
        generate(backbone, PRTLogitsProcessor(reward, tokenizer), tiny.prompts(1, 12))
    with pytest.raises(ContextLengthError):  # outgrown while generating
        generate(backbone, PRTLogitsProcessor(reward, tokenizer), tiny.prompts(1, 7))


def test_broken_rewards_are_named(backbone, tokenizer):
    network = tiny.llama(2)
    network.lm_head.weight.data[9] = torch.nan
    reward = RewardModel.from_base(network, tokenizer)
    with pytest.raises(NonFiniteRewardError, match="token or label id 9"):
        generate(backbone, PRTLogitsProcessor(reward, tokenizer), tiny.prompts(1))


@pytest.mark.parametrize("strength", [float("nan"), [1.0, float("inf")], [[1.0]]])
def test_unusable_strengths(reward, tokenizer, strength):
    with pytest.raises(PRTValueError, match="`strength` is not usable"):
        PRTLogitsProcessor(reward, tokenizer, strength=strength)


def test_strengths_for_another_batch(reward, tokenizer):
    with pytest.raises(PRTValueError, match="(?s)batch of 3 rows.*2 numbers"):
        PRTLogitsProcessor(reward, tokenizer, strength=[1.0, 2.0])(tiny.prompts(3), torch.randn(3, tiny.VOCABULARY))


def test_rewards_over_labels_do_not_generate(tokenizer):
    with pytest.raises(PRTValueError, match="reward over labels"):
        PRTLogitsProcessor(RewardModel.from_base(tiny.vit()), tokenizer)


def test_arguments_of_other_kinds(reward, tokenizer):
    with pytest.raises(PRTValueError, match="(?s)a RewardModel.*found: str"):
        PRTLogitsProcessor("me/reward", tokenizer)
    with pytest.raises(PRTValueError, match="needs the backbone's tokenizer"):
        PRTLogitsProcessor(reward, None)


@pytest.mark.parametrize("layers", [2, 40])
def test_rounding_is_not_taken_for_another_way_of_reading(layers):
    """Forty layers in bfloat16 differ by a fifth of the logits' spread between two right ways to read."""
    network = tiny.llama(1, num_hidden_layers=layers).to(torch.bfloat16)
    assert behaviour_of(Pass(network)) == (True, True, True, True)
    blind = tiny.gpt2(1).to(torch.bfloat16)
    blind.forward = lambda input_ids, **_: GPT2LMHeadModel.forward(blind, input_ids)  # neither mask nor cache
    assert behaviour_of(Pass(blind)) == (False, False, False, False)
