"""Ways of running the engine, each with an engine of its own: the texts stay those of transformers."""

import json
import os
import subprocess
import sys

import pytest
import tiny
import torch
from transformers import OPTConfig, OPTForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from prt_hf import PRTForCausalLM, RewardModel
from prt_hf.cli import main

TOKENS = 24
PROMPTS = [tiny.prompts(1, length, seed=length)[0].tolist() for length in (2, 20, 45, 90)]
# Repeated words are what n-gram speculation finds; the engine must not take its drafts unseen.
PROMPTS.append(PROMPTS[1] * 3)
SIZES = {"vocab_size": 104, "max_position_embeddings": tiny.CONTEXT, "eos_token_id": None, "pad_token_id": 0}

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, prompts, tokens, names, settings = json.loads(sys.argv[1])
    engine = LLM(model, dtype="float32", block_size=32, max_num_seqs=8, disable_log_stats=False, **settings)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    named = names and [folder and LoRARequest(folder, 1, folder) for folder in names]
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, lora_request=named)
    drafted = sum(each.value for each in engine.get_metrics() if each.name == "vllm:spec_decode_num_draft_tokens")
    refused = None
    if drafted:
        try:
            asked = SamplingParams(extra_args={"prt_strength": [1.0, 1.0]})
            engine.generate({"prompt_token_ids": prompts[0]}, asked)
        except VLLMValidationError as error:
            refused = str(error)
    print("RESULT", json.dumps([[output.outputs[0].token_ids for output in outputs], drafted, refused]))
"""


def run(model, environment=None, names=None, **settings):
    """In a process of its own, which takes its engine along when it ends."""
    arguments = json.dumps([model, PROMPTS, TOKENS, names, {"enforce_eager": True} | settings])
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments],
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    return json.loads(line.removeprefix("RESULT "))


@pytest.fixture(scope="module")
def expected(served):
    return [served.text(prompt, TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def named(served):
    """Every second request names a reward of its own: settings, and what is expected."""
    names = [served.named if index % 2 else None for index in range(len(PROMPTS))]
    strengths = [served.strengths_with_named if name else None for name in names]
    texts = [served.text(prompt, TOKENS, value) for prompt, value in zip(PROMPTS, strengths, strict=True)]
    return {"enable_lora": True, "names": names}, texts


def test_drafts_of_n_grams(served, expected):
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    texts, drafted, refused = run(served.recipe, speculative_config=ngram)
    assert texts == expected and drafted > 0
    assert refused.startswith("vLLM's V1 model runner does not take `prt_strength` with speculation.")


@pytest.mark.slow
def test_drafts_of_a_model(served):
    """The engine groups layers by their kind of attention, and wants those of the draft model in one group."""
    model = PRTForCausalLM.from_parts(served.backbone, [served.adapter])
    model.save_pretrained(served.folder / "full-attention")
    small = served.save("small", tiny.llama(1, head_dim=64, num_hidden_layers=1, initializer_range=0.2))
    draft = {"method": "draft_model", "model": small, "num_speculative_tokens": 3}
    texts, drafted, _ = run(str(served.folder / "full-attention"), speculative_config=draft)
    assert texts == [tiny.greedy(model, prompt, TOKENS) for prompt in PROMPTS]
    assert drafted > 0


def opt() -> OPTForCausalLM:
    """Its last hidden states are not as wide as the others."""
    sizes = {"hidden_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 32, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(num_hidden_layers=2, do_layer_norm_before=False, init_std=0.3, **SIZES, **sizes))


def qwen(config_class, model_class, **more):
    """That of experts reads its vocabulary where the engine has the contract's, of which its head has more rows."""
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    return model_class(config_class(num_hidden_layers=2, initializer_range=0.3, **SIZES, **sizes, **more))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["opt", "experts"])
def test_networks_that_are_laid_out_otherwise(served, architecture):
    torch.manual_seed(3)
    if architecture == "opt":
        backbone, reward = served.backbone, served.save("opt", opt())
    else:
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        backbone = served.save("experts", qwen(Qwen3MoeConfig, Qwen3MoeForCausalLM, **experts))
        reward = served.save("qwen", qwen(Qwen3Config, Qwen3ForCausalLM))
    model = PRTForCausalLM.from_parts(backbone, [RewardModel.from_base(reward)], strengths=[0.6])
    model.save_pretrained(served.folder / f"with-{architecture}")
    texts, _, _ = run(str(served.folder / f"with-{architecture}"))
    assert texts == [tiny.greedy(model, prompt, TOKENS) for prompt in PROMPTS]


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment, settings",
    [
        ({"TORCH_COMPILE_DISABLE": "0"}, {"enforce_eager": False}),
        ({"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, {"tensor_parallel_size": 2}),
    ],
    ids=["compiled", "divided among two ranks"],
)
@pytest.mark.parametrize("with_adapters", [False, True])
def test_texts_stay_what_they_are(served, expected, named, environment, settings, with_adapters):
    more, texts = named if with_adapters else ({}, expected)
    found, _, _ = run(served.recipe, environment, **settings, **more)
    assert found == texts


@pytest.mark.slow
def test_throughput_is_told_beside_the_bare_backbone(served, tmp_path, capsys):
    PRTForCausalLM.from_parts(served.backbone, [served.adapter, served.named]).save_pretrained(tmp_path / "recipe")
    arguments = ["--requests", "4", "--new-tokens", "8", "--rounds", "1", "--dtype", "float32", "--json"]
    assert main(["bench", "serve", str(tmp_path / "recipe"), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    bare, *others = found["tokens_per_second"].values()
    assert list(found["tokens_per_second"]) == ["bare backbone", "PRT", "PRT, named"]
    assert found["figures"] == dict(
        zip(("prt_vs_bare", "prt_named_vs_bare"), (speed / bare for speed in others), strict=True)
    )
