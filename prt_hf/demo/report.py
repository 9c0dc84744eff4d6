"""Report the results of a task of the demo: numbers, a table and a figure."""

from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

from ..evaluation import figure
from ..hub import card
from .comparison import FORWARDS, METHODS, PLACES, gain_recovered


@dataclass
class Sample:
    """A prompt and its continuations: `{method: prompt and continuation}`."""

    prompt: str
    texts: dict[str, str]


@dataclass
class Result:
    """The figures of a task.

    Attributes:
        task (`str`): `"text"` or `"images"`.
        measure (`str`): The name of the scores, with unit and direction.
        unit (`str`): The unit of `milliseconds`.
        scores (`dict`): `{method: {"source": ..., "target": ...}}`.
        milliseconds (`dict[str, float]`): `{method: time with the target}`.
        models_held (`dict[str, int]`): `{method: models in memory with the target}`.
        sample (*optional*): A sample of generated text.
    """

    task: str
    measure: str
    unit: str
    scores: dict[str, dict[str, float]]
    milliseconds: dict[str, float]
    models_held: dict[str, int]
    sample: Sample | None = None

    @property
    def gain_recovered(self) -> float | None:
        """(PRT - pretrained) / (fine-tuned - pretrained) at the target."""
        return gain_recovered(self.scores)

    def to_dict(self) -> dict:
        """Return all entries for JSON."""
        return asdict(self) | {"forwards": FORWARDS, "gain_recovered": self.gain_recovered}


@dataclass(frozen=True)
class Outcome:
    """A finished task: its figures, its files, and lines of Python that use the reward."""

    result: Result
    figure: Path
    reward: Path
    usage: str
    seconds: float


def table(result: Result) -> str:
    """Return a table with a line for each method: its scores, and its costs at the target."""
    digits = 3 if result.task == "text" else 1
    per = result.unit.partition("/")[2]
    head = f"{'':<12}{'source':>9}{'target':>9}{result.unit:>12}{'models held':>14}{f'forwards/{per}':>17}"
    lines = [
        f"{name:<12}"
        + "".join(f"{result.scores[name][place]:>9.{digits}f}" for place in PLACES)
        + f"{result.milliseconds[name]:>12.2f}{result.models_held[name]:>14}{FORWARDS[name]:>17}"
        for name in METHODS
    ]
    gain = "undefined" if result.gain_recovered is None else f"{result.gain_recovered:.0%}"
    note = f"gain recovered at the target, (PRT - pretrained) / (fine-tuned - pretrained): {gain}"
    return "\n".join([result.measure, head, *lines, note])


def describe(outcome: Outcome) -> str:
    """Return the text that the command prints for a finished task."""
    result = outcome.result
    parts = [f"== {result.task}: tuned on the old model, added to the new one ==", table(result)]
    if result.sample is not None:
        parts += [f"{name}, at the target:\n{_indented(text)}" for name, text in result.sample.texts.items()]
    parts.append(f"reward: {outcome.reward}\nfigure: {outcome.figure}\ntook:   {outcome.seconds:.0f} s")
    parts.append(f"Use the reward:\n\n{_indented(outcome.usage)}")
    return "\n" + "\n\n".join(parts) + "\n"


def draw(result: Result, path: Path) -> None:
    """Draw the paper's bar chart: five methods at the source, and at the target."""
    names = dict(zip(card.METHODS, METHODS, strict=False))
    groups = [
        (head, {key: figure.Bar(result.scores[name][place], -inf, inf) for key, name in names.items()})
        for place, head in (("source", "source (old model)"), ("target", "target (new model)"))
    ]
    del names[figure.CONTROL]  # a line
    figure.draw(groups, names, result.measure.replace(" (", "\n(", 1), path)


def _indented(lines: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in lines.splitlines())
