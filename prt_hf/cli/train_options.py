"""The options of `prt-hf train`, on the command line or in a YAML file, as TRL's commands have them."""

import argparse
import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path

from ..errors import PRTError, PRTValueError

DESCRIPTION = """\
Tune a reward on a pretrained model, its source backbone: later it is added to the logits of any model with the same
vocabulary or labels. The model's configuration tells what is tuned: a language model, a text or an image classifier.

  prt-hf train --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara --output_dir capybara-reward
  prt-hf train --model_name_or_path google/vit-base-patch16-224 --dataset_name photos/ --output_dir photo-reward
  prt-hf train --config reward.yaml --max_steps 100

A YAML file has the options' names without dashes, one a line (`learning_rate: 1.0e-4`); what stands on the command line
goes before it. The learning rate is {rate} for an adapter by default, and the trainer's with --full. Language models
take the columns that TRL's SFTTrainer takes: text, prompt and completion, or messages. A file has one split, `train`;
a folder with train.jsonl and test.jsonl, or with folders of images, has those.
Several devices: torchrun --nproc_per_node 8 -m prt_hf.cli train ..."""
ADAPTER_LEARNING_RATE = 2e-4
LORA_NAMES = {"lora_r": "r", "lora_target_modules": "target_modules"}  # the others are PEFT's own
DTYPES = ("auto", "bfloat16", "float16", "float32")


def _option(text: str, **kwargs):
    return field(metadata={"help": text}, **kwargs)


@dataclass
class ModelOptions:
    """What the reward starts from, and what it is tuned on."""

    _argument_group_name = "model"

    model_name_or_path: str = _option("Hub id or folder: a pretrained model, or a saved reward, which is tuned on.")
    model_revision: str | None = _option("Branch, tag or commit of the model.", default=None)
    dtype: str | None = _option(
        f"Of its weights: {', '.join(DTYPES)}. By default as stored, and float32 where they are tuned (--full).",
        default=None,
    )
    attn_implementation: str | None = _option("Of attention, as transformers names it.", default=None)
    backbone: list[str] | None = _option(
        "Other source backbones to tune on, Hub ids or folders; every step draws one. By default the model itself.",
        default=None,
    )

    distill_from: str | None = _option(
        "A model that was fine-tuned from the source backbone, or a LoRA adapter of it, Hub id or folder: the reward "
        "is tuned to its distribution on the texts.",
        default=None,
    )

    def __post_init__(self):
        self.backbone = _as_list(self.backbone)
        if self.dtype not in (None, *DTYPES):
            raise PRTValueError("`dtype` is not usable.", expected=" or ".join(DTYPES), found=repr(self.dtype))


@dataclass
class DataOptions:
    """Where the rows come from, and which columns of them a classifier reads."""

    _argument_group_name = "data"

    dataset_name: str = _option("Hub id, folder, or file (.json, .jsonl, .csv, .parquet, .txt).")
    dataset_config: str | None = _option("Of a data set with several.", default=None)
    dataset_train_split: str = _option("Rows to tune on.", default="train")
    dataset_test_split: str = _option("Rows to evaluate on, unless --eval_strategy is no.", default="test")
    text_column: str = _option("Texts; of a language model also --dataset_text_field.", default="text")
    image_column: str = _option("An image classifier's images.", default="image")
    label_column: str = _option("A classifier's labels, matched to the model's by name.", default="label")


@dataclass
class AdapterOptions:
    """Which parameters are tuned."""

    _argument_group_name = "adapter"

    full: bool = _option("Tune all weights instead of a LoRA adapter.", default=False)
    lora_r: int | None = _option("Rank; default: see prt_hf.default_peft_config.", default=None)
    lora_alpha: int | None = _option("Scale; default: see there.", default=None)
    lora_dropout: float | None = _option("On the adapter's inputs; default: PEFT's.", default=None)
    lora_target_modules: list[str] | None = _option(
        "Layers, or all-linear; default: every linear layer and the head.", default=None
    )
    top_layers: int | None = _option(
        "Adapt this many of the uppermost layers, and the head: faster on the model's own base.", default=None
    )

    def __post_init__(self):
        self.lora_target_modules = _as_list(self.lora_target_modules)
        if self.full and self.given:
            raise PRTValueError("A full reward has no adapter.", expected="--full alone", found=", ".join(self.given))
        if self.top_layers is not None and self.lora_target_modules is not None:
            raise PRTValueError("The layers are named twice.", expected="--top_layers or --lora_target_modules")

    @property
    def given(self) -> dict:
        """All but `full`, where not left to the default."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "full"}
        return {name: value for name, value in values.items() if value is not None}

    def peft_config(self, model):
        """`LoraConfig` for a model, or None for a full reward."""
        from ..reward.adapter import default_peft_config

        if self.full:
            return None
        kwargs = {LORA_NAMES.get(name, name): value for name, value in self.given.items()}
        if kwargs.get("target_modules") == ["all-linear"]:
            kwargs["target_modules"] = "all-linear"  # a word of PEFT's, not a layer
        return default_peft_config(model, **kwargs)


class Options:
    """All that was given, before and after the model's task is known.

    Attributes:
        model ([`ModelOptions`]), data ([`DataOptions`]), adapter ([`AdapterOptions`])
        trust_remote_code (`bool`): may run code that lies beside the model.
        json (`bool`): report as JSON.
    """

    def __init__(self, arguments: list[str]):
        """
        Raises:
            PRTValueError: the YAML file cannot be read, or options exclude each other.
            SystemExit: with 2, after a message, where arguments are wrong.
        """
        self._arguments = _with_readable_config(arguments)
        self.model, self.data, self.adapter, rest, _ = _parse(_parser(), self._arguments)
        self.trust_remote_code, self.json = rest.trust_remote_code, rest.json

    def training_config(self, config_class: type, task: str, **defaults):
        """The other options, as a [`PRTConfig`] or [`PRTSFTConfig`]; `defaults` stand in for the class's own.

        Raises:
            SystemExit: with 2, after a message, where arguments are wrong or unknown.
        """
        parser = _parser(config_class)
        parser.set_defaults(**defaults)
        for action in parser._actions:
            action.required |= action.dest == "output_dir"  # no name that two runs would share
        *_, config, _, unknown = _parse(parser, self._arguments)
        if unknown:
            parser.error(_describe_unknown(parser, unknown, task))
        return config


def print_help() -> None:
    from ..training.sft import PRTSFTConfig  # has all that classifiers take, and more

    parser = _parser(PRTSFTConfig)
    parser.set_defaults(learning_rate=ADAPTER_LEARNING_RATE)
    parser.print_help()


def _parser(config_class: type | None = None):
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
    parser.add_argument("--config", metavar="FILE", help="a YAML file with options")
    parser.add_argument("--json", action="store_true", help="print one object on the last line of the output")
    if config_class is None or "trust_remote_code" not in {each.name for each in fields(config_class)}:
        # As HfArgumentParser adds the field of SFTConfig, which older TRL and PRTConfig have not.
        parser.add_argument(
            "--trust_remote_code",
            type=string_to_bool,
            nargs="?",
            const=True,
            default=False,
            help="may run code that lies beside the model",
        )
    return parser


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Examples stay as they are written, and a default is told where there is one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def _parse(parser, arguments: list[str]) -> tuple:
    try:
        return parser.parse_args_and_config(arguments, return_remaining_strings=True)
    except PRTError:
        raise
    except (ValueError, TypeError) as error:  # of values that do not go together
        parser.error(str(error))


def _with_readable_config(arguments: list[str]) -> list[str]:
    """The arguments with `--config FILE` in the place where TRL looks for it."""
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


def _describe_unknown(parser, unknown: list[str], task: str) -> str:
    from ..training.sft import PRTSFTConfig

    known = [action.dest for action in parser._actions]
    of_language_models = {each.name for each in fields(PRTSFTConfig)}
    hints = []
    for argument in unknown:
        name = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and name in of_language_models:
            hints.append(f"--{name} is for language models, not for {task}")
        elif argument.startswith("--"):
            hints += [f"did you mean --{close}?" for close in difflib.get_close_matches(name, known, n=1)]
    return "; ".join([f"unrecognized arguments: {' '.join(unknown)}", *hints])


def _as_list(value) -> list[str] | None:
    """A YAML file may give a single name as it is."""
    return [value] if isinstance(value, str) else value
