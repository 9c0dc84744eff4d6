"""Batches over a recipe without a server: vLLM's own runner, from file to file, and Ray Data."""

import json
import os
import subprocess
import sys

import pytest
import tiny

TOKENS = 16
STRENGTHS = [None, [1.0, 0.5], [0.0, 2.0]] * 2
SAMPLING = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}

RAY = """
import json, sys
import ray
from ray.data.llm import build_processor, vLLMEngineProcessorConfig

recipe, rows, sampling = json.loads(sys.argv[1])
config = vLLMEngineProcessorConfig(
    model_source=recipe,
    engine_kwargs={"dtype": "float32", "block_size": 32, "enforce_eager": True},
    placement_group_config={"bundle_per_worker": {"CPU": 1}},
    log_engine_metrics=False,
    batch_size=4,
)
process = build_processor(
    config,
    preprocess=lambda row: {
        "messages": [{"role": "user", "content": row["prompt"]}],
        "sampling_params": sampling | {"extra_args": {"prt_strength": row["strength"]}},
    },
    postprocess=lambda row: {"index": row["index"], "text": row["generated_text"]},
)
answers = process(ray.data.from_items(rows)).take_all()
print("RESULT", json.dumps([row["text"] for row in sorted(answers, key=lambda row: row["index"])]))
"""


@pytest.fixture(scope="module")
def prompts(served):
    return [served.tokenizer.decode(tiny.prompts(1, 3 + 7 * index, seed=index)[0]) for index in range(len(STRENGTHS))]


@pytest.fixture(scope="module")
def expected(served, prompts):
    """Words, by transformers."""
    asked = zip(prompts, STRENGTHS, strict=True)
    texts = [served.text(served.tokenizer(prompt)["input_ids"], TOKENS, strengths) for prompt, strengths in asked]
    words = [served.tokenizer.decode(text, skip_special_tokens=True).split() for text in texts]
    assert len({tuple(each) for each in words}) == len(words)
    return words


def request(name, prompt, strengths, url="/v1/chat/completions"):
    body = {"model": "prt", "messages": [{"role": "user", "content": prompt}]} | SAMPLING
    if strengths is not None:
        body["vllm_xargs"] = {"prt_strength": strengths}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def test_a_file_of_requests_is_answered_line_by_line(served, prompts, expected, tmp_path):
    asked, answered = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests = [request(str(index), *case) for index, case in enumerate(zip(prompts, STRENGTHS, strict=True))]
    requests.insert(2, request("too strong", prompts[0], [1.0, 1e6]))
    requests.insert(4, request("no chat", prompts[0], None, url="/v1/completions"))
    asked.write_text("".join(json.dumps(each) + "\n" for each in requests))

    command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "-i", str(asked), "-o", str(answered)]
    settings = ["--served-model-name", "prt", "--dtype", "float32", "--block-size", "32", "--enforce-eager"]
    subprocess.run([*command, "--model", served.recipe, *settings], check=True)

    lines = [json.loads(line) for line in answered.read_text().splitlines()]
    assert [line["custom_id"] for line in lines] == ["0", "1", "too strong", "2", "no chat", "3", "4", "5"]
    too_strong, no_chat = lines.pop(2), lines.pop(3)
    assert [line["error"] for line in lines] == [None] * len(lines)
    choices = [line["response"]["body"]["choices"][0] for line in lines]
    assert [choice["message"]["content"].split() for choice in choices] == expected
    assert (too_strong["response"]["status_code"], too_strong["response"]["body"]) == (400, None)
    message = "`prt_strength` is not usable.\n  expected: 2 of -10000 ... 10000, one for each reward\n  found: "
    assert message + "[1.0, 1000000.0]" in too_strong["error"]["error"]["message"]
    assert "URL /v1/completions was used. Supported endpoints: /v1/chat/completions" in no_chat["error"]


@pytest.mark.slow
def test_ray_data_gives_the_texts_of_transformers(served, prompts, expected):
    pytest.importorskip("ray.data.llm")
    cases = zip(prompts, STRENGTHS, strict=True)
    rows = [{"index": index, "prompt": prompt, "strength": value} for index, (prompt, value) in enumerate(cases)]
    output = subprocess.run(
        [sys.executable, "-c", RAY, json.dumps([served.recipe, rows, SAMPLING])],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("RESULT ")]
    assert [text.split() for text in json.loads(line.removeprefix("RESULT "))] == expected
