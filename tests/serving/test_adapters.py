"""Rewards that single requests name, as LoRAs of the engine: each row gets its own, and nothing passes for a reward."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_engine import SETTINGS, TOKENS, by_name, configure, metric, sampling
from transformers import AutoModelForCausalLM
from vllm import LLM
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from prt_hf import PRTForCausalLM, RewardModel, UnsupportedError

FIXED = [0.5, -0.3]  # strengths of the rewards that are always on
OF_ADAPTERS = [1.0, 0.8, 2.0]  # as they were tuned


@pytest.fixture(scope="module")
def adapters(served):
    """Rewards on one base, more than fit in a batch, of other ranks, of which one changes a single layer."""
    folders = []
    for index, strength in enumerate(OF_ADAPTERS):
        reward = served.lora_reward(served.base, seed=10 + index, kl_coef=1 / strength)
        folders.append(str(served.folder / f"adapter-{index}"))
        reward.save_pretrained(folders[-1])
    return folders


@pytest.fixture(scope="module")
def fixed(served):
    """A LoRA that is carried over, and a full reward."""
    tuned = served.lora_reward(served.base, seed=3).network
    tuned.save_pretrained(served.folder / "lora")
    RewardModel.from_adapter(str(served.folder / "lora")).save_pretrained(served.folder / "carried-over")
    return [str(served.folder / "carried-over"), served.full]


@pytest.fixture(scope="module")
def model(served, fixed, adapters):
    """What `prt_strength` has numbers for: the rewards that are always on, and all that requests may name."""
    return PRTForCausalLM.from_parts(served.backbone, [*fixed, *adapters])


@pytest.fixture(scope="module")
def engine(served, fixed):
    rewards = by_name(*fixed, prt_strengths=FIXED, prt_adapter_base=served.base)
    return LLM(
        served.backbone,
        enable_lora=True,
        max_loras=2,
        max_cpu_loras=2,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=40,
        disable_log_stats=False,
        **rewards,
        **SETTINGS,
    )


def named(index, adapters):
    return None if index is None else LoRARequest(f"reward-{index}", index + 1, adapters[index])


def strengths_for(index, requested=None):
    *fixed, own = requested or (*FIXED, None if index is None else OF_ADAPTERS[index])
    return [*fixed, *(own if number == index else 0.0 for number in range(len(OF_ADAPTERS)))]


def text(model, prompt, strengths):
    model.strengths = strengths
    return tiny.greedy(model, prompt, TOKENS)


def test_every_row_of_a_mixed_batch_has_the_reward_that_its_request_names(adapters, model, engine):
    """In pieces, with preemption, with more rewards than fit at once."""
    prompts = [
        tiny.prompts(1, length, seed=length)[0].tolist()
        for length in (1, 5, 31, 32, 33, 64, 73, 78, 100, 110, 120, 160)
    ]
    names = [(0, 1, None, 2)[index % 4] for index in range(len(prompts))]
    own = [[1.0, 0.2, 0.5] if index % 3 == 1 else None for index in range(len(prompts))]
    expected = [text(model, *case) for case in zip(prompts, map(strengths_for, names, own), strict=True)]
    for _ in range(2):
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            [sampling(strengths) for strengths in own],
            lora_request=[named(name, adapters) for name in names],
        )
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert len({tuple(each) for each in expected}) == len(expected)
    assert metric(engine, "vllm:num_preemptions") > 0


def test_what_was_read_with_one_reward_is_not_taken_for_another(adapters, model, engine):
    prompt = tiny.prompts(1, 100, seed=9)[0].tolist()
    hits = []
    for name in (0, 0, 1, None):
        before = metric(engine, "vllm:prefix_cache_hits")
        (output,) = engine.generate({"prompt_token_ids": prompt}, sampling(), lora_request=named(name, adapters))
        hits.append(metric(engine, "vllm:prefix_cache_hits") - before)
        assert list(output.outputs[0].token_ids) == text(model, prompt, strengths_for(name))
    assert hits[1] > 0 and hits == [0, hits[1], 0, 0]


def test_log_probabilities_with_a_reward_of_the_request(adapters, model, engine):
    prompt = tiny.prompts(1, 40)[0].tolist()
    (output,) = engine.generate({"prompt_token_ids": prompt}, sampling(logprobs=5), lora_request=named(1, adapters))
    model.strengths = strengths_for(1)
    with torch.no_grad():
        log_probs = model(torch.tensor([prompt + list(output.outputs[0].token_ids)])).logits[0, len(prompt) - 1 :]
    for position, entry in enumerate(output.outputs[0].logprobs):
        for token, found in entry.items():
            assert found.logprob == pytest.approx(log_probs[position, token].item(), abs=2e-4)


def test_what_is_no_reward_for_this_engine_is_refused(served, adapters, engine, tmp_path):
    def refusal(folder):
        with pytest.raises(Exception) as error:
            engine.llm_engine.add_lora(LoRARequest(str(folder), 99, str(folder)))
        return str(error.value)

    def saved(reward):
        reward.save_pretrained(tmp_path / str(len(list(tmp_path.iterdir()))))
        return tmp_path / str(len(list(tmp_path.iterdir())) - 1)

    lora = get_peft_model(
        AutoModelForCausalLM.from_pretrained(served.base), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    lora.save_pretrained(tmp_path / "0")
    assert "0 holds no reward" in refusal(tmp_path / "0")
    assert "The rewards that requests name share one base" in refusal(served.full)
    assert "a LoRA that is carried over" in refusal(saved(RewardModel.from_adapter(str(tmp_path / "0"))))
    other = served.save("other-base", tiny.llama(7, head_dim=32))
    assert "The pretrained model is not the one that was used before" in refusal(saved(served.lora_reward(other)))
    words = served.save("other-tokens", tiny.llama(2, head_dim=32), tiny.tokenizer(changed={"w5": "w500"}))
    assert "The reward's vocabulary is not that of the base of the rewards that requests name" in refusal(
        saved(served.lora_reward(words))
    )
    assert "LoRA rank 32 is greater than max_lora_rank 16" in refusal(saved(served.lora_reward(served.base, r=32)))
    assert "vLLM does not yet support DoRA" in refusal(saved(served.lora_reward(served.base, use_dora=True)))
    embeddings = LoraConfig(target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    assert "The embedding LoRA size" in refusal(saved(RewardModel.from_base(served.base, peft_config=embeddings)))
    assert "Loading lora" in refusal(tmp_path / "nothing")
    (output,) = engine.generate({"prompt_token_ids": [5]}, sampling(), lora_request=named(0, adapters))
    assert len(output.outputs[0].token_ids) == TOKENS


@pytest.mark.parametrize(
    "strengths, settings, message",
    [
        (
            [1.0],
            {},
            "expected: 3 of -10000 ... 10000, one for each reward, the last for that which the request names",
        ),
        (None, {"prompt_logprobs": 1}, "scores prompts without the rewards that requests name"),
    ],
)
def test_requests_that_are_refused_where_rewards_are_named(engine, strengths, settings, message):
    with pytest.raises(VLLMValidationError, match=message):
        engine.generate({"prompt_token_ids": [5]}, sampling(strengths, **settings))


def test_what_rewards_of_requests_need(served, tmp_path):
    with pytest.raises(ValueError, match="is for rewards that requests name.\n  expected: --enable-lora"):
        configure(served.backbone, **by_name(prt_adapter_base=served.base))
    with pytest.raises(UnsupportedError, match="requests' own rewards are put on one base, and none is known"):
        configure(served.backbone, enable_lora=True, **by_name(served.full))
    with pytest.raises(UnsupportedError, match="and all of it that they were tuned on"):
        configure(served.recipe, enable_lora=True, lora_target_modules=["q_proj"])
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with pytest.raises(UnsupportedError, match="does not show which of the drafts' rows have rewards of their own"):
        configure(served.recipe, enable_lora=True, speculative_config=ngram)
    parts = configure(served.recipe, enable_lora=True).model_config.hf_config.prt_parts
    assert parts["adapter_base"]["folder"] == served.base
    assert configure(served.recipe).model_config.hf_config.prt_parts["adapter_base"] is None
