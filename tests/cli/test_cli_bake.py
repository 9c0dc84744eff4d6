"""`prt-hf bake`: language models, recipes, prompts alone, images."""

import json

import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, Image
from peft import PeftModel
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from prt_hf import PRTForCausalLM, RewardModel
from prt_hf.cli import main

STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--report_to", "none", "--use_cpu", "true"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A backbone, a reward, their recipe, texts and prompts."""
    home = tmp_path_factory.mktemp("bake")
    tokenizer = tiny.tokenizer()
    tiny.llama(2).save_pretrained(home / "backbone")
    tokenizer.save_pretrained(home / "backbone")
    tiny.gpt2(1).save_pretrained(home / "base")
    tokenizer.save_pretrained(home / "base")
    RewardModel.from_base(str(home / "base")).save_pretrained(home / "reward")
    PRTForCausalLM.from_parts(str(home / "backbone"), [home / "reward"]).save_pretrained(home / "recipe")
    for name in ("text", "prompt"):
        rows = [json.dumps({name: f"w{index} w{index + 1} w{index + 2} w9"}) for index in range(3, 9)]
        (home / f"{name}s.jsonl").write_text("\n".join(rows))
    return home


@pytest.mark.parametrize("data, extra", [("texts", []), ("prompts", ["--max_new_tokens", "3"])])
def test_a_backbone_with_rewards(home, tmp_path, capsys, data, extra):
    arguments = [
        "bake",
        str(home / "backbone"),
        "--reward",
        str(home / "reward"),
        "--output_dir",
        str(tmp_path / "lora"),
    ]
    arguments += ["--dataset_name", str(home / f"{data}.jsonl"), "--lora_r", "4", *extra, *STEPS]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    loaded = PeftModel.from_pretrained(tiny.LlamaForCausalLM.from_pretrained(home / "backbone"), tmp_path / "lora")
    assert loaded.peft_config["default"].r == 4 and loaded.peft_config["default"].lora_alpha == 8
    assert report["rows"] == 6
    assert report["parameters"] == sum(value.numel() for name, value in loaded.named_parameters() if "lora" in name)
    assert loaded.peft_config["default"].base_model_name_or_path == str(home / "backbone")


def test_a_recipe_and_an_interruption(home, tmp_path, capsys):
    folder = tmp_path / "lora"
    arguments = ["bake", str(home / "recipe"), "--output-dir", str(folder), "--save_steps", "2"]
    arguments += ["--dataset_name", str(home / "texts.jsonl"), *STEPS]
    assert main(arguments) == 0
    assert (folder / "checkpoint-2").is_dir()
    assert "merge_and_unload" in capsys.readouterr().out
    assert main([*arguments, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert main(["bake", str(home / "recipe"), "--reward", str(home / "reward"), *arguments[2:]]) == 1
    assert "names its own rewards" in capsys.readouterr().err
    assert main(["bake", str(home / "backbone"), *arguments[2:]]) == 1
    assert "There is no reward.\n  expected: --reward, or the recipe of a PRT model" in capsys.readouterr().err


def test_images(tmp_path):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    for name, seed in (("backbone", 2), ("base", 1)):
        tiny.vit(seed, num_channels=3).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    RewardModel.from_base(str(tmp_path / "base")).save_pretrained(tmp_path / "reward")
    features = Features({"image": Image(), "label": ClassLabel(names=["x"])})
    pictures = [{"image": PILImage.new("RGB", (9, 9), colour), "label": 0} for colour in ("red", "blue")]
    (tmp_path / "data").mkdir()
    Dataset.from_list(pictures, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    arguments = ["bake", str(tmp_path / "backbone"), "--reward", str(tmp_path / "reward")]
    arguments += ["--dataset_name", str(tmp_path / "data"), "--output_dir", str(tmp_path / "lora"), *STEPS]
    assert main(arguments) == 0
    network = PeftModel.from_pretrained(tiny.vit(2, num_channels=3), tmp_path / "lora")
    assert any(torch.count_nonzero(value) for name, value in network.named_parameters() if "lora_B" in name)
