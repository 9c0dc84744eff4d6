"""`prt-hf train`."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from ..errors import PRTError, PRTValueError
from .train_options import ADAPTER_LEARNING_RATE, Options, print_help

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from ..contract import RewardConfig
    from ..reward.model import RewardModel
    from ..training.config import PRTConfig
    from ..training.trainer import PRTTrainer


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add a parser without options: these depend on the model, and [`run`] parses them (`arguments.rest`)."""
    return commands.add_parser("train", add_help=False, help="tune a reward on your own model and data")


def run(args: argparse.Namespace) -> None:
    """Tune a reward, save it with its card, and print the figures and the next commands."""
    if {"-h", "--help"} & set(args.rest):
        print_help()
        return
    options = Options(args.rest)
    from transformers import set_seed

    from ..training.saving import checkpoint_to_resume, trained_steps

    start = perf_counter()
    task, saved = _task(options)
    config = _config(options, task, saved)
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint, config.output_dir)
    _check_output(Path(config.output_dir), is_resumed=checkpoint is not None)
    if config.process_index > 0:
        _silence()
    set_seed(config.seed)  # an adapter starts at random
    trainer = _trainer(options, config, task, saved)
    metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    if trainer.state.global_step == trained_steps(checkpoint):
        metrics = {}  # of no step
    if config.do_eval:
        metrics |= trainer.evaluate()
    dataset = options.data.dataset_name
    card_kwargs = {} if Path(dataset).exists() else {"dataset_name": dataset}
    trainer.save_model(_internal_call=True)  # without a push
    trainer.create_model_card(**card_kwargs)
    if config.push_to_hub:
        trainer.push_to_hub(**card_kwargs)
    if trainer.is_world_process_zero():
        report = {
            "output_dir": config.output_dir,
            "train_loss": metrics.get("train_loss"),
            "metrics": metrics,
            "steps": trainer.state.global_step,
            "seconds": perf_counter() - start,
        }
        print(json.dumps(report) if options.json else _describe(report, trainer.reward.config, config), flush=True)
    trainer.accelerator.end_training()


def _task(options: Options) -> tuple[str, RewardConfig | None]:
    """Return the model's task, and its configuration if it is a saved reward."""
    from ..contract import PRT_CONFIG_NAME, RewardConfig
    from ..hub.client import has_file, local_folder
    from ..networks.auto import task_of_checkpoint
    from ..training.data import first_line

    name, revision = options.model.model_name_or_path, options.model.model_revision
    try:
        if not has_file(name, PRT_CONFIG_NAME):
            return task_of_checkpoint(name, revision=revision, trust_remote_code=options.trust_remote_code), None
        saved = RewardConfig.from_json_file(local_folder(name, revision) / PRT_CONFIG_NAME)
    except PRTError:
        raise
    except (OSError, ValueError) as error:
        raise PRTValueError(
            f"{name} cannot be loaded.",
            expected="an id of the Hub, or a folder, with a pretrained model or a saved reward",
            found=first_line(error),
        ) from error
    if options.adapter.full or options.adapter.given:
        raise PRTValueError(
            "The model is a reward already, and its adapter cannot be changed.",
            expected="no options of the adapter",
            found=", ".join(["full"] if options.adapter.full else options.adapter.given),
        )
    return saved.task, saved


def _config(options: Options, task: str, saved: RewardConfig | None) -> PRTConfig:
    from ..contract import TEXT_GENERATION
    from ..training.config import PRTConfig
    from ..training.sft import PRTSFTConfig

    defaults = {}
    if not (options.adapter.full or (saved and not saved.is_adapter)):
        defaults["learning_rate"] = ADAPTER_LEARNING_RATE
    if saved:
        defaults["kl_coef"] = saved.kl_coef  # another is refused
    if task != TEXT_GENERATION:
        return options.training_config(PRTConfig, task, **defaults)
    defaults["dataset_text_field"] = options.data.text_column
    return options.training_config(PRTSFTConfig, task, **defaults)


def _check_output(folder: Path, is_resumed: bool) -> None:
    """Raise if files in the output directory would be mixed with those of this run."""
    from ..contract import PRT_CONFIG_NAME

    if folder.exists() and not folder.is_dir():
        raise PRTValueError("The output directory is a file.", expected="a folder", found=str(folder))
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    is_run = PRT_CONFIG_NAME in names or any(name.startswith("checkpoint-") for name in names)
    if names and not (is_run and is_resumed):
        raise PRTValueError(
            f"{folder} holds {'an earlier run' if is_run else 'files that do not belong to a reward'}.",
            expected="a new or empty folder, or one with checkpoints to resume from",
            found=", ".join(names[:5]),
            remedy="choose another one: --output_dir" + ("; or --resume_from_checkpoint true" if is_run else ""),
        )


def _silence() -> None:
    """Silence all but the main process."""
    import datasets
    from transformers.utils import logging as transformers_logging

    for name in ("prt_hf", "trl", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _trainer(options: Options, config: PRTConfig, task: str, saved: RewardConfig | None) -> PRTTrainer:
    from ..contract import TEXT_GENERATION
    from ..training.data import prepare_rows
    from ..training.sft import PRTSFTTrainer
    from ..training.trainer import PRTTrainer

    try:
        model, processing_class, peft_config = _model(options, config, task, saved)
    except PRTError:
        raise
    except (ValueError, TypeError) as error:
        raise PRTValueError("The model cannot be loaded with these options.", found=str(error)) from error
    backbones = options.model.backbone
    if backbones and not saved:
        # None stands for the model itself, which is in memory.
        backbones = [None if name == options.model.model_name_or_path else name for name in backbones]
    data = options.data
    splits = [data.dataset_train_split, *([data.dataset_test_split] if config.do_eval else [])]
    with config.main_process_first(desc="preparing the data"):
        train_rows, *evaluation_rows = prepare_rows(
            data.dataset_name,
            data.dataset_config,
            splits,
            config,
            model.network if saved else model,
            processing_class,
            _source_names(backbones, saved),
            text_column=data.text_column,
            image_column=data.image_column,
            label_column=data.label_column,
        )
    trainer_class = PRTSFTTrainer if task == TEXT_GENERATION else PRTTrainer
    try:
        return trainer_class(
            model,
            config,
            train_dataset=train_rows,
            eval_dataset=evaluation_rows[0] if evaluation_rows else None,
            processing_class=processing_class,
            backbone=backbones,
            distill_from=options.model.distill_from,
            peft_config=peft_config,
        )
    except PRTError:
        raise
    except ValueError as error:
        raise PRTValueError("The options or the data cannot be used.", found=str(error)) from error


def _model(
    options: Options, config: PRTConfig, task: str, saved: RewardConfig | None
) -> tuple[PreTrainedModel | RewardModel, object, PeftConfig | None]:
    """Return a pretrained model or a saved reward, its tokenizer or image processor, and the adapter to add."""
    from ..networks.auto import load_pretrained, load_processing_class
    from ..reward.model import RewardModel

    given, name = options.model, options.model.model_name_or_path
    kwargs = {
        "revision": given.model_revision,
        "trust_remote_code": options.trust_remote_code or None,
        "dtype": given.dtype or ("float32" if options.adapter.full else None),
        "attn_implementation": given.attn_implementation,
    }
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if init_kwargs := getattr(config, "model_init_kwargs", None):
        kwargs |= init_kwargs
        config.model_init_kwargs = None  # TRL would warn that it ignores them
    if saved:
        reward = RewardModel.from_pretrained(name, **kwargs)
        return reward, _required(reward.processing_class, name, task), None
    model = load_pretrained(name, **{"dtype": "auto"} | kwargs)
    processing_class = _required(load_processing_class(name, task, **kwargs), name, task)
    return model, processing_class, options.adapter.peft_config(model)


def _required(processing_class, name: str, task: str):
    from ..contract import IMAGE_CLASSIFICATION

    if processing_class is None:
        kind = "image processor" if task == IMAGE_CLASSIFICATION else "tokenizer"
        raise PRTValueError(f"{name} has no {kind}.", expected=f"a model whose folder also has its {kind}")
    return processing_class


def _source_names(
    backbones: list[str | None] | None, saved: RewardConfig | None
) -> list[tuple[str | None, str | None]]:
    """Return id and revision of every source backbone; the id of the reward's own base is None."""
    from ..reward.backbones import is_own_base

    if backbones or not saved:
        return [(name, None) for name in backbones or [None]]
    is_own = [saved.is_adapter and is_own_base(saved, source) for source in saved.sources]
    return [(None if own else source.id, source.revision) for source, own in zip(saved.sources, is_own, strict=True)]


def _describe(report: dict, reward: RewardConfig, config: PRTConfig) -> str:
    from ..contract import TEXT_GENERATION

    folder, steps, seconds = shlex.quote(report["output_dir"]), report["steps"], report["seconds"]
    is_trained = report["train_loss"] is not None
    figures = [f"train_loss {report['train_loss']:.4f}" if is_trained else "no further training, weights unchanged"]
    if "eval_loss" in report["metrics"]:
        figures.append(f"eval_loss {report['metrics']['eval_loss']:.4f}")
    lines = [f"{steps} steps in {seconds:.0f} s; {', '.join(figures)}", f"reward: {folder}", "", "Next:"]
    lines.append(f"  prt-hf check {folder} BACKBONE")
    if reward.is_chat:
        lines.append(f"  prt-hf chat BACKBONE --reward {folder}")
    elif reward.task == TEXT_GENERATION:
        lines.append(f'  prt-hf generate BACKBONE --reward {folder} --raw --prompt "..."')
    if not config.push_to_hub:
        lines.append(f"  prt-hf push {folder} USER/NAME")
    return "\n".join(lines)
