"""Load the networks that saved files name, an adapter and its base, and check that they are the right ones."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import PreTrainedModel
from transformers.utils import logging

from ..contract import IMAGE_CLASSIFICATION, MINUS_BASE, TEXT_GENERATION, RewardConfig
from ..errors import BaseModelMismatchError, PRTValueError, RewardFileError, UnsupportedError
from ..hub.client import has_file, local_file, refuse_reward
from ..hub.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_shapes, read_weights
from ..networks.adapter_config import read_peft_config
from ..networks.adapters import bare_base, check_bare, wrap
from ..networks.anatomy import task_of
from ..networks.auto import _processing_class, load_base, load_pretrained, load_processing_class, processing_class_of
from ..networks.checkpoints import read_entries, unreadable
from ..networks.identity import check_same_model, reference_to
from ..networks.quantization import check_full_precision

logger = logging.get_logger(__name__)

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_start(
    model_or_id: str | PreTrainedModel | PeftModel, processing_class: Any, load_kwargs: dict
) -> tuple[PreTrainedModel | PeftModel, Any]:
    """Return the model that a reward starts from, with its tokenizer or image processor; load what is given by id.

    Raises:
        PRTValueError: load arguments for a model in memory.
    """
    if not isinstance(model_or_id, PreTrainedModel | PeftModel):
        model = load_pretrained(str(model_or_id), **load_kwargs)
        if processing_class is None:
            processing_class = load_processing_class(model_or_id, task_of(model), **load_kwargs)
        return model, processing_class
    if load_kwargs:
        raise PRTValueError(
            "A model in memory is not loaded again.",
            expected="load arguments with an id or path only",
            found=", ".join(load_kwargs),
        )
    return model_or_id, processing_class


def load_adapter(
    folder: Path,
    config: RewardConfig,
    base_model: str | PreTrainedModel | None,
    token: str | bool | None,
    load_kwargs: dict,
) -> tuple[PeftModel, str | None]:
    """Return a reward adapter on its checked base, and the place that the base was loaded from; None if from memory."""
    peft_config = read_peft_config(folder, config.reward_base.id)
    base, source = base_model, None
    if base_model is None:
        source = config.reward_base.id
        base = load_base(config.reward_base, token, **load_kwargs)
    else:
        if not isinstance(base_model, torch.nn.Module):
            source = str(base_model)
            base = load_pretrained(source, token=token, **load_kwargs)
        check_bare(base)
        check_same_model(config.reward_base, base)
    network = on_base(base, peft_config, folder)
    if MINUS_BASE in config.terms:
        check_switchable(network, base)
    return network, source


def read_ordinary_adapter(
    place: str | Path, token: str | bool | None = None, *, beside_base: bool = True
) -> PeftConfig:
    """Read the configuration of a PEFT adapter that was not made as a reward, once its weights can be loaded.

    For `beside_base` see [`~prt_hf.networks.adapter_config.check_is_of_layers`].

    Raises:
        PRTValueError: it is a reward.
        RewardFileError: no adapter there, or a damaged or pickled one.
        UnsupportedError: its effect depends on the text, or it is a prompt.
    """
    place = str(place)
    refuse_reward(place, "a fine-tuned model, or an ordinary adapter", token)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not has_file(place, name, token):
            raise RewardFileError(
                f"The adapter {place} has no {'weights' if name == ADAPTER_WEIGHTS else 'files'} that can be loaded.",
                expected=name,
                found="no such file; pickled weights can run code and are not loaded",
                remedy="convert the weights to safetensors, or name another folder",
            )
    folder = local_file(place, ADAPTER_WEIGHTS, token).parent
    return read_peft_config(folder, beside_base=beside_base)


def load_ordinary_adapter(
    folder: Path, base_model: str | PreTrainedModel | None, processing_class: Any, load_kwargs: dict
) -> tuple[PeftModel, Any]:
    """Load a PEFT adapter that was not made as a reward, on its base, and its tokenizer.

    By default the base is the one that it names, and the tokenizer the one saved with it, else its base's.

    Raises:
        PRTValueError: it names no base, or its base is no language model.
        BaseModelMismatchError: its weights do not fit the base.
        UnsupportedError: it cannot be switched off.
        RewardFileError: no adapter there, or a damaged or pickled one.
    """
    peft_config = read_ordinary_adapter(folder)
    base = base_model
    if not isinstance(base, torch.nn.Module):
        name, revision = str(base), None
        if base is None:
            name, revision = peft_config.base_model_name_or_path, peft_config.revision
        if not name:
            raise PRTValueError(
                f"{folder / ADAPTER_CONFIG} names no base.",
                expected="`base_model_name_or_path`",
                found=repr(name),
                remedy="`base_model=` the model that it was tuned on",
            )
        pinned = {"revision": revision} if revision else {}
        base = load_pretrained(name, **load_kwargs | pinned)
    check_bare(base)
    if task_of(base) != TEXT_GENERATION or peft_config.task_type not in (None, "CAUSAL_LM"):
        raise PRTValueError(
            "Only adapters of causal language models are carried over.",
            expected="a base for text-generation, and task_type CAUSAL_LM",
            found=f"{type(base).__name__}, {peft_config.task_type}",
        )
    network = on_base(base, peft_config, folder)
    check_switchable(network, base)
    if processing_class is None:
        processing_class = load_saved_processing_class(folder, TEXT_GENERATION)
        processing_class = processing_class or processing_class_of(base, TEXT_GENERATION, **load_kwargs)
    return network.eval(), processing_class


def check_switchable(network: PeftModel, base: PreTrainedModel) -> None:
    """Raise `UnsupportedError` if the network without its adapted layers is not the base."""
    off = bare_base(network)
    kinds = [[(name, type(module)) for name, module in model.named_modules()] for model in (off, base)]
    weights = [{name: value.data_ptr() for name, value in model.named_parameters()} for model in (off, base)]
    changed = [name for name, place in weights[0].items() if place != weights[1].get(name)]
    if kinds[0] != kinds[1] or changed:
        raise UnsupportedError(
            "The adapter changes its base's own weights or modules, so it cannot be switched off.",
            expected="an adapter beside its base (LoRA with bias='none')",
            found=f"{network.peft_config['default'].peft_type.value}, {changed[:3] or 'other modules'}",
            remedy="distil the fine-tuned model into a reward",
        )


def on_base(base: PreTrainedModel, peft_config: PeftConfig, folder: Path) -> PeftModel:
    """Put a saved adapter on its base, once its weights are known to be the ones that its configuration describes.

    Raises:
        BaseModelMismatchError: its layers or its weights are another model's.
        RewardFileError: its weights are damaged.
        UnsupportedError: the base is quantised.
    """
    check_full_precision(base)
    file = folder / ADAPTER_WEIGHTS
    shapes = read_shapes(file)
    peft_config = copy.deepcopy(peft_config)
    peft_config.inference_mode = False
    try:
        expected, named = _described(base, peft_config, shapes)
    except Exception as error:  # PEFT raises errors of many kinds for missing layers
        raise BaseModelMismatchError(
            "The adapter cannot be put on its base.",
            expected=f"the configuration of an adapter of {reference_to(base)}",
            found=f"{folder / ADAPTER_CONFIG}: {str(error)[:200]}",
            remedy="load the adapter on the base that it was tuned on",
        ) from error
    wrong = {name for name in expected if shapes.get(name) != expected[name]} | (
        shapes.keys() - expected.keys() - named
    )
    network, weights = base, {}
    if not wrong:
        network, weights = wrap(base, peft_config), read_weights(file)
        own = get_peft_model_state_dict(network, save_embedding_layers=True) if named else {}
        wrong = {name for name in named if not _is_same(own[name], weights.pop(name))}
        wrong |= {name for name, value in weights.items() if not value.is_floating_point()}
    if wrong:
        raise BaseModelMismatchError(
            "The adapter's weights do not fit its base.",
            expected=f"{len(expected)} tensors for {reference_to(base)}",
            found=f"{len(shapes)} tensors; missing, left over, of another shape or kind: {sorted(wrong)[:3]}",
            remedy="load the adapter on the base that it was tuned on",
        )
    set_peft_model_state_dict(network, weights)
    return network


def _described(
    base: PreTrainedModel, peft_config: PeftConfig, shapes: dict[str, list[int]]
) -> tuple[dict[str, list[int]], set[str]]:
    """Return the shapes of an adapter's tensors by its configuration, without memory for them.

    Also return the names of stored tensors that are just embeddings or head of the base, which PEFT saves beside an
    adapter of them.
    """
    peft_config = copy.deepcopy(peft_config)
    if hasattr(peft_config, "init_lora_weights"):
        peft_config.init_lora_weights = True  # some others read the base's weights
    if peft_config.peft_type == PeftType.ADALORA and peft_config.rank_pattern:  # masks, which need values to be applied
        peft_config.rank_pattern = {
            name: [index for index, is_kept in enumerate(mask) if is_kept]
            for name, mask in peft_config.rank_pattern.items()
        }
    network = wrap(base, peft_config, device="meta")
    expected = get_peft_model_state_dict(network, save_embedding_layers=False)
    others = shapes.keys() - expected.keys()
    if others:
        others &= get_peft_model_state_dict(network, save_embedding_layers=True).keys()
    return {name: list(value.shape) for name, value in expected.items()}, others


def load_own_processing_class(folder: Path, config: RewardConfig, source: str | None, load_kwargs: dict) -> Any:
    """Load the tokenizer or image processor of a reward: from its folder, else from the place of its base, if any."""
    found = load_saved_processing_class(folder, config.task)
    if found is None and source is not None:
        revision = config.reward_base.revision if source == config.reward_base.id else None
        found = load_processing_class(source, config.task, **load_kwargs | {"revision": revision})
    return found


def load_saved_processing_class(folder: Path, task: str) -> Any:
    """Load the tokenizer or image processor in the folder of a reward or an adapter.

    The folder is not trusted: none of its code is run.

    Returns:
        None if there is none, or one that needs code.

    Raises:
        RewardFileError: its files cannot be used.
    """
    names = _PROCESSOR_FILES if task == IMAGE_CLASSIFICATION else _TOKENIZER_FILES
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        return None
    entries = {}
    try:
        entries = read_entries(files[0])
        return _processing_class(folder, task, trust_remote_code=False)
    except BaseException as error:  # the Rust of tokenizers panics past `Exception`
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if entries.get("auto_map"):  # like those of a base with code of its own, which has them as well
            logger.warning(f"The {files[0].name} in {folder} asks for code, which is not run: it is skipped.")
            return None
        raise unreadable(files[0], error) from error


def _is_same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Compare in the precision of either: an adapter may be tuned in another one than its base is stored in."""
    ours = ours.cpu()
    return ours.shape == theirs.shape and any(
        torch.equal(ours.to(dtype), theirs.to(dtype)) for dtype in (ours.dtype, theirs.dtype)
    )
