"""Draw the idea of Portable Reward Tuning, the picture in the README.

    python notebooks/idea.py        # writes notebooks/idea.svg

The models' probabilities and the reward are invented; `combine` computes what they give together.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from prt_hf import combine

PROMPT = "Q: What is the capital of Australia? A:"
WORDS = ("Well, ...", "Sydney", "Canberra")
REWARD = (-2.5, 1.0, 1.0)  # answer at once
STEPS = {  # title: which model, its probabilities, colour, about the reward, about the result
    "1. Tune once": ("on an", "old", (0.70, 0.18, 0.12), "#7c8896", "reward r, trained", "answers at once: wrong"),
    "2. Add it": ("to a", "new", (0.60, 0.08, 0.32), "#1f4e79", "same r, not trained", "answers at once: right"),
}
REWARD_COLOUR, RESULT_COLOUR = "#c9722a", "#3f7d58"


def together(pretrained: Sequence[float]) -> list[float]:
    """Return the probabilities of a model with the reward."""
    return combine(torch.tensor(pretrained).log(), torch.tensor(REWARD)).exp().tolist()


def draw(path: Path) -> None:
    """Write the picture."""
    figure = Figure(figsize=(10.4, 4.6))
    grid = figure.add_gridspec(2, 3, left=0.24, right=0.99, top=0.8, bottom=0.12, wspace=0.3, hspace=0.75)
    figure.text(0.615, 0.955, f"Next word after “{PROMPT}”", ha="center", va="center", fontsize=12, style="italic")
    for row, (title, (where, age, pretrained, colour, about_reward, about_result)) in enumerate(STEPS.items()):
        left, middle, right = (figure.add_subplot(grid[row, column]) for column in range(3))
        _bars(left, f"{age} model, frozen", pretrained, colour, "{:.0%}", (0, 1.15))
        _bars(middle, about_reward, REWARD, REWARD_COLOUR, "{:+.1f}", (-3.6, 2.2))
        _bars(right, about_result, together(pretrained), RESULT_COLOUR, "{:.0%}", (0, 1.15))
        left.set_yticks(range(len(WORDS)), WORDS, fontsize=11)
        box = left.get_position()
        height = (box.y0 + box.y1) / 2
        figure.text(0.012, height + 0.04, title, fontsize=15, weight="bold", va="center")
        figure.text(0.012, height - 0.045, f"{where} {age} model", fontsize=12)
        for panel, sign in ((left, "+"), (middle, "=")):
            x = panel.get_position().x1 + 0.028
            figure.text(x, height, sign, fontsize=22, ha="center", va="center")
    upper, lower = (grid[row, 1].get_position(figure) for row in range(2))
    x = (upper.x0 + upper.x1) / 2
    ends = (x, upper.y0 - 0.02), (x, lower.y1 + 0.085)
    figure.add_artist(FancyArrowPatch(*ends, arrowstyle="-|>", mutation_scale=18, color=REWARD_COLOUR))
    figure.text(x + 0.015, sum(y for _, y in ends) / 2, "saved as a LoRA", va="center", color=REWARD_COLOUR)
    figure.text(0.99, 0.03, "r is added to the logits; bars of models are probabilities", ha="right", color="#555555")
    with rc_context({"svg.hashsalt": "idea", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None})


def _bars(
    axes: Axes, title: str, values: Sequence[float], colour: str, label: str, limits: tuple[float, float]
) -> None:
    axes.set_title(title, fontsize=12, color=colour, weight="bold")
    bars = axes.barh(range(len(values)), values, color=colour, height=0.68)
    axes.bar_label(bars, [label.format(value).replace("-", "−") for value in values], padding=4, fontsize=11)
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_xlim(limits)
    axes.invert_yaxis()
    axes.set(xticks=[], yticks=[])
    axes.tick_params(axis="y", length=0)
    axes.spines[:].set_visible(False)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".svg"))
