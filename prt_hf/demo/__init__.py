"""Show Portable Reward Tuning on this machine within minutes, without network: pretrain, tune, port, compare.

An old and a new model are pretrained on real data that comes with Python and scikit-learn. A reward is tuned on the old
one and added to the new one, beside EFT, the reward by itself and fine-tuning. Every number is computed in the run.
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
    """The user's models and data, instead of those that the demo makes: ids on the Hub, or paths.

    The data has a column `text`, or columns `image` and `label`. `tuning` is the length of all tuning: of the reward,
    of EFT's model, and of the oracle.
    """

    source: str
    target: str
    dataset: str
    tuning: Steps = Steps(200, 2e-4, 8)

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("source", "target", "dataset")}
        if missing := [name for name, value in given.items() if not value]:
            raise PRTValueError(
                "Models of your own need data of your own.",
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
    """Run one task.

    Args:
        task: `"text"` or `"images"`.
        output_dir: The folder that gets the models made (`<task>-source`, `<task>-target`), `<task>-reward`,
            `<task>.png` and `results.json`.
        seed: Of everything that is random.
        own (*optional*): Models and data of the user.
        text_settings (*optional*): Sizes and steps of the text task.
        image_settings (*optional*): Sizes and steps of the image task.

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
    """Silence the libraries' warnings and progress bars."""
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
