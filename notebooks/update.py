"""An update of the same base: is the old LoRA, laid on it, better than a reward? Figures of the guide to evaluation.

    python notebooks/update.py --assets ASSETS --seeds 0 1 2 --output update.json      # continued where it exists
    python notebooks/update.py --output update.json --table

The old model is stories260K. Its updates go on pretraining, on grade-school problems and stories, for a few and for
many steps. A LoRA and a reward are tuned on bullet lists with the old model, for as many steps each.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from bake import TEXTS
from datasets import Dataset
from existing_loras import texts
from peft import LoraConfig
from real_models import story_models
from transformers import PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

from prt_hf import PRTSFTConfig, PRTSFTTrainer, default_peft_config
from prt_hf.evaluation import portability_report
from prt_hf.evaluation.machine import hardware, versions

STEPS = {"30 more steps": 30, "300 more steps": 300}
METHODS = ("pretrained", "eft", "prt", "transplanted", "few_shot")


def old_model(assets: Path) -> PreTrainedModel:
    return story_models(assets)[0]["target"]


def updated(assets: Path, steps: int, folder: str) -> PreTrainedModel:
    """The old model after more pretraining; the same one for all seeds."""
    lines = (assets / "text" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]
    rows = problems + texts(assets, "train")["stories"]
    random.Random(0).shuffle(rows)
    set_seed(0)
    settings = TEXTS | {"learning_rate": 2e-4, "max_steps": steps}
    trainer = SFTTrainer(
        old_model(assets),
        SFTConfig(folder, **settings),
        train_dataset=Dataset.from_dict({"text": rows}),
        processing_class=story_models(assets)[1],
    )
    trainer.train()
    # The trainer's own forward pass stays behind.
    model = old_model(assets)
    model.load_state_dict(trainer.model.state_dict())
    return model.eval()


def measured(assets: Path, seed: int, updates: dict[str, PreTrainedModel], folder: str) -> dict[str, dict[str, float]]:
    """Nats per token of 50 held-out bullet lists, at the old model and at each update, and KL(old, update)."""
    tokenizer = story_models(assets)[1]
    rows, test = (Dataset.from_dict({"text": texts(assets, split)["bullets"]}) for split in ("train", "test"))
    common = {"train_dataset": rows, "processing_class": tokenizer}
    settings = TEXTS | {"seed": seed, "max_steps": 150}
    set_seed(seed)
    source = old_model(assets)
    args = PRTSFTConfig(folder, **settings)
    trainer = PRTSFTTrainer(source, args, peft_config=default_peft_config(source), **common)
    trainer.train()
    set_seed(seed)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    tuner = SFTTrainer(old_model(assets), SFTConfig(folder, **settings), peft_config=lora, **common)
    tuner.train()
    tuner.save_model(f"{folder}/lora")
    example = Dataset.from_dict({"text": [min(rows["text"], key=len)]})  # so that a long row fits behind it
    kwargs = {"eft": f"{folder}/lora", "few_shot": example, "length": 256, "reward_name": "bullets"}
    report = portability_report(trainer.reward, updates, test, METHODS, **kwargs)
    found = {"the old model": {method: each.nll.value for method, each in report.source.figures.items()}}
    for name, place in report.targets.items():
        found[name] = {method: each.nll.value for method, each in place.figures.items()}
        found[name]["eps"] = place.portability.eps
    return found


def table(results: dict) -> str:
    """Return Markdown: mean ± standard deviation over the seeds."""
    heads = {
        "pretrained": "bare",
        "few_shot": "one example",
        "transplanted": "transplanted LoRA",
        "eft": "EFT",
        "prt": "PRT",
    }
    lines = [f"| | KL(old, new) | {' | '.join(heads.values())} |", "|---|---|---|---|---|---|---|"]
    found = list(results["seeds"].values())
    for place in found[0]:
        cells = [f"{found[0][place]['eps']:.3f}" if "eps" in found[0][place] else ""]
        for method in heads:
            values = [run[place][method] for run in found if method in run[place]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(set(values)) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        lines.append(f"| {place} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("PRT_ASSETS"), help="or PRT_ASSETS")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("update.json"), help="continued where it exists")
    parser.add_argument("--table", action="store_true", help="only print the table of the output")
    args = parser.parse_args()
    results = json.loads(args.output.read_text()) if args.output.exists() else {"seeds": {}}
    if not args.table:
        torch.set_num_threads(1)
        transformers.utils.logging.set_verbosity_error()
        warnings.filterwarnings("ignore")
        results |= {"machine": hardware(), "versions": versions()}
        with tempfile.TemporaryDirectory() as folder:
            updates = {name: updated(Path(args.assets), steps, folder) for name, steps in STEPS.items()}
            for seed in args.seeds:
                if str(seed) not in results["seeds"]:
                    results["seeds"][str(seed)] = measured(Path(args.assets), seed, updates, folder)
                    args.output.write_text(json.dumps(results, indent=1) + "\n")
                    print(seed, results["seeds"][str(seed)], flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
