"""The options of `prt-hf train`, on the command line or in a YAML file, as in TRL's commands."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PRTError, PRTValueError
from .arguments import DTYPES as TORCH_DTYPES
from .arguments import add_json, add_option, describe_unknown

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

    from ..training.config import PRTConfig

DESCRIPTION = """\
Tune a reward on a pretrained model, its source backbone. The reward can then be added to the logits of any model with
the same vocabulary, an update of it, or the same labels. Language models, text classifiers and image classifiers are
recognised by the model's configuration.

  prt-hf train --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara --output_dir capybara-reward
  prt-hf train --model_name_or_path google/vit-base-patch16-224 --dataset_name photos/ --output_dir photo-reward
  prt-hf train --config reward.yaml --max_steps 100

A YAML file has an option in each line, without dashes (`learning_rate: 1.0e-4`); options on the command line take
precedence. The default learning rate is {rate} for an adapter, and the trainer's with --full. Language models are tuned
on the columns of TRL's SFTTrainer: text, prompt and completion, or messages. A file is the split `train`; a folder with
train.jsonl and test.jsonl, or with folders of images, has these splits.
On several devices: torchrun --nproc_per_node 8 -m prt_hf.cli train ..."""
ADAPTER_LEARNING_RATE = 2e-4
LORA_NAMES = {"lora_r": "r", "lora_target_modules": "target_modules"}  # the others are PEFT's own
DTYPES = ("auto", *TORCH_DTYPES)


_OTHER_NAMES = {  # of TRL's commands and others'
    "--lr": "did you mean --learning_rate?",
    "--epochs": "did you mean --num_train_epochs?",
    "--batch_size": "did you mean --per_device_train_batch_size?",
    "--use_peft": "an adapter is tuned unless --full is given",
}


def _option(text: str, aliases: list[str] | None = None, **kwargs: Any) -> Any:
    return field(metadata={"help": text, "aliases": aliases or []}, **kwargs)


@dataclass
class ModelOptions:
    """The model that the reward starts from, and the backbones that it is tuned on."""

    _argument_group_name = "model"

    model_name_or_path: str = _option(
        "Hub id or folder of a pretrained model, or of a saved reward to tune further.", aliases=["--model"]
    )
    model_revision: str | None = _option("Branch, tag or commit of the model.", default=None)
    dtype: str | None = _option(
        f"Type of its weights: {', '.join(DTYPES)}. Default: as stored, and float32 with --full.", default=None
    )
    attn_implementation: str | None = _option("Attention implementation, as transformers names it.", default=None)
    backbone: list[str] | None = _option(
        "Hub ids or folders of other source backbones; each step draws one of them. Default: the model itself.",
        default=None,
    )
    distill_from: str | None = _option(
        "Hub id or folder of a model that was fine-tuned from the source backbone, or of such a LoRA adapter: the "
        "reward learns its distribution on the texts instead of the labels.",
        default=None,
    )

    def __post_init__(self):
        self.backbone = _as_list(self.backbone)
        if self.dtype not in (None, *DTYPES):
            raise PRTValueError("`dtype` is not usable.", expected=" or ".join(DTYPES), found=repr(self.dtype))


@dataclass
class DataOptions:
    """The data set, and the columns that a classifier reads."""

    _argument_group_name = "data"

    dataset_name: str = _option("Hub id, folder, or file (.json, .jsonl, .csv, .parquet, .txt).", aliases=["--dataset"])
    dataset_config: str | None = _option("Configuration of a data set that has several.", default=None)
    dataset_train_split: str = _option("Split to tune on.", default="train")
    dataset_test_split: str = _option("Split to evaluate on, unless --eval_strategy is no.", default="test")
    text_column: str = _option("Column of texts; the same as --dataset_text_field for language models.", default="text")
    image_column: str = _option("Column of images.", default="image")
    label_column: str = _option("Column of a classifier's labels, matched with the model's by name.", default="label")


@dataclass
class AdapterOptions:
    """The parameters that are tuned."""

    _argument_group_name = "adapter"

    full: bool = _option("Tune all weights instead of a LoRA adapter.", default=False)
    lora_r: int | None = _option("Rank; default: that of prt_hf.default_peft_config.", default=None)
    lora_alpha: int | None = _option("Scale; default: that of prt_hf.default_peft_config.", default=None)
    lora_dropout: float | None = _option("Dropout on the adapter's inputs; default: PEFT's.", default=None)
    lora_target_modules: list[str] | None = _option(
        "Names of layers, or all-linear; default: every linear layer and the head.", default=None
    )
    top_layers: int | None = _option(
        "Adapt only this many layers at the top, and the head; faster on the model's own base.", default=None
    )

    def __post_init__(self):
        self.lora_target_modules = _as_list(self.lora_target_modules)
        if self.full and self.given:
            raise PRTValueError("A full reward has no adapter.", expected="--full alone", found=", ".join(self.given))
        if self.top_layers is not None and self.lora_target_modules is not None:
            raise PRTValueError("The layers are given twice.", expected="--top_layers or --lora_target_modules")

    @property
    def given(self) -> dict[str, Any]:
        """The options other than `full` that are not left at their defaults."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "full"}
        return {name: value for name, value in values.items() if value is not None}

    def peft_config(self, model: PreTrainedModel) -> PeftConfig | None:
        """Return the `LoraConfig` for a model, or None for a full reward."""
        from ..reward.adapter import default_peft_config

        if self.full:
            return None
        kwargs = {LORA_NAMES.get(name, name): value for name, value in self.given.items()}
        self._check_targets(model)
        if kwargs.get("target_modules") == ["all-linear"]:
            kwargs["target_modules"] = "all-linear"  # PEFT's keyword
        return default_peft_config(model, **kwargs)

    def _check_targets(self, model: PreTrainedModel) -> None:
        """Raise `PRTValueError` if a named layer is not there: PEFT would do so for all of them only."""
        weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
        layers = [name for name, weight in weights.items() if weight is not None and weight.ndim > 1]  # not norms
        wanted = set(self.lora_target_modules or ()) - {"all-linear"}
        absent = sorted(name for name in wanted if not any(f".{layer}".endswith(f".{name}") for layer in layers))
        if absent:
            raise PRTValueError(
                "The model has no layers of these names.",
                expected=f"some of {', '.join(sorted({layer.rpartition('.')[2] for layer in layers}))}, or all-linear",
                found=", ".join(absent),
                remedy="--lora_target_modules",
            )


class Options:
    """The options of one call: those that any model has, and those of the trainer once the model's task is known.

    Wrong arguments raise `SystemExit` with status 2, after a message.

    Attributes:
        model ([`ModelOptions`]), data ([`DataOptions`]), adapter ([`AdapterOptions`])
        trust_remote_code (`bool`): Run code from the model's repository.
        json (`bool`): Report as JSON.
    """

    def __init__(self, arguments: list[str]):
        self._arguments = _with_readable_config(arguments)
        self.model, self.data, self.adapter, rest, _ = _parse(_parser(), self._arguments)
        self.trust_remote_code, self.json = rest.trust_remote_code, rest.json

    def training_config(self, config_class: type[PRTConfig], task: str, **defaults: Any) -> PRTConfig:
        """Return the trainer's options as a configuration.

        Args:
            config_class: [`PRTConfig`] or [`PRTSFTConfig`].
            task: The model's task, for messages.
            defaults: Take the place of the class's own.
        """
        parser = _parser(config_class)
        parser.set_defaults(**defaults)
        for action in parser._actions:
            action.required |= action.dest == "output_dir"  # the default would be shared by all runs
        *_, config, _, unknown = _parse(parser, self._arguments)
        if unknown:
            parser.error(_describe_unknown(parser, unknown, task))
        return config


def print_help() -> None:
    """Print the help text with all options."""
    from ..training.sft import PRTSFTConfig  # has the options of classifiers, and more

    parser = _parser(PRTSFTConfig)
    parser.set_defaults(learning_rate=ADAPTER_LEARNING_RATE)
    parser.print_help()


def _parser(config_class: type | None = None) -> argparse.ArgumentParser:
    from transformers.hf_argparser import string_to_bool
    from trl import TrlParser

    kinds = [ModelOptions, DataOptions, AdapterOptions, *([config_class] if config_class else [])]
    parser = TrlParser(
        kinds,
        prog="prt-hf train",
        usage="prt-hf train --model_name_or_path MODEL --dataset_name DATA [--config FILE] [options]",
        description=DESCRIPTION.format(rate=ADAPTER_LEARNING_RATE),
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    add_option(parser, "config", metavar="FILE", help="a YAML file with options")
    add_json(parser, "print one JSON object on the last line of the output")
    if config_class is None or "trust_remote_code" not in {each.name for each in fields(config_class)}:
        # As HfArgumentParser adds the field of SFTConfig, which PRTConfig and older versions of TRL do not have.
        add_option(
            parser,
            "trust_remote_code",
            type=string_to_bool,
            nargs="?",
            const=True,
            default=False,
            help="run code from the model's repository",
        )
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the line breaks of the examples, and show defaults other than None."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def _parse(parser, arguments: list[str]) -> tuple:
    try:
        return parser.parse_args_and_config(arguments, return_remaining_strings=True)
    except PRTError:
        raise
    except (ValueError, TypeError) as error:  # from the configuration classes
        parser.error(str(error))


def _with_readable_config(arguments: list[str]) -> list[str]:
    """Return the arguments with `--config FILE` first, where TRL looks for it."""
    import yaml

    finder = argparse.ArgumentParser(prog="prt-hf train", usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, others = finder.parse_known_args(arguments)
    if found.config is None:
        return others
    try:
        options = yaml.safe_load(Path(found.config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PRTValueError(
            f"{found.config} cannot be read.", expected="a YAML file with options", found=str(error)
        ) from error
    if not isinstance(options, dict):
        raise PRTValueError(
            f"{found.config} holds no options.", expected="lines of the form `option: value`", found=repr(options)[:80]
        )
    return ["--config", found.config, *others]


def _describe_unknown(parser: argparse.ArgumentParser, unknown: list[str], task: str) -> str:
    from ..training.sft import PRTSFTConfig

    names = [f"--{each.name}" for each in fields(PRTSFTConfig)]
    hints = {name: f"{name} is for language models, not for {task}" for name in names}
    return describe_unknown(unknown, [f"--{action.dest}" for action in parser._actions], hints | _OTHER_NAMES)


def _as_list(value: str | list[str] | None) -> list[str] | None:
    """Return a list of names; a YAML file may give a single name instead of a list."""
    return [value] if isinstance(value, str) else value
