"""Portable Reward Tuning on this machine within minutes, without network: pretrain, tune, port, compare.

An old and a new model are pretrained on real data that comes with Python and scikit-learn. A reward is tuned on the old
one and added to the new one, beside EFT, the reward alone and fine-tuning. Every number is computed in the run.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

import datasets
import transformers

from ..errors import PRTValueError
from . import images, text
from .folder import claim, write_result
from .report import Outcome, draw
from .training import Steps

TASKS = ("text", "images")


@dataclass(frozen=True)
class OwnModels:
    """Instead of what the demo makes itself: ids of the Hub or paths, and how long to tune on them.

    Args:
        source, target (`str`): the old and the new model.
        dataset (`str`): with a column `text`, or columns `image` and `label`.
        tuning ([`Steps`]): of reward, EFT's model and oracle alike.
    """

    source: str
    target: str
    dataset: str
    tuning: Steps = Steps(200, 2e-4, 8)

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("source", "target", "dataset")}
        if missing := [name for name, value in given.items() if not value]:
            raise PRTValueError(
                "Own models come with own data.",
                expected="--source, --target and --dataset together",
                found=f"no {', no '.join('--' + name for name in missing)}",
            )


def run_demo(
    task: str,
    output_dir: str | Path = "prt_demo",
    seed: int = 0,
    own: OwnModels | None = None,
    *,
    text_settings: text.TextSettings | None = None,
    image_settings: images.ImageSettings | None = None,
) -> Outcome:
    """Run one task, `"text"` or `"images"`.

    `output_dir` then holds the models made (`<task>-source`, `<task>-target`), `<task>-reward`, `<task>.png` and
    `results.json`.

    Raises:
        PRTValueError: `output_dir` holds something else, or models or data cannot be used.
    """
    start, folder = perf_counter(), Path(output_dir)
    if task not in TASKS:
        raise PRTValueError("Unknown task.", expected=" or ".join(TASKS), found=repr(task))
    claim(folder)
    target = own.target if own else folder / f"{task}-target"
    with _quiet():
        if task == "text":
            settings = text_settings or text.TextSettings()
            if own:
                settings = replace(settings, tuning=own.tuning)
                prepared = text.own_text(own.source, own.target, own.dataset, settings, seed)
            else:
                prepared = text.bullet_lists(folder, settings, seed)
            result = text.run_text(prepared, folder, settings, seed)
            usage = text.usage(folder, target, prepared.prompt)
        else:
            settings = image_settings or images.ImageSettings()
            if own:
                settings = replace(settings, tuning=own.tuning)
                prepared = images.own_images(own.source, own.target, own.dataset, seed)
            else:
                prepared = images.turned_digits(folder, settings, seed)
            result = images.run_images(prepared, folder, settings, seed)
            usage = images.usage(folder, target)
    figure = folder / f"{task}.png"
    draw(result, figure)
    seconds = perf_counter() - start
    write_result(folder, result, seed=seed, seconds=seconds, models=own and asdict(own))
    return Outcome(result, figure, folder / f"{task}-reward", usage, seconds)


@contextmanager
def _quiet() -> Iterator[None]:
    """The libraries speak of errors only, and leave progress bars to the demo."""
    loggers = {
        name: logging.getLogger(name).level for name in ("accelerate", "datasets", "peft", "transformers", "trl")
    }
    had_bars = transformers.utils.logging.is_progress_bar_enabled()
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in loggers.items():
            logging.getLogger(name).setLevel(level)
        if had_bars:
            transformers.utils.logging.enable_progress_bar()
        datasets.enable_progress_bars()
