"""Quantised backbones: rewards stay in full precision, and every way to combine the two gives the same."""

import json
import shutil

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from prt_hf import (
    BaseModelMismatchError,
    PRTConfig,
    PRTForCausalLM,
    PRTLogitsProcessor,
    PRTTrainer,
    RewardFileError,
    RewardModel,
    UnsupportedError,
)
from prt_hf.cli import main
from prt_hf.errors import BackboneCacheError, PRTValueError
from prt_hf.networks.identity import reference_to
from prt_hf.networks.quantization import is_quantized
from prt_hf.reward.backbones import Backbone

PROMPT = "w5 w6 w7 w8 w9"


def int8():
    """The configuration of the command line's `--quantization torchao-int8`."""
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`source`, `target` with tied embeddings, and `reward` on the source."""
    folder = tmp_path_factory.mktemp("models")
    for name, model in (("source", tiny.llama(1)), ("target", tiny.llama(2, tie_word_embeddings=True))):
        model.save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    RewardModel.from_base(str(folder / "source"), peft_config=config).save_pretrained(folder / "reward")
    return folder


@pytest.fixture(scope="module")
def quantized(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "target", quantization_config=int8())


@pytest.fixture(scope="module")
def on_disk(folder, quantized):
    """A checkpoint that holds quantised weights."""
    quantized.save_pretrained(folder / "quantized")
    tiny.tokenizer().save_pretrained(folder / "quantized")
    return folder / "quantized"


@pytest.fixture(scope="module")
def model(folder):
    return PRTForCausalLM.from_parts(str(folder / "target"), [folder / "reward"], quantization_config=int8())


@torch.no_grad()
def logits(model):
    return model(**tiny.tokenizer()(PROMPT, return_tensors="pt")).logits


def text(model, **kwargs):
    inputs = tiny.tokenizer()(PROMPT, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=12, pad_token_id=0, do_sample=False, **kwargs)[0].tolist()


def test_the_backbone_alone_is_quantised(folder, quantized, model):
    assert is_quantized(model.backbone) and not is_quantized(model.rewards[0].network)
    assert torch.equal(logits(model.backbone), logits(quantized))
    assert not torch.equal(logits(quantized), logits(AutoModelForCausalLM.from_pretrained(folder / "target")))


def test_processor_model_and_speculation_give_the_same_text(folder, quantized, model):
    reward = RewardModel.from_pretrained(folder / "reward")
    expected = text(quantized, logits_processor=[reward.processor(quantized)])
    assert expected != text(quantized)
    assert text(model) == text(PRTForCausalLM.from_parts(quantized, [reward])) == expected
    assert text(model, speculative=True) == expected


def test_a_reward_on_the_same_checkpoint_has_a_base_of_its_own(folder):
    model = PRTForCausalLM.from_parts(str(folder / "source"), [folder / "reward"], quantization_config=int8())
    assert not is_quantized(model.rewards[0].network)
    backbone = AutoModelForCausalLM.from_pretrained(folder / "source", quantization_config=int8())
    processor = PRTLogitsProcessor(RewardModel.from_pretrained(folder / "reward"), tiny.tokenizer())
    assert text(model) == text(backbone, logits_processor=[processor]) == text(model, speculative=True)


@pytest.mark.parametrize("how", ["by id", "in memory", "on disk"])
def test_a_recipe_gives_the_same_logits_again(folder, on_disk, tmp_path, recwarn, how):
    ways = {"by id": ("target", {"quantization_config": int8()}), "on disk": ("quantized", {})}
    name, kwargs = ways.get(how, ways["by id"])
    backbone = str(folder / name)
    if how == "in memory":
        backbone, kwargs = AutoModelForCausalLM.from_pretrained(backbone, **kwargs), {}
    made = PRTForCausalLM.from_parts(backbone, [folder / "reward"], **kwargs)
    made.save_pretrained(tmp_path / "recipe")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "recipe")
    assert is_quantized(again.backbone)
    assert torch.equal(logits(again), logits(made))
    assert not [each for each in recwarn if "quantization_config" in str(each.message)]
    assert "quantization_config" not in json.loads((tmp_path / "recipe" / "config.json").read_text())


def test_a_recipe_can_be_loaded_in_full_precision(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "recipe")
    whole = PRTForCausalLM.from_pretrained(tmp_path / "recipe", quantization_config=None)
    assert torch.equal(logits(whole), logits(PRTForCausalLM.from_parts(str(folder / "target"), [folder / "reward"])))


def test_the_reference_is_that_of_the_source_checkpoint(folder, quantized):
    assert reference_to(quantized) == reference_to(AutoModelForCausalLM.from_pretrained(folder / "target"))


def test_quantised_files_have_a_fingerprint_of_their_own(folder, on_disk, quantized, tmp_path):
    place = shutil.copytree(on_disk, tmp_path / "copy")
    found = [reference_to(AutoModelForCausalLM.from_pretrained(each)).weights for each in (on_disk, place)]
    assert found[0] == found[1] not in (None, reference_to(quantized).weights)


def test_a_changed_backbone_is_refused(folder, tmp_path):
    place = shutil.copytree(folder / "target", tmp_path / "target")
    made = PRTForCausalLM.from_parts(str(place), [folder / "reward"], quantization_config=int8())
    made.save_pretrained(tmp_path / "recipe")
    tiny.llama(3, tie_word_embeddings=True).save_pretrained(place)
    with pytest.raises(BaseModelMismatchError):
        PRTForCausalLM.from_pretrained(tmp_path / "recipe")


def test_files_that_are_not_the_models_do_not_identify_it(folder, tmp_path):
    place = shutil.copytree(folder / "target", tmp_path / "target")
    loaded = AutoModelForCausalLM.from_pretrained(place, quantization_config=int8())
    tiny.llama(3, tie_word_embeddings=True).save_pretrained(place)
    assert reference_to(loaded).weights is None


def test_a_recipe_with_a_broken_quantisation_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "recipe")
    path = tmp_path / "recipe" / "config.json"
    for broken in ("int8", {"quant_method": "unheard of"}, {"quant_method": "torchao", "quant_type": 3}, [1]):
        entries = json.loads(path.read_text())
        entries["backbone_config"]["quantization_config"] = broken
        path.write_text(json.dumps(entries))
        with pytest.raises(RewardFileError):
            PRTForCausalLM.from_pretrained(tmp_path / "recipe")


def test_a_backbone_quantised_by_hand_is_used_and_not_saved(folder, tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    backbone = AutoModelForCausalLM.from_pretrained(folder / "target")
    torchao.quantize_(backbone.model, torchao.Int8WeightOnlyConfig(version=2))
    made = PRTForCausalLM.from_parts(backbone, [folder / "reward"])
    processor = RewardModel.from_pretrained(folder / "reward").processor(backbone)
    assert text(made) == text(backbone, logits_processor=[processor])
    with pytest.raises(UnsupportedError, match="by hand"):
        made.save_pretrained(tmp_path / "recipe")


def test_rewards_are_not_made_on_quantised_weights(folder, quantized):
    with pytest.raises(UnsupportedError, match="full precision"):
        RewardModel.from_base(quantized, tiny.tokenizer(), LoraConfig())
    with pytest.raises(UnsupportedError, match="full precision"):
        RewardModel.from_base(str(folder / "source"), peft_config=LoraConfig(), quantization_config=int8())
    base = AutoModelForCausalLM.from_pretrained(folder / "source", quantization_config=int8())
    with pytest.raises(UnsupportedError, match="full precision"):
        RewardModel.from_pretrained(folder / "reward", base_model=base)


def test_a_reward_is_tuned_on_a_quantised_source_backbone(folder, quantized, tmp_path):
    rows = tiny.texts(8)
    trainer = PRTTrainer(
        str(folder / "source"),
        PRTConfig(str(tmp_path / "out"), **tiny.TUNING, max_steps=2),
        train_dataset=rows,
        eval_dataset=rows,
        backbone=quantized,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    found = trainer.evaluate()["eval_backbone_loss"]
    trainer.train()
    total = count = 0
    for row in rows:
        log_probs = quantized(torch.tensor([row["input_ids"]])).logits[0, :-1].detach().log_softmax(-1)
        labels = torch.tensor(row["labels"])[1:]
        keep = labels != -100
        total -= float(log_probs[keep].gather(1, labels[keep, None]).sum())
        count += int(keep.sum())
    assert found == pytest.approx(total / count, rel=1e-4)
    assert trainer.reward.config.source_backbone == reference_to(quantized)


def test_states_of_a_quantised_backbone_are_stored_by_its_id_and_quantisation(folder, quantized):
    reward = RewardModel.from_pretrained(folder / "reward")
    whole, less = (
        Backbone(reward, str(folder / "target"), **kwargs).identity for kwargs in ({}, {"quantization_config": int8()})
    )
    assert whole != less and whole.items() <= less.items()
    with pytest.raises(BackboneCacheError, match="quantised"):
        _ = Backbone(reward, quantized).identity


def test_a_model_in_memory_is_not_quantised(folder):
    config = BitsAndBytesConfig()
    with pytest.raises(PRTValueError, match="in memory"):
        PRTForCausalLM.from_parts(tiny.llama(1), [folder / "reward"], quantization_config=config)


def run(capsys, *arguments):
    status = main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_line_quantises_the_backbone(folder, model, tmp_path, capsys):
    int8()
    option = ("--quantization", "torchao-int8")
    pair = (folder / "target", "--reward", folder / "reward")
    asked = ("--prompt", PROMPT, "--max_new_tokens", 12, "--no_stream")
    status, out, _ = run(capsys, "generate", *pair, *asked, *option)
    length = len(PROMPT.split())
    expected = tiny.tokenizer().decode(text(model)[length:], skip_special_tokens=True)
    assert (status, out) == (0, f"{expected}\n")
    model.save_pretrained(tmp_path / "recipe")
    assert run(capsys, "generate", tmp_path / "recipe", *asked)[1] == out


def test_check_and_evaluate_measure_the_quantised_backbone(folder, quantized, tmp_path, capsys):
    int8()
    data = tmp_path / "rows.txt"
    data.write_text("\n".join(f"{PROMPT} w{index}" for index in range(10, 16)))
    option = ("--data", data, "--json", "--quantization", "torchao-int8")
    status, out, _ = run(capsys, "check", folder / "reward", folder / "target", *option)
    checked = json.loads(out)["portability"]["nll"]["target"]
    total = count = 0
    for line in data.read_text().splitlines():
        ids = torch.tensor([[*tiny.tokenizer()(line)["input_ids"], 2]])
        log_probs = quantized(ids).logits[0, :-1].detach().log_softmax(-1)
        total -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    assert status == 0 and checked == pytest.approx(total / count, rel=1e-4)
    status, out, _ = run(capsys, "evaluate", folder / "reward", "--targets", folder / "target", *option)
    assert status == 0 and f"{checked:.4f}"[:-1] in out


@pytest.mark.parametrize("option", ["--load_in_4bit", "--load_in_8bit", "--quantization=torchao-int8"])
@pytest.mark.parametrize("command", ["generate", "check", "evaluate"])
def test_a_missing_library_is_named(folder, capsys, monkeypatch, option, command):
    monkeypatch.setattr("prt_hf.cli.quantization.find_spec", lambda name: None)
    arguments = {
        "generate": (folder / "target", "--reward", folder / "reward", "--prompt", PROMPT),
        "check": (folder / "reward", folder / "target", "--data", "rows.txt"),
        "evaluate": (folder / "reward", "--targets", folder / "target", "--data", "rows.txt"),
    }
    status, out, err = run(capsys, command, *arguments[command], option)
    library = "torchao" if "torchao" in option else "bitsandbytes"
    assert (status, out) == (1, "")
    assert f"pip install {library}" in err and "Traceback" not in err


def test_one_quantisation_can_be_asked_for(folder, capsys):
    with pytest.raises(SystemExit):
        run(capsys, "check", folder / "reward", folder / "target", "--load_in_4bit", "--load_in_8bit")
    assert "not allowed with" in capsys.readouterr().err
