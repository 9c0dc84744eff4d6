"""The OpenAI server with a PRT model, on loopback: nothing that many clients get at once differs from transformers."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import tiny

TOKENS = 16
STRENGTHS = [None, [1.0, 0.5, 0.0], [0.0, 2.0, 0.0]]


class Server:
    """`python -m vllm.entrypoints.openai.api_server` as a process of its own."""

    def __init__(self, *arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.arguments = arguments
        self.start()

    def start(self):
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        settings = ["--port", str(self.port), "--dtype", "float32", "--block-size", "32", "--enforce-eager"]
        self.process = subprocess.Popen([*command, *settings, *self.arguments], start_new_session=True)
        while True:
            try:
                urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, "the server did not start"
                time.sleep(0.5)

    def kill(self):
        """With the engine's processes."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def open(self, path, **body):
        request = Request(
            f"http://127.0.0.1:{self.port}/v1/{path}",
            json.dumps({"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True} | body).encode(),
            {"Content-Type": "application/json"},
        )
        return urlopen(request, timeout=120)

    def ask(self, path, **body):
        with self.open(path, **body) as response:
            return json.load(response)

    def refusal(self, path, **body):
        with pytest.raises(HTTPError) as error:
            self.open(path, **body)
        return error.value.code, json.load(error.value)["error"]["message"]


@pytest.fixture(scope="module")
def server(served):
    overrides = {
        "architectures": ["PRTForCausalLM"],
        "prt_rewards": [served.adapter, served.full],
        "prt_strengths": served.model.strengths,
    }
    named = ["--enable-lora", "--lora-modules", f"named={served.named}"]
    server = Server(
        *("--model", served.backbone, "--served-model-name", "prt", "--hf-overrides", json.dumps(overrides)), *named
    )
    yield server
    server.kill()


def asked(strengths):
    return {} if strengths is None else {"vllm_xargs": {"prt_strength": strengths}}


def test_a_streamed_chat_with_log_probabilities(served, server):
    words = [f"w{index}" for index in (7, 30, 5, 61)]
    prompt = served.tokenizer(" ".join(words))["input_ids"]
    body = {"model": "prt", "messages": [{"role": "user", "content": " ".join(words)}], "logprobs": True}
    whole = server.ask("chat/completions", **body)["choices"][0]
    streamed, log_probs = "", []
    with server.open("chat/completions", stream=True, **body) as response:
        for line in response:
            if line.startswith(b"data: {"):
                (choice,) = json.loads(line[6:])["choices"]
                streamed += choice["delta"].get("content") or ""
                log_probs += [each["logprob"] for each in (choice.get("logprobs") or {}).get("content") or []]
    text = served.text(prompt, TOKENS)
    assert streamed == whole["message"]["content"] and streamed.split() == served.tokenizer.decode(text).split()
    expected = served.log_probs(prompt + text)[len(prompt) - 1 : -1]
    assert log_probs == pytest.approx([row[token].item() for row, token in zip(expected, text, strict=True)], abs=2e-4)
    assert [each["logprob"] for each in whole["logprobs"]["content"]] == pytest.approx(log_probs, abs=1e-4)


def load(served, server, count, clients):
    """Requests of different lengths, strengths and rewards, `clients` at a time; wrong answers by their index."""
    prompts = [tiny.prompts(1, 1 + index % 60, seed=index % 90)[0].tolist() for index in range(count)]
    cases = [*(("prt", value, value) for value in STRENGTHS), ("named", None, served.strengths_with_named)]
    cases = [cases[index % len(cases)] for index in range(count)]

    def answer(case):
        prompt, (model, value, _) = case
        body = server.ask("completions", model=model, prompt=prompt, return_token_ids=True, **asked(value))
        return body["choices"][0]["token_ids"]

    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(answer, zip(prompts, cases, strict=True)))
    known = {}
    for prompt, (_, _, value) in zip(prompts, cases, strict=True):
        key = (tuple(prompt), str(value))
        known[key] = known.get(key) or served.text(prompt, TOKENS, value)
    expected = [known[tuple(prompt), str(value)] for prompt, (_, _, value) in zip(prompts, cases, strict=True)]
    return [index for index in range(count) if answers[index] != expected[index]]


def test_no_answer_under_load_is_wrong(served, server):
    assert load(served, server, count=120, clients=60) == []


def test_what_is_refused_leaves_the_server_up(served, server):
    body = {"model": "prt", "prompt": [5, 6, 7]}
    for strengths, found in ((1.0, "1.0"), ([1.0, 1e6, 1.0], "[1.0, 1000000.0, 1.0]"), ("much", "much")):
        status, message = server.refusal("completions", **body, **asked(strengths))
        assert status == 400 and "`prt_strength` is not usable.\n  expected: 3 of -10000 ... 10000" in message
        assert f"\n  found: {found}" in message
    status, message = server.refusal("completions", **body | {"model": "another-reward"})
    assert status == 404 and "`another-reward` does not exist" in message
    assert server.ask("completions", **body)["usage"]["completion_tokens"] == TOKENS


@pytest.mark.slow
def test_a_server_that_is_killed_at_work_answers_rightly_when_it_is_back(served, server):
    streams = [
        server.open("completions", model="prt", prompt=[5, token], stream=True, max_tokens=200)
        for token in range(3, 11)
    ]
    for stream in streams:
        assert stream.readline().startswith(b"data: {")
    server.kill()
    for stream in streams:
        with pytest.raises((OSError, HTTPException)):
            stream.read()
    server.start()
    assert load(served, server, count=400, clients=100) == []
