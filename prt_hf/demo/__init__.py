"""Show Portable Reward Tuning on this machine within minutes, without network: pretrain, tune, port, compare.

An old and a new model are pretrained on facts that we list, and on scikit-learn's digits. A reward is tuned on the old
one and added to the new one, beside EFT, the reward by itself and fine-tuning. Every number is computed in the run.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import datasets
import torch
import transformers

from ..errors import PRTValueError
from . import answers, images, text
from .facts import make_world
from .folder import claim, write_result
from .report import Outcome, Result, draw
from .training import Stages, Steps

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
    text_settings: answers.AnswerSettings | None = None,
    image_settings: images.ImageSettings | None = None,
) -> Outcome:
    """Run one task.

    Args:
        task: `"text"` or `"images"`.
        output_dir: The folder that gets the models made (`<task>-source`, `<task>-target`), `<task>-reward`,
            `<task>.png` and `results.json`.
        seed: Of data and models, and of the first tuning; the others have the seeds that follow.
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
    with _quiet():
        if own:
            result, usage = _run_own(task, folder, seed, own)
        else:
            with _one_thread():
                result, usage = _run(task, folder, seed, text_settings, image_settings)
    figure = folder / f"{task}.png"
    draw(result, figure)
    seconds = perf_counter() - start
    write_result(folder, result, seed=seed, seconds=seconds, models=own and asdict(own))
    return Outcome(result, figure, folder / f"{task}-reward", usage, seconds)


def _run(
    task: str,
    folder: Path,
    seed: int,
    text_settings: answers.AnswerSettings | None,
    image_settings: images.ImageSettings | None,
) -> tuple[Result, str]:
    """Make models and data, and run a task; return its result, and lines of Python that use the reward."""
    if task == "text":
        settings = text_settings or answers.AnswerSettings()
        stage = Stages(settings.stages)
        world = make_world(folder, settings.world, seed, stage)
        result = answers.run_answers(world, folder, settings, seed, stage)
        return result, text.usage(folder, folder / "text-target", world.judged[0].prompt)
    settings = image_settings or images.ImageSettings()
    stage = Stages(settings.stages)
    result = images.run_images(images.turned_digits(folder, settings, seed, stage), folder, settings, seed, stage)
    return result, images.usage(folder, folder / "images-target")


def _run_own(task: str, folder: Path, seed: int, own: OwnModels) -> tuple[Result, str]:
    """Do the same with the user's models and data, with one tuning."""
    places, stage = (own.source, own.target, own.dataset), Stages(4)
    if task == "text":
        settings = text.TextSettings(tuning=own.tuning)
        prepared = text.own_text(*places, settings, seed)
        result = text.run_own_text(prepared, folder, settings, seed, stage)
        return result, text.usage(folder, own.target, prepared.prompt)
    settings = images.ImageSettings(tuning=own.tuning, tunings=1)
    result = images.run_images(images.own_images(*places, seed), folder, settings, seed, stage)
    return result, images.usage(folder, own.target)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread.

    Several threads only wait for each other on models this small, and figures would depend on their number.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
