"""Tell a pretrained network's task, head, layers, context length and contract."""

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

from ..contract import (
    IMAGE_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    Contract,
    LabelContract,
    VocabularyContract,
    unwrap_tokenizer,
)
from ..errors import ContextLengthError, PRTValueError

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
# Parameters that PEFT adds besides those with its prefix; the last is AdaLoRA's.
_OF_ADAPTERS = (".modules_to_save.", ".trainable_tokens_", ".ranknum.")
# The name of the cache among the inputs and outputs of models, and of `generate`; another before transformers 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


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
        task = task_of_class(type(model).__name__, model.name_or_path)
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


def pretrained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are no adapter's, by name."""
    tuner = getattr(network.base_model, "prefix", "lora_") if isinstance(network, PeftModel) else None
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if not (tuner and any(part in name for part in (tuner, *_OF_ADAPTERS)))
    }


def frozen_norms(network: nn.Module) -> list[nn.Module]:
    """Layers with batch statistics that are not trained: under an adapter the statistics are the base's, which others
    share."""
    return [
        module
        for module in network.modules()
        if getattr(module, "running_mean", None) is not None
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


def task_of_class(class_name: str, model_id: str) -> str:
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
