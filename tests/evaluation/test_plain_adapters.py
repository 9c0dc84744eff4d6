"""Plain LoRAs are checked and measured like rewards: r = log pi_ft - log pi_pt, in float64 by its definition."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig
from test_portability import assert_equal, by_definition

from prt_hf import PRTTrainer, RewardModel
from prt_hf.cli import main
from prt_hf.errors import PRTValueError, UnsupportedError
from prt_hf.evaluation import batches, check_fit, measure_portability, portability_report, reading
from prt_hf.networks.adapters import wrap

KINDS = {
    "of the body": {"target_modules": ["q_proj", "down_proj"]},
    "with the head": {"target_modules": ["q_proj", "lm_head"]},
    "a head of its own, which is not projected": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, model in {"old": tiny.llama(1), "new": tiny.gpt2(2, vocab_size=104)}.items():
        model.save_pretrained(name)
        tiny.tokenizer().save_pretrained(name)
    return tmp_path


def save_adapter(folder, base="old", **lora):
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **{"target_modules": "all-linear"} | lora)
    network = wrap(tiny.llama(1), config)
    for name, parameter in network.named_parameters():
        if ".modules_to_save." in name:
            torch.nn.init.normal_(parameter, std=0.4)
    network.peft_config["default"].base_model_name_or_path = base
    network.save_pretrained(folder)
    return network.eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_lora_is_measured_by_its_definition(home, kind, monkeypatch):
    monkeypatch.setattr(reading, "_CHUNK", 4 * tiny.VOCABULARY)
    tuned, source, target = save_adapter("lora", **KINDS[kind]), tiny.llama(1), tiny.gpt2(2, vocab_size=104)
    reward = RewardModel.from_adapter("lora")
    found = measure_portability(reward, target, batches(tiny.texts(7), reward, 3, 99))
    parts = []
    for row in tiny.texts(7):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        old, new, ft = (net(ids).logits[0, :-1, : tiny.VOCABULARY].double() for net in (source, target, tuned))
        parts.append([value[labels != -100] for value in (ft - old, old, new, labels)])
    assert_equal(found, by_definition(*map(torch.cat, zip(*parts, strict=True)), 1.0))
    at_source = measure_portability(reward, source, batches(tiny.texts(7), reward, 3, 99))
    report = portability_report("lora", ["new"], tiny.texts(7), ("finetuned", "prt"), eft="lora")
    assert at_source.nll["prt_source"] == pytest.approx(report.source.figures["finetuned"].nll.value, rel=1e-5)
    assert report.targets["new"].portability.nll == pytest.approx(found.nll, rel=1e-6)


def test_whether_a_plain_lora_fits_is_told_without_weights(home, capsys):
    save_adapter("lora")
    for name in ("old", "new"):
        Path(name, "model.safetensors").unlink()
    fit = check_fit("lora", "new")
    assert fit.fits and fit.reward.terms == ("network", "-base") and not fit.is_base_shared
    adapter = wrap(tiny.llama(1), LoraConfig(target_modules="all-linear"))
    assert fit.adapter_parameters == sum(p.numel() for name, p in adapter.named_parameters() if "lora_" in name)
    assert main(["check", "lora", "new"]) == 0
    assert "text-generation, adapter that is carried over, " in capsys.readouterr().out
    tiny.llama(2).save_pretrained("other")
    tiny.tokenizer(changed={"w5": "v5"}).save_pretrained("other")
    assert main(["check", "lora", "other"]) == 1
    assert "fits: no\nThe vocabulary of the backbone is not the reward's." in capsys.readouterr().out


def test_check_says_whether_a_plain_lora_is_worth_carrying_over(home, capsys):
    save_adapter("lora")
    texts = [{"text": " ".join(f"w{3 + (7 * row + column) % 90}" for column in range(9))} for row in range(5)]
    Path("texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    assert main(["check", "lora", "new", "--data", "texts.jsonl"]) == 0
    out = capsys.readouterr().out
    assert "\nworth porting: " in out and "\nstrength: " in out
    assert main(["evaluate", "lora", "--targets", "new", "--data", "texts.jsonl", "--write_card"]) == 1
    assert "The card can only be written into a folder." in capsys.readouterr().err


def test_a_plain_lora_without_a_base_is_refused_and_none_is_tuned(home):
    save_adapter("lora", base=None)
    with pytest.raises(PRTValueError, match="lora/adapter_config.json names no base"):
        check_fit("lora", "new")
    save_adapter("lora")
    with pytest.raises(UnsupportedError, match="a reward of two networks, and not tuned as one"):
        PRTTrainer(model=RewardModel.from_adapter("lora"), train_dataset=tiny.texts())
