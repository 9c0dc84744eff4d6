"""The results of a portability report: figures, verdict, table, files, and measurements for the card."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..contract import PRT_CONFIG_NAME, TEXT_GENERATION, RewardConfig
from ..errors import PRTValueError
from ..hub.card import METHODS, Measurement, render_card
from ..hub.card_merge import merge_cards, read_card, write_card
from ..hub.folder import replace_file
from ..reward.model import RewardModel
from .figure import Bar, draw
from .portability import Portability, from_json_numbers, to_json_numbers
from .store import load_results, save_results
from .tally import ACCURACY, NLL, Estimate

REPORT, TABLE, FIGURE = "report.json", "report.md", "report.png"
_CONCLUSIONS = {
    "target": "the target does as well without the reward: no success",
    "prt_source": "the source with the reward does as well: the target adds nothing",
    "reward_only": "the reward does as well without a backbone: nothing is carried over",
}
VERDICTS = {True: "yes", False: "no", None: "cannot tell"}


@dataclass(frozen=True)
class Figures:
    """Figures of one method with one backbone.

    Attributes:
        nll ([`~evaluation.tally.Estimate`]): The mean of -log pi(y* | x), nats, with a 95 % interval.
        accuracy ([`~evaluation.tally.Estimate`]): A share from 0 to 1, with a 95 % interval.
        entropy (`float`): The mean of H(pi(. | x)), nats.
        milliseconds (`float`): The time to read one token of a text, or one example; decoding takes other times.
        memory (`int`): The bytes of the weights that the method needs; on a GPU, also what reading takes.
    """

    nll: Estimate
    accuracy: Estimate
    entropy: float
    milliseconds: float
    memory: int


@dataclass
class Place:
    """One backbone.

    Attributes:
        name (`str`): Its id or folder.
        figures (`dict[str, Figures]`): The figures of each method.
        portability ([`~evaluation.Portability`], *optional*): Of a target, if PRT was measured.
        keys (`dict[str, dict[str, str]]`): Method -> network -> key of the weights that the figures were measured on.
        scores (list of `float`): The sum over the positions of each row of the verdict's measure with PRT, so that
            reports are compared row by row.
    """

    name: str
    figures: dict[str, Figures] = field(default_factory=dict)
    portability: Portability | None = None
    keys: dict[str, dict[str, str]] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)

    def forget(self, known: Mapping[str, str]) -> None:
        """Drop figures that were measured on other networks than the `known` ones: network -> its key now."""
        for method, keys in list(self.keys.items()):
            if any(known.get(name, key) != key for name, key in keys.items()):
                del self.keys[method], self.figures[method]
                if method == "prt":
                    self.portability, self.scores = None, []


@dataclass
class PortabilityReport:
    """The figures of a reward at its source and at the targets, beside those of other methods.

    Attributes:
        reward (`str`): The reward's name.
        config ([`~contract.RewardConfig`]): The reward's `prt_config.json`.
        dataset (`str`): The name of the data.
        split (`str`, *optional*): The split of the data.
        strength (`float`): 1 / lambda in use.
        source ([`Place`]): The source, where EFT and fine-tuned are the same model, the fine-tuned source.
        targets (`dict[str, Place]`): The targets by name.
        rows (`int`): The number of rows that were measured.
        positions (`int`): The number of supervised tokens, or of examples.
        counts (list of `int`): The number of positions of each row.
        notes (list of `str`): What was left out, and why.
        settings (`dict`): Keys of reward, source and data, and the strength; figures under other settings are refused.
    """

    reward: str
    config: RewardConfig
    dataset: str
    split: str | None
    strength: float
    source: Place
    targets: dict[str, Place] = field(default_factory=dict)
    rows: int = 0
    positions: int = 0
    counts: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settings: dict = field(default_factory=dict)

    @property
    def places(self) -> list[Place]:
        """The source and the targets."""
        return [self.source, *self.targets.values()]

    @property
    def methods(self) -> list[str]:
        """The methods that were measured anywhere, in the paper's order."""
        return [method for method in METHODS if any(method in place.figures for place in self.places)]

    @property
    def measure(self) -> str:
        """The measure that verdicts are based on: `"nll"` for language models, `"accuracy"` for classifiers."""
        return NLL if self.config.task == TEXT_GENERATION else ACCURACY

    def verdict(self) -> dict[str, tuple[bool | None, list[str]]]:
        """Return for each target whether the reward is worth porting there, and why.

        These are the verdicts of [`Portability.verdict`], with the conclusions if a rival does as well.
        """
        found = {}
        for name, place in self.targets.items():
            if place.portability is None:
                found[name] = None, ["PRT was not measured"]
                continue
            worth, reasons = place.portability.verdict()
            better = {rival: place.portability.is_better_than(rival) for rival in _CONCLUSIONS}
            conclusions = [
                text if better[rival] is False else f"the data does not rule out that {text}"
                for rival, text in _CONCLUSIONS.items()
                if better[rival] is not True
            ]
            found[name] = worth, [*reasons, *conclusions]
        return found

    def gain_recovered(self, name: str) -> float | None:
        """Return (PRT - pretrained) / (fine-tuned - pretrained) at a target.

        None if one of them was not measured, or fine-tuning gains nothing.
        """
        figures = self.targets[name].figures
        if not {"pretrained", "prt", "finetuned"} <= figures.keys():
            return None
        bare, prt, tuned = (getattr(figures[each], self.measure).value for each in ("pretrained", "prt", "finetuned"))
        is_gain = tuned < bare if self.measure == NLL else tuned > bare
        return (prt - bare) / (tuned - bare) if is_gain else None

    def measurements(self) -> list[Measurement]:
        """Return accuracy and negative log-likelihood with every backbone, for the card."""
        measures = (ACCURACY, NLL) if self.measure == ACCURACY else (NLL, ACCURACY)
        return [
            Measurement(
                backbone=place.name,
                dataset=self.dataset,
                metric=measure,
                values={m: getattr(place.figures[m], measure).value for m in METHODS if m in place.figures},
                is_lower_better=measure == NLL,
                split=self.split,
            )
            for place in self.places
            for measure in measures
            if place.figures
        ]

    def table(self) -> str:
        """Return Markdown tables, as in the paper: methods by backbones, eps and C, costs, verdicts."""
        unit = "token" if self.config.task == TEXT_GENERATION else "example"
        count = f"{self.rows} rows, {self.positions} tokens" if unit == "token" else f"{self.rows} examples"
        data = f"`{short_name(self.dataset)}`" + (f" ({self.split})" if self.split else "")
        nll = self._section(
            f"Negative log-likelihood per {unit}, nats, lower is better", lambda f: _interval(f.nll, 1, 3)
        )
        accuracy = self._section(
            f"Accuracy{' of the next token' if unit == 'token' else ''}, %, higher is better",
            lambda f: _interval(f.accuracy, 100, 1),
        )
        lines = [
            f"# `{short_name(self.reward)}`: {self.config.task}",
            f"Strength {self.strength:g}, on {data}: {count}. In brackets: 95 % intervals, with rows as draws.",
            *((nll, accuracy) if self.measure == NLL else (accuracy, nll)),
            self._distances(),
            self._section(f"Milliseconds, to read one {unit}", lambda f: f"{f.milliseconds:.3g}"),
            self._section(
                "Memory, MB: weights, and on a GPU what reading takes beside them", lambda f: f"{f.memory / 1e6:.4g}"
            ),
            self._words(),
        ]
        return "\n\n".join(filter(None, lines)) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write `report.json` (all figures), `report.md` (the table) and `report.png` (the paper's bar chart)."""
        folder = Path(folder)
        self.save_figures(folder)
        replace_file(folder / TABLE, self.table())
        groups, methods = [], [method for method in METHODS if method != "reward_only"]
        scale = 1 if self.measure == NLL else 100
        for place, head in zip(self.places, self._heads(), strict=True):
            bars = {m: Bar(*(scale * each for each in getattr(f, self.measure))) for m, f in place.figures.items()}
            groups.append((head.replace("`", "").replace(" (", "\n("), bars))
        label = "negative log-likelihood per token\n(nats, lower is better)"
        label = label if self.measure == NLL else "accuracy\n(%, higher is better)"
        names = {method: METHODS[method] for method in methods if method in self.methods}
        replace_file(folder / FIGURE, lambda path: draw(groups, names, label, path))

    def save_figures(self, folder: str | Path) -> None:
        """Write `report.json` alone, atomically."""
        save_results(Path(folder) / REPORT, self.to_dict())

    def write_to_card(self, reward: str | Path | RewardModel) -> None:
        """Put the figures into the card of the reward that was measured, see [`write_measurements`].

        Another reward raises `PRTValueError`.
        """
        config = _config_of(reward)
        if config != self.config:
            raise PRTValueError(
                "The report is about another reward.",
                expected=f"the reward that was measured: {self.reward}",
                found=f"one with another {PRT_CONFIG_NAME}",
            )
        write_measurements(reward, self.measurements(), name=self.reward)

    def to_dict(self) -> dict:
        """Return the report for JSON."""
        derived = {"verdict": {name: {"worth_porting": w, "reasons": r} for name, (w, r) in self.verdict().items()}}
        places = {"source": _place_to_dict(self.source), "targets": [_place_to_dict(p) for p in self.targets.values()]}
        return vars(self) | {"config": json.loads(self.config.to_json_string())} | places | derived

    @classmethod
    def from_folder(cls, folder: str | Path, config: RewardConfig) -> "PortabilityReport | None":
        """Read the `report.json` that [`save`] wrote for a reward; None if there is none."""

        def parsed(entries: dict) -> "PortabilityReport":
            del entries["verdict"]
            source, targets = _place_from_dict(entries["source"]), map(_place_from_dict, entries["targets"])
            places = {"config": config, "source": source, "targets": {place.name: place for place in targets}}
            return cls(**entries | places)

        return load_results(Path(folder) / REPORT, parsed, "the report of an earlier evaluation")

    def _section(self, title: str, cell: Callable[[Figures], str]) -> str:
        rows = []
        for method in self.methods:
            figures = [place.figures.get(method) for place in self.places]
            rows.append([METHODS[method], *("" if each is None else cell(each) for each in figures)])
        return markdown_table(title, ["", *self._heads()], rows)

    def _distances(self) -> str:
        measured = [place.portability for place in self.places]
        recovered = [None, *(self.gain_recovered(name) for name in self.targets)]
        entropies = [place.figures["prt"].entropy if "prt" in place.figures else None for place in self.places]
        rows = {
            "eps = KL(source, target), nats": [p and f"{p.eps:.4g}" for p in measured],
            "C, mean (largest)": [p and f"{p.c_mean:.4g} ({p.c_max:.4g})" for p in measured],
            "entropy with the reward, nats": [None if e is None else f"{e:.3f}" for e in entropies],
            "gain recovered": [None if r is None else f"{r:.0%}" for r in recovered],
        }
        kept = [[name, *(cell or "" for cell in cells)] for name, cells in rows.items() if any(cells)]
        return markdown_table("Source and targets (Prop. 3.2)", ["", *self._heads()], kept) if kept else ""

    def _words(self) -> str:
        lines = ["## Worth porting?", ""]
        for place, head in zip(self.targets.values(), self._heads()[1:], strict=True):
            worth, reasons = self.verdict()[place.name]
            lines += [f"- {head}: {VERDICTS[worth]}", *(f"  - {reason}" for reason in reasons)]
            if place.portability and place.portability.proposal:
                lines.append(f"  - {place.portability.proposal}")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])

    def _heads(self) -> list[str]:
        names = [short_name(place.name) for place in self.places]
        if len(set(names[1:])) < len(names[1:]):
            names = [place.name for place in self.places]
        return [f"`{name}`" + (" (source)" if index == 0 else "") for index, name in enumerate(names)]


def write_measurements(reward: str | Path | RewardModel, measurements: Sequence[Measurement], *, name: str) -> None:
    """Put figures into a reward's card, in place of earlier ones; text of users is kept.

    Args:
        reward: Its folder, whose `README.md` is written; or the reward, whose `card` is changed.
        measurements: The figures.
        name: The name of a reward in memory in its card.

    Raises:
        RewardFileError: The folder holds no reward.
    """
    config = _config_of(reward)
    if isinstance(reward, RewardModel):
        card = render_card(config, name, measurements=measurements)
        reward.card = card if reward.card is None else merge_cards(reward.card, card)
        return
    folder = Path(reward)
    write_card(folder, render_card(config, folder.absolute().name, measurements=measurements), read_card(folder))


def markdown_table(title: str, head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table with a heading."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(cells)} |" for cells in lines)])


def short_name(name: str) -> str:
    """Return an id as it is and the last part of a path, without characters that end a cell or a code span."""
    name = Path(name).absolute().name if Path(name).exists() else name
    return " ".join(name.split()).replace("|", "/").replace("`", "'")


def _config_of(reward: str | Path | RewardModel) -> RewardConfig:
    if isinstance(reward, RewardModel):
        return reward.config
    return RewardConfig.from_json_file(Path(reward) / PRT_CONFIG_NAME)


def _place_to_dict(place: Place) -> dict:
    portability = place.portability and place.portability.to_dict()
    figures = {method: to_json_numbers(asdict(figures)) for method, figures in place.figures.items()}
    return vars(place) | {"figures": figures, "portability": portability, "scores": to_json_numbers(place.scores)}


def _place_from_dict(entries: dict) -> Place:
    portability = entries["portability"] and Portability.from_dict(entries["portability"])
    figures = {method: _figures(each) for method, each in entries["figures"].items()}
    scores = from_json_numbers(entries.get("scores", []))
    return Place(**entries | {"figures": figures, "portability": portability, "scores": scores})


def _figures(entries: dict) -> Figures:
    estimates = {name: Estimate.from_json(entries[name]) for name in (NLL, ACCURACY)}
    return Figures(**from_json_numbers(entries) | estimates)


def _interval(estimate: Estimate, scale: float, digits: int) -> str:
    value, low, high = (f"{scale * each:.{digits}f}" for each in estimate)
    return f"{value} [{low}, {high}]" if math.isfinite(estimate.low) else value
