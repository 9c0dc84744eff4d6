"""Speculative decoding gives what ordinary decoding gives: greedy token by token, sampling in distribution."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import tiny
import torch
from peft import LoraConfig
from scipy.stats import chisquare
from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM, StoppingCriteria, TextStreamer
from transformers.generation import BaseStreamer

from prt_hf import PRTForCausalLM, PRTLogitsProcessor, RewardModel, UnsupportedError, speculative_decoding
from prt_hf.errors import PRTValueError, RewardFileError
from prt_hf.inference.probe import behaviour_of
from prt_hf.inference.state import RECORDS_PAST, RewardState
from prt_hf.networks.anatomy import CACHE
from prt_hf.networks.mixed_pass import Pass

LORA = {"target_modules": "all-linear", "init_lora_weights": False}


def noisy(model, scale=0.03):
    """A backbone that often agrees with the source, and often does not."""
    model = copy.deepcopy(model)
    torch.manual_seed(9)
    for parameter in model.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return model


def reward_of(kind, source, tokenizer):
    if kind == "full":
        return RewardModel.from_base(tiny.gpt2(4), tokenizer)
    torch.manual_seed(1)
    reward = RewardModel.from_base(source, tokenizer, LoraConfig(**LORA, use_dora=kind == "dora"))
    reward.network.eval()
    return reward


def both(backbone, processor, prompt, **settings):
    """The ordinary output and the speculative one."""
    settings = {"do_sample": False, "max_new_tokens": 24, "attention_mask": torch.ones_like(prompt)} | settings
    ordinary = backbone.generate(prompt, logits_processor=[processor], **settings)
    ours = backbone.generate(
        prompt,
        logits_processor=[processor],
        custom_generate=speculative_decoding,
        return_dict_in_generate=True,
        **settings,
    )
    return ordinary, ours


@pytest.fixture(scope="module")
def source():
    return tiny.llama(2)


@pytest.fixture(scope="module")
def backbone(source):
    return noisy(source)


@pytest.fixture(scope="module")
def processor(source, tokenizer):
    return PRTLogitsProcessor(reward_of("lora", source, tokenizer), tokenizer, strength=0.7)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "sliding-window"])
def test_greedy_text_is_the_ordinary_one(architecture, kind, tokenizer):
    source = tiny.LANGUAGE_MODELS[architecture](2)
    backbone = noisy(source)
    processor = PRTLogitsProcessor(
        reward_of(kind, source, tokenizer), tokenizer, source_backbone=source if kind == "full" else None
    )
    for prompt in tiny.prompts(2, 9):
        ordinary, ours = both(backbone, processor, prompt[None])
        assert torch.equal(ours.sequences, ordinary)
        assert 0 < ours.num_accepted < ours.num_drafted, "some drafts are taken, some are not"
        assert ours.num_rounds < 24


OPTIONS = {
    "constraints": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 5,
        "suppress_tokens": [5, 6],
    },
    "an end": {"eos_token_id": list(range(5, 25)), "max_new_tokens": 40},
    "chunked prefill": {"prefill_chunk_size": 2},
    "one new token": {"max_new_tokens": 1},
    "one draft at most": {"num_draft_tokens": 1},
    "three drafts at most": {"num_draft_tokens": 3},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_greedy_decoding(backbone, processor, option):
    settings = dict(OPTIONS[option])
    longest = settings.pop("num_draft_tokens", None)
    for seed in range(3):
        prompt = tiny.prompts(1, 9, seed)
        settings |= {"do_sample": False, "attention_mask": torch.ones_like(prompt), "logits_processor": [processor]}
        ordinary = backbone.generate(prompt, **{"max_new_tokens": 24} | settings)
        settings["custom_generate"] = partial(speculative_decoding, num_draft_tokens=longest)
        assert torch.equal(backbone.generate(prompt, **{"max_new_tokens": 24} | settings), ordinary)


def test_as_one_model(source, backbone, tokenizer):
    """Two rewards, of which the first drafts; padding; processors after the rewards."""
    rewards = [reward_of("lora", source, tokenizer), RewardModel.from_base(tiny.gpt2(5), tokenizer)]
    model = PRTForCausalLM.from_parts(copy.deepcopy(backbone), rewards, [0.7, -0.2], tokenizer)
    prompt = tiny.prompts(1, 9)
    mask = torch.ones_like(prompt)
    prompt[0, :3], mask[0, :3] = tokenizer.pad_token_id, 0
    for settings in ({}, {"repetition_penalty": 1.5}, {"num_draft_tokens": 2}, {"attention_mask": None}):
        longest = settings.pop("num_draft_tokens", None)
        settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 24} | settings
        ordinary = model.generate(prompt, **settings)
        assert torch.equal(model.generate(prompt, speculative=True, num_draft_tokens=longest, **settings), ordinary)


@pytest.mark.parametrize(("source_rows", "backbone_rows"), [(97, 128), (128, 97), (104, 128)])
def test_padded_heads(tokenizer, source_rows, backbone_rows):
    source = tiny.llama(2, vocab_size=source_rows)
    backbone = tiny.llama(2, vocab_size=backbone_rows)
    processor = PRTLogitsProcessor(reward_of("lora", source, tokenizer), tokenizer)
    ordinary, ours = both(backbone, processor, tiny.prompts(1))
    assert torch.equal(ours.sequences, ordinary)


def test_scores_and_logits_are_the_ordinary_ones(backbone, processor):
    prompt = tiny.prompts(1)
    settings = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "top_k": 5}
    settings |= {"logits_processor": [processor], "max_new_tokens": 12, "do_sample": False}
    ordinary = backbone.generate(prompt, **settings)
    ours = backbone.generate(prompt, custom_generate=speculative_decoding, **settings)
    assert len(ours.scores) == len(ours.logits) == 12
    for name in ("scores", "logits"):
        for theirs, mine in zip(getattr(ordinary, name), getattr(ours, name), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    none = backbone.generate(prompt, custom_generate=speculative_decoding, **settings | {"output_scores": False})
    assert none.scores is None


# Every count below has its exact expectation from brute force; samples are drawn with fixed seeds, and a right
# implementation would fail one of the three tests for 1 of 30,000 choices of seeds.
FALSE_ALARM = 1e-5


@pytest.mark.parametrize(
    "options", [{"top_k": 3, "temperature": 1.3}, {"top_k": 0, "top_p": 0.7}, {"top_k": 4, "repetition_penalty": 2.0}]
)
def test_samples_have_the_same_distribution(source, tokenizer, options):
    backbone, reward = noisy(source, 0.04), reward_of("lora", source, tokenizer)
    processor = PRTLogitsProcessor(reward, tokenizer, strength=0.5)
    prompt = tiny.prompts(1, 5)
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 3, "min_new_tokens": 3} | options
    settings |= {"return_dict_in_generate": True, "output_scores": True, "do_sample": True}
    exact = exact_distribution(backbone, tiny.BruteForce(reward.network, strength=0.5), prompt, settings)
    assert sum(exact.values()) == pytest.approx(1) and len(exact) > 8
    torch.manual_seed(0)
    counts = dict.fromkeys(exact, 0)
    runs, accepted, drafted = 300, 0, 0
    for _ in range(runs):
        output = backbone.generate(
            prompt, logits_processor=[processor], custom_generate=speculative_decoding, **settings
        )
        counts[tuple(output.sequences[0, 5:].tolist())] += 1
        accepted, drafted = accepted + output.num_accepted, drafted + output.num_drafted
    assert 0.1 < accepted / drafted < 0.95, "both branches of the algorithm are taken"
    # Outcomes that are expected fewer than ten times are counted as one.
    seldom = {outcome for outcome, chance in exact.items() if chance * runs < 10}
    pairs = [(counts[outcome], exact[outcome] * runs) for outcome in exact if outcome not in seldom]
    if seldom:
        pairs.append((sum(counts[o] for o in seldom), runs * sum(exact[o] for o in seldom)))
    observed, expected = zip(*pairs, strict=True)
    total = sum(expected)
    assert chisquare(observed, [value * runs / total for value in expected]).pvalue > FALSE_ALARM


def exact_distribution(backbone, processor, prompt, settings):
    """Chance of every text, from the scores that ordinary decoding gives after every prefix."""
    greedy = settings | {"do_sample": True, "max_new_tokens": 1, "min_new_tokens": 1}

    def chances(prefix):
        mask = torch.ones_like(prefix)
        output = backbone.generate(prefix, logits_processor=[processor], **greedy | {"attention_mask": mask})
        return output.scores[0][0].double().softmax(-1)

    texts = {(): 1.0}
    for _ in range(settings["max_new_tokens"]):
        longer = {}
        for text, chance in texts.items():
            following = chances(torch.cat([prompt, torch.tensor([text], dtype=torch.long)], 1))
            longer |= {(*text, token): chance * following[token].item() for token in following.nonzero()[:, 0].tolist()}
        texts = longer
    return texts


def test_work_is_as_promised(source, backbone, tokenizer):
    """One pass of the backbone a round, one two-row pass of the reward's base a draft; rewards are not recomputed."""
    processor = PRTLogitsProcessor(reward_of("lora", source, tokenizer), tokenizer)
    prompt, passes = tiny.prompts(1, 9), []
    assert behaviour_of(Pass(backbone)).rewinds  # which takes some passes, once
    handle = backbone.register_forward_pre_hook(lambda *_: passes.append(1))
    ordinary, ours = both(backbone, processor, prompt)
    handle.remove()
    assert len(passes) == 24 + ours.num_rounds
    (state,) = processor._drafting._states
    # The prompt, every draft, and after a round whose drafts all held the token that follows.
    assert state.tokens_computed <= 9 + ours.num_drafted + ours.num_rounds


def test_drafts_of_the_backbone_itself_are_all_accepted(source, tokenizer):
    processor = PRTLogitsProcessor(reward_of("lora", source, tokenizer), tokenizer)
    ordinary, ours = both(source, processor, tiny.prompts(1))
    assert torch.equal(ours.sequences, ordinary)
    assert ours.num_accepted == ours.num_drafted
    # 4 drafts and one more token, then 6 and one more, then 8 and one more, then the last 3.
    assert ours.num_rounds == 4


def test_one_processor_for_ordinary_and_speculative_decoding_in_turn(backbone, processor):
    for seed in range(3):
        prompt = tiny.prompts(1, 6 + seed, seed)
        ordinary, ours = both(backbone, processor, prompt)
        assert torch.equal(ours.sequences, ordinary)
        scores = torch.randn(1, tiny.VOCABULARY)
        reference = tiny.BruteForce(processor.reward.network, strength=0.7)
        torch.testing.assert_close(processor(ordinary, scores), reference(ordinary, scores), atol=1e-4, rtol=1e-4)


def test_both_logits_in_one_pass(source, tokenizer):
    """The state that drafts: adapter and base, under the calls that decoding makes."""
    network = reward_of("lora", source, tokenizer).network
    state = RewardState(network, of="both")
    first = tiny.prompts(3, 6)
    for rows in (first, first[[2, 0, 0]], torch.cat([first, first[:, :2]], 1), first[:, :4], first[:1]):
        tuned, base = state.blocks(rows)
        torch.testing.assert_close(tuned, tiny.next_logits(network, rows), atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(base, tiny.next_logits(source, rows), atol=2e-4, rtol=1e-3)
        alone = RewardState(network, of="base")(rows)
        torch.testing.assert_close(alone, base, atol=2e-4, rtol=1e-3)


def test_drafters_forget_what_training_changed(source, backbone, tokenizer):
    """The same prompt before and after a step of a trainer that never calls the reward as a whole."""
    reward = reward_of("lora", copy.deepcopy(source), tokenizer)
    model = PRTForCausalLM.from_parts(copy.deepcopy(backbone), [reward], tokenizer=tokenizer)
    prompt, settings = tiny.prompts(1), {"max_new_tokens": 16, "do_sample": False}
    before = model.generate(prompt, speculative=True, **settings)
    model.train()
    model.base_model(prompt).last_hidden_state.sum().backward()
    with torch.no_grad():
        for parameter in reward.network.parameters():
            if parameter.grad is not None:
                parameter += 0.3 * parameter.grad.sign()
    model.eval()
    after = model.generate(prompt, speculative=True, **settings)
    assert torch.equal(after, model.generate(prompt, **settings)) and not torch.equal(after, before)


# Streaming and stopping


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.is_ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.is_ended = True


def test_streaming(backbone, processor, tokenizer, capsys):
    prompt, recorder = tiny.prompts(1), Recorder()
    model = PRTForCausalLM.from_parts(copy.deepcopy(backbone), [processor.reward], [0.7], tokenizer)
    output = model.generate(prompt, speculative=True, streamer=recorder, max_new_tokens=12, do_sample=False)
    assert recorder.tokens == output[0].tolist() and recorder.is_ended
    recorder = Recorder()
    backbone.generate(
        prompt,
        logits_processor=[processor],
        custom_generate=partial(speculative_decoding, streamer=recorder),
        max_new_tokens=12,
        do_sample=False,
    )
    assert recorder.tokens == output[0, 7:].tolist() and recorder.is_ended
    model.generate(prompt, speculative=True, streamer=TextStreamer(tokenizer), max_new_tokens=12, do_sample=False)
    assert capsys.readouterr().out.split() == tokenizer.decode(output[0]).split()


class StopAt(StoppingCriteria):
    """Looks at the last token only, as many do: it must see every token as the last one."""

    def __init__(self, tokens):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return torch.isin(input_ids[:, -1], self.tokens)


def test_stopping_criteria_see_every_token(source, backbone, tokenizer):
    model = PRTForCausalLM.from_parts(
        copy.deepcopy(source), [reward_of("lora", source, tokenizer)], tokenizer=tokenizer
    )
    prompt = tiny.prompts(1)
    text = model.generate(prompt, do_sample=False, max_new_tokens=20)
    for index in (8, 10, 13):
        settings = {"do_sample": False, "max_new_tokens": 20, "stopping_criteria": [StopAt([text[0, index].item()])]}
        ordinary = model.generate(prompt, **settings)
        assert torch.equal(model.generate(prompt, speculative=True, **settings), ordinary)
        assert ordinary.shape[1] <= index + 1


def test_the_models_own_defaults_hold(source, backbone, tokenizer):
    """Not those of the backbone, whose `generate` does the work."""
    model = PRTForCausalLM.from_parts(
        copy.deepcopy(backbone), [reward_of("lora", source, tokenizer)], tokenizer=tokenizer
    )
    prompt = tiny.prompts(1)
    text = model.generate(prompt, do_sample=False, max_new_tokens=20)
    config = GenerationConfig(do_sample=False, max_new_tokens=20)
    model.generation_config.eos_token_id = text[0, 11].item()
    model.generation_config.repetition_penalty = 1.1
    model.backbone.generation_config.eos_token_id = text[0, 8].item()
    for given in ({"generation_config": config}, {"do_sample": False, "max_new_tokens": 20}):
        ordinary = model.generate(prompt, **given)
        assert torch.equal(model.generate(prompt, speculative=True, **given), ordinary)


def test_threads(source, backbone, tokenizer):
    model = PRTForCausalLM.from_parts(
        copy.deepcopy(backbone), [reward_of("lora", source, tokenizer)], tokenizer=tokenizer
    )
    prompts = [tiny.prompts(1, 6 + seed, seed) for seed in range(4)]
    expected = [model.generate(prompt, do_sample=False, max_new_tokens=12) for prompt in prompts]

    def generate(prompt):
        return model.generate(prompt, speculative=True, do_sample=False, max_new_tokens=12)

    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(generate, prompts), expected))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_threads_of_one_processor(source, backbone, tokenizer, kind):
    """Ordinary and speculative decoding side by side."""
    processor = PRTLogitsProcessor(reward_of(kind, source, tokenizer), tokenizer, source_backbone=source)
    prompts = [tiny.prompts(1, 6 + seed % 3, seed) for seed in range(8)]
    settings = {"do_sample": False, "max_new_tokens": 16, "logits_processor": [processor]}
    expected = [backbone.generate(prompt, **settings) for prompt in prompts]

    def generate(index):
        decode = {"custom_generate": speculative_decoding} if index % 4 else {}
        return backbone.generate(prompts[index], **settings, **decode)

    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(generate, range(8)), expected))


def test_a_backbone_of_longrope(source, tokenizer):
    """Which reads everything anew where its frequencies switch, in the midst of the text."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 2.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    torch.manual_seed(1)
    backbone = Phi3ForCausalLM(
        Phi3Config(**tiny._ATTENTION, rope_parameters=rope, original_max_position_embeddings=16)
    ).eval()
    processor = PRTLogitsProcessor(reward_of("lora", source, tokenizer), tokenizer)
    if not RECORDS_PAST:
        with pytest.raises(UnsupportedError, match="where a longrope model switches its frequencies"):
            both(backbone, processor, tiny.prompts(1, 9))
        return
    ordinary, ours = both(backbone, processor, tiny.prompts(1, 9))
    assert torch.equal(ours.sequences, ordinary)


# What cannot be right is refused


def test_what_cannot_be_speculative(source, backbone, processor, tokenizer):
    decode = {"custom_generate": speculative_decoding, "logits_processor": [processor], "max_new_tokens": 4}
    one, two = tiny.prompts(1), tiny.prompts(2)
    for prompt, settings, message in (
        (two, {}, "2 rows"),
        (one, {"num_beams": 3, "do_sample": False}, "beam_search"),
        (one, {"num_return_sequences": 2, "do_sample": True}, "2 rows"),
        (one, {"use_cache": False}, "no cache"),
        (one, {"cache_implementation": "static"}, "StaticCache"),
        (one, {"guidance_scale": 1.7}, "counts its calls"),
        (one, {"return_dict_in_generate": True, "output_hidden_states": True}, "Hidden states"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            backbone.generate(prompt, **decode | settings)
    with pytest.raises(UnsupportedError, match="cache"):
        tiny.mamba(1).generate(one, **decode)
    with pytest.raises(PRTValueError, match="no PRTLogitsProcessor to draft with"):
        backbone.generate(one, custom_generate=speculative_decoding, max_new_tokens=4)
    for number in (0, 64, 1.5):
        with pytest.raises(PRTValueError, match="num_draft_tokens"):
            backbone.generate(one, num_draft_tokens=number, **decode)
    model = PRTForCausalLM.from_parts(copy.deepcopy(backbone), [processor.reward], tokenizer=tokenizer)
    with pytest.raises(PRTValueError, match="speculative=True"):
        model.generate(one, num_draft_tokens=3, max_new_tokens=4)


def test_going_on_from_a_cache(backbone, processor):
    prompt, settings = tiny.prompts(1), {"do_sample": False, "logits_processor": [processor]}
    settings["custom_generate"] = speculative_decoding
    first = backbone.generate(prompt, return_dict_in_generate=True, max_new_tokens=6, **settings)
    whole = backbone.generate(prompt, max_new_tokens=12, **settings)
    cache = first[CACHE]
    assert torch.equal(backbone.generate(first.sequences, max_new_tokens=6, **{CACHE: cache}, **settings), whole)
    with pytest.raises(UnsupportedError, match=f"including those in `{CACHE}`"):
        backbone.generate(
            whole[:, -1:],
            attention_mask=torch.ones(1, cache.get_seq_length() + 1),
            max_new_tokens=2,
            **{CACHE: cache},
            **settings,
        )


def test_a_full_reward_drafts_with_the_source_that_it_names(tmp_path, backbone, source, tokenizer):
    nameless = PRTLogitsProcessor(RewardModel.from_base(tiny.gpt2(4), tokenizer), tokenizer)
    with pytest.raises(RewardFileError, match="made in memory"):
        both(backbone, nameless, tiny.prompts(1))
    tiny.gpt2(4).save_pretrained(tmp_path)
    reward = RewardModel.from_base(str(tmp_path), tokenizer)
    ordinary, ours = both(backbone, PRTLogitsProcessor(reward, tokenizer), tiny.prompts(1))
    assert torch.equal(ours.sequences, ordinary)
    model = PRTForCausalLM.from_parts(copy.deepcopy(backbone), [nameless.reward], tokenizer=tokenizer)
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(
        model.generate(tiny.prompts(1), speculative=True, assistant_model=source, **settings),
        model.generate(tiny.prompts(1), **settings),
    )


def test_limits_of_context_are_those_of_ordinary_decoding(source, tokenizer):
    """Drafts do not read further than the text may go."""
    short = RewardModel.from_base(tiny.gpt2(4, n_positions=16), tokenizer)
    processor = PRTLogitsProcessor(short, tokenizer, source_backbone=source)
    ordinary, ours = both(noisy(source), processor, tiny.prompts(1, 9), max_new_tokens=8)
    assert torch.equal(ours.sequences, ordinary) and ordinary.shape[1] == 17
