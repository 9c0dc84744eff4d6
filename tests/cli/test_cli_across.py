"""The commands that take `--across_vocabularies`, on a backbone with another tokenizer than the reward's."""

import json

import pytest
import texts
import torch
from peft import LoraConfig

from prt_hf import RewardModel
from prt_hf.cli import main

OPTION = "--across_vocabularies"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`backbone` (SentencePiece), `source` (byte-level BPE) and `reward` on it, and `rows.jsonl`."""
    monkeypatch.chdir(tmp_path)
    for name, tokenizer, seed in (("backbone", texts.sentencepiece(150), 1), ("source", texts.byte_level(300), 2)):
        texts.model(tokenizer, seed=seed).save_pretrained(name)
        tokenizer.save_pretrained(name)
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    RewardModel.from_base("source", peft_config=config).save_pretrained("reward")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts.SENTENCES[:4])
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    return tmp_path


def run(capsys, *arguments):
    status = main([str(each) for each in arguments])
    captured = capsys.readouterr()
    return status or 0, captured.out, captured.err


def test_check(folder, capsys):
    status, out, _ = run(capsys, "check", "reward", "backbone")
    assert status == 1 and OPTION[2:] in out
    status, out, _ = run(capsys, "check", "reward", "backbone", OPTION)
    assert status == 0 and "another vocabulary of 410 tokens; the reward's has 303" in out and "fits: yes" in out
    status, out, _ = run(capsys, "check", "reward", "backbone", OPTION, "--data", "rows.jsonl", "--json")
    found = json.loads(out)
    figures = found["across_vocabularies"]
    assert status == 0 and found["is_across"] and figures["rows"] == 4
    assert set(figures["gains"]) == {"0.25", "0.5", "1.0"} and 0 < figures["in_place"] < 1
    for strength, (gain, _) in figures["gains"].items():
        assert gain == pytest.approx(figures["nats"]["target"] - figures["prt_target"][strength], abs=1e-9)


def test_check_of_a_tokenizer_that_changes_texts(folder, capsys):
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained("backbone")
    from tokenizers import normalizers

    backend.backend_tokenizer.normalizer = normalizers.Lowercase()
    backend.save_pretrained("backbone")
    status, out, _ = run(capsys, "check", "reward", "backbone", OPTION)
    assert status == 1 and "fits: no" in out and "does not give every text back byte for byte" in out


def test_evaluate(folder, capsys):
    arguments = ["evaluate", "reward", "--targets", "backbone", "--data", "rows.jsonl"]
    status, out, _ = run(capsys, *arguments, OPTION, "--output_dir", "report")
    assert status == 0 and "target, strength 0.5" in out
    figures = json.loads((folder / "report" / "across_vocabularies.json").read_text())["backbone"]
    assert f"{figures['prt_target']['1.0']:.4f}" in out
    assert (folder / "report" / "across_vocabularies.txt").read_text() == out
    status, _, err = run(capsys, *arguments, OPTION, "--eft", "source")
    assert status == 1 and "compared with the bare backbone alone" in err
    status, _, err = run(capsys, "evaluate", "reward", "--targets", "source", *arguments[4:], OPTION)
    assert status == 1 and "has the reward's own vocabulary" in err
    status, _, err = run(capsys, "evaluate", "reward", "source", "--targets", "backbone", OPTION)
    assert status == 1 and f"{OPTION} goes with one reward" in err


def test_generate_and_bake(folder, capsys):
    prompt = ["--prompt", "The girl went", "--max_new_tokens", 5, "--json"]
    status, out, _ = run(capsys, "generate", "backbone", "--reward", "reward", OPTION, *prompt)
    with_reward = json.loads(out)
    assert status == 0 and with_reward["new_tokens"] == 5
    status, out, _ = run(capsys, "generate", "backbone", "--reward", "reward", "--strength", 0, OPTION, *prompt)
    assert json.loads(out)["text"] != with_reward["text"]
    options = ["--dataset_name", "rows.jsonl", "--output_dir", "baked", "--max_steps", 1, "--use_cpu", "--json"]
    status, out, _ = run(capsys, "bake", "backbone", "--reward", "reward", OPTION, *options, "--report_to", "none")
    assert status == 0 and json.loads(out.splitlines()[-1])["rows"] == 4
