"""The recipes for models of full size: what they say parses, and runs on tiny models in the place of large ones."""

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import tiny
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageClassification, CLIPImageProcessorPil, TrainingArguments
from trl.scripts.sft import make_parser

from prt_hf import RewardModel, cli
from prt_hf.cli.train_options import Options
from prt_hf.contract import IMAGE_CLASSIFICATION, TEXT_GENERATION
from prt_hf.training.config import PRTConfig
from prt_hf.training.sft import PRTSFTConfig

FOLDER = Path(__file__).parents[1] / "notebooks" / "recipes"
TEXT = (FOLDER / "README.md").read_text()
LINES = [
    re.sub(r"^torchrun .* -m prt_hf\.cli", "prt-hf", line)
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    for line in block.splitlines()
]
ON_CPU = ["--use_cpu", "true"]  # else bfloat16 is refused here
KINDS = {
    "tulu_reward.yaml": (PRTSFTConfig, TEXT_GENERATION),
    "tulu_lora.yaml": (PRTSFTConfig, TEXT_GENERATION),
    "cars_reward.yaml": (PRTConfig, IMAGE_CLASSIFICATION),
}


def module(name):
    spec = importlib.util.spec_from_file_location(f"recipes_{name}", FOLDER / f"{name}.py")
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(FOLDER)


def parsed(arguments):
    """All options of a `train` command and its YAML file."""
    options = Options([*arguments, *ON_CPU])
    name = next(argument for argument in arguments if argument.endswith(".yaml"))
    return options, options.training_config(*KINDS[name])


def test_every_file_is_told():
    files = {path.name for path in FOLDER.iterdir() if path.is_file()} - {"README.md"}
    assert {name for name in files if name not in TEXT} == set()
    assert {name for name in files if name.endswith(".yaml")} == {*KINDS, "tulu_sft.yaml"}


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("prt-hf ")])
def test_every_command_of_the_package_parses(line, here, monkeypatch):
    """Up to what they would load: unknown options, wrong values and missing ones leave with 2."""
    seen = []
    for command in cli.COMMANDS:
        monkeypatch.setattr(command, "run", seen.append)
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0
    (args,) = seen
    if args.command == "train":
        parsed(args.rest)


def test_the_papers_settings(here):
    for name, full in (("tulu_reward.yaml", True), ("tulu_lora.yaml", False)):
        options, config = parsed(["--config", name])
        assert options.adapter.full is full and options.data.dataset_name == "allenai/tulu-v2-sft-mixture"
        assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 128
        assert (config.num_train_epochs, config.get_warmup_steps(1000), config.lr_scheduler_type) == (2, 30, "linear")
        assert (config.learning_rate, config.kl_coef) == (2e-5 if full else 2e-4, 1)
    options, config = parsed(["--config", "cars_reward.yaml"])
    assert options.adapter.full and config.learning_rate == 1e-5
    assert (config.max_steps, config.get_warmup_steps(2000), config.lr_scheduler_type) == (2000, 500, "cosine")
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 128


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("trl ")])
def test_every_command_of_trl_parses_and_tunes_as_the_reward_is_tuned(line, here):
    command, kind, *arguments = shlex.split(line)
    assert (command, kind) == ("trl", "sft")
    (script, config, *_), rest = _of_trl([*arguments, *ON_CPU])
    assert rest in ([], ["--accelerate_config", "zero3"])
    _, ours = parsed(["--config", "tulu_reward.yaml"])
    devices = 8 if rest else 1  # of TRL's zero3.yaml
    assert devices * config.per_device_train_batch_size * config.gradient_accumulation_steps == 128
    for name in ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_length"):
        assert getattr(config, name) == getattr(ours, name), name
    assert config.assistant_only_loss and config.chat_template_path == ours.chat_template_path
    assert script.dataset_name == "allenai/tulu-v2-sft-mixture"


def _of_trl(arguments):
    *found, rest = make_parser().parse_args_and_config(arguments, return_remaining_strings=True)
    return found, rest


CHAT = [
    {"role": "system", "content": "w3"},
    {"role": "user", "content": "w4 w5"},
    {"role": "assistant", "content": "w6 w7"},
    {"role": "user", "content": "w8"},
    {"role": "assistant", "content": "w9"},
]


def test_the_chat_template_marks_answers_and_their_end():
    tokenizer = tiny.tokenizer()
    template = (FOLDER / "tulu.jinja").read_text()
    text = tokenizer.apply_chat_template(CHAT[:3], chat_template=template, tokenize=False)
    assert text == "<|system|>\nw3\n<|user|>\nw4 w5\n<|assistant|>\nw6 w7<eos>\n"
    asked = tokenizer.apply_chat_template(CHAT[:2], chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text.startswith(asked) and asked.endswith("<|assistant|>\n")
    encoded = tokenizer.apply_chat_template(
        CHAT, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [id for id, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.convert_ids_to_tokens(learned) == ["w6", "w7", "<eos>", "w9", "<eos>"]


@pytest.mark.parametrize("name", ["tulu_reward.yaml", "tulu_lora.yaml"])
def test_the_language_recipes_tune(name, here, tmp_path):
    tiny.llama(1).save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps({'messages': CHAT})}\n" * 4)
    paths = {"model_name_or_path": "model", "dataset_name": "chats.jsonl", "output_dir": "reward"}
    arguments = [item for option, place in paths.items() for item in (f"--{option}", str(tmp_path / place))]
    few = ["--max_steps", "1", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"]
    assert cli.main(["train", "--config", name, *arguments, *few, *ON_CPU]) == 0
    reward = RewardModel.from_pretrained(tmp_path / "reward")
    assert reward.config.is_adapter is (name == "tulu_lora.yaml")
    assert reward.processing_class.chat_template == (FOLDER / "tulu.jinja").read_text()


class Block(nn.Module):
    """A layer of OpenCLIP, which transformers' CLIP is made of."""

    def __init__(self, size):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attn = nn.MultiheadAttention(size, 2, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(size, 2 * size), "c_proj": nn.Linear(2 * size, size)})

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp["c_proj"](nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


class Tower(nn.Module):
    def __init__(self, size, patch=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, size, patch, patch, bias=False)
        self.class_embedding, self.positional_embedding = _table(size), _table(5, size)
        self.ln_pre, self.ln_post, self.proj = nn.LayerNorm(size), nn.LayerNorm(size), _table(size, 24)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([Block(size), Block(size)])})

    def forward(self, pixels):
        patches = self.conv1(pixels).flatten(2).mT
        x = torch.cat([self.class_embedding.expand(len(pixels), 1, -1), patches], 1) + self.positional_embedding
        x = self.ln_pre(x)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x[:, 0]) @ self.proj


class OpenCLIP(nn.Module):
    """Names and computation of `open_clip.create_model("ViT-B-16")`, small."""

    def __init__(self, size=16):
        super().__init__()
        self.visual, self.logit_scale = Tower(size), nn.Parameter(torch.tensor(2.0))
        self.token_embedding, self.positional_embedding = nn.Embedding(tiny.VOCABULARY, size), _table(16, size)
        self.transformer = nn.ModuleDict({"resblocks": nn.ModuleList([Block(size), Block(size)])})
        self.ln_final, self.text_projection = nn.LayerNorm(size), _table(size, 24)

    def encode_text(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
        for block in self.transformer["resblocks"]:
            x = block(x, mask)
        return self.ln_final(x)[torch.arange(len(ids)), ids.argmax(-1)] @ self.text_projection


def _table(*shape):
    return nn.Parameter(torch.randn(shape))


def open_clip_and_config():
    torch.manual_seed(0)
    model = OpenCLIP().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    encoder = {"hidden_act": "gelu", "num_channels": 3}
    config = tiny.CLIPConfig(
        text_config=tiny.TEXT_ENCODER | encoder, vision_config=tiny.IMAGE_ENCODER | encoder, projection_dim=24
    )
    return model, config


def test_a_model_of_openclip_is_the_same_in_transformers():
    model, config = open_clip_and_config()
    converted = module("clip").from_open_clip(model.state_dict(), config)
    pixels = torch.randn(2, 3, 8, 8)
    ids = torch.tensor([[1, 5, 96, 0], [1, 7, 7, 96]])  # texts end with the last token of all
    with torch.no_grad():
        ours = converted.get_image_features(pixels).pooler_output, converted.get_text_features(ids).pooler_output
        theirs = model.visual(pixels), model.encode_text(ids)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(converted.logit_scale, model.logit_scale)
    with pytest.raises(RuntimeError, match="visual.other"):
        module("clip").from_open_clip(model.state_dict() | {"visual.other": torch.zeros(1)}, config)


def test_the_image_recipe_runs(tmp_path, monkeypatch):
    """Build, tune the reward, fine-tune for EFT, on eight small pictures."""
    clip = module("clip")
    model, config = open_clip_and_config()
    clip.CLIPModel(config).save_pretrained(tmp_path / "target")
    tiny.tokenizer().save_pretrained(tmp_path / "target")
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(
        tmp_path / "target"
    )
    names = ["w3", "w4"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    pictures = [Image.new("RGB", (9, 9), (30 * index, 5, 90)) for index in range(8)]
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 4}, features=features)
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "open_clip", SimpleNamespace(create_model=lambda *_: model))
    monkeypatch.setattr(clip, "load_dataset", lambda *_, **__: rows)
    monkeypatch.setattr(clip, "TARGET", "target")
    few = {"max_steps": 1, "per_device_train_batch_size": 4}
    monkeypatch.setattr(
        clip, "TrainingArguments", lambda **given: TrainingArguments(**given | few, use_cpu=True, disable_tqdm=True)
    )
    clip.build()
    for folder in ("cars/laion400m", "cars/laion2b"):
        classifier = AutoModelForImageClassification.from_pretrained(folder)
        assert list(classifier.config.id2label.values()) == names
    clip.finetune("cars/laion400m", "cars/laion400m-tuned")
    tuned = AutoModelForImageClassification.from_pretrained("cars/laion400m-tuned")
    plain = AutoModelForImageClassification.from_pretrained("cars/laion400m")
    assert torch.equal(tuned.classifier.weight, plain.classifier.weight)
    arguments = [f"--{name}={value}" for name, value in few.items()]
    data = ["--dataset_name", "data", "--dataloader_num_workers", "0"]
    assert cli.main(["train", "--config", str(FOLDER / "cars_reward.yaml"), *data, *arguments, *ON_CPU]) == 0
    reward = RewardModel.from_pretrained("cars-reward")
    assert not reward.config.is_adapter and reward.contract.names == tuple(names)


def test_the_tables_are_those_of_the_arithmetic():
    estimate = module("estimate")
    for table in (estimate.tuning(), estimate.decoding(), estimate.images()):
        assert table in TEXT
    published = {"Qwen2.5-0.5B": 494_032_768, "Qwen2.5-7B": 7_615_616_512, "Qwen2.5-14B": 14_770_033_664}
    assert {name: estimate.qwen(name).num_parameters() for name in published} == published
    # Tied embeddings are the head and multiply every token, untied ones do not; norms and biases are left out.
    assert estimate.multiplied(estimate.qwen("Qwen2.5-0.5B")) == pytest.approx(494_032_768, rel=1e-3)
    assert estimate.multiplied(estimate.qwen("Qwen2.5-7B")) == pytest.approx(7_615_616_512 - 152_064 * 3584, rel=1e-3)
