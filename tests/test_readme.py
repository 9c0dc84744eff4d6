"""The README's Python runs as it stands, with small models in the place of those of the Hub."""

import re
from pathlib import Path

import datasets
import test_own_pixels
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

import prt_hf

README = (Path(__file__).parents[1] / "README.md").read_text()
# Ray Data wants the environment of vLLM: see tests/serving/test_batch.py.
BLOCKS = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if not block.startswith("import ray\n")]


MODELS = {
    "Qwen/Qwen2.5-0.5B": tiny.llama(1),
    "Qwen/Qwen2.5-7B": tiny.llama(2, hidden_size=64),
    "google/vit-base-patch16-224": tiny.vit(1),
    "facebook/convnextv2-large-22k-224": tiny.resnet(2, names=tiny.COLOURS[::-1]),
}


CLASS_NAMES = ["w3", "w4", "w5", "w6"]
ENCODERS = {
    "openai/clip-vit-base-patch16": (CLIPModel, CLIPConfig, {"num_channels": 3, "image_size": 8}),
    "google/siglip-so400m-patch14-384": (SiglipModel, SiglipConfig, {"num_channels": 3, "image_size": 12}),
}
PROCESSORS = (
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    SiglipImageProcessorPil(size={"height": 12, "width": 12}),
)


def test_every_block_runs(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    for model_id, model in MODELS.items():
        model.save_pretrained(model_id)
        tiny.tokenizer().save_pretrained(model_id)
    base = MODELS["Qwen/Qwen2.5-0.5B"].from_pretrained("Qwen/Qwen2.5-0.5B")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).save_pretrained("user/any-lora")
    for (model_id, (model, config, size)), processor in zip(ENCODERS.items(), PROCESSORS, strict=True):
        encoders = {"text_config": tiny.TEXT_ENCODER, "vision_config": tiny.IMAGE_ENCODER | size}
        model(config(**encoders)).save_pretrained(model_id)
        tiny.tokenizer().save_pretrained(model_id)
        processor.save_pretrained(model_id)
    problem = {"question": " ".join(f"w{index}" for index in range(3, 12)), "answer": "w20 w21 w22"}
    data_sets = {"openai/gsm8k": problem, "trl-lib/Capybara": {"text": " ".join(problem.values())}}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *_, **__: datasets.Dataset.from_list([data_sets[name]] * 4)
    )
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda name, device_map=None, **kwargs: load(name, **kwargs)
    )
    torch.manual_seed(0)
    pixel_values = torch.randn(4, 1, 8, 8)
    photos = datasets.Dataset.from_dict({"pixel_values": pixel_values.tolist(), "label": [0, 1, 2, 3]})
    scope = {"photos": photos.with_format("torch"), "pixel_values": pixel_values, "class_names": CLASS_NAMES}
    scope["cars"] = test_own_pixels.PHOTOS
    seen = []
    for block in BLOCKS:
        on_cpu = re.sub(
            r"(PRT(?:SFT)?Config)\(([^)]*?)(, bf16=True)?\)", r"\1(\2, use_cpu=True, report_to='none')", block
        )
        exec(compile(on_cpu, "README.md", "exec"), scope)
        seen.append(dict(scope))
    text, generated, fits, whole, existing, shared, measured, images, zero_shot, chat = seen
    assert hub.repositories["me/gsm8k-reward"].private
    with torch.no_grad():
        ids = shared["inputs"]["input_ids"]
        assert torch.equal(shared["reward"](input_ids=ids), generated["reward"](input_ids=ids))
        assert torch.equal(shared["model"](ids).logits, whole["model"](ids).logits)
    assert torch.equal(whole["output"], generated["output"]), "speculative or not, processor or model"
    assert str(fits["processor"].match) == "identical: 97 tokens"
    assert fits["processor"].prompt.shape[1] > fits["inputs"]["input_ids"].shape[1]
    assert torch.equal(existing["carried_over"].generate(**existing["inputs"], max_new_tokens=64), existing["emulated"])
    assert text["trainer"].state.global_step > 0
    # The end token belongs to what is answered.
    assert (measured["report"].rows, measured["report"].positions) == (4, 4 * (3 + 1))
    assert "| `Qwen/Qwen2.5-7B` | `evaluation data` |" in Path("gsm8k-reward/README.md").read_text()
    assert Path("report/report.png").is_file()
    assert chat["trainer"].state.global_step > 0 and chat["trainer"].args.output_dir == "chat-reward"
    assert generated["output"].shape[1] > generated["inputs"]["input_ids"].shape[1]
    source, target = MODELS["google/vit-base-patch16-224"], MODELS["facebook/convnextv2-large-22k-224"]
    assert [source.config.id2label[index] for index in images["order"]] == list(target.config.id2label.values())
    torch.testing.assert_close(images["log_probs"].exp().sum(-1), torch.ones(4))
    torch.testing.assert_close(zero_shot["log_probs"].exp().sum(-1), torch.ones(4))
    assert list(zero_shot["target"].config.id2label.values()) == CLASS_NAMES


def test_the_face_comes_within_sixty_lines():
    first = "\n".join(README.splitlines()[:60])
    for line in ("pip install -e . && prt-hf demo", "PRTTrainer(", "RewardModel.from_pretrained", "backbone.generate"):
        assert line in first, line


def test_every_public_name_is_told():
    told = {name for name in prt_hf.__all__ if name in README}
    assert told == set(prt_hf.__all__) - {"__version__"}
