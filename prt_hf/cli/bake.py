"""`prt-hf bake`."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import TYPE_CHECKING, Any

from ..errors import PRTValueError
from .arguments import DTYPES, add_across, add_command, add_json, add_option, positive, with_default
from .generation import recipe_at

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainingArguments

    from ..inference.prt_model import PRTPreTrainedModel

DESCRIPTION = """\
Make an ordinary LoRA of a backbone that has the distribution of the backbone with rewards. It needs no labels: texts,
prompts alone (the LoRA writes the answers, the PRT model scores them), or images. One model is left at inference, which
merges, quantises and converts like any other. Options that are not listed here are those of TRL's SFTConfig."""
EXAMPLES = """examples:
  prt-hf bake Qwen/Qwen2.5-7B --reward me/gsm8k-reward --dataset_name texts.jsonl --output_dir gsm8k-7b-lora
  prt-hf bake gsm8k-7b --dataset_name prompts.jsonl --output_dir gsm8k-7b-lora
  prt-hf bake google/vit-large-patch16-224 --reward me/cars-reward --dataset_name photos/ --output_dir cars-lora"""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(commands, "bake", "make one plain model of a backbone with rewards", DESCRIPTION, EXAMPLES)
    parser.add_argument("backbone", help="Hub id or folder of the backbone, or of a recipe")
    many = {"nargs": "+", "action": "extend", "default": []}
    add_option(parser, "reward", **many, help="Hub ids or folders of rewards or LoRA adapters; not with a recipe")
    add_option(parser, "strength", **many, type=float, metavar="S", help="1 / lambda of each reward; default: as tuned")
    add_across(parser)
    data = parser.add_argument_group("data")
    text = "Hub id, folder, or file; columns: text, prompt and completion, messages, prompt alone, or image"
    add_option(data, "dataset_name", required=True, metavar="DATA", help=text)
    add_option(data, "dataset_config", help="configuration of a data set that has several")
    add_option(data, "dataset_train_split", default="train", help=with_default("split to bake on"))
    training = parser.add_argument_group("training")
    add_option(training, "output_dir", required=True, metavar="FOLDER", help="where the LoRA and its checkpoints go")
    add_option(training, "lora_r", type=positive(int), metavar="N", default=16, help=with_default("rank of the LoRA"))
    add_option(training, "lora_alpha", type=positive(int), metavar="N", help="its scale; default: twice the rank")
    text = "layers of the LoRA; default: all linear layers but a language model's head, all layers of a classifier"
    add_option(training, "lora_target_modules", nargs="+", metavar="NAME", help=text)
    models = parser.add_argument_group("models")
    add_option(models, "dtype", choices=DTYPES, help="type of all weights; default: each model's as it is stored")
    add_option(models, "revision", help="branch, tag or commit of the backbone")
    add_option(models, "trust_remote_code", action="store_true", help="run code from the models' repositories")
    add_json(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Bake, save the LoRA with its card, and print the figures and the next commands."""
    config = _config(args)

    from transformers import set_seed

    from ..baking.trainer import bake
    from ..contract import TEXT_GENERATION

    model = _model(args)
    rows = _rows(args, model)
    if model.task != TEXT_GENERATION:
        config = _for_classifiers(config)
    set_seed(config.seed)  # a LoRA starts at random
    student = bake(model, rows, config, _lora(args, model))
    parameters = sum(value.numel() for value in student.parameters() if value.requires_grad)
    report = {"output_dir": args.output_dir, "rows": len(rows), "parameters": parameters}
    print(json.dumps(report) if args.json else _describe(report, args.backbone))


def _config(args: argparse.Namespace) -> TrainingArguments:
    """Return the trainer's options, which [`add_parser`] does not name."""
    from transformers.utils import is_torch_bf16_gpu_available
    from trl import TrlParser

    from ..baking.trainer import BakeConfig

    parser = TrlParser([BakeConfig], prog="prt-hf bake", usage=argparse.SUPPRESS, allow_abbrev=False)
    if not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)  # TRL's default fails here
    try:
        return parser.parse_args_into_dataclasses(["--output_dir", args.output_dir, *args.rest])[0]
    except (ValueError, TypeError) as error:  # from the configuration class
        raise PRTValueError("The options of training cannot be used.", found=str(error)) from error


def _model(args: argparse.Namespace) -> PRTPreTrainedModel:
    """Load the backbone and the rewards, or a recipe."""
    import torch

    from .. import inference
    from ..playground.comparison import load

    kwargs: dict[str, Any] = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    config = recipe_at(args.backbone, args.reward, **kwargs)
    kwargs |= {"dtype": getattr(torch, args.dtype)} if args.dtype else {}
    if config is not None:
        model = getattr(inference, config.architectures[0]).from_pretrained(args.backbone, **kwargs)
        model.strengths = args.strength or model.strengths
        return model
    kwargs["across_vocabularies"] = args.across_vocabularies
    return load(args.backbone, args.reward, args.strength or None, **kwargs)


def _rows(args: argparse.Namespace, model: PRTPreTrainedModel) -> Dataset:
    """Return the rows to bake on: what TRL reads, token ids of texts, or images."""
    from ..contract import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION
    from ..training.data import load_data, require_column, require_split, require_texts

    name = args.dataset_name
    rows = require_split(load_data(name, args.dataset_config), args.dataset_train_split, name)
    if model.task == IMAGE_CLASSIFICATION:
        require_column(rows, "image", name)
        return rows.select_columns(["image"])
    if model.task == TEXT_CLASSIFICATION:
        require_texts(rows, "text", name)
        tokenizer = model.processing_class
        return rows.map(
            lambda batch: tokenizer(batch["text"], truncation=True), batched=True, remove_columns=rows.column_names
        )
    return rows


def _for_classifiers(config: TrainingArguments) -> TrainingArguments:
    """Return the options that every trainer has."""
    from dataclasses import fields

    from transformers import TrainingArguments

    values = {each.name: getattr(config, each.name) for each in fields(TrainingArguments) if each.init}
    return TrainingArguments(**values)


def _lora(args: argparse.Namespace, model: PRTPreTrainedModel) -> LoraConfig:
    from ..baking.trainer import default_lora

    config = default_lora(model)
    config.r, config.lora_alpha = args.lora_r, args.lora_alpha or 2 * args.lora_r
    if args.lora_target_modules:
        names = args.lora_target_modules
        config.target_modules = "all-linear" if names == ["all-linear"] else set(names)
    return config


def _describe(report: dict, backbone: str) -> str:
    folder = shlex.quote(report["output_dir"])
    return "\n".join(
        [
            f"baked on {report['rows']} rows: {folder}, a LoRA of {report['parameters']:,} parameters",
            "",
            "Next:",
            f'  AutoPeftModelForCausalLM.from_pretrained("{report["output_dir"]}").merge_and_unload()',
            f"  prt-hf evaluate REWARD --targets {shlex.quote(backbone)} --baked {folder} --data test.jsonl",
        ]
    )
