"""`prt-hf train`."""

import argparse
import json
import logging
import shlex
from pathlib import Path
from time import perf_counter

from ..errors import PRTError, PRTValueError
from .train_options import ADAPTER_LEARNING_RATE, DataOptions, Options, print_help

logger = logging.getLogger(__name__)
TRAINER_STATE_NAME = "trainer_state.json"


def add_parser(commands) -> argparse.ArgumentParser:
    """A parser that knows no options: they depend on the model, and are left to [`run`] (`arguments.rest`)."""
    return commands.add_parser("train", add_help=False, help="tune a reward on a model and data of your own")


def run(args: argparse.Namespace) -> None:
    if {"-h", "--help"} & set(args.rest):
        print_help()
        return
    options = Options(args.rest)
    from transformers import set_seed  # training libraries: not needed to show help

    start = perf_counter()
    task, saved = _kind(options)
    config = _config(options, task, saved)
    checkpoint = _checkpoint(config)
    _check_output(Path(config.output_dir), is_resumed=checkpoint is not None)
    if config.process_index > 0:
        _be_quiet()
    set_seed(config.seed)  # an adapter starts at random
    trainer = _trainer(options, config, task, saved)
    metrics = _train(trainer, checkpoint)
    if config.do_eval:
        metrics |= trainer.evaluate()
    dataset = options.data.dataset_name
    of_card = {} if Path(dataset).exists() else {"dataset_name": dataset}
    trainer.save_model(_internal_call=True)  # without a push
    trainer.create_model_card(**of_card)
    if config.push_to_hub:
        trainer.push_to_hub(**of_card)
    if trainer.is_world_process_zero():
        report = {
            "output_dir": config.output_dir,
            "train_loss": metrics.get("train_loss"),
            "metrics": metrics,
            "steps": trainer.state.global_step,
            "seconds": perf_counter() - start,
        }
        print(json.dumps(report) if options.json else _describe(report, task, config), flush=True)
    trainer.accelerator.end_training()


def _kind(options: Options):
    """The model's task, and the configuration of a reward if it is one."""
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
            "The model is a reward already, and is tuned on as it is.",
            expected="no options of the adapter",
            found=", ".join(["full"] if options.adapter.full else options.adapter.given),
        )
    return saved.task, saved


def _config(options: Options, task: str, saved):
    from transformers.utils import is_torch_bf16_gpu_available

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
    if not is_torch_bf16_gpu_available():
        defaults["bf16"] = False  # TRL's default is not to be had
    return options.training_config(PRTSFTConfig, task, **defaults)


def _check_output(folder: Path, is_resumed: bool) -> None:
    from ..contract import PRT_CONFIG_NAME

    if folder.exists() and not folder.is_dir():
        raise PRTValueError("The output directory is a file.", expected="a folder", found=str(folder))
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    is_ours = PRT_CONFIG_NAME in names or any(name.startswith("checkpoint-") for name in names)
    if names and not is_ours:
        raise PRTValueError(
            f"{folder} holds files that are no reward's.",
            expected="a new or empty folder, or one with checkpoints to go on from",
            found=", ".join(names[:5]),
            remedy="name another one: --output_dir",
        )
    if is_ours and not is_resumed:
        raise PRTValueError(
            f"{folder} holds an earlier run.",
            expected="a new or empty folder, or a run that is gone on with",
            found=", ".join(names[:5]),
            remedy="--resume_from_checkpoint true, or another --output_dir",
        )


def _checkpoint(config) -> str | None:
    """The checkpoint to go on from: `resume_from_checkpoint` is a folder, or true for the last one."""
    from ..training.saving import last_checkpoint

    given, folder = str(config.resume_from_checkpoint or "false"), config.output_dir
    if given.lower() == "false":
        return None
    found = last_checkpoint(Path(folder)) if given.lower() == "true" else given
    if found is None or not (Path(found) / TRAINER_STATE_NAME).is_file():
        raise PRTValueError(
            "There is no checkpoint to go on from.",
            expected="--resume_from_checkpoint a checkpoint-* folder, or true for the last one in --output_dir",
            found=f"none in {folder}" if found is None else str(found),
        )
    return found


def _train(trainer, checkpoint: str | None) -> dict:
    """Its metrics; none where the checkpoint has all the steps, of which the trainer would add one."""
    from transformers import TrainerState

    if checkpoint is None:
        return trainer.train().metrics
    steps = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    try:
        if steps < trainer.args.max_steps or trainer.args.max_steps <= 0:
            return trainer.train(resume_from_checkpoint=checkpoint).metrics
        logger.warning(f"{checkpoint} has {steps} of {trainer.args.max_steps} steps: nothing is left to train.")
        trainer._load_from_checkpoint(checkpoint)
        trainer.state.global_step = steps
        return {}
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise PRTValueError(
            f"{checkpoint} has weights of other shapes than the reward.",
            expected="the model and the adapter's options (--lora_r, ...) that it was made with",
            found=str(error).splitlines()[-1].strip(),
        ) from error


def _be_quiet() -> None:
    """What one process says is enough."""
    import datasets
    from transformers.utils import logging as transformers_logging

    for name in ("prt_hf", "trl", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _trainer(options: Options, config, task: str, saved):
    from ..contract import TEXT_GENERATION
    from ..training.sft import PRTSFTTrainer
    from ..training.trainer import PRTTrainer

    try:
        model, processing_class, peft_config = _model(options, config, task, saved)
    except PRTError:
        raise
    except (ValueError, TypeError) as error:
        raise PRTValueError("The model refuses the options.", found=str(error)) from error
    network = model.network if saved else model
    backbones = options.model.backbone
    if backbones and not saved:
        # The model itself is in memory: None stands for it.
        backbones = [None if name == options.model.model_name_or_path else name for name in backbones]
    with config.main_process_first(desc="preparing the data"):
        parts = _rows(options, config, task, network, processing_class, _places(backbones, saved))
    trainer_class = PRTSFTTrainer if task == TEXT_GENERATION else PRTTrainer
    try:
        return trainer_class(
            model,
            config,
            train_dataset=parts[0],
            eval_dataset=parts[1] if len(parts) > 1 else None,
            processing_class=processing_class,
            backbone=backbones,
            distill_from=options.model.distill_from,
            peft_config=peft_config,
        )
    except PRTError:
        raise
    except ValueError as error:
        raise PRTValueError("The trainer refuses the options, or the data.", found=str(error)) from error


def _model(options: Options, config, task: str, saved):
    """A pretrained model or a saved reward; its tokenizer or image processor; the adapter to add."""
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
        config.model_init_kwargs = None  # TRL would say that it ignores them
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
        raise PRTValueError(
            f"{name} has no {kind} that can be loaded.", expected=f"a model that lies beside its {kind}", found="none"
        )
    return processing_class


def _places(backbones: list[str | None] | None, saved) -> list[tuple[str | None, str | None]]:
    """Id and revision of every source backbone; None for the model's own base, and for what was made in memory."""
    from ..reward.backbones import is_own_base

    if backbones or not saved:
        return [(name, None) for name in backbones or [None]]
    is_own = [saved.is_adapter and is_own_base(saved, source) for source in saved.sources]
    return [(None if own else source.id, source.revision) for source, own in zip(saved.sources, is_own, strict=True)]


def _rows(options: Options, config, task: str, network, processing_class, backbones: list) -> list:
    """To tune on, and to evaluate on if that is asked for."""
    from ..training.data import load_data, require_split

    data = options.data
    parts = load_data(data.dataset_name, data.dataset_config)
    splits = [data.dataset_train_split, *([data.dataset_test_split] if config.do_eval else [])]
    rows = [require_split(parts, split, data.dataset_name) for split in splits]
    return [_prepared(part, data, config, task, network, processing_class, backbones) for part in rows]


def _pixels(config, processing_class, backbones: list) -> dict:
    """What makes the columns of pixels: the reward's, and those of every backbone that wants others."""
    from ..contract import IMAGE_CLASSIFICATION
    from ..networks.auto import load_config, load_processing_class
    from ..training.data import pixel_makers

    theirs = [
        (None, None)
        if name is None
        else (load_processing_class(name, IMAGE_CLASSIFICATION, revision=at), load_config(name, revision=at))
        for name, at in backbones
    ]
    return pixel_makers(processing_class, config, theirs)


def _prepared(rows, data: DataOptions, config, task: str, network, processing_class, backbones: list):
    """What the trainer takes: language models' rows as they are, classifiers' as inputs and labels."""
    from ..contract import IMAGE_CLASSIFICATION, TEXT_GENERATION
    from ..networks.anatomy import context_length, unwrap_adapter
    from ..training.data import check_language_rows, classified_images, classified_texts

    model_config = unwrap_adapter(network).config
    if task == IMAGE_CLASSIFICATION:
        config.remove_unused_columns = False  # it would remove the images before they are read
        return classified_images(
            rows,
            data.dataset_name,
            image_column=data.image_column,
            label_column=data.label_column,
            id2label=model_config.id2label,
            pixels=_pixels(model_config, processing_class, backbones),
            is_lazy=not config.precompute_backbone,
        )
    limit = context_length(network)
    if task == TEXT_GENERATION:
        has_template = bool(processing_class.chat_template or config.chat_template_path)
        check_language_rows(rows, config.dataset_text_field, has_template, data.dataset_name)
        if config.max_length is not None and limit is not None:
            config.max_length = min(config.max_length, limit)  # TRL's default is longer than some models can read
        return rows
    return classified_texts(
        rows,
        data.dataset_name,
        text_column=data.text_column,
        label_column=data.label_column,
        id2label=model_config.id2label,
        tokenizer=processing_class,
        length=limit,
    )


def _describe(report: dict, task: str, config) -> str:
    from ..contract import TEXT_GENERATION

    folder, steps, seconds = shlex.quote(report["output_dir"]), report["steps"], report["seconds"]
    is_trained = report["train_loss"] is not None
    figures = [f"train_loss {report['train_loss']:.4f}" if is_trained else "no further training, weights unchanged"]
    if "eval_loss" in report["metrics"]:
        figures.append(f"eval_loss {report['metrics']['eval_loss']:.4f}")
    lines = [f"{steps} steps in {seconds:.0f} s; {', '.join(figures)}", f"reward: {folder}", "", "Next:"]
    lines.append(f"  prt-hf check {folder} BACKBONE")
    if task == TEXT_GENERATION:
        lines.append(f'  prt-hf generate BACKBONE --reward {folder} --prompt "..."')
    if not config.push_to_hub:
        lines.append(f"  prt-hf push {folder} USER/NAME")
    return "\n".join(lines)
