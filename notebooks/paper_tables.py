"""The tables and charts of paper.json."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from prt_hf.evaluation.figure import Bar, draw
from prt_hf.evaluation.results import markdown_table
from prt_hf.hub.card import PAPER_METHODS as METHODS
from prt_hf.hub.folder import replace_file

PLACES = ("source", "target")
CASES = {
    ("noise", "mild"): "Mild noise, ResNet-20 to ResNet-32: top-1 %",
    ("noise", "strong"): "Strong noise, ResNet-20 to ResNet-32: top-1 %",
    ("upscaling", "bullet_stories"): "Bullet stories, stories-old to stories260K: nats per token, lower is better",
    ("upscaling", "gsm8k"): "GSM8K, stories-old to stories260K: nats per token, lower is better",
    ("architectures", "ViT to ConvNeXt"): "Turned digits, ViT to ConvNeXt: top-1 %",
    ("architectures", "ConvNeXt to ViT"): "Turned digits, ConvNeXt to ViT: top-1 %",
}
STAGES = {
    "clean": "tuned and tested clean",
    "mild noise": "the same reward, mild noise",
    "mild noise, tuned on": "a few more steps on mild noise",
    "strong noise": "the same reward, strong noise",
    "strong noise, tuned on": "a few more steps on strong noise",
}


def figures(results: dict, experiment: str, case: str) -> list[dict]:
    """Of each seed, in their order."""
    found = [run for run in results["runs"] if (run["experiment"], run["case"]) == (experiment, case)]
    return [run["figures"] for run in sorted(found, key=lambda run: run["seed"])]


def value(one: dict, place: str, method: str, experiment: str) -> list[float]:
    """What is compared, and its 95 % interval: top-1 %, of texts nats per token."""
    if experiment == "upscaling":
        return one[place][method]["nll"]
    return [100 * each for each in one[place][method]["accuracy"]]


def over_seeds(all_seeds: list[dict], place: str, method: str, experiment: str) -> list[float]:
    """Of the seeds that have it: the fine-tuned target is of the first alone."""
    return [value(one, place, method, experiment)[0] for one in all_seeds if method in one[place]]


def alphas(results: dict) -> dict[float, dict]:
    """entropy_coef -> figures of the first seed; those of 0 are of the noise experiment."""
    found = {float(run["case"]): run["figures"] for run in results["runs"] if run["experiment"] == "entropy"}
    return {0.0: figures(results, "noise", "mild")[0]} | dict(sorted(found.items()))


def tables(results: dict) -> str:
    """Markdown."""
    parts = [_methods_table(results, *case) for case in CASES if figures(results, *case)]
    parts += [_distances(results), _shift(results), _entropy(results), _samples(results)]
    return "\n\n".join(parts) + "\n"


def draw_all(results: dict, folder: Path) -> None:
    """The paper's bar chart for every pair of models, and a line chart of entropy_coef."""
    for name, experiment, label, models in (
        ("noise", "noise", "top-1 %", {"mild": ("ResNet-20", "ResNet-32"), "strong": ("ResNet-20", "ResNet-32")}),
        (
            "upscaling",
            "upscaling",
            "negative log-likelihood per token\n(nats, lower is better)",
            {"bullet_stories": ("stories-old", "stories260K"), "gsm8k": ("stories-old", "stories260K")},
        ),
        (
            "architectures",
            "architectures",
            "top-1 %",
            {"ViT to ConvNeXt": ("ViT", "ConvNeXt"), "ConvNeXt to ViT": ("ConvNeXt", "ViT")},
        ),
    ):
        groups = [
            (
                f"{case.replace('_', ' ')}:\n{model} ({place})",
                _bars(figures(results, experiment, case), place, experiment),
            )
            for case, pair in models.items()
            if figures(results, experiment, case)
            for place, model in zip(PLACES, pair, strict=True)
        ]
        methods = {method: name for method, name in METHODS.items() if method != "reward_only"}
        _save(folder / f"{name}.png", lambda path, of=(groups, methods, label): draw(*of, path))
    _save(folder / "entropy.png", lambda path: _draw_entropy(alphas(results), path))


def _save(path: Path, draw_into: Callable[[Path], None]) -> None:
    def write(staged: Path) -> None:
        draw_into(staged)
        Image.open(staged).convert("RGB").quantize(64).save(staged, "PNG", optimize=True)  # a third of the size

    replace_file(path, write)


def _bars(all_seeds: list[dict], place: str, experiment: str) -> dict[str, Bar]:
    """Means over seeds, of the ends of the intervals as well."""
    found = {}
    for method in all_seeds[0][place]:
        estimates = [value(one, place, method, experiment) for one in all_seeds if method in one[place]]
        found[method] = Bar(*(statistics.mean(part) for part in zip(*estimates, strict=True)))
    return found


def _methods_table(results: dict, experiment: str, case: str) -> str:
    all_seeds = figures(results, experiment, case)
    digits = 3 if experiment == "upscaling" else 1
    head = ["", *(f"{place}, first seed" for place in PLACES)]
    if len(all_seeds) > 1:
        head += [f"{place}, {len(all_seeds)} seeds" for place in PLACES]
    rows = []
    for method in METHODS:
        row = [METHODS[method]]
        for place in PLACES:
            if method in all_seeds[0][place]:
                middle, low, high = value(all_seeds[0], place, method, experiment)
                row.append(f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
            else:
                row.append("")
        if len(all_seeds) > 1:
            row += [_spread(over_seeds(all_seeds, place, method, experiment), digits) for place in PLACES]
        rows.append(row)
    return markdown_table(f"{CASES[experiment, case]} ({all_seeds[0]['rows']} rows)", head, rows)


def _distances(results: dict) -> str:
    rows = []
    for (experiment, case), title in CASES.items():
        if not (all_seeds := figures(results, experiment, case)):
            continue
        row = [title.partition(":")[0]]
        row += [f"{statistics.mean(one[name] for one in all_seeds):.3g}" for name in ("eps", "c_mean", "c_max")]
        for place, method in (("source", "reward_only"), ("source", "prt"), ("target", "prt")):
            row.append(f"{statistics.mean(one[place][method]['entropy'] for one in all_seeds):.3f}")
        with_oracle = [one for one in all_seeds if "finetuned" in one["target"]]
        gain = ""
        if with_oracle:
            bare, prt, tuned = (
                statistics.mean(over_seeds(with_oracle, "target", method, experiment))
                for method in ("pretrained", "prt", "finetuned")
            )
            gain = f"{(prt - bare) / (tuned - bare):.0%}"
        rows.append([*row, gain])
    entropies = ["entropy of the reward", "of PRT at the source", "of PRT at the target"]
    head = ["", "eps", "C, mean", "C, largest", *entropies, "gain recovered"]
    return markdown_table("eps and C of Prop. 3.2, entropies (nats); means over seeds", head, rows)


def _shift(results: dict) -> str:
    all_seeds = figures(results, "shift", "")
    rows = []
    for stage, title in STAGES.items():
        row = [title]
        for method in ("prt", "pretrained"):
            for place in PLACES:
                row.append(_spread(over_seeds([one[stage] for one in all_seeds], place, method, "shift"), 1))
        row.append(_spread(over_seeds([one[stage] for one in all_seeds], "source", "reward_only", "shift"), 1))
        rows.append(row)
    head = ["", "PRT, source", "PRT, target", "pretrained source", "pretrained target", METHODS["reward_only"]]
    return markdown_table(f"Table 5: a reward under another shift: top-1 %, {_count(all_seeds)}", head, rows)


def _entropy(results: dict) -> str:
    rows = []
    for alpha, one in alphas(results).items():
        cells = [value(one, place, "prt", "entropy")[0] for place in PLACES]
        cells.append(value(one, "source", "reward_only", "entropy")[0])
        entropy = one["source"]["reward_only"]["entropy"]
        rows.append([f"{alpha:g}", *(f"{cell:.1f}" for cell in cells), f"{entropy:.3f}", f"{one['c_mean']:.3g}"])
    head = ["entropy_coef", "PRT, source", "PRT, target", METHODS["reward_only"], "entropy of the reward", "C, mean"]
    return markdown_table("Entropy maximisation, mild noise: top-1 %, nats, one seed", head, rows)


def _samples(results: dict) -> str:
    lines = ["## Greedy texts, first seed, cut at 100 tokens"]
    names = METHODS | {"prt at the source": "PRT at the source"}
    for texts in figures(results, "upscaling", "bullet_stories")[0]["texts"]:
        lines += ["", f"`{texts['prompt']}`", "", "```"]
        lines += [f"[{names[method]}]\n{text.strip()}" for method, text in texts.items() if method != "prompt"]
        lines.append("```")
    return "\n".join(lines)


def _spread(values: Sequence[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else ""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _count(all_seeds: list[dict]) -> str:
    return "one seed" if len(all_seeds) == 1 else f"{len(all_seeds)} seeds"


def _draw_entropy(by_alpha: dict[float, dict], path: Path) -> None:
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    ticks = range(len(by_alpha))
    for name, place, method, colour in (
        ("PRT, target", "target", "prt", "#1f4e79"),
        ("PRT, source", "source", "prt", "#6f9fc8"),
        ("reward only", "source", "reward_only", "#b03a2e"),
    ):
        parts = [value(one, place, method, "entropy") for one in by_alpha.values()]
        middle, low, high = zip(*parts, strict=True)
        ends = [[m - x for m, x in zip(middle, low, strict=True)], [x - m for m, x in zip(middle, high, strict=True)]]
        left.errorbar(ticks, middle, yerr=ends, marker="o", capsize=3, color=colour, label=name)
    right.plot(ticks, [one["source"]["reward_only"]["entropy"] for one in by_alpha.values()], "o-", color="#b03a2e")
    for axes, label in ((left, "top-1 %"), (right, "entropy of the reward, nats")):
        axes.set_xticks(ticks, [f"{alpha:g}" for alpha in by_alpha])
        axes.set_xlabel("entropy_coef (alpha)")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110, format="png")
