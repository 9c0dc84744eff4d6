"""The paper's experiments on models that a laptop can tune. What they say: paper.md.

    python notebooks/paper.py --assets ASSETS --output notebooks/paper.json       # runs what is missing
    python notebooks/paper.py --output notebooks/paper.json --table               # prints the tables
    python notebooks/paper.py --output notebooks/paper.json --figures notebooks/paper

A seed is the order of the data and the initial weights of adapters; of "architectures" also the split.
"""

import argparse
import copy
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
from datasets import Array3D, Dataset, Features, Value, concatenate_datasets
from paper_tables import PLACES, draw_all, tables
from real_models import MILD, STRONG, cifar10, resnets, story_models, text_rows
from torch import nn
from transformers import LogitsProcessorList, PreTrainedModel, default_data_collator, set_seed

from prt_hf import EFTLogitsProcessor, PRTConfig, PRTLogitsProcessor, PRTTrainer, RewardModel, default_peft_config
from prt_hf.demo.images import ImageSettings, turned_digits
from prt_hf.demo.training import Steps, fine_tune
from prt_hf.evaluation import portability_report
from prt_hf.evaluation.machine import hardware, versions
from prt_hf.hub.folder import replace_file
from prt_hf.training.collators import TokenCollator

IMAGE_STEPS, LATER_STEPS = Steps(320, 1e-3, 64), Steps(80, 3e-4, 64)
TEXT_STEPS = Steps(300, 3e-3, 16)
PROMPTS = ("- Once upon a time", "- Tom and Lily", "- The little dog")


@dataclass(frozen=True)
class Run:
    """One line of work: what is trained and measured together, and saved when it is done."""

    experiment: str
    case: str
    seed: int
    measure: Callable[[Path, int], dict]

    @property
    def key(self) -> dict:
        return {"experiment": self.experiment, "case": self.case, "seed": self.seed}


def runs(seeds: list[int]) -> Iterator[Run]:
    """All of them, what matters most first."""
    first, *others = seeds

    def mild(seed: int) -> Run:
        return Run("noise", "mild", seed, lambda assets, seed: noise(assets, seed, MILD, oracle=seed == first))

    def digits(seed: int) -> Iterator[Run]:
        for case in ("ViT to ConvNeXt", "ConvNeXt to ViT"):
            yield Run("architectures", case, seed, lambda _, seed, case=case: architectures(case, seed))

    def texts(case: str, seed: int) -> Run:
        oracle = case == "bullet_stories" and seed == first
        return Run("upscaling", case, seed, lambda assets, seed: upscaling(assets, seed, case, oracle))

    def sweep(alpha: float) -> Run:
        return Run("entropy", f"{alpha:g}", first, lambda assets, seed: entropy(assets, seed, alpha))

    yield mild(first)
    yield from digits(first)
    yield texts("bullet_stories", first)
    yield from map(mild, others[:1])
    yield Run("shift", "", first, shift)
    yield sweep(1e-1)
    yield texts("gsm8k", first)
    for seed in others:
        yield from digits(seed)
    yield Run("noise", "strong", first, lambda assets, seed: noise(assets, seed, STRONG, oracle=False))
    yield from map(mild, others[1:])
    yield from (texts("bullet_stories", seed) for seed in others)
    yield from map(sweep, (0.5, 1e-2))


def noise(assets: Path, seed: int, level: float, oracle: bool) -> dict:
    """ResNet-20 to ResNet-32 on noisy images: all methods (Tables 4 and 7)."""
    models = backbones(assets)
    train, test = images(assets, "train", level), images(assets, "test", level)
    reward = tune(models["source"], train, IMAGE_STEPS, seed)
    rivals = [fit_plainly(models[place], train, IMAGE_STEPS, seed) for place in PLACES[: 1 + oracle]]
    return compared(reward, models, test, *rivals)


def shift(assets: Path, seed: int) -> dict:
    """A reward tuned on clean images, tested on clean and noisy ones, and tuned on for a few steps (Table 5)."""
    models = backbones(assets)
    reward = tune(models["source"], images(assets, "train", 0.0), IMAGE_STEPS, seed)
    found = {"clean": compared(reward, models, images(assets, "test", 0.0))}
    for name, level in (("mild noise", MILD), ("strong noise", STRONG)):
        train, test = images(assets, "train", level), images(assets, "test", level)
        found[name] = compared(reward, models, test)
        later = tune(copy.deepcopy(reward), train, LATER_STEPS, seed, backbone=models["source"])
        found[f"{name}, tuned on"] = compared(later, models, test)
    return found


def entropy(assets: Path, seed: int, alpha: float) -> dict:
    """The reward of `noise` with entropy maximisation (Eq. 12, Fig. 6 and 7)."""
    models = backbones(assets)
    reward = tune(models["source"], images(assets, "train", MILD), IMAGE_STEPS, seed, entropy_coef=alpha)
    return compared(reward, models, images(assets, "test", MILD))


def upscaling(assets: Path, seed: int, data: str, oracle: bool) -> dict:
    """stories-old to stories260K: adapters with the head, and what all methods write after the same prompts."""
    models, tokenizer = story_models(assets)
    train, test = (
        Dataset.from_dict({"input_ids": text_rows(assets, tokenizer, f"{data}_{split}")}) for split in ("train", "test")
    )
    test = test.select(range(min(200, len(test))))
    reward = tune(models["source"], train, TEXT_STEPS, seed, adapter=True, processing_class=tokenizer)
    collator = TokenCollator(tokenizer.pad_token_id)
    rivals = [
        fit_plainly(models[place], train, TEXT_STEPS, seed, collator, adapter=True) for place in PLACES[: 1 + oracle]
    ]
    found = compared(reward, models, test, *rivals, batch_size=10)
    if oracle:
        found["texts"] = [written(prompt, models, tokenizer, reward, *rivals) for prompt in PROMPTS]
    return found


def architectures(case: str, seed: int) -> dict:
    """A ViT and a ConvNeXt, both pretrained here on the same 900 clean digits, tuned on turned and noisy ones."""
    settings = ImageSettings(old={"hidden_size": 64, "num_hidden_layers": 4}, old_images=900)
    with tempfile.TemporaryDirectory() as folder:
        task = turned_digits(Path(folder), settings, seed)
    train, test = (
        as_dataset(*(np.stack([row[name].numpy() for row in rows]) for name in ("pixel_values", "labels")))
        for rows in (task.train, task.test)
    )
    pair = (task.source, task.target) if case == "ViT to ConvNeXt" else (task.target, task.source)
    models = dict(zip(PLACES, pair, strict=True))
    reward = tune(models["source"], train, settings.tuning, seed)
    rivals = [fit_plainly(model, train, settings.tuning, seed) for model in models.values()]
    return compared(reward, models, test, *rivals)


def tune(
    model: PreTrainedModel | RewardModel,
    rows: Dataset,
    steps: Steps,
    seed: int,
    *,
    adapter: bool = False,
    entropy_coef: float = 0.0,
    **kwargs,
) -> RewardModel:
    """A reward, by `PRTTrainer`; what the backbone says of the rows is kept on disk for the runs that follow."""
    set_seed(seed)
    if adapter:
        kwargs["peft_config"] = default_peft_config(model)
    with tempfile.TemporaryDirectory() as folder:
        args = PRTConfig(
            folder,
            max_steps=steps.steps,
            learning_rate=steps.learning_rate,
            per_device_train_batch_size=steps.batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=round(0.05 * steps.steps),
            seed=seed,
            entropy_coef=entropy_coef,
            precompute_backbone=True,
            report_to="none",
            save_strategy="no",
            logging_steps=50,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        network = model if adapter or isinstance(model, RewardModel) else copy.deepcopy(model)
        trainer = PRTTrainer(network, args, train_dataset=rows, **kwargs)
        trainer.train()
    trainer.reward.network.eval()
    return trainer.reward


def fit_plainly(
    model: PreTrainedModel,
    rows: Dataset,
    steps: Steps,
    seed: int,
    collator=default_data_collator,
    adapter: bool = False,
) -> nn.Module:
    """By the Trainer, with the model's own loss: EFT's tuned source, or the oracle."""
    return fine_tune(model, rows, steps, seed, "fine-tuning", collator, adapter=adapter)


def compared(
    reward: RewardModel,
    models: dict[str, PreTrainedModel],
    test: Dataset,
    eft: nn.Module | None = None,
    oracle: nn.Module | None = None,
    batch_size: int = 250,
) -> dict:
    """Of a portability report what the tables need: figures with 95 % intervals, and those of Prop. 3.2."""
    report = portability_report(
        reward,
        {"target": models["target"]},
        test,
        eft=eft,
        finetuned={} if oracle is None else {"target": oracle},
        source=models["source"],
        batch_size=batch_size,
    )
    target = report.targets["target"]
    found = {
        name: {
            method: {"nll": list(f.nll), "accuracy": list(f.accuracy), "entropy": f.entropy}
            for method, f in place.figures.items()
        }
        for name, place in (("source", report.source), ("target", target))
    }
    measured = target.portability
    return found | {"eps": measured.eps, "c_mean": measured.c_mean, "c_max": measured.c_max, "rows": report.rows}


@torch.no_grad()
def written(prompt: str, models: dict, tokenizer, reward: RewardModel, eft, oracle) -> dict[str, str]:
    """Greedy continuations by every method, at the target unless the name says otherwise."""
    inputs = tokenizer(prompt, return_tensors="pt")

    def by(model, processor=None) -> str:
        processors = LogitsProcessorList([] if processor is None else [processor])
        output = model.generate(**inputs, logits_processor=processors, max_new_tokens=100, do_sample=False)
        return tokenizer.decode(output[0], skip_special_tokens=True)

    return {
        "prompt": prompt,
        "pretrained": by(models["target"]),
        "eft": by(models["target"], EFTLogitsProcessor(eft, tokenizer)),
        "prt": by(models["target"], PRTLogitsProcessor(reward, tokenizer)),
        "prt at the source": by(models["source"], PRTLogitsProcessor(reward, tokenizer)),
        "finetuned": by(oracle),
    }


@cache
def backbones(assets: Path) -> dict[str, PreTrainedModel]:
    """With channels last: a quarter faster on a CPU."""
    return {name: model.to(memory_format=torch.channels_last) for name, model in resnets(assets).items()}


@cache
def images(assets: Path, split: str, level: float) -> Dataset:
    return as_dataset(*(part.numpy() for part in cifar10(assets, split, level)))


def as_dataset(pixels: np.ndarray, labels: np.ndarray) -> Dataset:
    features = Features({"pixel_values": Array3D(pixels.shape[1:], "float32"), "label": Value("int64")})
    parts = [
        Dataset.from_dict({"pixel_values": pixels[i : i + 1000], "label": labels[i : i + 1000]}, features)
        for i in range(0, len(pixels), 1000)
    ]
    return concatenate_datasets(parts).with_format("torch", columns=["pixel_values"], output_all_columns=True)


def measure(names: list[str], seeds: list[int], assets: Path, output: Path) -> dict:
    """Run what the output does not hold yet; it is written, whole, after every run."""
    results = json.loads(output.read_text()) if output.exists() else {"runs": []}
    results |= {"machine": hardware(), "versions": versions()}
    results["steps"] = {"images": asdict(IMAGE_STEPS), "tuned on": asdict(LATER_STEPS), "text": asdict(TEXT_STEPS)}
    results["steps"]["digits"] = asdict(ImageSettings().tuning)
    for run in runs(seeds):
        known = any(all(done[name] == value for name, value in run.key.items()) for done in results["runs"])
        if known or run.experiment not in names:
            continue
        start = time.perf_counter()
        figures = run.measure(assets, run.seed)
        results["runs"].append(run.key | {"figures": figures, "seconds": round(time.perf_counter() - start, 1)})
        replace_file(output, json.dumps(results, indent=1) + "\n")
        print(run.experiment, run.case, run.seed, results["runs"][-1]["seconds"], flush=True)
    return results


def main() -> None:
    names = list(dict.fromkeys(run.experiment for run in runs([0])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("PRT_ASSETS"), help="or PRT_ASSETS")
    parser.add_argument("--experiment", choices=[*names, "all"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("paper.json"), help="continued where it exists")
    parser.add_argument("--table", action="store_true", help="only print the tables of the output")
    parser.add_argument("--figures", type=Path, help="only draw the charts of the output, into this folder")
    args = parser.parse_args()
    if args.table or args.figures:
        results = json.loads(args.output.read_text())
        if args.figures:
            draw_all(results, args.figures)
        if args.table:
            print(tables(results))
        return
    chosen = names if args.experiment == "all" else [args.experiment]
    if args.assets is None and chosen != ["architectures"]:
        parser.error("--assets or PRT_ASSETS is needed")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    print(tables(measure(chosen, args.seeds, args.assets and Path(args.assets), args.output)))


if __name__ == "__main__":
    main()
