"""Existing LoRAs: carried over, distilled, added up and subtracted; figures of existing_loras.md and lora_rewards.md.

    python notebooks/existing_loras.py --assets ASSETS --folder loras      # tunes what is missing there, prints tables

Plain LoRAs of stories-old, tuned by TRL as anyone's on the Hub: on bullet lists, and on "excited" stories and lists,
whose sentences end with an exclamation mark. Figures are of 50 held-out texts.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from real_models import story_models
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from prt_hf import PRTForCausalLM, PRTSFTConfig, PRTSFTTrainer, RewardModel

LENGTH = 256
TUNED = ("bullets", "excited", "excited bullets")
KINDS = ("stories", *TUNED)
# What is added to the target, with its strength.
SUMS = {
    "pretrained": {},
    "bullets": {"bullets": 1.0},
    "excited": {"excited": 1.0},
    "bullets + 0.5 excited": {"bullets": 1.0, "excited": 0.5},
    "bullets + excited": {"bullets": 1.0, "excited": 1.0},
    "tuned on excited bullets": {"excited bullets": 1.0},
    "tuned on excited bullets - 0.5 excited": {"excited bullets": 1.0, "excited": -0.5},
    "tuned on excited bullets - excited": {"excited bullets": 1.0, "excited": -1.0},
}
SETTINGS = {
    "learning_rate": 3e-3,
    "max_steps": 300,
    "per_device_train_batch_size": 16,
    "max_length": LENGTH,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def texts(assets: Path, split: str) -> dict[str, list[str]]:
    """By kind; the last 50 of the 1000 stories are held out."""
    stories = json.loads((assets / "text" / "tinystories_1000.json").read_text(encoding="utf-8"))
    lines = (assets / "text" / f"bullet_stories_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    found = {
        "stories": stories[:950] if split == "train" else stories[950:],
        "bullets": [json.loads(line)["text"] for line in lines],
    }
    excited = {"excited": found["stories"], "excited bullets": found["bullets"]}
    return found | {name: [text.replace(".", "!") for text in rows] for name, rows in excited.items()}


def tune(assets: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whatever is not in the folder yet: the LoRAs, and the reward that is distilled from the one of bullet lists."""
    source, data = str(assets / "stories-old"), texts(assets, "train")
    for kind in TUNED:
        if (folder / kind).is_dir():
            continue
        set_seed(0)
        trainer = SFTTrainer(
            source,
            SFTConfig(str(folder / kind), **SETTINGS),
            train_dataset=Dataset.from_dict({"text": data[kind]}),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        )
        trainer.train()
        trainer.save_model()
    if not (folder / "distilled").is_dir():
        trainer = PRTSFTTrainer(
            source,
            PRTSFTConfig(str(folder / "distilled"), **SETTINGS),
            train_dataset=Dataset.from_dict({"text": data["bullets"]}),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=64),
            distill_from=str(folder / "bullets"),
        )
        trainer.train()
        trainer.save_model()


@torch.no_grad()
def nats(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[str]) -> float:
    """Negative log-likelihood per token."""
    total = count = 0
    for text in rows:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :LENGTH]
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        total -= log_probs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
    return total / count


def tables(assets: Path, folder: Path) -> Iterator[str]:
    models, tokenizer = story_models(assets)
    tune(assets, folder, tokenizer)
    held_out = texts(assets, "test")
    loras = {kind: RewardModel.from_adapter(folder / kind) for kind in TUNED}

    def with_rewards(place: str, rewards: list[RewardModel], strengths: list[float] | None = None):
        if not rewards:
            return models[place]
        return PRTForCausalLM.from_parts(models[place], rewards, strengths, tokenizer=tokenizer).eval()

    yield "| nats per token of bullet lists | source | target |\n|---|---|---|"
    distilled = RewardModel.from_pretrained(folder / "distilled")
    for name, rewards in {
        "pretrained": [],
        "the LoRA carried over (EFT)": [loras["bullets"]],
        "distilled (PRT)": [distilled],
    }.items():
        figures = [nats(with_rewards(place, rewards), tokenizer, held_out["bullets"]) for place in ("source", "target")]
        yield f"| {name} | {figures[0]:.3f} | {figures[1]:.3f} |"
    yield f"\n| | {' | '.join(KINDS)} |\n|---|{'---|' * len(KINDS)}"
    for name, parts in SUMS.items():
        model = with_rewards("target", [loras[kind] for kind in parts], list(parts.values()))
        yield f"| {name} | {' | '.join(f'{nats(model, tokenizer, held_out[kind]):.3f}' for kind in KINDS)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, required=True, help="folder of the stories' models and texts")
    parser.add_argument("--folder", type=Path, required=True, help="where the LoRAs are kept")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for line in tables(args.assets, args.folder):
        print(line, flush=True)


if __name__ == "__main__":
    main()
