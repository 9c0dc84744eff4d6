"""Texts and log-probabilities of vLLM's engine are those of transformers; what cannot be so is refused."""

import gc
import json
import shutil
from pathlib import Path

import pytest
import tiny
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM, PaliGemmaConfig, PaliGemmaForConditionalGeneration
from vllm import LLM, EngineArgs, SamplingParams
from vllm.exceptions import VLLMValidationError

from prt_hf import PRTForCausalLM, RewardFileError, RewardModel, UnsupportedError
from prt_hf.serving.limits import window_of
from prt_hf.serving.strength import RefusedStrengths

TOKENS = 24
STRENGTHS = [None, [0.0, 0.0], [1.0, 0.5], [0.0, 2.0]]
SETTINGS = {"dtype": "float32", "block_size": 32, "enforce_eager": True}


@pytest.fixture(scope="module")
def engine(served):
    """Small enough that prompts are read in pieces, and that requests are put off and begun again."""
    return LLM(
        served.recipe,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        num_gpu_blocks_override=36,
        disable_log_stats=False,
        **SETTINGS,
    )


def sampling(strengths=None, **settings):
    asked = {} if strengths is None else {"extra_args": {"prt_strength": strengths}}
    return SamplingParams(**{"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True} | asked | settings)


def metric(engine, name):
    return sum(each.value for each in engine.get_metrics() if each.name == name)


def test_texts_in_flight_together_are_those_of_transformers(served, engine):
    """Different lengths and strengths in one batch, in pieces, with preemption, from the prefix cache as well."""
    common = tiny.prompts(1, 70, seed=9)[0].tolist()
    prompts = [tiny.prompts(1, length, seed=length)[0].tolist() for length in (1, 5, 31, 32, 33, 64, 100, 150)]
    prompts += [common + tiny.prompts(1, length, seed=length)[0].tolist() for length in (3, 8, 40, 90)]
    strengths = [STRENGTHS[index % len(STRENGTHS)] for index in range(len(prompts))]
    tokens = [TOKENS - index % 5 for index in range(len(prompts))]  # so that rows of the batch move
    expected = [served.text(*case) for case in zip(prompts, tokens, strengths, strict=True)]
    asked = [sampling(value, max_tokens=count) for value, count in zip(strengths, tokens, strict=True)]
    for _ in range(2):
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert len({tuple(text) for text in expected}) == len(expected)
    assert metric(engine, "vllm:num_preemptions") > 0
    assert metric(engine, "vllm:prefix_cache_hits") > 0


@pytest.mark.parametrize("strengths", STRENGTHS[:3])
def test_log_probabilities_are_those_of_transformers(served, engine, strengths):
    prompt = tiny.prompts(1, 40)[0].tolist()
    scored = {} if strengths else {"prompt_logprobs": 2}
    (output,) = engine.generate({"prompt_token_ids": prompt}, sampling(strengths, logprobs=5, **scored))
    log_probs = served.log_probs(prompt + list(output.outputs[0].token_ids), strengths)
    told = [(len(prompt) - 1 + index, entry) for index, entry in enumerate(output.outputs[0].logprobs)]
    told += [(index, entry) for index, entry in enumerate((output.prompt_logprobs or [None])[1:])]
    assert len(told) == TOKENS + (len(prompt) - 1 if scored else 0)
    for position, entry in told:
        for token, found in entry.items():
            assert found.logprob == pytest.approx(log_probs[position, token].item(), abs=2e-4)


def test_what_pads_the_head_is_no_token(engine):
    assert engine.llm_engine.model_config.get_vocab_size() == tiny.VOCABULARY  # of 104 rows
    (output,) = engine.generate({"prompt_token_ids": [5]}, sampling(logit_bias={tiny.VOCABULARY - 1: 100.0}))
    assert list(output.outputs[0].token_ids) == [tiny.VOCABULARY - 1] * TOKENS
    with pytest.raises(VLLMValidationError, match=str(tiny.VOCABULARY)):
        engine.generate({"prompt_token_ids": [5]}, sampling(logit_bias={tiny.VOCABULARY: 100.0}))


@pytest.mark.parametrize(
    "strengths, settings, message",
    [
        (
            [1.0],
            {},
            r"not usable.\n  expected: 2 of -10000 ... 10000, one for each reward\n  found: \[1.0\]",
        ),
        ([1.0, float("nan")], {}, r"found: \[1.0, nan\]"),
        ([1e5, 1.0], {}, r"found: \[100000.0, 1.0\]"),
        ([1.0, True], {}, r"found: \[1.0, True\]"),
        ("strong", {}, "found: strong"),
        ([1.0, 1.0], {"prompt_logprobs": 1}, "cannot change strengths and give `prompt_logprobs`"),
        ([1.0, 1.0], {"repetition_penalty": 1.5}, "cannot change strengths and give `repetition_penalty`"),
    ],
)
def test_strengths_of_a_request_that_are_refused(engine, strengths, settings, message):
    with pytest.raises(VLLMValidationError, match=message):
        engine.generate({"prompt_token_ids": [5]}, sampling(strengths, **settings))


def test_repetition_is_punished_as_by_transformers(served, engine):
    prompt = tiny.prompts(1, 12)[0].tolist()
    (output,) = engine.generate({"prompt_token_ids": prompt}, sampling(repetition_penalty=1.3))
    ids = served.tokenizer.pad({"input_ids": [prompt]}, return_tensors="pt")
    expected = served.model.generate(
        **ids, do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS, repetition_penalty=1.3
    )
    assert list(output.outputs[0].token_ids) == expected[0, len(prompt) :].tolist()


def configure(model, **settings):
    return EngineArgs(model=model, **SETTINGS | settings).create_engine_config()


def by_name(*rewards, **more):
    return {"hf_overrides": {"architectures": ["PRTForCausalLM"], "prt_rewards": list(rewards)} | more}


def test_the_engine_reads_no_more_than_every_reward_can(served, tmp_path):
    short = tiny.llama(5, head_dim=32, max_position_embeddings=64)
    RewardModel.from_base(short, served.tokenizer).save_pretrained(tmp_path / "short")
    rewards = by_name(str(tmp_path / "short"), served.adapter)
    assert configure(served.backbone, **rewards).model_config.max_model_len == 64
    with pytest.raises(ValueError, match="expected: at most 64 .*\n  found: 100\n  remedy: --max-model-len 64"):
        configure(served.backbone, max_model_len=100, **rewards)


def test_a_recipe_has_its_own_name_tokenizer_and_settings(served, tmp_path):
    shutil.copytree(served.recipe, tmp_path / "recipe")
    (tmp_path / "recipe/generation_config.json").write_text('{"temperature": 0.5}')
    config = configure(str(tmp_path / "recipe")).model_config
    assert config.get_diff_sampling_param() == {"temperature": 0.5}
    assert (config.model, config.tokenizer) == (served.backbone, str(tmp_path / "recipe"))
    assert config.served_model_name == str(tmp_path / "recipe")


def test_arguments_that_are_asked_for_a_configuration_twice_keep_the_rewards(served):
    """As by Ray Data; the arguments take over the model's name from the first."""
    arguments = EngineArgs(model=served.recipe, **SETTINGS)
    for _ in range(2):
        config = arguments.create_engine_config().model_config
        assert (arguments.model, config.model) == (served.recipe, served.backbone)
        assert config.architectures == ["PRTForCausalLM"]


def test_windows_of_single_layers_are_left_to_the_layers():
    assert window_of(tiny.sliding_window(window=6).config) == 6
    assert window_of(tiny.llama().config) is None
    mixed = tiny.sliding_window(window=6).config
    mixed.layer_types = ["full_attention", "sliding_attention"]
    assert window_of(mixed) is None


def changed(file: Path):
    weights = load_file(file)
    save_file({name: value + 1 for name, value in weights.items()}, file, metadata={"format": "pt"})


def moe_model() -> MixtralForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    experts = {"num_local_experts": 2, "num_key_value_heads": 1}
    config = MixtralConfig(vocab_size=tiny.VOCABULARY, max_position_embeddings=tiny.CONTEXT, **sizes, **experts)
    return MixtralForCausalLM(config)


def test_strengths_are_refused_no_longer_than_an_engine_speculates(served):
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    config = configure(served.recipe, speculative_config=ngram)
    with pytest.raises(ValueError, match="does not take `prt_strength` with speculation"):
        RefusedStrengths.validate_params(sampling([1.0, 1.0]))
    del config
    gc.collect()
    RefusedStrengths.validate_params(sampling([1.0, 1.0]))


def edit(folder: Path, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


def vision_language_model() -> PaliGemmaForConditionalGeneration:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": tiny.VOCABULARY, "num_key_value_heads": 1, "head_dim": 8}
    images = sizes | {"image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = PaliGemmaConfig(text_config=text, vision_config=images, projection_dim=16, image_token_index=5)
    return PaliGemmaForConditionalGeneration(config)


def test_damaged_recipes_are_refused(served, tmp_path):
    """As by transformers, though the engine loads no reward before it starts."""
    recipe = tmp_path / "recipe"
    shutil.copytree(served.recipe, recipe)
    references = json.loads((recipe / "config.json").read_text())["reward_references"]
    references[0]["strength"] = float("nan")
    edit(recipe, reward_references=references)
    with pytest.raises(RewardFileError, match="The recipe's reward_references cannot be read(?s:.*)'strength': nan"):
        configure(str(recipe))
    shutil.copytree(served.recipe, recipe, dirs_exist_ok=True)
    (recipe / "reward-0/adapter_model.safetensors").unlink()
    with pytest.raises(RewardFileError, match="reward-0 is incomplete: adapter_model.safetensors is missing"):
        configure(str(recipe))


def test_recipes_whose_parts_have_changed_are_refused(served, tmp_path):
    shutil.copytree(served.recipe, tmp_path / "recipe")
    changed(tmp_path / "recipe/reward-0/adapter_model.safetensors")
    with pytest.raises(RewardFileError, match="The recipe's reward has changed"):
        configure(str(tmp_path / "recipe"))
    model = tiny.llama(6, head_dim=32)
    model.save_pretrained(tmp_path / "moved")
    served.tokenizer.save_pretrained(tmp_path / "moved")
    PRTForCausalLM.from_parts(str(tmp_path / "moved"), [served.full]).save_pretrained(tmp_path / "other")
    assert configure(str(tmp_path / "other")).model_config.model == str(tmp_path / "moved")
    changed(tmp_path / "moved/model.safetensors")
    with pytest.raises(ValueError, match="not the one that was used before"):
        configure(str(tmp_path / "other"))


def test_what_the_engine_cannot_do_is_refused_before_it_starts(served, tmp_path):
    with pytest.raises(ValueError, match="The model names no rewards"):
        configure(served.backbone, hf_overrides={"architectures": ["PRTForCausalLM"]})
    with pytest.raises(ValueError, match="`prt_strengths` is not usable.\n  expected: 1 finite numbers"):
        configure(served.backbone, **by_name(served.full, prt_strengths=[1.0, 2.0]))
    drafts = {"method": "draft_model", "model": served.recipe, "num_speculative_tokens": 2}
    with pytest.raises(UnsupportedError, match="the engine keeps one network's cache and states for drafts"):
        configure(served.recipe, speculative_config=drafts)
    with pytest.raises(ValueError, match="A recipe names all of its networks"):
        configure(served.recipe, hf_overrides={"vocab_size": 97})
    with pytest.raises(RewardFileError, match="backbone holds no reward"):
        configure(served.backbone, **by_name(served.backbone))
    with pytest.raises(UnsupportedError, match="cannot read the backbone's"):
        configure(served.recipe, enable_prompt_embeds=True)
    with pytest.raises(UnsupportedError, match="leave the rewards with random ones.\n  found: .* = runai_streamer"):
        configure(served.recipe, load_format="runai_streamer")
    for settings in ({"runner": "pooling"}, {"convert": "classify"}):
        with pytest.raises(UnsupportedError, match="cannot be pooled.\n  found: runner = pooling"):
            configure(served.recipe, **settings)
    other = served.save("other-words", tiny.llama(4, head_dim=32), tiny.tokenizer(changed={"w5": "w500"}))
    with pytest.raises(ValueError, match="The vocabulary of the backbone is not the reward's"):
        configure(other, **by_name(served.full))
    states = served.save("states", tiny.mamba())
    with pytest.raises(UnsupportedError, match="MambaForCausalLM: state-space layers"):
        configure(states, **by_name(served.full))
    images = served.save("images", vision_language_model())
    with pytest.raises(UnsupportedError, match="PaliGemmaForConditionalGeneration: no plain language model"):
        configure(images, **by_name(served.full))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
    mrope_model = served.save("frames", tiny.llama(4, head_dim=32, rope_parameters=rope))
    with pytest.raises(UnsupportedError, match="LlamaForCausalLM: positions of three dimensions"):
        configure(mrope_model, **by_name(served.full))
    RewardModel.from_base(moe_model(), served.tokenizer).save_pretrained(tmp_path / "experts")
    with pytest.raises(UnsupportedError, match="found: a reward with experts, and a backbone without"):
        configure(served.backbone, **by_name(str(tmp_path / "experts")))
    shutil.copytree(served.full, tmp_path / "quantised")
    edit(tmp_path / "quantised", quantization_config={"quant_method": "fp8"})
    with pytest.raises(RewardFileError, match="more than a network(?s:.)*found: quantization_config: .*fp8"):
        configure(served.backbone, **by_name(str(tmp_path / "quantised")))
    shutil.copytree(served.recipe, tmp_path / "int8")
    entries = json.loads((tmp_path / "int8/config.json").read_text())
    entries["backbone_config"]["quantization_config"] = {"quant_method": "torchao"}
    (tmp_path / "int8/config.json").write_text(json.dumps(entries))
    with pytest.raises(UnsupportedError, match="The recipe quantises its backbone when it is loaded"):
        configure(str(tmp_path / "int8"))
    with pytest.raises(UnsupportedError, match="beside the backbone's, not in stages"):
        configure(served.recipe, pipeline_parallel_size=2)
    odd = RewardModel.from_base(
        tiny.llama(4, hidden_size=48, head_dim=32, num_attention_heads=3, num_key_value_heads=3), served.tokenizer
    )
    odd.save_pretrained(tmp_path / "odd")
    with pytest.raises(UnsupportedError, match="attention heads cannot be divided .*\n.* divides 3 heads"):
        configure(served.backbone, tensor_parallel_size=2, **by_name(str(tmp_path / "odd")))
