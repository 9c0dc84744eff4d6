"""Is a baked LoRA as good as the PRT model it was baked from? The figures of bake.md.

    python notebooks/bake.py --assets ASSETS --seeds 0 1 2 --output bake.json      # continued where it exists
    python notebooks/bake.py --output bake.json --table

Pairs: "stories" (stories-old -> stories260K, bullet lists) and "cifar" (ResNet-20 -> ResNet-32, mild Gaussian noise).
All methods train for as many steps, with the same LoRA on the target; from prompts alone, where each step generates,
for a third of them. Only `fine-tuned` sees labels at the target.
"""

import argparse
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from existing_loras import SETTINGS, nats, texts
from peft import LoraConfig
from real_models import MILD, cifar10, resnets, story_models
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from prt_hf import (
    BakeConfig,
    PRTConfig,
    PRTForCausalLM,
    PRTForImageClassification,
    PRTSFTConfig,
    PRTSFTTrainer,
    PRTTrainer,
    bake,
    default_peft_config,
)
from prt_hf.baking.trainer import BakeTrainer, TextBakeTrainer
from prt_hf.evaluation.machine import hardware, versions

IMAGES = {
    "learning_rate": 3e-3,
    "max_steps": 234,
    "per_device_train_batch_size": 128,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 12,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
}
TEXTS = SETTINGS | {"disable_tqdm": True, "logging_strategy": "no", "lr_scheduler_type": "cosine", "warmup_steps": 15}


class OldModel:
    """The fine-tuned old model as the teacher in the place of a PRT model: distillation without a reward."""

    columns = slice(None)

    def __init__(self, model: nn.Module):
        self.model = model.eval()

    @torch.no_grad()
    def log_probs(self, batch) -> torch.Tensor:
        return batch.chosen(self.model(**batch.inputs).logits).log_softmax(-1)

    def why_not_projected(self, batch) -> str:
        return "no PRT model"

    def inputs_of_student(self, inputs: dict) -> dict:
        return inputs


def stories(assets: Path, seed: int, folder: str) -> dict[str, float]:
    """Nats per token of 50 held-out bullet lists at the target."""
    models, tokenizer = story_models(assets)
    train, held_out = (texts(assets, split)["bullets"] for split in ("train", "test"))
    rows = Dataset.from_dict({"text": train})
    settings = TEXTS | {"seed": seed}
    set_seed(seed)
    trainer = PRTSFTTrainer(
        models["source"],
        PRTSFTConfig(folder, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=default_peft_config(models["source"]),
    )
    trainer.train()
    model = PRTForCausalLM.from_parts(models["target"], [trainer.reward], tokenizer=tokenizer).eval()
    found = {"pretrained": nats(models["target"], tokenizer, held_out), "PRT": nats(model, tokenizer, held_out)}
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")

    def fine_tuned(place: str) -> nn.Module:
        set_seed(seed)
        pretrained = story_models(assets)[0][place]
        trainer = SFTTrainer(
            pretrained,
            SFTConfig(folder, **settings),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainer.train()
        return trainer.model.eval()

    prompts = Dataset.from_dict({"prompt": [text[: len("- ") + 12] for text in train]})
    set_seed(seed)
    found["baked"] = nats(bake(model, rows, BakeConfig(folder, **settings), lora), tokenizer, held_out)
    set_seed(seed)
    args = BakeConfig(folder, **settings | {"max_steps": 100}, max_new_tokens=32)
    found["baked, from prompts alone (100 steps)"] = nats(bake(model, prompts, args, lora), tokenizer, held_out)
    found["fine-tuned"] = nats(fine_tuned("target"), tokenizer, held_out)
    old = fine_tuned("source")
    set_seed(seed)
    trainer = TextBakeTrainer(model, BakeConfig(folder, **settings), train_dataset=rows, peft_config=lora)
    trainer.teacher = OldModel(old)
    trainer.train()
    return found | {"distilled from the fine-tuned old model": nats(trainer.model.eval(), tokenizer, held_out)}


def cifar(assets: Path, seed: int, folder: str) -> dict[str, float]:
    """Top-1 accuracy at the target, %, on 2,000 held-out images."""
    models = resnets(assets)
    (pixels, labels), (test_pixels, test_labels) = (cifar10(assets, split, MILD) for split in ("train", "test"))
    rows = Dataset.from_dict({"pixel_values": pixels.numpy(), "label": labels.tolist()}).with_format("torch")
    unlabelled = rows.remove_columns("label")
    settings = IMAGES | {"seed": seed}
    args = TrainingArguments(folder, **settings)

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        hits = [model(pixel_values=part).logits.argmax(-1) for part in test_pixels.split(500)]
        return 100 * (torch.cat(hits) == test_labels).double().mean().item()

    set_seed(seed)
    config = default_peft_config(models["source"])
    trainer = PRTTrainer(models["source"], PRTConfig(folder, **settings), train_dataset=rows, peft_config=config)
    trainer.train()
    model = PRTForImageClassification.from_parts(models["target"], [trainer.reward]).eval()
    found = {"pretrained": accuracy(models["target"]), "PRT": accuracy(model)}
    set_seed(seed)
    found["baked"] = accuracy(bake(model, unlabelled, args))

    def fine_tuned(place: str) -> nn.Module:
        from prt_hf.networks.adapters import wrap

        set_seed(seed)
        pretrained = resnets(assets)[place]
        trainer = Trainer(wrap(pretrained, default_peft_config(pretrained)), args, train_dataset=rows)
        trainer.train()
        return trainer.model.eval()

    found["fine-tuned"] = accuracy(fine_tuned("target"))
    old = fine_tuned("source")
    set_seed(seed)
    trainer = BakeTrainer(model, args, train_dataset=unlabelled)
    trainer.teacher = OldModel(old)
    trainer.train()
    return found | {"distilled from the fine-tuned old model": accuracy(trainer.model.eval())}


PAIRS: dict[str, Callable[[Path, int, str], dict[str, float]]] = {"stories": stories, "cifar": cifar}


def table(results: dict) -> str:
    """Return Markdown: mean ± standard deviation over the seeds, and the share of the ported gain that is kept."""
    lines = []
    for name, runs in results["pairs"].items():
        found = list(runs.values())
        digits = 1 if name == "cifar" else 3
        lines += [f"**{name}** ({len(found)} seeds)", "", "| | at the target | of the ported gain |", "|---|---|---|"]
        for method in found[0]:
            values = [run[method] for run in found]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            kept = [(run[method] - run["pretrained"]) / (run["PRT"] - run["pretrained"]) for run in found]
            share = "" if method == "pretrained" else f"{statistics.mean(kept):.0%}"
            lines.append(f"| {method} | {statistics.mean(values):.{digits}f}{spread} | {share} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("PRT_ASSETS"), help="or PRT_ASSETS")
    parser.add_argument("--pair", choices=[*PAIRS, "all"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("bake.json"), help="continued where it exists")
    parser.add_argument("--table", action="store_true", help="only print the table of the output")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {"pairs": {}}
    if not args.table:
        torch.set_num_threads(1)
        transformers.utils.logging.set_verbosity_error()
        warnings.filterwarnings("ignore")
        results |= {"machine": hardware(), "versions": versions()}
        for name in PAIRS if args.pair == "all" else [args.pair]:
            runs = results["pairs"].setdefault(name, {})
            for seed in args.seeds:
                if str(seed) not in runs:
                    with tempfile.TemporaryDirectory() as folder:
                        runs[str(seed)] = PAIRS[name](Path(args.assets), seed, folder)
                    args.output.write_text(json.dumps(results, indent=1) + "\n")
                    print(name, seed, runs[str(seed)], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
