"""Decide which adapters can be rewards, and check files of adapters, which may come from anybody."""

import re
from dataclasses import MISSING, fields
from numbers import Real
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from ..contract import PRT_CONFIG_NAME, is_name, is_number
from ..errors import PRTError, PRTValueError, RewardFileError, UnsupportedError
from ..hub.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_shapes
from .checkpoints import read_entries

# Kinds whose weights and configuration fully describe the change of a layer. Others depend on the text (X-LoRA, Lily,
# prompts), on a task's id (Poly), or on values that each load draws anew (VeRA, FourierFT, OSF and similar), or run a
# compiler (BOFT).
_LAYER_KINDS = {
    *("ADALORA", "C3A", "DELORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "ROAD"),
    "TRAINABLE_TOKENS",
}
# LoRA's options of the same nature; options that a later PEFT adds are refused until they are known.
_LORA_OPTIONS = {
    *{entry.name for entry in fields(PeftConfig)},
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "fan_in_fan_out", "lora_dropout"),
    *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("megatron_core", "runtime_config", "layer_replication"),
}
# Not those that move a part of the base's weights into the adapter: the base with the adapter off is the source
# backbone.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
_PATTERNS = ("target_modules", "exclude_modules")
_NAMES = (
    *("modules_to_save", "layers_pattern", "feedforward_modules"),
    *("target_parameters", "rank_pattern", "alpha_pattern", "lambda_pattern", "block_size_pattern"),
    "trainable_token_indices",
)
_PLAIN = re.compile(r"\^?(\w|-|\.|\\\.)+\$?")
_MOST_UNITS = 2**16  # ranks and blocks, if the weights do not limit them


def check_is_of_layers(peft_config: PeftConfig, *, beside_base: bool = False) -> None:
    """Check that an adapter treats every token of every text alike.

    Args:
        peft_config: the adapter.
        beside_base: also check that it leaves its base unchanged, so that it can be switched off.

    Raises:
        UnsupportedError: it depends on more than its weights and its configuration.
        PRTValueError: its initialisation changes its base.
    """
    kind, options = PeftType(peft_config.peft_type).value, []
    if isinstance(peft_config, LoraConfig):
        others = [entry for entry in fields(peft_config) if entry.name not in _LORA_OPTIONS]
        options = [entry.name for entry in others if getattr(peft_config, entry.name) not in (None, _default(entry))]
    if kind not in _LAYER_KINDS or options:
        is_prompt = peft_config.is_prompt_learning
        effect = "puts tokens of its own before the text" if is_prompt else "does not change layers in a fixed way"
        raise UnsupportedError(
            f"The adapter {effect}, so it cannot be switched on and off side by side.",
            expected="an adapter of layers: LoRA, or one of " + ", ".join(sorted(_LAYER_KINDS - {"LORA"})),
            found=f"{kind}{' with ' if options else ''}{', '.join(options)}",
            remedy="distil the fine-tuned model into a reward" if options else "fine-tune a LoRA adapter",
        )
    if beside_base and getattr(peft_config, "layer_replication", None):
        raise UnsupportedError(
            "The adapter makes its base deeper, so it cannot be switched off.",
            expected="no `layer_replication`",
            found=str(peft_config.layer_replication)[:80],
            remedy="distil the fine-tuned model into a reward",
        )
    if beside_base and getattr(peft_config, "init_lora_weights", True) not in _INITIALISATIONS:
        raise PRTValueError(
            "The adapter's initialisation would change the base's weights.",
            expected=f"`init_lora_weights` one of {_INITIALISATIONS}",
            found=repr(peft_config.init_lora_weights),
            remedy="if it was tuned already: distil it (`distill_from`), or save it with PEFT as plain LoRA "
            "(`path_initial_model_for_weight_conversion`)",
        )


def changes_base(peft_config: PeftConfig) -> bool:
    """Return whether the model with the adapter switched off differs from the one that the adapter was tuned from."""
    return (
        getattr(peft_config, "bias", "none") != "none"
        or getattr(peft_config, "init_lora_weights", True) not in _INITIALISATIONS
        or bool(getattr(peft_config, "layer_replication", None))
    )


def read_peft_config(folder: Path, base_id: str | None = None, *, beside_base: bool = True) -> PeftConfig:
    """Read the configuration of the adapter in a folder, before anything is loaded or allocated for it.

    Args:
        folder: the adapter's.
        base_id: the base that it must name, if it names any.
        beside_base: see [`check_is_of_layers`].

    Raises:
        RewardFileError: the file cannot be read, or does not describe the weights beside it.
        UnsupportedError, PRTValueError: those of [`check_is_of_layers`].
    """
    path = folder / ADAPTER_CONFIG
    try:
        _check_entries(read_entries(path))
        peft_config = PeftConfig.from_pretrained(folder)
        _check_values(peft_config)
        check_is_of_layers(peft_config, beside_base=beside_base)
        shapes = read_shapes(folder / ADAPTER_WEIGHTS) if (folder / ADAPTER_WEIGHTS).exists() else None
        if shapes is not None:
            _check_ranks(path, peft_config, shapes)
        _name_targets(peft_config, shapes)
    except PRTError:
        raise
    except Exception as error:  # PEFT's classes raise errors of any kind
        raise RewardFileError.unreadable(
            path, error, expected="the configuration of a PEFT adapter", remedy="download or save the adapter again"
        ) from error
    named = peft_config.base_model_name_or_path
    if base_id is not None and named not in (None, base_id):
        raise RewardFileError(
            f"{path} and {PRT_CONFIG_NAME} name different bases.",
            expected=base_id,
            found=str(named),
            remedy="download or save the reward again",
        )
    return peft_config


def _check_entries(entries: dict[str, Any]) -> None:
    """Raise `ValueError` if PEFT would import a module or repeat layers of the base, or an entry is missing."""
    if entries.get("megatron_config") is not None:  # PEFT would import the module that it names
        raise ValueError(f"it is for Megatron: megatron_config = {str(entries['megatron_config'])[:80]}")
    if entries.get("layer_replication"):
        raise ValueError(f"layer_replication = {str(entries['layer_replication'])[:80]}")
    if entries.get("peft_type") in ("LORA", "ADALORA") and not {"r", "lora_alpha"} <= entries.keys():
        raise ValueError("no `r` or no `lora_alpha`")


def _check_values(peft_config: PeftConfig) -> None:
    """Raise `ValueError` if a value is not the boolean, number or name that it should be."""
    for entry in fields(peft_config):
        name, value, default = entry.name, getattr(peft_config, entry.name), _default(entry)
        if name in ("base_model_name_or_path", "revision"):
            is_right = value is None or is_name(value)
        elif name in _PATTERNS and isinstance(value, str):  # see `_name_targets`
            is_right = True
        elif name in _NAMES or name in _PATTERNS:
            is_right = _are_names(value)
        elif isinstance(default, bool):
            is_right = isinstance(value, bool) or (name.startswith("init_") and isinstance(value, str))
        else:
            is_right = not isinstance(default, Real) or is_number(value)
        if not is_right:
            raise ValueError(f"{name} = {str(value)[:80]}")


def _name_targets(peft_config: PeftConfig, shapes: dict[str, list[int]] | None) -> None:
    """Replace regular expressions, which could take for ever, by the names of the layers in the file of weights."""
    if not any(isinstance(getattr(peft_config, name, None), str) for name in _PATTERNS):
        return
    if shapes is None:
        raise ValueError("target_modules or exclude_modules is a text, and no list of names")
    prefix = PEFT_TYPE_TO_PREFIX_MAPPING[peft_config.peft_type]
    names = (name.removeprefix("base_model.model.").partition(f".{prefix}") for name in shapes)
    peft_config.target_modules = sorted({layer for layer, found, _ in names if found})
    peft_config.exclude_modules = None


def _check_ranks(path: Path, peft_config: PeftConfig, shapes: dict[str, list[int]]) -> None:
    """Raise `RewardFileError` if the configuration describes larger weights than there are.

    LoRA's ranks are dimensions of its weights. AdaLoRA's rank_pattern holds masks over `init_r`, not ranks.
    """
    sizes = [
        value
        for entry in fields(peft_config)
        if entry.name not in ("lora_alpha", "alpha", "total_step", "tinit", "tfinal", "deltaT")
        and type(value := getattr(peft_config, entry.name)) is int
    ]
    largest, lowest = _MOST_UNITS, -1
    if isinstance(peft_config, LoraConfig):
        largest = max((max(shape) for shape in shapes.values() if shape and 0 not in shape), default=0)
        patterns = (peft_config.rank_pattern or {}).values()
        sizes = [getattr(peft_config, "init_r", peft_config.r)]
        sizes += [len(each) if isinstance(each, list) else each for each in patterns]
        lowest = 1
    if not all(type(size) is int and lowest <= size <= largest for size in sizes):
        raise RewardFileError(
            f"{path} describes larger weights than there are.",
            expected=f"ranks 1 ... {largest}, the largest dimension in {ADAPTER_WEIGHTS}",
            found=str(sizes)[:200],
            remedy="download or save the adapter again",
        )


def _default(entry) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _are_names(value) -> bool:
    """Return whether a value has names of layers, and for each a number or AdaLoRA's mask if it is a pattern.

    No name may be a regular expression, because PEFT takes some names for these. Tokens to be trained are numbers.
    """
    names = [value] if isinstance(value, str) else value or ()
    numbers = value.values() if isinstance(value, dict) else ()
    return all(type(name) is int or (isinstance(name, str) and _PLAIN.fullmatch(name)) for name in names) and all(
        all(type(each) in (bool, int) for each in number) if isinstance(number, list) else is_number(number)
        for number in numbers
    )
