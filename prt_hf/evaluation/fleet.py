"""Measure several rewards on several backbones, and compare them with an earlier report."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from ..contract import TEXT_GENERATION
from ..errors import PRTValueError
from ..hub.folder import check_writable, replace_file
from ..reward.model import RewardModel
from .figure import Cell, draw_heat_map
from .fit import Fit
from .portability import Portability, to_json_numbers
from .report import portability_report
from .results import REPORT, VERDICTS, PortabilityReport, markdown_table, short_name
from .store import save_results
from .tally import ERRORS, NLL, Z, mean_and_error

FLEET, FLEET_TABLE, FLEET_FIGURE = "fleet.json", "fleet.md", "fleet.png"
_METHODS = ("pretrained", "prt", "reward_only")


@dataclass(frozen=True)
class Change:
    """A reward on a backbone, now and in an earlier report, on the same rows.

    Attributes:
        reward (`str`): The reward's name.
        target (`str`): The backbone.
        earlier_target (`str`): The backbone of the earlier report: the same, or the one that `target` replaces.
        then, now (`float`): -log pi(y* | x) per token in nats, or accuracy for classifiers, of the backbone with the
            reward.
        better (`float`): By how much it is better now, in the same unit.
        standard_error (`float`): That of the difference row by row; NaN for a single row.
    """

    reward: str
    target: str
    earlier_target: str
    then: float
    now: float
    better: float
    standard_error: float

    @property
    def is_better(self) -> bool | None:
        """Whether it is better by more than two standard errors; None within them, or if it is the same."""
        is_known = self.better and abs(self.better) > ERRORS * self.standard_error  # no comparison holds for NaN
        return self.better > 0 if is_known else None


def compare(report: PortabilityReport, earlier: PortabilityReport, name: str | None = None) -> list[Change]:
    """Compare the targets of a report with those of an earlier one.

    A target of the same name is compared with itself. A new one is compared with the one that it replaces: the only
    target of the earlier report that is not in this one. Targets with neither are left out.

    Raises:
        PRTValueError: The reports are of other data, or no target can be compared.
    """
    name = name or report.reward
    if report.settings["data"] != earlier.settings.get("data") or report.counts != earlier.counts:
        raise PRTValueError(
            f"The earlier report of {name} cannot be compared with this one.",
            expected=f"the rows of {report.dataset}, cut at the same length",
            found=f"other rows of {earlier.dataset}, or a report of an earlier version",
            remedy="measure both in new folders, with the same --data, --samples and --max_length",
        )
    gone = [target for target in earlier.targets if target not in report.targets]
    new = [target for target in report.targets if target not in earlier.targets]
    replaced = {new[0]: gone[0]} if len(new) == len(gone) == 1 else {}
    changes = []
    for target, place in report.targets.items():
        then = earlier.targets.get(replaced.get(target, target))
        if then is None or not (then.scores and place.scores):
            continue
        sign = -1 if report.measure == NLL else 1
        apart = sign * (torch.tensor(place.scores).double() - torch.tensor(then.scores).double())
        figures = [getattr(each.figures["prt"], report.measure).value for each in (then, place)]
        changes.append(Change(name, target, then.name, *figures, *mean_and_error(apart, torch.tensor(report.counts))))
    if not changes:
        raise PRTValueError(
            f"No backbone of {name} can be compared with the earlier report.",
            expected=f"one of its backbones ({', '.join(earlier.targets)}), or one in the place of a single one",
            found=", ".join(report.targets),
        )
    return changes


def earlier_report(folder: str | Path, reward: str, report: PortabilityReport) -> PortabilityReport | None:
    """Return the report of a reward in a folder of a fleet, or in the folder of this one report; None if there is none.

    A report of a single reward may be compared with that of any other.
    """
    found = PortabilityReport.from_folder(Path(folder) / folder_name(reward), report.config)
    return found or PortabilityReport.from_folder(folder, report.config)


def check_earlier(folder: str | Path, output_dir: str | Path | None = None) -> None:
    """Raise `PRTValueError` if a folder holds no report to compare with, or is the one that is written to."""
    if output_dir is not None and Path(folder).absolute() == Path(output_dir).absolute():
        raise PRTValueError(
            "A report cannot be compared with itself.", expected="another folder for the new report", found=str(folder)
        )
    if not any(Path(folder).glob(REPORT)) and not any(Path(folder).glob(f"*/{REPORT}")):
        raise PRTValueError(
            "There is no report to compare with.",
            expected=f"a folder that `--output_dir` named, with {REPORT} in it, or in folders of its rewards",
            found=str(folder),
        )


@dataclass
class Fleet:
    """Rewards by backbones.

    Attributes:
        fits (`dict`): (reward, target) -> [`Fit`].
        reports (`dict`): Reward -> its report, with the targets that it fits.
        changes (list of [`Change`]): Against an earlier report.
    """

    fits: dict[tuple[str, str], Fit]
    reports: dict[str, PortabilityReport] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)

    @property
    def rewards(self) -> list[str]:
        """The rewards, in the given order."""
        return list(dict.fromkeys(reward for reward, _ in self.fits))

    @property
    def targets(self) -> list[str]:
        """The backbones, in the given order."""
        return list(dict.fromkeys(target for _, target in self.fits))

    @property
    def regressions(self) -> list[Change]:
        """The changes for the worse, beyond their noise."""
        return [change for change in self.changes if change.is_better is False]

    def portability(self, reward: str, target: str) -> Portability | None:
        """Return what was measured of a reward on a target; None if it does not fit."""
        place = self.reports[reward].targets.get(target) if reward in self.reports else None
        return place and place.portability

    def fit_table(self) -> str:
        """Return what fits, from configurations and tokenizers alone, and why the rest does not."""
        rows = [
            [f"`{short_name(reward)}`", *("yes" if self.fits[reward, each].fits else "no" for each in self.targets)]
            for reward in self.rewards
        ]
        lines = [markdown_table("What fits", self._head(), rows), ""]
        for (reward, target), fit in self.fits.items():
            for problem in fit.problems:
                said = " ".join(line.strip() for line in problem.splitlines()[:3])
                lines.append(f"- `{short_name(reward)}` on `{short_name(target)}`: {said}")
        return "\n".join(lines).rstrip() + "\n"

    def table(self) -> str:
        """Return Markdown: what each reward gains on each backbone, verdicts, what fits, and what has changed."""
        rows = [
            [f"`{short_name(reward)}`", self._data(reward), *(self._cell(reward, each) for each in self.targets)]
            for reward in self.rewards
        ]
        head = self._head()
        title = "Gain over the bare backbone, and whether the reward is worth porting"
        lines = [
            "# Rewards by backbones\n",
            markdown_table(title, [head[0], "data", *head[1:]], rows),
            "\nNats per token for language models, points of accuracy for classifiers; +- half a 95 % interval.\n",
            *(f"- {line}" for line in self._words()),
        ]
        parts = ["\n".join(lines).rstrip()]
        if not all(fit.fits for fit in self.fits.values()):
            parts.append(self.fit_table().rstrip())
        return "\n\n".join(parts + ([change_table(self.changes)] if self.changes else [])) + "\n"

    def to_dict(self) -> dict:
        """Return fits, gains, verdicts and changes for JSON."""
        cells = []
        for (reward, target), fit in self.fits.items():
            found = self.portability(reward, target)
            cell = {"reward": reward, "target": target, "fits": fit.fits, "reasons": list(fit.problems)}
            if found is not None:
                worth, reasons = found.verdict()
                cell |= {"gain": found.advantage["target"], "standard_error": found.standard_error["target"]}
                cell |= {"worth_porting": worth, "reasons": reasons}
            cells.append(to_json_numbers(cell))
        changes = [to_json_numbers(vars(each) | {"is_better": each.is_better}) for each in self.changes]
        return {"cells": cells, "changes": changes}

    def save(self, folder: str | Path) -> None:
        """Write `fleet.json`, `fleet.md`, the table, and `fleet.png`, a heat map of the gains."""
        save_results(Path(folder) / FLEET, self.to_dict())
        replace_file(Path(folder) / FLEET_TABLE, self.table())
        cells = [[self._heat(reward, target) for target in self.targets] for reward in self.rewards]
        names = [[short_name(name) for name in each] for each in (self.rewards, self.targets)]
        replace_file(Path(folder) / FLEET_FIGURE, lambda path: draw_heat_map(*names, cells, path))

    def _head(self) -> list[str]:
        return ["reward", *(f"`{short_name(target)}`" for target in self.targets)]

    def _data(self, reward: str) -> str:
        return f"`{short_name(self.reports[reward].dataset)}`" if reward in self.reports else ""

    def _cell(self, reward: str, target: str) -> str:
        found = self.portability(reward, target)
        if found is None:
            return "does not fit" if not self.fits[reward, target].fits else ""
        return f"{_gain(found)}, {VERDICTS[found.verdict()[0]]}"

    def _heat(self, reward: str, target: str) -> Cell:
        found = self.portability(reward, target)
        if found is None:
            return Cell(None, "nats", self._cell(reward, target))
        unit = "nats" if found.task == TEXT_GENERATION else "points"
        return Cell(found.advantage["target"], unit, f"{_gain(found)}\n{VERDICTS[found.verdict()[0]]}")

    def _words(self) -> list[str]:
        """Return why a reward is not worth porting, and which strengths would be better."""
        lines = []
        for reward, report in self.reports.items():
            for target, (worth, reasons) in report.verdict().items():
                name = f"`{short_name(reward)}` on `{short_name(target)}`"
                if worth is not True:
                    lines.append(f"{name}: {VERDICTS[worth]}: {'; '.join(reasons[3:] or reasons)}")
                proposal = report.targets[target].portability.proposal
                if proposal is not None and proposal.is_better:
                    lines.append(f"{name}: {proposal}")
        return lines


def measure_fleet(
    fits: dict[tuple[str, str], Fit],
    data: Mapping[str, Dataset],
    load: Callable[[str], RewardModel],
    *,
    output_dir: str | Path | None = None,
    earlier: str | Path | None = None,
    lengths: Mapping[str, int] | None = None,
    dataset_names: Mapping[str, str] | None = None,
    **kwargs: Any,
) -> Fleet:
    """Measure every reward on the backbones that it fits, one reward after another.

    Args:
        fits: What [`~evaluation.check_fits`] has found.
        data: The rows of each reward.
        load: A function that loads a reward by its name.
        output_dir (*optional*): Where each reward has a folder with its report, which a later run continues.
        earlier (*optional*): The folder of an earlier report to compare with.
        lengths (*optional*): The number of tokens at which the texts of each reward are cut off.
        dataset_names (*optional*): The names of the data of each reward.
        **kwargs: Arguments of [`~evaluation.portability_report`].

    Raises:
        PRTValueError: Two rewards would share a folder, `earlier` holds no report, or one of other data.
    """
    fleet = Fleet(fits)
    _check_folders(fleet.rewards)
    if earlier is not None:
        check_earlier(earlier, output_dir)
    if output_dir is not None:
        check_writable(output_dir)
    for reward in fleet.rewards:
        fitting = [target for target in fleet.targets if fits[reward, target].fits]
        if not fitting:
            continue
        report = portability_report(
            load(reward),
            fitting,
            data[reward],
            _METHODS,
            reward_name=reward,
            dataset_name=(dataset_names or {}).get(reward),
            **({"length": lengths[reward]} if lengths else {}),
            output_dir=None if output_dir is None else Path(output_dir) / folder_name(reward),
            **kwargs,
        )
        report.targets = {name: report.targets[name] for name in fitting}  # not those of earlier runs
        fleet.reports[reward] = report
        if output_dir is not None:
            fleet.save(output_dir)
        before = None if earlier is None else earlier_report(earlier, reward, report)
        if before is not None and (before.reward == reward or len(fleet.rewards) == 1):
            fleet.changes += compare(report, before, reward)
    if earlier is not None and not fleet.changes:
        raise PRTValueError(
            "Nothing can be compared with the earlier report.",
            expected=f"a report of one of these rewards in {earlier}",
            found="reports of others",
        )
    if output_dir is not None:
        fleet.save(output_dir)
    return fleet


def change_table(changes: Sequence[Change]) -> str:
    """Return a Markdown table of what has changed since an earlier report."""
    rows = []
    for change in changes:
        word = {True: "better", False: "worse", None: "within noise" if change.better else "the same"}
        was = "" if change.target == change.earlier_target else f" (was `{short_name(change.earlier_target)}`)"
        cells = [f"{change.then:.4g}", f"{change.now:.4g}", _plus_minus(change.better, change.standard_error, 1, 4)]
        rows.append(
            [
                f"`{short_name(change.reward)}`",
                f"`{short_name(change.target)}`{was}",
                *cells,
                word[change.is_better],
            ]
        )
    head = ["reward", "backbone", "then", "now", "better by", ""]
    return markdown_table("With the reward, against the earlier report", head, rows)


def folder_name(reward: str) -> str:
    """Return the name of a reward's folder in a report: `me/style` -> `me--style`."""
    return re.sub(r"[^\w.-]+", "--", reward).strip("-.") or "reward"


def _check_folders(rewards: Sequence[str]) -> None:
    folders: dict[str, str] = {}
    for reward in rewards:
        other = folders.setdefault(folder_name(reward).lower(), reward)
        if other != reward:
            raise PRTValueError(
                "Two rewards would share a folder of the report.",
                expected="different names",
                found=f"{other!r} and {reward!r}",
            )


def _gain(found: Portability) -> str:
    scale, digits = (1, 3) if found.task == TEXT_GENERATION else (100, 1)
    return _plus_minus(found.advantage["target"], found.standard_error["target"], scale, digits)


def _plus_minus(value: float, error: float, scale: float, digits: int) -> str:
    noise = f" +- {Z * scale * error:.{digits}f}" if math.isfinite(error) else ""
    return f"{scale * value:+.{digits}f}{noise}"
