"""On real weights and data, where they are: the method itself, with its figures printed (`pytest -m real -s`)."""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prt_hf import PRTConfig, PRTLogitsProcessor, PRTTrainer, RewardModel, combine, default_peft_config

ASSETS = Path(os.environ.get("PRT_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not ASSETS.is_dir(), reason=f"no assets at {ASSETS} (set PRT_ASSETS)"),
]


def config(folder, **changes):
    defaults = {
        "output_dir": str(folder),
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 50,
        "per_device_eval_batch_size": 100,
    }
    return PRTConfig(**defaults | changes)


def bullet_stories(tokenizer, split, rows=None):
    """Stories rewritten as bullet lists: a shift of form, which the old model can learn."""
    lines = (ASSETS / "text" / f"bullet_stories_{split}.jsonl").read_text().splitlines()[:rows]
    texts = [json.loads(line)["text"] for line in lines]
    ids = tokenizer(texts, truncation=True, max_length=255)["input_ids"]
    return Dataset.from_list([{"input_ids": [*row, tokenizer.eos_token_id]} for row in ids])


def test_a_language_reward_is_ported(tmp_path):
    """stories-old -> stories260K, LoRA with the head; a third of the steps that it takes to the end."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "stories-old")
    source, target = (AutoModelForCausalLM.from_pretrained(ASSETS / name) for name in ("stories-old", "stories260K"))
    test_set = bullet_stories(tokenizer, "test")

    trainer = PRTTrainer(
        source,
        config(tmp_path, max_steps=100, learning_rate=3e-3, per_device_train_batch_size=16),
        train_dataset=bullet_stories(tokenizer, "train"),
        eval_dataset=test_set,
        processing_class=tokenizer,
        peft_config=default_peft_config(source),
    )
    trainer.train()
    trainer.save_model()
    reward = RewardModel.from_pretrained(tmp_path)

    def nll(log_probs):
        total = count = 0.0
        for row in test_set["input_ids"]:
            ids = torch.tensor([row])
            with torch.no_grad():
                chosen = log_probs(ids)[0, :-1].gather(1, ids[0, 1:, None])
            total, count = total - chosen.sum().item(), count + len(chosen)
        return total / count

    figures = {
        "source": nll(lambda ids: source(ids).logits.log_softmax(-1)),
        "target": nll(lambda ids: target(ids).logits.log_softmax(-1)),
        "reward only": nll(lambda ids: reward(input_ids=ids).log_softmax(-1)),
        "source + reward": nll(lambda ids: combine(source(ids).logits, reward(input_ids=ids))),
        "target + reward": nll(lambda ids: combine(target(ids).logits, reward(input_ids=ids))),
    }
    print("\nnegative log-likelihood per token, bullet stories:", {k: round(v, 3) for k, v in figures.items()})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(figures["source + reward"], rel=1e-4)
    assert figures["target + reward"] < figures["target"] - 0.7, "the ported reward improves the target clearly"
    assert figures["target + reward"] < figures["source + reward"] - 0.2, "the target's knowledge comes through"
    assert figures["target + reward"] < figures["reward only"] - 0.5, "and is not the reward's"

    prompt = tokenizer("Once upon a time", return_tensors="pt")
    bare, tuned = (
        tokenizer.decode(target.generate(**prompt, max_new_tokens=150, do_sample=False, logits_processor=processors)[0])
        for processors in ([], [PRTLogitsProcessor(reward, tokenizer)])
    )
    print(f"--- target\n{bare}\n--- target + reward\n{tuned}")


def cifar10(split, preprocess, noise, rows=None):
    data = load_dataset("parquet", data_files=str(ASSETS / "cifar10" / f"{split}.parquet"), split="train")
    data = data.select(range(rows)) if rows else data
    images = torch.cat([preprocess(data[i : i + 500]["image"]) for i in range(0, len(data), 500)])
    generator = torch.Generator().manual_seed(0 if split == "train" else 1)
    images += noise * torch.randn(images.shape, generator=generator)
    return Dataset.from_dict({"pixel_values": images.numpy(), "labels": data["label"]}).with_format("torch")


@pytest.mark.slow
def test_an_image_reward_is_ported(tmp_path):
    """ResNet-20 -> ResNet-32 under mild noise, a full reward as in the paper."""
    spec = importlib.util.spec_from_file_location("cifar_resnet", ASSETS / "cifar_resnet.py")
    cifar = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cifar)
    source, target = (cifar.load_cifar_resnet(name) for name in ("resnet20", "resnet32"))
    noise = 0.05 * 0.5 / 0.226
    train_set, test_set = (cifar10(split, cifar.preprocess, noise) for split in ("train", "test"))

    def accuracy(model, data=test_set, reward=None):
        right = 0
        for start in range(0, len(data), 500):
            batch = data[start : start + 500]
            with torch.no_grad():
                scores = model(batch["pixel_values"]).logits.log_softmax(-1) if model else 0
                scores = scores if reward is None else scores + reward(pixel_values=batch["pixel_values"])
            right += (scores.argmax(-1) == batch["labels"]).sum().item()
        return 100 * right / len(data)

    figures = {"source": accuracy(source), "target": accuracy(target)}
    trainer = PRTTrainer(
        cifar.load_cifar_resnet("resnet20"),
        config(tmp_path, num_train_epochs=2, learning_rate=1e-3, per_device_train_batch_size=128),
        train_dataset=train_set,
        eval_dataset=test_set,
    )
    trainer.train()
    trainer.save_model()
    reward = RewardModel.from_pretrained(tmp_path, base_model=source)
    figures |= {
        "reward only": accuracy(None, reward=reward),
        "source + reward": accuracy(source, reward=reward),
        "target + reward": accuracy(target, reward=reward),
    }
    print("\ntop-1 %, CIFAR-10 with noise:", {name: round(value, 1) for name, value in figures.items()})
    assert 100 * trainer.evaluate()["eval_accuracy"] == pytest.approx(figures["source + reward"], abs=0.1)
    assert figures["target + reward"] > figures["target"] + 5, "the ported reward improves the target clearly"
    assert figures["target + reward"] > figures["source + reward"], "and a better target stays better"
    assert figures["target + reward"] > figures["reward only"] + 10, "the backbone carries its share"
    assert np.isfinite(list(figures.values())).all()
