"""The clock, and a description of this machine."""

import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import torch
from transformers import PreTrainedModel

from .._version import __version__


def hardware() -> dict[str, str | int]:
    """Describe the machine that figures are measured on."""
    found = {"machine": platform.machine(), "processor": _processor(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions(*others: str) -> dict[str, str]:
    """Return the versions of this package, of Python, of the packages that figures depend on, and of others."""
    found = {"prt_hf": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", *others):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def now(model: PreTrainedModel) -> float:
    """Return the time in seconds, once all work on the model's device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return perf_counter()


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    model: PreTrainedModel,
    progress: Callable[[Iterable], Iterable] = iter,
) -> dict[str, list[float]]:
    """Return the seconds of each call in each of several rounds, after one that warms up; all calls run in turn.

    Take the fastest round of each: other programs only ever add time. `model` names the device, `progress` wraps the
    rounds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for index in progress(range(rounds + 1)):
        for name, call in calls.items():
            start = now(model)
            call()
            if index:
                seconds[name].append(now(model) - start)
    return seconds


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
