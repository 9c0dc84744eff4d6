"""What prt_hf has to know of a pretrained network: its task, head, context, identity; and how to share its weights."""

import copy
import hashlib
import os
from collections.abc import Iterable
from itertools import chain

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import modeling_auto

from .checkpoints import check_attention, check_counts, load_whole
from .contract import (
    IMAGE_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    Contract,
    LabelContract,
    ModelReference,
    VocabularyContract,
    unwrap_tokenizer,
)
from .errors import ContextLengthError, PRTValueError, UnsupportedError
from .hub import commit_of

AUTO_CLASSES = {
    TEXT_GENERATION: AutoModelForCausalLM,
    TEXT_CLASSIFICATION: AutoModelForSequenceClassification,
    IMAGE_CLASSIFICATION: AutoModelForImageClassification,
}
_CLASS_NAMES = {
    TEXT_GENERATION: set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()),
    TEXT_CLASSIFICATION: set(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()),
    IMAGE_CLASSIFICATION: set(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()),
}
_OTHER_TASKS = ("TokenClassification", "MaskedLM", "QuestionAnswering", "MultipleChoice", "Segmentation", "Detection")
_TIMM = "timm_wrapper"  # whose checkpoints name no class
_SAMPLES_PER_TENSOR = 64
# Parameters that PEFT adds besides those with its prefix; the last is AdaLoRA's.
_OF_ADAPTERS = (".modules_to_save.", ".trainable_tokens_", ".ranknum.")
# The name of the cache among the inputs and outputs of models, and of `generate`; another before transformers 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
CONFIG_KWARGS = ("revision", "token", "trust_remote_code")  # those that tokenizers and image processors take as well


class FixedLinear(nn.Linear):
    """A linear head that is never tuned: its weights are buffers, which no optimiser and no `requires_grad_` finds."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        for name, value in list(self.named_parameters()):
            delattr(self, name)
            self.register_buffer(name, value.data)


def register_model(task: str, config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """Make a pretrained model's class that transformers does not have known to the Auto classes, and its task to
    [`task_of_checkpoint`]."""
    AutoConfig.register(config_class.model_type, config_class)
    AUTO_CLASSES[task].register(config_class, model_class)
    _CLASS_NAMES[task].add(model_class.__name__)


def unwrap_adapter(network: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT model; any other network itself."""
    return network.get_base_model() if isinstance(network, PeftModel) else network


def load_pretrained(model_id: str, **load_kwargs) -> PreTrainedModel:
    """Load a model by id with the Auto class of its task, which its configuration names, and remember its commit.

    Raises:
        PRTValueError: the checkpoint has no head that predicts tokens or labels, lacks weights, or names an attention
            that is not transformers' own.
    """
    commit = commit_of(model_id, load_kwargs.get("revision"), load_kwargs.get("token"))
    # Said either way: asked for code of others, transformers would put the question to the terminal.
    trusted = {"trust_remote_code": bool(load_kwargs.get("trust_remote_code"))}
    load_kwargs = load_kwargs | trusted | {"revision": commit or "main"}
    telling = (*CONFIG_KWARGS, "attn_implementation")
    config = load_config(model_id, **{name: load_kwargs[name] for name in telling if name in load_kwargs})
    check_attention(config, model_id)
    model = load_whole(AUTO_CLASSES[_task_of_config(config, model_id)], model_id, **load_kwargs)
    model.config._commit_hash = commit  # where transformers kept it up to 5.17; never written to files
    return model


def task_of_checkpoint(model_id: str, **config_kwargs) -> str:
    """The task of a model by id, told by its configuration; its weights are not loaded.

    Raises:
        PRTValueError: the checkpoint has no head that predicts tokens or labels.
    """
    return _task_of_config(load_config(model_id, **config_kwargs), model_id)


def load_config(model_id: str, **config_kwargs) -> PreTrainedConfig:
    """
    Args:
        config_kwargs: `revision`, `token`, `trust_remote_code`.

    Raises:
        PRTValueError: an architecture that transformers does not know, or code that it may not run.
    """
    trusted = {"trust_remote_code": bool(config_kwargs.get("trust_remote_code"))}
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


def load_skeleton(model_id: str, **config_kwargs) -> PreTrainedModel:
    """A model without its weights, on the meta device: all that its configuration tells, for a few kilobytes.

    Args:
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
    model.name_or_path, model.config._commit_hash = model_id, commit
    return model


def task_of(network: nn.Module) -> str:
    """Tell causal language models, sequence classifiers and image classifiers apart.

    Raises:
        PRTValueError: the network is none of them, or its loss is not cross-entropy over labels.
    """
    model = unwrap_adapter(network)
    if not isinstance(model, PreTrainedModel):
        raise PRTValueError(
            "A reward is tuned from a transformers model.",
            expected="a PreTrainedModel, or a PeftModel of one",
            found=type(model).__name__,
        )
    try:
        task = _task_of_class(type(model).__name__, model.name_or_path)
    except PRTValueError:
        # A class of the user's own: its inputs and outputs tell.
        if any(name in type(model).__name__ for name in _OTHER_TASKS):
            raise
        if model.can_generate() and model.get_output_embeddings() is not None:
            task = TEXT_GENERATION
        elif model.main_input_name == "pixel_values" and model.config.num_labels > 1:
            task = IMAGE_CLASSIFICATION
        else:
            raise
    if model.config.is_encoder_decoder and task == TEXT_GENERATION:
        raise PRTValueError(
            "Encoder-decoder models are not supported.", expected="a causal language model", found=type(model).__name__
        )
    if task != TEXT_GENERATION:
        problem_type = getattr(model.config, "problem_type", None)
        if model.config.num_labels < 2 or problem_type in ("regression", "multi_label_classification"):
            raise PRTValueError(
                "A reward needs one distribution over at least two labels (Eq. 5).",
                expected="single-label classification",
                found=f"num_labels = {model.config.num_labels}, problem_type = {problem_type!r}",
            )
    return task


def contract_of(network: nn.Module, processing_class=None) -> Contract:
    """The contract that a network's logits keep; language models need their tokenizer for it.

    Raises:
        PRTValueError: a language model without a tokenizer.
        VocabularyMismatchError: the tokenizer has more tokens than the head has rows.
    """
    model = unwrap_adapter(network)
    if task_of(model) != TEXT_GENERATION:
        return LabelContract.from_model_config(model.config)
    tokenizer = unwrap_tokenizer(processing_class)
    if tokenizer is None:
        raise PRTValueError(
            "The vocabulary of a language model is told by its tokenizer.",
            expected="`processing_class=` a tokenizer",
            found=type(processing_class).__name__,
            remedy="processing_class=AutoTokenizer.from_pretrained(...)",
        )
    contract = VocabularyContract.from_tokenizer(tokenizer)
    contract.check_head(head_of(model)[1].weight.shape[0], owner=type(model).__name__)
    return contract


def head_of(network: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the layer whose outputs are the logits: the language model head, or the last layer with as
    many outputs as there are labels.

    Raises:
        PRTValueError: there is none.
    """
    model = unwrap_adapter(network)
    if task_of(model) == TEXT_GENERATION:
        head = model.get_output_embeddings()
        candidates = [(name, module) for name, module in model.named_modules() if module is head]
    else:
        candidates = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
        ]
    if not candidates:
        raise PRTValueError(f"{type(model).__name__} has no output layer that could be recognised.")
    return candidates[-1]


def has_fixed_head(network: nn.Module) -> bool:
    """Whether the logits come from a [`FixedLinear`]."""
    return isinstance(head_of(network)[1], FixedLinear)


def layer_stack(network: nn.Module) -> tuple[str, nn.ModuleList] | None:
    """Name and module of the list in which a network's layers follow one another; None where there is not one list."""
    model = unwrap_adapter(network)
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    return stacks[0] if len(stacks) == 1 else None


def context_length(network: nn.Module) -> int | None:
    """Tokens that the network can read; None where there is no limit (state-space models)."""
    model = unwrap_adapter(network)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit <= 0:
        return None
    return limit - first_position(model)


def first_position(model: PreTrainedModel) -> int:
    """Return the number that the model gives to the first token of a text: not 0 where padding has a position."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:  # RoBERTa's kin
            return module.padding_idx + 1
    return 0


def check_length(length: int, limit: int | None) -> None:
    """Raises:
    ContextLengthError: more tokens than a network can read.
    """
    if limit is not None and length > limit:
        raise ContextLengthError(
            "The sequence is longer than the reward's context.",
            expected=f"at most {limit} tokens (max_position_embeddings)",
            found=f"{length} tokens",
            remedy="shorten the prompt or `max_new_tokens`, or tune a reward on a model with a longer context",
        )


def check_bare(model: PreTrainedModel) -> None:
    """Raises:
    PRTValueError: the model carries an adapter.
    """
    if isinstance(model, PeftModel) or getattr(model, "peft_config", None):
        raise PRTValueError(
            "The base carries an adapter, so it is no pretrained model any more.",
            expected="a PreTrainedModel without adapters",
            found=type(model).__name__,
            remedy="load the base again, or merge its adapter with `merge_and_unload` if that is what you want",
        )


def reference_to(network: nn.Module) -> ModelReference:
    """Id, commit, class and weights of a network without its adapters.

    Raises:
        UnsupportedError: DeepSpeed has divided it already.
    """
    model = unwrap_adapter(network)
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UnsupportedError(
            "The model was loaded in parts, so that its weights tell nothing.",
            expected="a model that is whole until the trainer divides it",
            found=f"{model.name_or_path or type(model).__name__} of DeepSpeed ZeRO-3",
            remedy="load it before `PRTConfig` is made, or use FSDP 2 (`fsdp_cpu_ram_efficient_loading`)",
        )
    place = model.name_or_path or None
    return ModelReference(
        id=os.path.abspath(place) if place and os.path.isdir(place) else place,
        revision=getattr(model.config, "_commit_hash", None),
        architecture=type(model).__name__,
        weights=weights_fingerprint(network),
    )


def weights_fingerprint(network: nn.Module) -> str | None:
    """SHA-256 over shapes and samples of the pretrained weights, batch statistics and fixed heads, adapters left out.

    Up to 64 samples of each tensor, rounded to bfloat16, so that a model has the same fingerprint in float32 and in
    bfloat16; without names, which change between versions of transformers. None where the values cannot be read
    (quantised or offloaded weights) or were rounded otherwise (float16).
    """
    return fingerprint_of([*pretrained_parameters(network).values(), *_telling_buffers(network)])


def fingerprint_of(tensors: Iterable[torch.Tensor]) -> str | None:
    """The fingerprint of a model that is made of these tensors, see [`weights_fingerprint`]."""
    digests = []
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16) or tensor.is_meta:
            return None
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES_PER_TENSOR)
        samples = flat[::step][:_SAMPLES_PER_TENSOR].to("cpu", torch.bfloat16).view(torch.int16)
        digests.append(hashlib.sha256(str(tuple(tensor.shape)).encode() + samples.numpy().tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def pretrained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are no adapter's, by name."""
    tuner = getattr(network.base_model, "prefix", "lora_") if isinstance(network, PeftModel) else None
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if not (tuner and any(part in name for part in (tuner, *_OF_ADAPTERS)))
    }


def _telling_buffers(network: nn.Module) -> list[torch.Tensor]:
    """Running means and variances of batch normalisation, and what a fixed head is made of."""
    tensors = []
    for name, module in network.named_modules():
        if ".modules_to_save." in name:
            continue
        names = ("weight", "bias") if isinstance(module, FixedLinear) else ("running_mean", "running_var")
        tensors += [getattr(module, name, None) for name in names]
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]


def share_weights(model: PreTrainedModel, device: str | None = None) -> PreTrainedModel:
    """Return a second model on the very same weights: adapters put into one leave the other as it is, and cost no copy;
    or, on the device `"meta"`, on none."""

    def shared(tensor: torch.Tensor) -> torch.Tensor:
        if type(tensor) is nn.Parameter:
            return nn.Parameter(tensor.detach().to(device), requires_grad=False)
        return tensor.to(device) if type(tensor) is torch.Tensor else tensor

    return copy.deepcopy(model, {id(tensor): shared(tensor) for tensor in chain(model.parameters(), model.buffers())})


def frozen_norms(network: nn.Module) -> list[nn.Module]:
    """Layers with batch statistics that are not trained: under an adapter the statistics are the base's, which others
    share."""
    return [
        module
        for module in network.modules()
        if getattr(module, "running_mean", None) is not None
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


def tie_parameters(network: nn.Module, base: nn.Module) -> None:
    """Make parameters of `network` that share their values with parameters of `base` the same objects, so that they
    stay one when they move to another device or precision."""
    known = {value.data_ptr(): value for value in base.parameters() if value.numel()}
    for module in network.modules():
        for name, value in module._parameters.items():
            same = None if value is None else known.get(value.data_ptr())
            if same is not None and same.shape == value.shape and same.dtype == value.dtype:
                module._parameters[name] = same


def _task_of_config(config: PreTrainedConfig, model_id: str) -> str:
    if not config.architectures and config.model_type == _TIMM and config.num_labels > 0:
        return IMAGE_CLASSIFICATION
    return _task_of_class((config.architectures or ["unknown"])[0], model_id)


def _task_of_class(class_name: str, model_id: str) -> str:
    for task, names in _CLASS_NAMES.items():
        if class_name in names:
            return task
    raise PRTValueError(
        f"{model_id or class_name} has no head that predicts tokens or class labels.",
        expected="a causal language model, a sequence classifier or an image classifier",
        found=class_name,
        remedy="name a checkpoint that was trained for the task: a new head knows nothing that a reward could build "
        "on. Of CLIP and its kin, `zero_shot_classifier` makes an image classifier",
    )
