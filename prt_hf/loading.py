"""The networks that saved files name: a reward's own, and the pretrained model it sits on; checked to be those."""

import os
import re
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .adapter import check_initialisation, wrap
from .contract import IMAGE_CLASSIFICATION, PRT_CONFIG_NAME, TEXT_GENERATION, ModelReference, RewardConfig
from .errors import BaseModelMismatchError, PRTValueError, RewardFileError, UnsupportedError
from .own_pixels import PRTImageProcessor, is_saved_apart
from .passes import bare_base
from .pretrained import AUTO_CLASSES, CONFIG_KWARGS, check_bare, load_pretrained, reference_to, task_of
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
    peft_config = read_peft_config(folder, config.reward_base.id)
    check_initialisation(peft_config)
    network = on_base(base, peft_config, folder)
    if config.minus_base:
        check_switchable(network, base)
    return network, source


def read_peft_config(folder: Path, base_id: str | None = None) -> PeftConfig:
    """The configuration of the adapter in a folder, after a check that it claims no more memory than its weights take,
    and no code of others.

    Args:
        base_id (*optional*): of the base that it must name, if it names any.

    Raises:
        RewardFileError: it cannot be read, or describes another adapter than the one that lies beside it.
    """
    path = folder / ADAPTER_CONFIG
    try:
        peft_config = PeftConfig.from_pretrained(folder)
        ranks = _ranks(peft_config) if isinstance(peft_config, LoraConfig) else []
        named = peft_config.base_model_name_or_path
        if not isinstance(named, str | None):
            raise TypeError(f"base_model_name_or_path = {named!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RewardFileError.unreadable(
            path, error, expected="the configuration of a PEFT adapter", remedy="download or save the adapter again"
        ) from error
    if base_id is not None and named not in (None, base_id):
        raise RewardFileError(
            f"{path} and {PRT_CONFIG_NAME} name two bases, of which one is wrong.",
            expected=base_id,
            found=str(named),
            remedy="download or save the reward again",
        )
    if isinstance(peft_config, LoraConfig):
        if peft_config.megatron_config is not None:  # PEFT would import the module that it names
            raise RewardFileError(
                f"{path} is for Megatron.", expected="no `megatron_config`", found=str(peft_config.megatron_config)[:80]
            )
        largest = max((max(shape) for shape in read_shapes(folder / ADAPTER_WEIGHTS).values() if shape), default=0)
        if not all(type(rank) is int and 0 < rank <= largest for rank in ranks):
            raise RewardFileError(
                f"{path} describes larger weights than there are.",
                expected=f"ranks 1 ... {largest}, the largest dimension in {ADAPTER_WEIGHTS}",
                found=str(ranks),
                remedy="download or save the adapter again",
            )
    return peft_config


def read_ordinary_adapter(folder: Path) -> PeftConfig:
    """The configuration of a PEFT adapter that was not made as a reward, after a check that its weights can be loaded.

    Raises:
        PRTValueError: it is a reward.
        RewardFileError: no adapter there, or a damaged or pickled one.
        UnsupportedError: what it does depends on the text, or it is a prompt.
    """
    if (folder / PRT_CONFIG_NAME).exists():
        raise PRTValueError(
            f"{folder} is a reward, and no ordinary adapter.",
            expected="an adapter of a fine-tuned language model",
            found=PRT_CONFIG_NAME,
            remedy="RewardModel.from_pretrained",
        )
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise RewardFileError(
                f"{folder} holds no adapter that can be loaded.",
                expected=f"{ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}",
                found=f"no {name}; pickled weights can run code and are not loaded",
                remedy="convert the weights to safetensors, or name another folder",
            )
    peft_config = read_peft_config(folder)
    check_is_of_layers(peft_config)
    check_initialisation(peft_config)
    return peft_config


def origin_of(path_or_repo: str | Path, folder: Path) -> ModelReference:
    """To what was loaded by name and lies in `folder`; of a repository, the one in the cache that its commit names."""
    if Path(path_or_repo).is_dir():
        return ModelReference(os.path.abspath(path_or_repo))
    return ModelReference(str(path_or_repo), folder.name)


def check_is_of_layers(peft_config: PeftConfig) -> None:
    """Raises:
    UnsupportedError: what the adapter does depends on the text, or it is a prompt.
    """
    is_activated = bool(getattr(peft_config, "alora_invocation_tokens", None))
    if peft_config.is_prompt_learning or is_activated or peft_config.peft_type == PeftType.XLORA:
        raise UnsupportedError(
            "The adapter does not change layers once and for all, so it cannot be switched on and off side by side.",
            expected="an adapter of layers (LoRA and its kin)",
            found=f"{peft_config.peft_type.value}{' with alora_invocation_tokens' if is_activated else ''}",
            remedy="distil the fine-tuned model into a reward" if is_activated else "fine-tune a LoRA adapter",
        )


def load_ordinary_adapter(
    folder: Path, base_model: str | PreTrainedModel | None, token: str | bool | None, load_kwargs: dict
) -> PeftModel:
    """A PEFT adapter that was not made as a reward, on its base; by default the one that it names.

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
        base = load_pretrained(name, **{"token": token} | load_kwargs | pinned)
    check_bare(base)
    if task_of(base) != TEXT_GENERATION or peft_config.task_type not in (None, "CAUSAL_LM"):
        raise PRTValueError(
            "Only adapters of causal language models are carried over.",
            expected="a base for text-generation, and task_type CAUSAL_LM",
            found=f"{type(base).__name__}, {peft_config.task_type}",
        )
    network = on_base(base, peft_config, folder)
    check_switchable(network, base)
    return network.eval()


def check_switchable(network: PeftModel, base: PreTrainedModel) -> None:
    """Raises:
    UnsupportedError: without its adapted layers the network is not the base.
    """
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
    """A saved adapter on its base.

    Raises:
        BaseModelMismatchError: its layers or its weights are another model's.
        RewardFileError: its weights are damaged.
    """
    peft_config.inference_mode = False
    try:
        network = wrap(base, peft_config)
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise BaseModelMismatchError(
            "The adapter cannot be put on its base.",
            expected=f"the configuration of an adapter of {reference_to(base)}",
            found=f"{folder / ADAPTER_CONFIG}: {str(error)[:200]}",
            remedy="load the adapter on the base that it was tuned on",
        ) from error
    weights = read_weights(folder / ADAPTER_WEIGHTS)
    expected = get_peft_model_state_dict(network, save_embedding_layers=False)
    if weights.keys() - expected.keys():  # PEFT saves embeddings and head of the base beside an adapter of them
        own = get_peft_model_state_dict(network, save_embedding_layers=True)
        same = [name for name in own.keys() - expected.keys() if name in weights and _is_same(own[name], weights[name])]
        weights = {name: value for name, value in weights.items() if name not in same}
    wrong = (expected.keys() ^ weights.keys()) | {
        name for name in expected.keys() & weights.keys() if expected[name].shape != weights[name].shape
    }
    if wrong:
        raise BaseModelMismatchError(
            "The adapter's weights do not fit its base.",
            expected=f"{len(expected)} tensors for {reference_to(base)}",
            found=f"{len(weights)} tensors, of which missing, left over or of another shape: {sorted(wrong)[:3]}",
            remedy="load the adapter on the base that it was tuned on",
        )
    set_peft_model_state_dict(network, weights)
    return network


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
    check_same_reference(expected, reference_to(model))


def check_same_reference(expected: ModelReference, found: ModelReference) -> None:
    """As [`check_same_model`], of a model that is not in memory."""
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


def _ranks(peft_config: LoraConfig) -> list:
    """Of AdaLoRA, which starts with another rank, the pattern has masks over that."""
    patterns = (peft_config.rank_pattern or {}).values()
    return [
        getattr(peft_config, "init_r", peft_config.r),
        *(len(each) if isinstance(each, list) else each for each in patterns),
    ]


def _is_same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Up to the precision of either: an adapter is not always tuned in the one that its base is stored in."""
    ours = ours.cpu()
    return ours.shape == theirs.shape and any(
        torch.equal(ours.to(dtype), theirs.to(dtype)) for dtype in (ours.dtype, theirs.dtype)
    )
