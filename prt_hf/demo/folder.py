"""Manage the folder that the demo writes to; it recognises its own by `results.json`."""

import json
from pathlib import Path
from typing import Any

from ..errors import PRTValueError
from ..evaluation.machine import hardware, versions
from ..hub.folder import replace_file
from .report import Result

RESULTS = "results.json"
MADE_BY = "prt-hf demo"


def claim(folder: Path) -> None:
    """Create the folder, or use one that an earlier demo wrote; refuse any other."""
    if folder.exists() and not folder.is_dir():
        raise PRTValueError("The output directory is a file.", expected="a folder", found=str(folder))
    others = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if others and _read(folder).get("made_by") != MADE_BY:
        raise PRTValueError(
            f"{folder} holds files that the demo did not write.",
            expected="a new or empty folder, or one that an earlier demo wrote",
            found=", ".join(others[:5]),
            remedy="name another folder: --output-dir",
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {"made_by": MADE_BY} | _read(folder))


def write_result(folder: Path, result: Result, **circumstances: Any) -> None:
    """Put the figures of a task, and other entries, into `results.json`, in place of those of an earlier run."""
    circumstances |= {"versions": versions(), "hardware": hardware()}
    _write(folder, _read(folder) | {result.task: result.to_dict() | circumstances})


def _read(folder: Path) -> dict:
    try:
        entries = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write(folder: Path, entries: dict) -> None:
    replace_file(folder / RESULTS, json.dumps(entries, indent=2) + "\n")
