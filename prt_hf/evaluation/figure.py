"""Draw the paper's bar chart, for each backbone its methods side by side; and rewards by backbones."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_COLOURS = {"pretrained": "#b8c0c8", "eft": "#e0a458", "prt": "#1f4e79", "finetuned": "#7a9e7e"}
_COLOURS |= {"transplanted": "#9b7fb0", "few_shot": "#d98c8c", "baked": "#4f94a8"}
_COLOURS |= {"lora": "#c9b458", "lora_steps": "#a89436", "lora_compute": "#7d6e28"}
_REMARKS = {"finetuned": " (oracle)"}
_WIDTH = 0.8  # of all bars of a backbone, which are 1 apart
_LETTERS = 20  # of a line below a group
CONTROL = "reward_only"
_BLUE, _RED, _GREY = (0.12, 0.31, 0.47), (0.69, 0.23, 0.18), (0.9, 0.9, 0.9)


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


class Cell(NamedTuple):
    """A field of the heat map: its height among those of its unit, None if it has none, and its text."""

    value: float | None
    unit: str
    text: str


def draw_heat_map(
    rows: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Cell]], path: str | Path
) -> None:
    """Draw rewards by backbones into a PNG file: blue gains, red loses, grey does not fit.

    The deepest colour is the largest gain or loss of its unit.
    """
    from matplotlib.figure import Figure

    largest: dict[str, float] = {}
    for cell in (cell for row in cells for cell in row if cell.value is not None and math.isfinite(cell.value)):
        largest[cell.unit] = max(largest.get(cell.unit, 0.0), abs(cell.value))
    colours = [[_heat(cell, largest.get(cell.unit, 0.0)) for cell in row] for row in cells]
    names = [_broken(name) for name in rows]
    longest = max(len(line) for name in names for line in name.splitlines())
    size = (1.6 + 0.09 * longest + 1.8 * len(columns), 1.3 + 0.75 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(colours, aspect="auto")
    for row, line in enumerate(cells):
        for column, cell in enumerate(line):
            is_dark = sum(colours[row][column]) < 1.5
            style = {"color": "white" if is_dark else "#222222", "fontsize": 9}
            axes.text(column, row, cell.text, ha="center", va="center", **style)
    axes.set_xticks(range(len(columns)), [_broken(name) for name in columns])
    axes.set_yticks(range(len(rows)), names)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    for border in range(1, len(columns)):
        axes.axvline(border - 0.5, color="white", linewidth=3)
    for border in range(1, len(rows)):
        axes.axhline(border - 0.5, color="white", linewidth=3)
    figure.supxlabel("gain over the bare backbone +- half a 95 % interval; worth porting?", fontsize=9)
    figure.savefig(path, dpi=150, format="png")


def _heat(cell: Cell, largest: float) -> tuple[float, float, float]:
    """Return red, green and blue from 0 to 1."""
    if cell.value is None or not math.isfinite(cell.value):
        return _GREY
    share = abs(cell.value) / largest if largest else 0.0
    full = _BLUE if cell.value > 0 else _RED
    return tuple(1 - share * (1 - channel) for channel in full)
