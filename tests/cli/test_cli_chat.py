"""`prt-hf chat` answers each message with the whole conversation before it."""

import copy
import io
import sys

import families
import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from prt_hf import PRTForCausalLM, PRTLogitsProcessor, RewardModel
from prt_hf.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.tokenizer()
    tiny.llama(1, eos_token_id=2).save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "plain")
    tiny.llama(1, eos_token_id=2).save_pretrained(folder / "plain")
    tokenizer.chat_template = tiny.CHAT_TEMPLATE
    tokenizer.save_pretrained(folder / "backbone")
    torch.manual_seed(3)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    RewardModel.from_base(str(folder / "plain"), peft_config=config).save_pretrained(folder / "reward")
    return folder


@pytest.fixture
def chat(capsys, monkeypatch):
    """Run `chat` with lines on standard input; its exit status, replies and errors."""

    def run(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        status = main(["chat", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def reply(model, text, tokens=5):
    inputs = tiny.tokenizer()(text, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=tokens, pad_token_id=0)[0, inputs["input_ids"].shape[1] :]
    return tiny.tokenizer().decode(output, skip_special_tokens=True)


def test_each_turn_reads_the_whole_conversation(folder, chat):
    model = PRTForCausalLM.from_parts(str(folder / "backbone"), folder / "reward")
    first = reply(model, "w3 w5 w9")
    second = reply(model, f"w3 w5 w4 {first} w3 w6 w7 w9")
    alone = reply(model, "w3 w6 w7 w9")
    assert len({first, second, alone}) == 3
    given = (folder / "backbone", "--reward", folder / "reward", "--max_new_tokens", 5)
    shown = f"> w5\n{first}\n> w6 w7\n{second}\n> \n"
    for more in ([], ["--speculative"], ["--num_beams", 1]):
        status, out, err = chat(["w5", "", "w6 w7"], *given, *more)
        assert (status, out) == (0, f"> w5\n{first}\n> \n> w6 w7\n{second}\n> \n"), more
    assert chat(["w5", "/reset", "w6 w7"], *given)[1] == f"> w5\n{first}\n> /reset\n> w6 w7\n{alone}\n> \n"
    assert chat(["w5", "/exit", "w6 w7"], *given)[1] == f"> w5\n{first}\n> /exit\n"
    assert shown.startswith(chat(["w5"], *given)[1].removesuffix("> \n"))
    system = reply(model, "w8 w20 w3 w5 w9")
    lines = ["w5", "/reset", "w5"]
    assert chat(lines, *given, "--system", "w20")[1] == f"> w5\n{system}\n> /reset\n> w5\n{system}\n> \n"


def test_beams_are_printed_when_they_are_complete(folder, chat):
    model = PRTForCausalLM.from_parts(str(folder / "backbone"), folder / "reward")
    model.generation_config.num_beams = 3
    text = reply(model, "w3 w5 w9")
    given = (folder / "backbone", "--reward", folder / "reward", "--max_new_tokens", 5)
    assert chat(["w5"], *given, "--num_beams", 3)[1] == f"> w5\n{text}\n> \n"


def test_the_reward_reads_the_conversation_in_its_own_template(chat, tmp_path):
    """Of another family, with another template; its prompt is new at each turn."""
    templates = {"renamed": "x{}y", "identical": "<|user|>abc{}"}
    for name, kind in (("backbone", "renamed"), ("source", "identical")):
        families.build(kind, tiny.llama, len(kind)).save_pretrained(tmp_path / name)
        tokenizer = copy.deepcopy(families.BACKBONES[kind])
        tokenizer.chat_template = templates[kind].format("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        tokenizer.save_pretrained(tmp_path / name)
    torch.manual_seed(5)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    RewardModel.from_base(str(tmp_path / "source"), peft_config=config).save_pretrained(tmp_path / "reward")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "backbone")
    tokenizer, reward = families.BACKBONES["renamed"], RewardModel.from_pretrained(tmp_path / "reward")

    def answered(said):
        processor = PRTLogitsProcessor(reward, tokenizer)
        processor.prompt = families.REWARD(f"<|user|>abc{said}", return_tensors="pt")
        inputs = tokenizer(f"x{said}y", return_tensors="pt")
        ids = backbone.generate(**inputs, max_new_tokens=4, do_sample=False, logits_processor=[processor])
        return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    first = answered("cde")
    second = answered(f"cde{first}ab")
    given = (tmp_path / "backbone", "--reward", tmp_path / "reward", "--reward_chat_template", "--max_new_tokens", 4)
    assert chat(["cde", "ab"], *given)[1] == f"> cde\n{first}\n> ab\n{second}\n> \n"


def test_a_conversation_that_is_too_long_is_told_and_goes_on_after_a_reset(folder, chat):
    given = (folder / "backbone", "--reward", folder / "reward", "--max_new_tokens", 5)
    long = " ".join(["w5"] * 300)
    status, out, err = chat([long, "w5"], *given)
    assert status == 0 and err.count("longer than the models can read") == 1 and "remedy: /reset" in err
    assert out.endswith(chat(["w5"], *given)[1])


def test_models_without_a_template_are_refused_before_the_first_message(folder, chat):
    status, out, err = chat(["w5"], folder / "plain", "--reward", folder / "reward")
    assert (status, out) == (1, "") and "The backbone's tokenizer has no chat template." in err
    status, out, err = chat(["w5"], folder / "backbone", "--reward", folder / "reward", "--reward_chat_template")
    assert (status, out) == (1, "") and "The reward's tokenizer has no chat template." in err


def test_what_a_template_cannot_write_is_told(folder, chat, tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}w3"
    )
    tiny.llama(1).save_pretrained(tmp_path / "strict")
    tokenizer.save_pretrained(tmp_path / "strict")
    status, out, err = chat(["w5"], tmp_path / "strict", "--reward", folder / "reward", "--system", "w6")
    assert (status, out) == (1, "") and "found: no system here\n  remedy: leave --system out" in err
