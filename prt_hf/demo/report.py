"""Report the results of a task of the demo: figures over several tunings, a table and a chart."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

from ..evaluation import figure
from ..hub import card
from .comparison import METHODS, PLACES

_HEADS = {"source": "with the old model (source)", "target": "with the new model (target)"}


@dataclass(frozen=True)
class Measure:
    """A measure of all methods: `{method: {"source": [a value for each tuning], "target": [...]}}`."""

    name: str
    values: dict[str, dict[str, list[float]]]
    digits: int = 1

    @classmethod
    def from_runs(cls, name: str, runs: Sequence[dict[str, dict[str, float]]], digits: int = 1) -> "Measure":
        """Collect the scores of several tunings."""
        values = {method: {place: [run[method][place] for run in runs] for place in PLACES} for method in METHODS}
        return cls(name, values, digits)

    def mean(self, method: str, place: str) -> float:
        """Return the mean over the tunings."""
        return mean(self.values[method][place])

    def spread(self, method: str, place: str) -> float:
        """Return the standard deviation over the tunings, 0 for a single one."""
        values = self.values[method][place]
        return stdev(values) if len(values) > 1 else 0.0

    def shown(self, method: str, place: str) -> str:
        """Return the mean, with the spread if there are several tunings."""
        text = f"{self.mean(method, place):.{self.digits}f}"
        if len(self.values[method][place]) > 1:
            text += f" ± {self.spread(method, place):.{self.digits}f}"
        return text


@dataclass(frozen=True)
class Sample:
    """A prompt and the answers to it: `{name: text}`."""

    prompt: str
    texts: dict[str, str]


@dataclass(frozen=True)
class Result:
    """The figures of a task.

    Attributes:
        task (`str`): `"text"` or `"images"`.
        title (`str`): A line on what was tuned, and what it is judged on.
        measures (list of [`Measure`]): What the methods are judged by.
        models_held (`dict[str, int]`): `{method: models in memory with the target}`.
        samples (list of [`Sample`]): Samples of generated text.
        notes (list of `str`): What has to be known to read the table.
    """

    task: str
    title: str
    measures: list[Measure]
    models_held: dict[str, int]
    samples: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """Return all entries for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """A finished task: its figures, its files, and lines of Python that use the reward."""

    result: Result
    figure: Path
    reward: Path
    usage: str
    seconds: float


def table(result: Result) -> str:
    """Return a table with a line for each method at each place: its measures, and the models that it needs."""
    widths = [max(len(measure.name), 14) + 2 for measure in result.measures]
    names = "".join(f"{measure.name:>{width}}" for measure, width in zip(result.measures, widths, strict=True))
    lines = [result.title, f"{'':<14}{names}{'models held':>14}"]
    for place in PLACES:
        lines.append(_HEADS[place])
        for method in METHODS:
            shown = (
                f"{measure.shown(method, place):>{width}}"
                for measure, width in zip(result.measures, widths, strict=True)
            )
            held = f"{result.models_held[method]:>14}" if place == "target" else ""
            lines.append(f"  {method:<12}{''.join(shown)}{held}")
    return "\n".join([*lines, *result.notes])


def spread_note(tunings: int) -> str:
    """Return a line that explains the spreads."""
    if tunings == 1:
        return "of a single tuning"
    return f"±: standard deviation over {tunings} tunings with different seeds, of the same pretrained models"


def describe(outcome: Outcome) -> str:
    """Return the text that the command prints for a finished task."""
    result = outcome.result
    parts = [f"== {result.task} ==", table(result)]
    for sample in result.samples:
        width = max(map(len, sample.texts)) + 2
        parts.append(
            "\n".join([sample.prompt, *(_hanging(f"  {name:<{width}}", text) for name, text in sample.texts.items())])
        )
    parts.append(f"reward: {outcome.reward}\nfigure: {outcome.figure}\ntook:   {outcome.seconds:.0f} s")
    parts.append(f"Use the reward:\n\n{_hanging('    ', outcome.usage)}")
    return "\n" + "\n\n".join(parts) + "\n"


def draw(result: Result, path: Path) -> None:
    """Draw bars with spreads: of a single measure at both places, of several measures at the target."""
    names = dict(zip(card.PAPER_METHODS, METHODS, strict=True))
    percent = [measure for measure in result.measures if "%" in measure.name]
    if len(percent) > 1:
        groups = [(measure, "target", measure.name) for measure in percent]
        label = "share of answers with the new model (%)"
    else:
        groups = [(result.measures[0], place, _HEADS[place]) for place in PLACES]
        label = result.measures[0].name
    drawn = [
        (head, {key: _bar(measure, name, place) for key, name in names.items()}) for measure, place, head in groups
    ]
    del names[figure.CONTROL]  # a line
    figure.draw(drawn, names, label, path, result.title)


def _bar(measure: Measure, method: str, place: str) -> figure.Bar:
    value, spread = measure.mean(method, place), measure.spread(method, place)
    return figure.Bar(value, value - spread, value + spread)


def _hanging(head: str, text: str) -> str:
    """Write a text behind a head, and its other lines below the first."""
    first, *others = text.splitlines() or [""]
    rest = (" " * len(head) + line for line in others)
    return "\n".join(line.rstrip() for line in (head + first, *rest))
