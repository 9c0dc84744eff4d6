"""`prt-hf generate` prints what PRTForCausalLM.generate makes."""

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from prt_hf import PRTForCausalLM, PRTLogitsProcessor, RewardModel
from prt_hf.cli import main

PROMPTS = ["w5 w6 w7 w8 w9", "w10 w11", "w12 w13 w14"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`backbone`, `reward`, `other` (a second reward) and `recipe`, on other weights each."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("backbone", 1), ("source", 2)):
        tiny.llama(seed, eos_token_id=2).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    for name, seed in (("reward", 3), ("other", 4)):
        torch.manual_seed(seed)
        config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
        RewardModel.from_base(str(folder / "source"), peft_config=config).save_pretrained(folder / name)
    PRTForCausalLM.from_parts(str(folder / "backbone"), [folder / "reward"]).save_pretrained(folder / "recipe")
    return folder


@pytest.fixture
def command(folder, capfd):
    """Run `generate` with 9 new tokens; its exit status, output and errors."""

    def run(*arguments):
        status = main(["generate", *map(str, arguments), "--max_new_tokens", "9"])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run


def expected(model, prompt, **kwargs):
    """One prompt by itself."""
    inputs = tiny.tokenizer()(prompt, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(**inputs, **{"max_new_tokens": 9, "pad_token_id": 0} | kwargs)
    return tiny.tokenizer().decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def joined(texts):
    return "\n---\n".join(texts) + "\n"


@pytest.fixture(scope="module")
def composite(folder):
    return PRTForCausalLM.from_parts(str(folder / "backbone"), [folder / "reward"])


def test_text_is_that_of_a_processor_streamed_or_not(folder, command):
    backbone = AutoModelForCausalLM.from_pretrained(folder / "backbone")
    processor = PRTLogitsProcessor(RewardModel.from_pretrained(folder / "reward"), tiny.tokenizer())
    texts = [expected(backbone, prompt, logits_processor=[processor]) for prompt in PROMPTS]
    assert len(set(texts)) == 3 and texts[0] != expected(backbone, PROMPTS[0])
    arguments = (folder / "backbone", "--reward", folder / "reward", "--prompt", *PROMPTS)
    for more in ([], ["--no_stream"], ["--no-stream"], ["--batch_size", 2], ["--batch-size", 3], ["--speculative"]):
        assert command(*arguments, *more)[:2] == (0, joined(texts)), more


def test_rewards_have_strengths(folder, command):
    rewards = [folder / "reward", folder / "other"]
    model = PRTForCausalLM.from_parts(str(folder / "backbone"), rewards, strengths=[0.5, -1.0])
    texts = joined(expected(model, prompt) for prompt in PROMPTS)
    apart = ("--reward", rewards[0], "--reward", rewards[1], "--strength", 0.5, "--strength", -1)
    together = ("--reward", *rewards, "--strength", 0.5, -1)
    for given in (apart, together):
        assert command(folder / "backbone", *given, "--prompt", *PROMPTS)[1] == texts


def test_a_recipe_has_its_rewards(folder, command, composite):
    text = expected(composite, PROMPTS[0]) + "\n"
    assert command(folder / "recipe", "--prompt", PROMPTS[0])[1] == text
    weaker = PRTForCausalLM.from_parts(str(folder / "backbone"), [folder / "reward"], strengths=[0.25])
    assert (
        command(folder / "recipe", "--prompt", PROMPTS[0], "--strength", 0.25)[1] == expected(weaker, PROMPTS[0]) + "\n"
    )


def test_options_are_those_of_generate(folder, command, composite):
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.2}
    options = [str(part) for name, value in sampled.items() for part in (f"--{name}", value)]
    text = expected(composite, PROMPTS[0], **sampled)
    assert text != expected(composite, PROMPTS[0])
    assert command(folder / "recipe", "--prompt", PROMPTS[0], *options)[1] == text + "\n"
    text = expected(composite, PROMPTS[0], **sampled | {"top_p": None, "top_k": 20, "repetition_penalty": None})
    implied = ("--temperature", 0.7, "--top_k", 20)
    assert command(folder / "recipe", "--prompt", PROMPTS[0], *implied)[1] == text + "\n"
    status, _, err = command(folder / "recipe", "--prompt", PROMPTS[0], *implied, "--do_sample", "false")
    assert status == 1 and "found: --temperature, --top_k" in err
    for wrong in (("--top_p", 1.5), ("--seed", -1)):
        with pytest.raises(SystemExit, match="2"):
            command(folder / "recipe", *wrong)
    options = [option.replace("_", "-") for option in options]
    assert command(folder / "recipe", "--prompt", PROMPTS[0], *options, "--seed", 1)[1] != text + "\n"
    beams = expected(composite, PROMPTS[0], num_beams=3)
    assert command(folder / "recipe", "--prompt", PROMPTS[0], "--num_beams", 3)[1] == beams + "\n"
    with pytest.raises(SystemExit, match="2"):
        command(folder / "recipe", "--do_sample", "perhaps")


def test_prompts_come_from_files_and_from_standard_input(folder, command, composite, tmp_path, monkeypatch):
    texts = [expected(composite, prompt) for prompt in PROMPTS]
    (tmp_path / "prompts.txt").write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]) + "\n")
    assert command(folder / "recipe", "--file", tmp_path / "prompts.txt")[1] == joined(texts)
    lines = [json.dumps({"prompt": prompt, "answer": 4}) for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    assert command(folder / "recipe", "--file", tmp_path / "prompts.jsonl")[1] == joined(texts)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5 w6\nw7 w8 w9\n"))
    assert command(folder / "recipe")[1] == texts[0] + "\n", "as a whole"


def test_prompts_go_through_the_template_where_there_is_one(folder, command, composite, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    model = PRTForCausalLM.from_parts(str(folder / "backbone"), [folder / "reward"], tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "chatty")
    text = expected(composite, "w3 w5 w9")
    _, out, err = command(tmp_path / "chatty", "--prompt", "w5")
    assert out == text + "\n" and err.endswith("chat template; --raw continues them as they are\n")
    _, out, err = command(tmp_path / "chatty", "--raw", "--prompt", "w5")
    assert out == expected(composite, "w5") + "\n" and "template" not in err
    text = expected(composite, "w8 w6 w3 w5 w9")
    assert command(tmp_path / "chatty", "--system", "w6", "--prompt", "w5")[1] == text + "\n"
    for given in (("--system", "w6"), ("--reward_chat_template",)):
        status, out, err = command(folder / "recipe", *given, "--prompt", "w5")
        assert (status, out) == (1, "") and f"no --raw, or `messages`, with {given[0]}" in err
    assert "expected: --system or --raw" in command(tmp_path / "chatty", "--raw", "--system", "w6")[2]
    turns = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    text = expected(composite, "w3 w5 w4 w6 w3 w7 w9")
    for more in ([], ["--raw"]):
        assert command(tmp_path / "chatty", "--file", tmp_path / "chats.jsonl", *more)[1] == text + "\n"
    text = expected(composite, "w8 w6 w3 w5 w4 w6 w3 w7 w9")
    assert command(tmp_path / "chatty", "--file", tmp_path / "chats.jsonl", "--system", "w6")[1] == text + "\n"
    status, out, err = command(folder / "recipe", "--file", tmp_path / "chats.jsonl")
    assert (status, out) == (1, "") and "has no chat template" in err


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """`backbone` and `reward` of one family, with other tokens and another chat template each."""
    folder = tmp_path_factory.mktemp("family")
    for name, kind, template in (("backbone", "renamed", "x{}y"), ("source", "identical", "<|user|>abc{}")):
        families.build(kind, tiny.llama, len(kind)).save_pretrained(folder / name)
        tokenizer = copy.deepcopy(families.BACKBONES[kind])
        tokenizer.chat_template = template.format("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        tokenizer.save_pretrained(folder / name)
    torch.manual_seed(5)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    RewardModel.from_base(str(folder / "source"), peft_config=config).save_pretrained(folder / "reward")
    return folder


def test_prompts_are_read_by_the_tokenizer_of_each(family, command):
    """The backbone's tokens by the backbone, and chats in its own template by the reward."""
    backbone = AutoModelForCausalLM.from_pretrained(family / "backbone")
    reward = RewardModel.from_pretrained(family / "reward")
    tokenizer = families.BACKBONES["renamed"]

    def made(texts, own=None, token_map=None):
        processor = PRTLogitsProcessor(reward, tokenizer, token_map=token_map)
        found = []
        for index, text in enumerate(texts):
            inputs = tokenizer(text, return_tensors="pt")
            processor.prompt = None if own is None else families.REWARD(own[index], return_tensors="pt")
            ids = backbone.generate(**inputs, max_new_tokens=9, do_sample=False, logits_processor=[processor])
            found.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        return joined(found)

    prompts, chats, own = ["a<think>b", "cde"], ["xa<think>by", "xcdey"], ["<|user|>abca<think>b", "<|user|>abccde"]
    given = [family / "backbone", "--reward", family / "reward", "--prompt", *prompts]
    raw = [*given, "--raw"]
    assert command(*raw)[1] == made(prompts)
    token_map = {"<think>": "<|reserved_1|>"}
    mapped = made(prompts, token_map=token_map)
    assert mapped != made(prompts)
    assert command(*raw, "--token_map", json.dumps(token_map))[1] == mapped
    assert command(*given)[1] == made(chats)
    assert made(chats, own) != made(chats)
    for more in ([], ["--batch_size", 2], ["--speculative"]):
        assert command(*given, "--reward_chat_template", *more)[1] == made(chats, own), more
    assert "Texts have no chat template." in command(*raw, "--reward-chat-template")[2]
    for wrong in ("<think>", '["<think>"]', '{"<think>": 3}'):
        with pytest.raises(SystemExit, match="2"):
            command(*given, "--token_map", wrong)


def test_json_has_one_object_for_each_prompt(folder, command, composite):
    for more in ([], ["--batch_size", "3"], ["--speculative"]):
        _, out, _ = command(folder / "recipe", "--prompt", *PROMPTS, "--json", *more)
        records = [json.loads(line) for line in out.splitlines()]
        assert [record["prompt"] for record in records] == PROMPTS
        for record in records:
            assert record["text"] == expected(composite, record["prompt"])
            inputs = tiny.tokenizer()(record["prompt"], return_tensors="pt")
            length = inputs["input_ids"].shape[1]
            assert record["new_tokens"] == composite.generate(**inputs, max_new_tokens=9).shape[1] - length
            assert record["seconds"] > 0
            assert ("accepted" in record) == ("drafted" in record) == ("--speculative" in more)
            assert record.get("accepted", 0) <= record.get("drafted", 0)


def test_texts_end_where_the_model_ends_them(folder, command):
    """The token that the first text makes second is made an end."""
    model = PRTForCausalLM.from_parts(str(folder / "backbone"), [folder / "reward"])
    inputs = tiny.tokenizer()(PROMPTS[0], return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=9)[0, inputs["input_ids"].shape[1] :].tolist()
    end = tokens.index(tokens[1])
    model.generation_config.eos_token_id = [2, tokens[1]]
    model.save_pretrained(folder / "ending")
    _, out, _ = command(folder / "ending", "--prompt", *PROMPTS, "--json", "--batch_size", 3)
    record = json.loads(out.splitlines()[0])
    assert (record["new_tokens"], record["text"]) == (end + 1, tiny.tokenizer().decode(tokens[: end + 1]))


def test_an_empty_text_comes_with_a_hint(folder, command, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    model = PRTForCausalLM.from_parts(str(folder / "backbone"), [folder / "reward"], tokenizer=tokenizer)
    model.generation_config.suppress_tokens = [0, 1, *range(3, tiny.VOCABULARY)]
    model.save_pretrained(tmp_path / "mute")
    for more, hint in (([], "try another prompt"), (["--raw"], "the model is made for chats; leave --raw out")):
        for way in ([], ["--no_stream"]):
            status, out, err = command(tmp_path / "mute", "--prompt", "w5", *more, *way)
            assert (status, out) == (0, "\n") and "text 1 is empty: " in err and hint in err


def test_a_terminal_without_a_prompt_is_not_waited_for(folder, command, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    status, out, err = command(folder / "recipe")
    assert (status, out) == (1, "") and "There is no prompt." in err and "`prt-hf chat`" in err


MISTAKES = {
    "no reward": (("backbone", "--prompt", "w5"), "There is no reward.\n  expected: --reward, or the recipe"),
    "a recipe and a reward": (
        ("recipe", "--reward", "reward", "--prompt", "w5"),
        "is a recipe, which names its own rewards",
    ),
    "too few strengths": (
        ("backbone", "--reward", "reward", "other", "--strength", "1", "--prompt", "w5"),
        "expected: no --strength, or 2: one for each reward\n  found: 1: 1.0",
    ),
    "too many for a recipe": (("recipe", "--strength", "1", "2", "--prompt", "w5"), "or 1: one for each reward"),
    "a recipe and a map": (("recipe", "--token_map", '{"w5": "w6"}', "--prompt", "w5"), "has its own map of tokens"),
    "no prompt": (("recipe", "--file", "empty.txt"), "There is no prompt."),
    "two sources": (("recipe", "--prompt", "w5", "--file", "empty.txt"), "Prompts are given twice."),
    "no text": (("recipe", "--prompt", "w5 \udcff"), "A prompt cannot be read.\n  expected: text in UTF-8"),
    "no such file": (("recipe", "--file", "nothing.txt"), "nothing.txt cannot be read."),
    "no JSON": (("recipe", "--file", "broken.jsonl"), "Line 2 of broken.jsonl is no prompt."),
    "messages without roles": (("recipe", "--file", "chat.jsonl"), "Line 1 of chat.jsonl is no prompt."),
    "speculation in batches": (
        ("recipe", "--speculative", "--batch_size", "2", "--prompt", "w5"),
        "Speculation takes one prompt at a time.\n  expected: --batch_size 1\n  found: 2",
    ),
    "no such device": (("recipe", "--device", "nowhere", "--prompt", "w5"), "The device nowhere cannot be used."),
    "no such backbone": (("no/such", "--reward", "reward", "--prompt", "w5"), "no folder no/such here, and the Hub"),
    "no such reward": (("backbone", "--reward", "no/such", "--prompt", "w5"), "no folder no/such here, and the Hub"),
    "a mistyped folder": (("bakbone", "--reward", "reward", "--prompt", "w5"), "There is no folder bakbone here"),
    "a reward as the backbone": (("reward", "--reward", "reward", "--prompt", "w5"), "reward is a reward, which is no"),
    "no reward there": (("backbone", "--reward", "backbone", "--prompt", "w5"), "backbone holds no reward."),
    "an unknown architecture": (("alien", "--reward", "reward", "--prompt", "w5"), "The configuration of alien cannot"),
    "too long": (("recipe", "--prompt", " ".join(["w5"] * 300)), "Prompt 1 leaves no room for a text"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_a_message(mistake, folder, command, monkeypatch):
    monkeypatch.chdir(folder)
    Path("empty.txt").write_text("\n")
    Path("broken.jsonl").write_text('{"prompt": "w5"}\n{"text": "w6"}\n')
    Path("chat.jsonl").write_text('{"messages": ["w5"]}')
    Path("alien").mkdir(exist_ok=True)
    Path("alien/config.json").write_text('{"model_type": "alien", "architectures": ["AlienForCausalLM"]}')
    arguments, message = MISTAKES[mistake]
    status, out, err = command(*arguments)
    assert (status, out) == (1, "")
    assert message in err and "Traceback" not in err
    assert err.count("prt-hf generate: ") == 1


def test_mistakes_of_the_system_are_told_and_ours_keep_their_traceback(folder, monkeypatch, capsys):
    monkeypatch.setattr("prt_hf.cli.generate.run", lambda args: os.remove("no such file"))
    assert main(["generate", str(folder / "recipe")]) == 1
    assert capsys.readouterr().err == "prt-hf generate: [Errno 2] No such file or directory: 'no such file'\n"
    monkeypatch.setattr("prt_hf.cli.generate.run", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["generate", str(folder / "recipe")])


def test_lengths_are_known_before_the_first_text(folder, capsys):
    long = " ".join(["w5"] * 250)
    generate = ["generate", str(folder / "recipe"), "--prompt", "w5 w6", long, "--json", "--max_new_tokens"]
    assert main([*generate, "9"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["new_tokens"] for line in captured.out.splitlines()] == [9, 6]
    assert "after 250 tokens the models can read 6 more" in captured.err
    assert main(["generate", str(folder / "recipe"), "--prompt", "w5", long + " w6" * 9]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "Prompt 2 leaves no room for a text" in captured.err and "found: 259" in captured.err


def test_an_interruption_has_its_status(folder, monkeypatch, capsys):
    class Interrupted(io.StringIO):
        def read(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    assert main(["generate", str(folder / "recipe")]) == 130
    assert capsys.readouterr().err == "prt-hf generate: interrupted\n"


def test_the_installed_command_ends_quietly_when_its_reader_does(folder, composite):
    """Nobody reads: the pipe's other end is closed before the first text."""
    script = Path(sys.executable).with_name("prt-hf")
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [script, "generate", folder / "recipe", "--prompt", PROMPTS[0], "--max_new_tokens", "9"]
    closed = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert closed.returncode == 1
    assert "Traceback" not in closed.stderr and "Broken" not in closed.stderr
    read = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert read.stdout == expected(composite, PROMPTS[0]) + "\n"
