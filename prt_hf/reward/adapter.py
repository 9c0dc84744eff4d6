"""How a reward starts: the layers that its LoRA adapts, and its first values."""

import copy
import re

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..contract import TEXT_GENERATION, ModelReference
from ..errors import PRTValueError, UnsupportedError
from ..networks.adapter_config import check_is_of_layers
from ..networks.adapters import ADAPTER, check_bare, wrap
from ..networks.anatomy import FixedLinear, has_fixed_head, head_of, layer_stack, task_of
from ..networks.quantization import check_full_precision

REWARD_INITS = ("pretrained", "zero")
ADAPTED_LAYERS = (nn.Linear, Conv1D, nn.Conv2d)
# Fused kernels read these layers' weights past an adapter, so PEFT refuses to adapt them.
_FUSED_MODELS = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_FUSED_LAYERS = {"conv1d", "out_proj"}


def start(
    model: PreTrainedModel | PeftModel, base: ModelReference, peft_config: PeftConfig | None, reward_init: str
) -> PreTrainedModel | PeftModel:
    """Return the network that a reward starts as: a `PeftModel` as it is, a base with a new adapter, or a whole model.

    Raises:
        PRTValueError: arguments that exclude each other, or adapters that cannot be saved as a reward.
        UnsupportedError: a kind of adapter that cannot be one, or a quantised model.
    """
    check_full_precision(model)
    is_zero = reward_init == "zero"
    if isinstance(model, PeftModel):
        if peft_config is not None or is_zero:
            raise PRTValueError(
                "The model is a PeftModel already.",
                expected="no `peft_config`, and `reward_init='pretrained'`",
                found=f"peft_config={type(peft_config).__name__}, reward_init={reward_init!r}",
                remedy="pass its base model to get another adapter",
            )
        if list(model.peft_config) != [ADAPTER]:
            raise PRTValueError(
                "The PeftModel cannot be saved as a reward.",
                expected=f"one adapter, named {ADAPTER!r}",
                found=", ".join(map(repr, model.peft_config)),
            )
        check_is_of_layers(model.peft_config[ADAPTER], beside_base=True)
        return model
    if peft_config is not None:
        check_bare(model)
        return add_adapter(model, peft_config, base, zero=is_zero)
    if is_zero:
        zero_head(model)
    return model


def default_peft_config(model: PreTrainedModel, *, top_layers: int | None = None, **lora_kwargs) -> LoraConfig:
    """Return LoRA on every linear or convolutional layer, the head included.

    The head decides: a reward is a residual over the vocabulary, which the pretrained head alone cannot express, and
    with it frozen LoRA rewards trail EFT (Table 6 of the paper). A language model's head gets LoRA, a classifier's
    small head is tuned whole, and a zero-shot classifier's head is left alone. A reward has farther to go than a
    fine-tuned model, because it starts as the pretrained logits, which the backbone adds once more: language models get
    twice the customary scale of LoRA (see notebooks/lora_rewards.md), classifiers, which lose by it, do not.

    Args:
        model (`PreTrainedModel`): the reward's base.
        top_layers (`int`, *optional*): adapt this many of the uppermost layers, and the head. The layers below are then
            computed once a step for the reward and its own base.
        **lora_kwargs: for [`~peft.LoraConfig`]. By default `r` is 16, and `lora_alpha` four times as much, or twice
            for classifiers.

    Raises:
        PRTValueError: the model has fewer layers than `top_layers`, or they are not in one list.
    """
    head, _ = head_of(model)
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, ADAPTED_LAYERS) and _takes_lora(model, name, module)
    ]
    if top_layers is not None:
        targets = [name for name in targets if name == head or name.startswith(_prefixes_of_top(model, top_layers))]
    rank = lora_kwargs.get("r", 16)
    if task_of(model) == TEXT_GENERATION:
        defaults = {"task_type": "CAUSAL_LM", "lora_alpha": 4 * rank}
    else:
        # PEFT takes any name that ends so for the head, and no layer twice.
        targets = [name for name in targets if not name.endswith(head)]
        saved = {} if has_fixed_head(model) else {"modules_to_save": [head]}
        defaults = saved | {"lora_alpha": 2 * rank}
    defaults |= {"r": rank, "target_modules": _shorten(model, targets)}
    return LoraConfig(**defaults | lora_kwargs)


def add_adapter(model: PreTrainedModel, peft_config: PeftConfig, base: ModelReference, *, zero: bool) -> PeftModel:
    """Put a new adapter on a base, which itself stays untouched and shares its weights.

    A `LoraConfig` that names no `target_modules` gets those of [`default_peft_config`]. With `zero`, the reward gets an
    output layer of its own, zero at the start, so that r = 0 and the PRT model starts as the backbone.
    """
    peft_config = copy.deepcopy(peft_config)
    check_is_of_layers(peft_config, beside_base=True)
    if isinstance(peft_config, LoraConfig) and not peft_config.target_modules and not peft_config.target_parameters:
        default = default_peft_config(model)
        peft_config.target_modules = default.target_modules
        peft_config.modules_to_save = peft_config.modules_to_save or default.modules_to_save
        peft_config.task_type = peft_config.task_type or default.task_type
    peft_config.base_model_name_or_path = base.id
    peft_config.revision = base.revision
    head, _ = head_of(model)
    if zero:
        check_zero(model)
        # PEFT would reject a layer that is both adapted and saved whole.
        if isinstance(peft_config.target_modules, set | list):
            peft_config.target_modules = {
                name for name in peft_config.target_modules if not (name.endswith(head) or head.endswith(f".{name}"))
            }
        peft_config.modules_to_save = list(dict.fromkeys([*(peft_config.modules_to_save or []), head]))
    network = wrap(model, peft_config)
    _check_saved(network)
    if has_fixed_head(model):
        _check_fixed(network, head)
    if zero:
        zero_(network.get_submodule(f"base_model.model.{head}.modules_to_save.default"))
    return network


def _check_saved(network: PeftModel) -> None:
    """Check that PEFT saves all that is trained: version 0.19 leaves tuned biases out of its files."""
    saved = {value.data_ptr() for value in get_peft_model_state_dict(network, save_embedding_layers=False).values()}
    lost = [name for name, value in network.named_parameters() if value.requires_grad and value.data_ptr() not in saved]
    if lost:
        raise UnsupportedError(
            "This PEFT does not save all that the adapter would train.",
            expected="every trainable parameter in its state dict",
            found=f"{len(lost)} are missing, the first is {lost[0]}",
            remedy="pip install --upgrade peft, or bias='none'",
        )


def _check_fixed(network: PeftModel, head: str) -> None:
    """Refuse an adapter of a head that is fixed."""
    found = network.get_base_model().get_submodule(head)
    if not isinstance(found, FixedLinear):
        raise PRTValueError(
            "The adapter changes a head that is fixed.",
            expected=f"an adapter of other layers than {head!r}, as `default_peft_config(model)` has",
            found=type(found).__name__,
            remedy=f"LoraConfig(exclude_modules=[{head!r}], ...)",
        )


def zero_head(model: PreTrainedModel) -> None:
    """Start a full reward at r = 0, in place; a head that was tied to the input embeddings is untied first."""
    check_zero(model)
    _, head = head_of(model)
    embeddings = model.get_input_embeddings() if task_of(model) == TEXT_GENERATION else None
    if embeddings is not None and head.weight is embeddings.weight:
        head = copy.deepcopy(head)
        model.set_output_embeddings(head)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    zero_(head)


def check_zero(model: PreTrainedModel) -> None:
    """Raise `PRTValueError` if a reward of this model cannot start at zero.

    The logits of DeiT and LeViT with a teacher are the mean of two heads, of which one would not be zero; a fixed head
    would stay zero.
    """
    if has_fixed_head(model):
        raise PRTValueError(
            "A reward with a fixed head cannot start at zero: it would stay there.",
            expected="reward_init='pretrained'",
            found=f"{type(model).__name__}, reward_init='zero'",
        )
    if "WithTeacher" in type(model).__name__:
        raise PRTValueError(
            "A reward of two heads cannot start at zero.",
            expected="reward_init='pretrained', or the model's class without teacher",
            found=type(model).__name__,
        )


def zero_(head: nn.Module) -> None:
    """Set all parameters to zero, in place."""
    for parameter in head.parameters():
        nn.init.zeros_(parameter)


def _prefixes_of_top(model: PreTrainedModel, count: int) -> tuple[str, ...]:
    """Return the names of the uppermost layers, each followed by a dot."""
    stack = layer_stack(model)
    depth = 0 if stack is None else len(stack[1])
    if not 0 < count <= depth:
        raise PRTValueError(
            "`top_layers` is not usable.",
            expected=f"1 ... {depth}" if depth else "a model whose layers are in one list",
            found=str(count),
        )
    return tuple(f"{stack[0]}.{index}." for index in range(depth - count, depth))


def _shorten(model: nn.Module, targets: list[str]) -> list[str]:
    """Shorten the layers' names to the part that repeats from block to block, if that names the same layers."""
    wanted = set(targets)
    # The last name of a path, with the numbers behind it.
    short = {re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name)[0] for name in targets}
    matched = {
        name for name, _ in model.named_modules() if name in short or any(name.endswith(f".{end}") for end in short)
    }
    return sorted(short if matched == wanted else wanted)


def _takes_lora(model: PreTrainedModel, name: str, module: nn.Module) -> bool:
    """Return whether PEFT can put LoRA on a layer, and the layer's owner runs it as a module."""
    if getattr(module, "groups", 1) > 1:  # PEFT splits the rank among the groups of a depthwise convolution
        return False
    # Attention of torch's own reads the weights of its output layer past an adapter.
    if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
        return False
    return not (model.config.model_type in _FUSED_MODELS and name.rpartition(".")[2] in _FUSED_LAYERS)
