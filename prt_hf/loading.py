"""The networks that saved files name: a reward's own, and the pretrained model it sits on; checked to be those."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .adapter import check_initialisation, wrap
from .contract import IMAGE_CLASSIFICATION, PRT_CONFIG_NAME, ModelReference, RewardConfig
from .errors import BaseModelMismatchError, RewardFileError
from .own_pixels import PRTImageProcessor, is_saved_apart
from .pretrained import AUTO_CLASSES, CONFIG_KWARGS, check_bare, load_pretrained, reference_to
from .reward_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_shapes, read_weights

logger = logging.get_logger(__name__)


def load_adapter(
    folder: Path,
    config: RewardConfig,
    base_model: str | PreTrainedModel | None,
    token: str | bool | None,
    load_kwargs: dict,
) -> tuple[PeftModel, str | None]:
    """The adapter on its checked base, and where the base came from."""
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
    peft_config = _read_peft_config(folder, config)
    peft_config.inference_mode = False
    network = wrap(base, peft_config)
    weights = read_weights(folder / ADAPTER_WEIGHTS)
    expected = get_peft_model_state_dict(network, save_embedding_layers=False)
    wrong = (expected.keys() ^ weights.keys()) | {
        name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape
    }
    if wrong:
        raise BaseModelMismatchError(
            "The adapter's weights do not fit its base.",
            expected=f"{len(expected)} tensors for {config.reward_base}",
            found=f"{len(weights)} tensors, of which missing, left over or of another shape: {sorted(wrong)[:3]}",
            remedy="load the reward on the base that it was tuned on",
        )
    set_peft_model_state_dict(network, weights)
    return network, source


def load_full(
    folder: Path, config: RewardConfig, base_model: PreTrainedModel | None, load_kwargs: dict
) -> PreTrainedModel:
    """A full reward, of the class of `base_model` where that is given.

    Raises:
        RewardFileError: its class is not known, or transformers would put an adapter on it.
    """
    if (folder / ADAPTER_CONFIG).exists():
        raise RewardFileError(
            f"{folder} holds a full reward and an adapter.",
            expected="a full reward by itself",
            found=ADAPTER_CONFIG,
            remedy="download or save the reward again",
        )
    load_kwargs = {"trust_remote_code": False} | load_kwargs
    auto_class = AUTO_CLASSES[config.task] if base_model is None else type(base_model)
    try:
        return auto_class.from_pretrained(folder, **load_kwargs)
    except ValueError as error:
        if base_model is not None:
            raise
        raise RewardFileError(
            f"The full reward is a {config.reward_base.architecture}, which {auto_class.__name__} cannot load.",
            expected="a registered class, or `base_model=` a model of that class",
            found=str(error).splitlines()[0],
        ) from error


def load_base(reference: ModelReference, token: str | bool | None = None, **load_kwargs) -> PreTrainedModel:
    """The pretrained model that a file names, at the revision named there.

    Raises:
        RewardFileError: it was made in memory and has no id.
        BaseModelMismatchError: what lies there now is another model.
    """
    if reference.id is None:
        raise RewardFileError(
            "The pretrained model was made in memory and has no id to load it by.",
            expected="`base_model=` of a reward, or `backbone=` of a PRT model: that model, or its path",
            found=str(reference),
        )
    # A revision among the arguments is of another model: a PRT model's backbone.
    kwargs = {name: value for name, value in load_kwargs.items() if name != "revision"}
    pinned = {"revision": reference.revision} if reference.revision else {}
    model = load_pretrained(reference.id, **{"token": token} | kwargs | pinned)
    check_same_model(reference, model)
    return model


def check_same_model(expected: ModelReference, model: PreTrainedModel) -> None:
    """The weights decide where they can be read: the same model may have moved, another may have taken its place.

    Raises:
        BaseModelMismatchError: it is another model, or another revision.
    """
    found = reference_to(model)
    if found.weights and expected.weights:
        same = found.weights == expected.weights
    else:
        names = [(reference.id, reference.revision, reference.architecture) for reference in (found, expected)]
        same = found.id is not None and names[0] == names[1]
    if not same:
        raise BaseModelMismatchError(
            "The pretrained model is not the one that was used before.",
            expected=str(expected),
            found=str(found),
            remedy="use that model, at that revision",
        )


def load_processing_class(path_or_id: str | Path, task: str, **load_kwargs):
    """Tokenizer or image processor of a checkpoint, or None where it has none."""
    auto_class = AutoImageProcessor if task == IMAGE_CLASSIFICATION else AutoTokenizer
    kwargs = {"trust_remote_code": False} | {
        name: load_kwargs[name] for name in CONFIG_KWARGS if load_kwargs.get(name) is not None
    }
    try:
        found = auto_class.from_pretrained(path_or_id, **kwargs)
        return found.main if isinstance(found, PRTImageProcessor) and not found.others else found
    except (OSError, ValueError, KeyError):
        return None
    except ImportError as error:
        logger.warning(f"{path_or_id} is used without its {auto_class.__name__}: {str(error).strip()}")
        return None


def save_processing_class(processing_class, folder: Path) -> None:
    """Write a tokenizer or image processor, if there is one, so that [`load_processing_class`] finds it."""
    if is_saved_apart(processing_class):
        processing_class = PRTImageProcessor(processing_class)
    if processing_class is not None:
        processing_class.save_pretrained(folder)


def processing_class_of(model: PreTrainedModel, task: str, **load_kwargs):
    """What lies beside a model's weights, at their revision; None where it was made in memory or has none."""
    if not model.name_or_path:
        return None
    return load_processing_class(model.name_or_path, task, **load_kwargs | {"revision": reference_to(model).revision})


def _read_peft_config(folder: Path, config: RewardConfig) -> PeftConfig:
    """
    Raises:
        RewardFileError: it cannot be read, or describes another adapter than the one that lies beside it.
    """
    path = folder / ADAPTER_CONFIG
    try:
        peft_config = PeftConfig.from_pretrained(folder)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RewardFileError(
            f"{path} cannot be read: {type(error).__name__}: {error}",
            expected="the configuration of a PEFT adapter",
            remedy="download or save the reward again",
        ) from error
    named = peft_config.base_model_name_or_path
    if config.reward_base.id is not None and named not in (None, config.reward_base.id):
        raise RewardFileError(
            f"{path} and {PRT_CONFIG_NAME} name two bases, of which one is wrong.",
            expected=config.reward_base.id,
            found=str(named),
            remedy="download or save the reward again",
        )
    check_initialisation(peft_config)
    if isinstance(peft_config, LoraConfig):
        if peft_config.megatron_config is not None:  # PEFT would import the module that it names
            raise RewardFileError(
                f"{path} is for Megatron.", expected="no `megatron_config`", found=str(peft_config.megatron_config)[:80]
            )
        ranks = [peft_config.r, *(peft_config.rank_pattern or {}).values()]
        largest = max((max(shape) for shape in read_shapes(folder / ADAPTER_WEIGHTS).values() if shape), default=0)
        if not all(type(rank) is int and 0 < rank <= largest for rank in ranks):
            raise RewardFileError(
                f"{path} describes larger weights than there are.",
                expected=f"ranks 1 ... {largest}, the largest dimension in {ADAPTER_WEIGHTS}",
                found=str(ranks),
                remedy="download or save the reward again",
            )
    return peft_config
