"""When is a LoRA reward as good as EFT with the same trained parameters? The figures behind prt_hf's defaults.

    python notebooks/lora_rewards.py --assets ASSETS --pair all --seeds 0 1 2 --output lora_rewards.json
    python notebooks/lora_rewards.py --output lora_rewards.json --table

Pairs: "prose" (Llamas that prose_models.py pretrains, once), "stories" (stories-old -> stories260K) and "cifar"
(ResNet-20 -> ResNet-32, mild Gaussian noise). A seed is the order of the data and the adapter's initial weights.
"""

import argparse
import copy
import json
import math
import os
import statistics
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel
from prose_models import MODELS, make_prose_models
from real_models import MILD, cifar10, resnets, story_models, text_rows
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from prt_hf import RewardModel, combine, default_peft_config, prt_loss
from prt_hf.evaluation.machine import hardware, versions
from prt_hf.networks.adapters import wrap

IGNORED = -100
MEASURES = {
    "prose": "nats per token, lower is better",
    "stories": "nats per token, lower is better",
    "cifar": "top-1 %, higher is better",
}
ORACLE = "fine-tuned target"


@dataclass(frozen=True)
class Recipe:
    """What is trained, and from where."""

    method: str = "prt"  # or "ft", fine-tuning: EFT at the target
    head: str = "lora"  # a language model's; "full": a copy of the pretrained head; "zero": the same, starting at 0
    alpha: int = 32
    lr: float = 0.0  # 0: the pair's
    entropy_coef: float = 0.0
    backbones: tuple[str, ...] = ("source",)  # one is drawn per step
    base: str = "source"  # what the adapter is on; "target", fine-tuned, is the oracle
    # How the first loss comes down to the backbone's. The share of "reward", "backbone" or "both" terms grows from
    # 0 (of both: 1/2) to 1 over the part `warm` of the steps; "head": LoRA's head starts at minus the head's best
    # approximation of its rank; "head-data": the best on the training rows.
    start: str = ""
    warm: float = 0.0


def configurations(pair: str) -> dict[str, tuple[Recipe, str]]:
    """Baselines and finalists, each reward with its rival: EFT with the same trained parameters."""
    oracle = {ORACLE: (Recipe("ft", base="target"), "")}
    if pair == "cifar":  # the classifier is trained whole, whatever alpha is
        found = {"EFT": (Recipe("ft"), ""), "PRT, alpha 32": (Recipe(), "EFT")}
        return found | {"PRT, alpha 128": (Recipe(alpha=128), "EFT")} | oracle
    found = {
        "EFT, LoRA head, alpha 32": (Recipe("ft"), ""),
        "EFT, LoRA head, alpha 64": (Recipe("ft", alpha=64), ""),
        "EFT, LoRA head, alpha 128": (Recipe("ft", alpha=128), ""),
        "EFT, full head": (Recipe("ft", head="full"), ""),
        "PRT, LoRA head, alpha 32": (Recipe(), "EFT, LoRA head, alpha 32"),
        "PRT, LoRA head, alpha 64": (Recipe(alpha=64), "EFT, LoRA head, alpha 64"),
        "PRT, LoRA head, alpha 128": (Recipe(alpha=128), "EFT, LoRA head, alpha 128"),
        "PRT, full head from zero": (Recipe(head="zero"), "EFT, full head"),
    }
    if pair == "prose":
        for label, backbones in (("two sources", ("source", "second")), ("the second source only", ("second",))):
            recipe = Recipe(alpha=128, backbones=backbones)
            found[f"PRT, LoRA head, alpha 128, {label}"] = (recipe, "EFT, LoRA head, alpha 128")
    return found | oracle


def starts(pair: str) -> dict[str, tuple[Recipe, str]]:
    """Starts with a lower first loss, for language models: `--starts`."""
    found = {f"PRT, alpha {alpha}": Recipe(alpha=alpha) for alpha in (64, 32)}
    for start in ("reward", "both", "backbone"):
        found[f"share of {start} grows, alpha 64"] = Recipe(alpha=64, start=start, warm=0.3)
    for start in ("head-data", "head"):
        found[f"{start}, alpha 64"] = Recipe(alpha=64, start=start)
    found["head, alpha 32"] = Recipe(alpha=32, start="head")
    return {} if pair == "cifar" else {label: (recipe, "") for label, recipe in found.items()}


@dataclass
class Pair:
    """Backbones, data, and what the backbones say about the data, computed once."""

    models: dict[str, nn.Module]
    tokenizer: object
    train: torch.Tensor
    train_labels: torch.Tensor  # aligned with the logits
    test: list[tuple[torch.Tensor, torch.Tensor]]
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    lr: float
    steps: int
    batch_size: int
    features: dict[str, torch.Tensor] = field(default_factory=dict)  # of the training rows: hidden states, or logits
    test_logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        self.is_text = self.train.dtype == torch.long
        with torch.no_grad():
            for name, model in self.models.items():
                model.eval().requires_grad_(False)
                parts = self.train.split(50)
                found = [model.model(part)[0] if self.is_text else model(part).logits for part in parts]
                self.features[name] = torch.cat(found)
                self.test_logits[name] = [model(inputs).logits for inputs, _ in self.test]

    def batch(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels; padding lies at the right, where a causal model does not look, and is cut."""
        inputs, labels = self.train[rows], self.train_labels[rows]
        if not self.is_text:
            return inputs, labels
        length = int((labels != IGNORED).sum(1).max())
        return inputs[:, :length], labels[:, :length]

    @torch.no_grad()
    def backbone_logits(self, name: str, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if not self.is_text:
            return self.features[name][rows]
        return self.models[name].lm_head(self.features[name][rows, : like.shape[1]])

    def mean_score(self, log_probs: list[torch.Tensor]) -> float:
        """Over all labels of the test batches."""
        kept = [labels != IGNORED for _, labels in self.test]
        parts = zip(log_probs, self.test, kept, strict=True)
        return torch.cat([self.score(found[at], labels[at]) for found, (_, labels), at in parts]).double().mean().item()


def make_network(pair: Pair, recipe: Recipe) -> tuple[nn.Module, RewardModel | None]:
    """`default_peft_config` with the recipe's head and alpha, on a backbone's weights."""
    model = pair.models[recipe.base]
    config: LoraConfig = default_peft_config(model, lora_alpha=recipe.alpha)
    if recipe.head != "lora":
        config.target_modules = set(config.target_modules) - {"lm_head"}
        config.modules_to_save = ["lm_head"]
    reward = None
    if recipe.method == "prt":
        init = "zero" if recipe.head == "zero" else "pretrained"
        reward = RewardModel.from_base(model, pair.tokenizer, config, reward_init=init)
    network = wrap(model, config) if reward is None else reward.network
    for module in network.modules():
        if isinstance(module, peft.tuners.lora.Linear | peft.tuners.lora.Conv2d):
            module.forward = types.MethodType(_merged_forward, module)
    if recipe.start.startswith("head"):
        _quiet_head(pair, network, recipe.start == "head-data")
    return network.eval(), reward  # no dropout here, and batch statistics stay the base's


@torch.no_grad()
def _quiet_head(pair: Pair, network: nn.Module, on_data: bool) -> None:
    """Start LoRA's head at minus the best approximation of the pretrained head of its rank."""
    head = network.get_output_embeddings()
    weight = head.base_layer.weight.double()
    root = torch.eye(weight.shape[1], dtype=torch.float64)  # of the covariance of the head's inputs
    if on_data:
        inputs = pair.features["source"][pair.train_labels != IGNORED].double()
        values, vectors = torch.linalg.eigh(inputs.T @ inputs / len(inputs))
        root = vectors @ torch.diag(values.clamp(min=1e-8).sqrt()) @ vectors.T
    left, sizes, right = torch.linalg.svd(weight @ root, full_matrices=False)
    rank = head.r["default"]
    half = (sizes[:rank] / head.scaling["default"]).sqrt()
    head.lora_B["default"].weight.copy_(-left[:, :rank] * half)
    head.lora_A["default"].weight.copy_(half[:, None] * (right[:rank] @ torch.linalg.inv(root)))


def _merged_forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """PEFT's function with one product instead of three: quicker where batches exceed widths."""
    base = layer.base_layer
    weight = base.weight + layer.get_delta_weight("default")
    if isinstance(base, nn.Conv2d):
        return F.conv2d(x, weight, base.bias, base.stride, base.padding)
    return F.linear(x, weight, base.bias)


def train(pair: Pair, recipe: Recipe, seed: int) -> tuple[nn.Module, RewardModel | None, list[float]]:
    """AdamW without weight decay, cosine schedule with 5 % warm-up, gradients clipped at 1. Also returns the losses."""
    set_seed(seed)
    network, reward = make_network(pair, recipe)
    trained = [value for value in network.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr or pair.lr, weight_decay=0.0)
    warmup = round(0.05 * pair.steps)

    def scale(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (pair.steps - warmup)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
    shuffle, draw = (torch.Generator().manual_seed(seed) for _ in range(2))
    order, losses = torch.empty(0, dtype=torch.long), []
    for step in range(pair.steps):
        if len(order) < pair.batch_size:
            order = torch.cat([order, torch.randperm(len(pair.train), generator=shuffle)])
        rows, order = order[: pair.batch_size], order[pair.batch_size :]
        inputs, labels = pair.batch(rows)
        logits = network(inputs).logits
        if reward is None:
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
        else:
            name = recipe.backbones[int(torch.randint(len(recipe.backbones), (), generator=draw))]
            backbone_logits = pair.backbone_logits(name, rows, labels)
            share = min(1.0, step / (recipe.warm * pair.steps)) if recipe.warm else 1.0
            share = (1 + share) / 2 if recipe.start == "both" else share
            backbone_logits = backbone_logits * (share if recipe.start in ("backbone", "both") else 1)
            logits = logits * (share if recipe.start in ("reward", "both") else 1)
            loss = prt_loss(backbone_logits, logits, labels, entropy_coef=recipe.entropy_coef)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
    return network, reward, losses


@torch.no_grad()
def figures(pair: Pair, network: nn.Module, recipe: Recipe) -> dict[str, float]:
    """Scores on the test rows: PRT's with both backbones, or fine-tuned on its own base and as EFT at the target."""
    logits = [network(inputs).logits for inputs, _ in pair.test]
    alone = pair.mean_score([part.log_softmax(-1) for part in logits])
    if recipe.base == "target":
        return {"target": alone}
    if recipe.method == "ft":
        shift = [new - old for new, old in zip(logits, pair.test_logits["source"], strict=True)]
        return {"source": alone, "target": pair.mean_score(list(map(combine, pair.test_logits["target"], shift)))}
    found = {name: pair.mean_score(list(map(combine, pair.test_logits[name], logits))) for name in ("source", "target")}
    return found | {"reward only": alone}


@torch.no_grad()
def check_artefact(pair: Pair, reward: RewardModel) -> None:
    """What PEFT alone loads from the reward's files is the reward."""
    inputs = pair.test[0][0][:4]
    with tempfile.TemporaryDirectory() as folder:
        reward.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(pair.models["source"]), folder).eval()
    torch.testing.assert_close(loaded(inputs).logits, reward.network(inputs).logits, rtol=1e-3, atol=1e-3)


def nll(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return -log_probs.gather(-1, labels[:, None])[:, 0]


def hits(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return 100.0 * (log_probs.argmax(-1) == labels)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and each position's next token."""
    ids = nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True)
    following = [torch.tensor([*row[1:], IGNORED]) for row in rows]
    return ids, nn.utils.rnn.pad_sequence(following, batch_first=True, padding_value=IGNORED)


def text_pair(models: dict, tokenizer, train_rows: list, test_rows: list, steps: int, batch_size: int) -> Pair:
    test = [padded(test_rows[i : i + 25]) for i in range(0, len(test_rows), 25)]
    return Pair(models, tokenizer, *padded(train_rows), test, nll, lr=3e-3, steps=steps, batch_size=batch_size)


def prose_pair(work: Path) -> Pair:
    """Models and rows of prose_models.py, with a third model as a second source; made once, with seed 0."""
    folder = work / "prose"
    if not (folder / "rows.json").exists():
        make_prose_models(folder)
    rows = json.loads((folder / "rows.json").read_text())
    models = {name: AutoModelForCausalLM.from_pretrained(folder / f"text-{name}") for name in MODELS}
    tokenizer = AutoTokenizer.from_pretrained(folder / "text-source")
    return text_pair(models, tokenizer, rows["train"], rows["test"], steps=250, batch_size=8)


def stories_pair(assets: Path) -> Pair:
    models, tokenizer = story_models(assets)
    sets = [text_rows(assets, tokenizer, f"bullet_stories_{split}") for split in ("train", "test")]
    return text_pair(models, tokenizer, *sets, steps=300, batch_size=16)


def cifar_pair(assets: Path) -> Pair:
    train, test = (cifar10(assets, split, MILD) for split in ("train", "test"))
    test = list(zip(*(part.split(250) for part in test), strict=True))
    return Pair(resnets(assets), None, *train, test, hits, lr=3e-3, steps=234, batch_size=128)


def measure(
    names: list[str], seeds: list[int], assets: Path, work: Path, output: Path, chosen: Callable = configurations
) -> dict:
    """Run what the output does not hold yet; it is written after every run."""
    results = json.loads(output.read_text()) if output.exists() else {"pairs": {}}
    results |= {"machine": hardware(), "versions": versions()}
    for name in names:
        pair = prose_pair(work) if name == "prose" else {"stories": stories_pair, "cifar": cifar_pair}[name](assets)
        entry = results["pairs"].setdefault(name, {"runs": []})
        entry |= {"steps": pair.steps, "batch_size": pair.batch_size, "learning_rate": pair.lr}
        entry |= {"train": len(pair.train), "test": sum(len(inputs) for inputs, _ in pair.test)}
        said = pair.test_logits.items()
        entry["pretrained"] = {key: pair.mean_score([part.log_softmax(-1) for part in parts]) for key, parts in said}
        for run in entry["runs"]:  # by earlier versions, without the newest settings
            run["recipe"] = asdict(Recipe()) | run["recipe"]
        for label, (recipe, rival) in chosen(name).items():
            for seed in seeds:
                key = {"label": label, "rival": rival, "seed": seed, "recipe": json.loads(json.dumps(asdict(recipe)))}
                if any(all(done[part] == key[part] for part in key) for done in entry["runs"]):
                    continue
                start = time.perf_counter()
                network, reward, losses = train(pair, recipe, seed)
                count = sum(value.numel() for value in network.parameters() if value.requires_grad)
                done = key | {"figures": figures(pair, network, recipe), "parameters": count}
                done["losses"] = {"first": losses[0], "first tenth": statistics.mean(losses[: len(losses) // 10])}
                entry["runs"].append(done | {"seconds": round(time.perf_counter() - start, 1)})
                if reward is not None:
                    check_artefact(pair, reward)
                output.write_text(json.dumps(results, indent=1) + "\n")
                print(name, label, seed, done["figures"], entry["runs"][-1]["seconds"], flush=True)
    return results


def table(results: dict) -> str:
    """Markdown: mean ± standard deviation over seeds; `over EFT` is paired by seed, and + where PRT is better."""
    lines = []
    for name, entry in results["pairs"].items():
        digits, sign = (1, 1) if name == "cifar" else (3, -1)
        runs: dict[str, dict[int, dict]] = {}
        for done in entry["runs"]:
            runs.setdefault(done["label"], {})[done["seed"]] = done
        most = max(map(len, runs.values()))

        def cell(values: list[float], form: str, of: int = most) -> str:
            if len(values) < 2:
                return f"{values[0]:{form}} (one seed)" if values else ""
            seeds = "" if len(values) == of else f" ({len(values)} seeds)"
            return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form.removeprefix('+')}}{seeds}"

        lines += [f"**{name}** ({MEASURES[name]}; {entry['steps']} steps)", ""]
        lines += [
            "| | trained | source | target | reward only | source, over EFT | target, over EFT | gain recovered |"
        ]
        before = entry["pretrained"]
        lines += [
            "|---" * 8 + "|",
            f"| Pretrained | | {before['source']:.{digits}f} | {before['target']:.{digits}f} |||||",
        ]
        best = [one["figures"]["target"] for one in runs.get(ORACLE, {}).values()]
        for label, by_seed in sorted(runs.items(), key=lambda item: item[0] == ORACLE):
            done = by_seed.values()
            row = [label, f"{next(iter(done))['parameters'] / 1000:.0f} k"]
            for key in ("source", "target", "reward only"):
                row.append(cell([one["figures"][key] for one in done if key in one["figures"]], f".{digits}f"))
            rival = runs.get(next(iter(done))["rival"], {})
            both = [(one["figures"], rival[seed]["figures"]) for seed, one in by_seed.items() if seed in rival]
            for key in ("source", "target"):
                row.append(cell([sign * (ours[key] - theirs[key]) for ours, theirs in both], f"+.{digits}f"))
            gains = []
            if best and label != ORACLE:
                whole = statistics.mean(best) - before["target"]
                gains = [(one["figures"]["target"] - before["target"]) / whole for one in done]
            lines.append(f"| {' | '.join([*row, cell(gains, '.0%')])} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=os.environ.get("PRT_ASSETS"), help="or PRT_ASSETS")
    parser.add_argument("--pair", choices=[*MEASURES, "all"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("lora_rewards.json"), help="continued where it exists")
    parser.add_argument("--work", type=Path, default=Path("lora_rewards"), help="where the prose models lie, or will")
    parser.add_argument("--table", action="store_true", help="only print the table of the output")
    parser.add_argument("--starts", action="store_true", help="study starts with a lower first loss instead")
    args = parser.parse_args()
    names = list(MEASURES) if args.pair == "all" else [args.pair]
    if args.table:
        print(table(json.loads(args.output.read_text())))
        return
    if args.assets is None and names != ["prose"]:
        parser.error("--assets or PRT_ASSETS is needed")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    chosen = starts if args.starts else configurations
    print(table(measure(names, args.seeds, args.assets and Path(args.assets), args.work, args.output, chosen)))


if __name__ == "__main__":
    main()
