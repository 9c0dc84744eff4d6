"""The folder that the demo writes to, and `results.json`, by which it knows its own."""

import json
import os
import platform
from pathlib import Path

import peft
import torch
import transformers

from .._version import __version__
from ..errors import PRTValueError
from .report import Result

RESULTS = "results.json"
MADE_BY = "prt-hf demo"


def claim(folder: Path) -> None:
    """Make the folder, or take one that an earlier demo wrote.

    Raises:
        PRTValueError: the folder holds something else, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise PRTValueError("The output directory is a file.", expected="a folder", found=str(folder))
    others = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    if others and _read(folder).get("made_by") != MADE_BY:
        raise PRTValueError(
            f"{folder} holds files that the demo did not write.",
            expected="a new or empty folder, or one that an earlier demo wrote",
            found=", ".join(others[:5]),
            remedy="name another one: --output-dir",
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, {"made_by": MADE_BY} | _read(folder))


def write_result(folder: Path, result: Result, **circumstances) -> None:
    """Put one task's numbers into `results.json`, in place of those of an earlier run."""
    versions = {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    machine = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    circumstances |= {"versions": {"prt_hf": __version__} | versions, "hardware": machine}
    _write(folder, _read(folder) | {result.task: result.to_dict() | circumstances})


def _read(folder: Path) -> dict:
    try:
        entries = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write(folder: Path, entries: dict) -> None:
    (folder / RESULTS).write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
