"""Draw the paper's bar chart: for each backbone its methods side by side."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_COLOURS = {"pretrained": "#b8c0c8", "eft": "#e0a458", "prt": "#1f4e79", "finetuned": "#7a9e7e"}
_REMARKS = {"finetuned": " (oracle)"}
_WIDTH = 0.8  # of all bars of a backbone, which are 1 apart
_LETTERS = 20  # of a line below a group
CONTROL = "reward_only"


class Bar(NamedTuple):
    """A height and the ends of its error bar, which is not drawn if they are infinite."""

    value: float
    low: float
    high: float


def draw(
    groups: Sequence[tuple[str, Mapping[str, Bar]]],
    names: Mapping[str, str],
    label: str,
    path: str | Path,
    title: str = "",
) -> None:
    """Draw grouped bars with error bars, and the reward by itself as a line across each group, into a PNG file.

    `groups` are the backbones with their bars by method; `names` those of the methods that have bars, in order.
    """
    # Not pyplot: a figure of its own needs no display, and leaves the caller's settings alone.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.5, 2.5 + 1.9 * len(groups)), 4.4), layout="constrained")
    axes = figure.add_subplot()
    width = _WIDTH / max(1, len(names))
    # Infinite ones have no height, and would leave none to the others.
    groups = [(name, {m: bar for m, bar in bars.items() if math.isfinite(bar.value)}) for name, bars in groups]
    digits = 1 if max((bar.value for _, bars in groups for bar in bars.values()), default=0) >= 10 else 2
    for index, (method, name) in enumerate(names.items()):
        drawn = [(place, bars[method]) for place, (_, bars) in enumerate(groups) if method in bars]
        if not drawn:
            continue
        drawn_bars = axes.bar(
            [place - _WIDTH / 2 + (index + 0.5) * width for place, _ in drawn],
            [bar.value for _, bar in drawn],
            0.94 * width,
            yerr=[
                [_length(bar.value - bar.low) for _, bar in drawn],
                [_length(bar.high - bar.value) for _, bar in drawn],
            ],
            color=_COLOURS[method],
            ecolor="#333333",
            capsize=3,
            label=name + _REMARKS.get(method, ""),
        )
        labels = axes.bar_label(drawn_bars, fmt=f"%.{digits}f", padding=2, fontsize=8)
        for text in labels:
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    for place, (_, bars) in enumerate(groups):
        if CONTROL in bars:
            line = axes.hlines(
                bars[CONTROL].value, place - _WIDTH / 2, place + _WIDTH / 2, colors="#b03a2e", linestyles="dashed"
            )
            if place == 0:
                line.set_label("reward only (control)")
    axes.set_xticks(range(len(groups)), [_broken(name) for name, _ in groups])
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    handles, texts = axes.get_legend_handles_labels()
    in_order = sorted(zip(handles, texts, strict=True), key=lambda pair: "control" in pair[1])
    if in_order:
        figure.legend(
            *zip(*in_order, strict=True), frameon=False, ncols=len(in_order), fontsize=9, loc="outside upper center"
        )
    figure.savefig(path, dpi=150, format="png")


def _broken(name: str) -> str:
    """Break a name into lines that are no wider than a group."""
    lines = name.replace("/", "/\n").splitlines()
    return "\n".join(textwrap.fill(line, _LETTERS) for line in lines)


def _length(error: float) -> float:
    return error if math.isfinite(error) else math.nan  # which is not drawn
