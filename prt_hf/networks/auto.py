"""Load models, configurations, tokenizers and image processors by id."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..contract import IMAGE_CLASSIFICATION, ModelReference
from ..errors import PRTValueError, RewardFileError
from ..hub.client import commit_of, refuse_reward
from .anatomy import AUTO_CLASSES, ProcessingClass, task_of_class
from .checkpoints import check_attention, check_counts, load_whole
from .identity import check_same_model, commit_of_model, remember_commit
from .pixels import PRTImageProcessor, is_saved_apart
from .quantization import not_installed

logger = logging.get_logger(__name__)
_TIMM = "timm_wrapper"  # its checkpoints name no class
CONFIG_KWARGS = ("revision", "token", "trust_remote_code")  # also for tokenizers and image processors


def load_base(reference: ModelReference, token: str | bool | None = None, **load_kwargs: Any) -> PreTrainedModel:
    """Load the pretrained model that a file names, at the revision named there.

    Args:
        reference: the file's entry.
        token: access token for the Hub.
        load_kwargs: for `from_pretrained`; a `revision` among them is that of another model, and not used.

    Raises:
        RewardFileError: the model was made in memory and has no id.
        BaseModelMismatchError: the id now stands for another model.
    """
    if reference.id is None:
        raise RewardFileError(
            "The pretrained model was made in memory and has no id to load it by.",
            expected="`base_model=` of a reward, or `backbone=` of a PRT model: that model, or its path",
            found=str(reference),
        )
    kwargs = {name: value for name, value in load_kwargs.items() if name != "revision"}
    pinned = {"revision": reference.revision} if reference.revision else {}
    model = load_pretrained(reference.id, **{"token": token} | kwargs | pinned)
    check_same_model(reference, model)
    return model


def load_processing_class(path_or_id: str | Path, task: str, **load_kwargs: Any) -> ProcessingClass | None:
    """Load the tokenizer or image processor of a pretrained model; return None if it has none."""
    kwargs = {name: load_kwargs[name] for name in CONFIG_KWARGS if load_kwargs.get(name) is not None}
    try:
        return _processing_class(path_or_id, task, **{"trust_remote_code": False} | kwargs)
    except (OSError, ValueError, KeyError):
        return None


def _processing_class(path_or_id: str | Path, task: str, **kwargs: Any) -> ProcessingClass | None:
    auto_class = AutoImageProcessor if task == IMAGE_CLASSIFICATION else AutoTokenizer
    try:
        found = auto_class.from_pretrained(path_or_id, **kwargs)
    except ImportError as error:
        logger.warning(f"{path_or_id} is used without its {auto_class.__name__}: {str(error).strip()}")
        return None
    if isinstance(found, PreTrainedTokenizerBase) and len(found) == len(found.added_tokens_decoder):
        return None  # what transformers makes of the architecture, where there are no files of a tokenizer
    return found.main if isinstance(found, PRTImageProcessor) and not found.others else found


def save_processing_class(processing_class: ProcessingClass | None, folder: Path) -> None:
    """Write a tokenizer or image processor, if there is one, so that [`load_processing_class`] finds it."""
    if is_saved_apart(processing_class):
        processing_class = PRTImageProcessor(processing_class)
    if processing_class is not None:
        processing_class.save_pretrained(folder)


def processing_class_of(model: PreTrainedModel, task: str, **load_kwargs: Any) -> ProcessingClass | None:
    """Load the tokenizer or image processor of a model, at its revision; return None if it was made in memory."""
    if not model.name_or_path:
        return None
    return load_processing_class(model.name_or_path, task, **load_kwargs | {"revision": commit_of_model(model)})


def load_pretrained(model_id: str, **load_kwargs: Any) -> PreTrainedModel:
    """Load a model by id with the Auto class of its task, and remember its commit.

    Args:
        model_id: id of the Hub, or folder.
        load_kwargs: for `from_pretrained`.

    Raises:
        PRTValueError: the checkpoint has no head that predicts tokens or labels, lacks weights, or names an attention
            that is not transformers' own; or it is a reward.
        UnsupportedError: the library of its quantisation is not installed.
    """
    refuse_reward(model_id, "a pretrained model", load_kwargs.get("token"), load_kwargs.get("revision"))
    commit = commit_of(model_id, load_kwargs.get("revision"), load_kwargs.get("token"))
    # Always given, because transformers would otherwise ask in the terminal whether to run the model's code.
    trusted = {"trust_remote_code": bool(load_kwargs.get("trust_remote_code"))}
    load_kwargs = load_kwargs | trusted | {"revision": commit or "main"}
    if load_kwargs.get("quantization_config") is None:  # None would hide that of the checkpoint
        load_kwargs.pop("quantization_config", None)
    names = (*CONFIG_KWARGS, "attn_implementation")
    config = load_config(model_id, **{name: load_kwargs[name] for name in names if name in load_kwargs})
    check_attention(config, model_id)
    try:
        model = load_whole(AUTO_CLASSES[_task_of_config(config, model_id)], model_id, **load_kwargs)
    except ImportError as error:
        if "quantization_config" not in load_kwargs and not hasattr(config, "quantization_config"):
            raise
        raise not_installed(model_id, error) from error
    remember_commit(model, commit)
    return model


def task_of_checkpoint(model_id: str, **config_kwargs: Any) -> str:
    """Return the task of a model by its configuration, without loading its weights.

    Args:
        model_id: id of the Hub, or folder.
        config_kwargs: `revision`, `token`, `trust_remote_code`.

    Raises:
        PRTValueError: the checkpoint has no head that predicts tokens or labels.
    """
    return _task_of_config(load_config(model_id, **config_kwargs), model_id)


def load_config(model_id: str, **config_kwargs: Any) -> PreTrainedConfig:
    """Load a model's configuration.

    Args:
        model_id: id of the Hub, or folder.
        config_kwargs: `revision`, `token`, `trust_remote_code`.

    Raises:
        PRTValueError: transformers does not know the architecture, or needs code that it may not run.
    """
    trusted = {"trust_remote_code": bool(config_kwargs.get("trust_remote_code"))}
    commit_of(model_id, config_kwargs.get("revision"), config_kwargs.get("token"))  # whose errors name the model
    try:
        check_counts(PreTrainedConfig.get_config_dict(model_id, **config_kwargs)[0], model_id)
        return AutoConfig.from_pretrained(model_id, **config_kwargs | trusted)
    except PRTValueError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise PRTValueError(
            f"The configuration of {model_id} cannot be used.",
            expected="an architecture that the installed transformers knows",
            found=str(error).strip().splitlines()[0],
        ) from error


def load_skeleton(model_id: str, **config_kwargs: Any) -> PreTrainedModel:
    """Make a model from its configuration, on the meta device, which takes a few kilobytes.

    Args:
        model_id: id of the Hub, or folder.
        config_kwargs: `revision`, `token`, `trust_remote_code`.

    Raises:
        PRTValueError: the checkpoint has no head that predicts tokens or labels, or its class is not known.
    """
    commit = commit_of(model_id, config_kwargs.get("revision"), config_kwargs.get("token"))
    config = load_config(model_id, **config_kwargs | {"revision": commit or "main"})
    check_attention(config, model_id)
    auto_class = AUTO_CLASSES[_task_of_config(config, model_id)]
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=bool(config_kwargs.get("trust_remote_code")))
    model.name_or_path = model_id
    remember_commit(model, commit)
    return model


def _task_of_config(config: PreTrainedConfig, model_id: str) -> str:
    if not config.architectures and config.model_type == _TIMM and config.num_labels > 0:
        return IMAGE_CLASSIFICATION
    return task_of_class((config.architectures or ["unknown"])[0], model_id)
