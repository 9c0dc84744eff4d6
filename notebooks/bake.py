"""Is a baked LoRA as good as the PRT model it was baked from? The figures of bake.md.

    python notebooks/bake.py --assets ASSETS --seeds 0 1 2 --output bake.json      # continued where it exists
    python notebooks/bake.py --output bake.json --table

Pairs: "stories" (stories-old -> stories260K, bullet lists) and "cifar" (ResNet-20 -> ResNet-32, mild Gaussian noise).
All methods train for as many steps, with the same LoRA on the target; from prompts alone, the LoRA writes 64 tokens
to the first words of a list at each step. Only `fine-tuned` sees labels at the target.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
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
from prt_hf.baking.teacher import Teacher
from prt_hf.baking.trainer import BakeTrainer, TextBakeTrainer
from prt_hf.evaluation.machine import hardware, versions
from prt_hf.inference.prt_model import PRTPreTrainedModel
from prt_hf.networks.adapters import wrap
from prt_hf.reward.backbones import Batch

IMAGES = {
    "learning_rate": 3e-3,
    "max_steps": 39,
    "per_device_train_batch_size": 128,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 4,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_strategy": "no",
}
TEXTS = SETTINGS | {"disable_tqdm": True, "logging_strategy": "no", "lr_scheduler_type": "cosine", "warmup_steps": 15}


class OldModel(Teacher):
    """The fine-tuned old model as the teacher in the place of a PRT model: distillation without a reward."""

    def __init__(self, model: PRTPreTrainedModel, old: nn.Module):
        super().__init__(model)
        self.old = old.eval()

    @torch.no_grad()
    def log_probs(self, batch: Batch) -> torch.Tensor:
        return batch.chosen(self.old(**batch.inputs).logits).log_softmax(-1)

    def why_not_projected(self, batch: Batch) -> str:
        return "it is no PRT model"


def stories(assets: Path, seed: int, folder: str) -> dict[str, Callable[[], float]]:
    """Nats per token of 50 held-out bullet lists at the target, by method."""
    models, tokenizer = story_models(assets)
    train, held_out = (texts(assets, split)["bullets"] for split in ("train", "test"))
    rows = Dataset.from_dict({"text": train})
    prompts = Dataset.from_dict({"prompt": [text[: len("- ") + 12] for text in train]})
    settings = TEXTS | {"seed": seed}
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")

    @cache
    def prt() -> PRTForCausalLM:
        set_seed(seed)
        trainer = PRTSFTTrainer(
            models["source"],
            PRTSFTConfig(folder, **settings),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=default_peft_config(models["source"]),
        )
        trainer.train()
        return PRTForCausalLM.from_parts(models["target"], [trainer.reward], tokenizer=tokenizer).eval()

    def fine_tuned(place: str) -> nn.Module:
        set_seed(seed)
        trainer = SFTTrainer(
            story_models(assets)[0][place],
            SFTConfig(folder, **settings),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora,
        )
        trainer.train()
        return trainer.model.eval()

    def baked(data: Dataset, **more: int) -> nn.Module:
        model = prt()
        set_seed(seed)
        return bake(model, data, BakeConfig(folder, **settings | more), lora)

    def distilled() -> nn.Module:
        model, old = prt(), fine_tuned("source")
        set_seed(seed)
        trainer = TextBakeTrainer(model, BakeConfig(folder, **settings), train_dataset=rows, peft_config=lora)
        trainer.teacher = OldModel(model, old)
        trainer.train()
        return trainer.model.eval()

    made = {
        "pretrained": lambda: models["target"],
        "PRT": prt,
        "baked": lambda: baked(rows),
        "fine-tuned": lambda: fine_tuned("target"),
        "distilled from the fine-tuned old model": distilled,
        "baked, from prompts alone": lambda: baked(prompts, max_new_tokens=64),
    }
    return {method: lambda make=make: nats(make(), tokenizer, held_out) for method, make in made.items()}


def cifar(assets: Path, seed: int, folder: str) -> dict[str, Callable[[], float]]:
    """Top-1 accuracy at the target, %, on 2,000 held-out images, by method."""
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

    @cache
    def prt() -> PRTForImageClassification:
        set_seed(seed)
        config = default_peft_config(models["source"])
        trainer = PRTTrainer(models["source"], PRTConfig(folder, **settings), train_dataset=rows, peft_config=config)
        trainer.train()
        return PRTForImageClassification.from_parts(models["target"], [trainer.reward]).eval()

    def fine_tuned(place: str) -> nn.Module:
        set_seed(seed)
        pretrained = resnets(assets)[place]
        trainer = Trainer(wrap(pretrained, default_peft_config(pretrained)), args, train_dataset=rows)
        trainer.train()
        return trainer.model.eval()

    def baked() -> nn.Module:
        model = prt()
        set_seed(seed)
        return bake(model, unlabelled, args)

    def distilled() -> nn.Module:
        model, old = prt(), fine_tuned("source")
        set_seed(seed)
        trainer = BakeTrainer(model, args, train_dataset=unlabelled)
        trainer.teacher = OldModel(model, old)
        trainer.train()
        return trainer.model.eval()

    made = {
        "pretrained": lambda: models["target"],
        "PRT": prt,
        "baked": baked,
        "fine-tuned": lambda: fine_tuned("target"),
        "distilled from the fine-tuned old model": distilled,
    }
    return {method: lambda make=make: accuracy(make()) for method, make in made.items()}


def decode_speed(assets: Path, folder: str, rounds: int = 21) -> dict[str, float]:
    """Tokens per second of processor time at the target, greedy, one text; the median of turns.

    Weights do not matter for it, so that each model is trained for one step.
    """
    models, tokenizer = story_models(assets)
    rows = Dataset.from_dict({"text": texts(assets, "train")["bullets"][:16]})
    settings = TEXTS | {"max_steps": 1}
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    reward = PRTSFTTrainer(
        models["source"],
        PRTSFTConfig(folder, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=default_peft_config(models["source"]),
    ).reward
    prt = PRTForCausalLM.from_parts(models["target"], [reward], tokenizer=tokenizer).eval()
    tuner = SFTTrainer(
        story_models(assets)[0]["target"],
        SFTConfig(folder, **settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
    )
    tuner.train()
    compared = {
        "pretrained": models["target"].eval(),
        "a plain LoRA": tuner.model.eval(),
        "baked": bake(prt, rows, BakeConfig(folder, **settings), lora),
        "PRT": prt,
    }
    prompt = tokenizer("- ", return_tensors="pt")
    seconds = {name: [] for name in compared}
    for _ in range(rounds):
        for name, model in compared.items():
            start = time.process_time()
            model.generate(**prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)
            seconds[name].append(time.process_time() - start)
    return {name: 64 / statistics.median(values) for name, values in seconds.items()}


PAIRS: dict[str, Callable[[Path, int, str], dict[str, Callable[[], float]]]] = {"stories": stories, "cifar": cifar}


def table(results: dict) -> str:
    """Return Markdown: mean ± standard deviation over the seeds, and the share of the ported gain that is kept."""
    lines = []
    for name, runs in results["pairs"].items():
        digits, unit = (1, "top-1, %") if name == "cifar" else (3, "nats per token")
        lines += [f"**{name}**", "", f"| | seeds | at the target, {unit} | of the ported gain |", "|---|---|---|---|"]
        for method in dict.fromkeys(method for run in runs.values() for method in run):
            found = [run for run in runs.values() if method in run]
            values = [run[method] for run in found]
            spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
            share = ""
            if method != "pretrained":
                kept = [(run[method] - run["pretrained"]) / (run["PRT"] - run["pretrained"]) for run in found]
                share = f"{statistics.mean(kept):.0%}"
            lines.append(f"| {method} | {len(found)} | {statistics.mean(values):.{digits}f}{spread} | {share} |")
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
        if "tokens per second" not in results:
            with tempfile.TemporaryDirectory() as folder:
                results["tokens per second"] = decode_speed(Path(args.assets), folder)
        for name in PAIRS if args.pair == "all" else [args.pair]:
            runs = results["pairs"].setdefault(name, {})
            for seed in args.seeds:
                found = runs.setdefault(str(seed), {})
                with tempfile.TemporaryDirectory() as folder:
                    for method, measured in PAIRS[name](Path(args.assets), seed, folder).items():
                        if method not in found:
                            found[method] = measured()
                            args.output.write_text(json.dumps(results, indent=1) + "\n")
                            print(name, seed, method, found[method], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
