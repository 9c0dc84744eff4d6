"""Tell a pretrained network's task, head, layers, context length and contract."""

from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import modeling_auto

from ..contract import (
    IMAGE_CLASSIFICATION,
    TEXT_CLASSIFICATION,
    TEXT_GENERATION,
    Contract,
    LabelContract,
)
from ..errors import ContextLengthError, PRTValueError
from ..vocabulary import VocabularyContract, unwrap_tokenizer

ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin | BaseImageProcessor
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
_ADAPTER_PARTS = (".modules_to_save.", ".trainable_tokens_", ".ranknum.")
# The cache's name among the inputs and outputs of models and of `generate`, which transformers 5.24 changed.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class FixedLinear(nn.Linear):
    """A linear head that is never tuned: its weights are buffers, which optimisers and `requires_grad_` do not see."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        for name, value in list(self.named_parameters()):
            delattr(self, name)
            self.register_buffer(name, value.data)


def register_model(task: str, config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> None:
    """Register a model class of this package with the Auto classes, and its task with [`task_of_checkpoint`]."""
    AutoConfig.register(config_class.model_type, config_class)
    AUTO_CLASSES[task].register(config_class, model_class)
    _CLASS_NAMES[task].add(model_class.__name__)


def unwrap_adapter(network: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside a PEFT model; any other network itself."""
    return network.get_base_model() if isinstance(network, PeftModel) else network


def task_of(network: nn.Module) -> str:
    """Return the task of a causal language model, sequence classifier or image classifier.

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
        # A class of the user's own: judged by its inputs and outputs.
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


def contract_of(network: nn.Module, processing_class: ProcessingClass | None = None) -> Contract:
    """Return the contract of a network's logits; language models need their tokenizer for it.

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
            "The vocabulary of a language model is that of its tokenizer.",
            expected="`processing_class=` a tokenizer",
            found=type(processing_class).__name__,
            remedy="processing_class=AutoTokenizer.from_pretrained(...)",
        )
    contract = VocabularyContract.from_tokenizer(tokenizer)
    contract.check_head(head_of(model)[1].weight.shape[0], owner=type(model).__name__)
    return contract


def head_of(network: nn.Module) -> tuple[str, nn.Module]:
    """Return name and module of the layer whose outputs are the logits.

    It is the language model head, or the last linear layer with as many outputs as there are labels.

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
    """Return name and module of the list of a network's layers; None if there is no such list, or several."""
    model = unwrap_adapter(network)
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    return stacks[0] if len(stacks) == 1 else None


def context_length(network: nn.Module) -> int | None:
    """Return the number of tokens that the network can read; None if there is no limit (state-space models)."""
    model = unwrap_adapter(network)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit <= 0:
        return None
    return limit - first_position(model)


def first_position(model: PreTrainedModel) -> int:
    """Return the position of the first token of a text: not 0 in models where padding has a position."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:  # RoBERTa's kin
            return module.padding_idx + 1
    return 0


def pad_id(network: nn.Module) -> int:
    """Return the token that masked positions hold; 0 if the configuration names none."""
    return getattr(unwrap_adapter(network).config.get_text_config(), "pad_token_id", None) or 0


def check_length(
    length: int,
    limit: int | None,
    remedy: str = "shorten the prompt or `max_new_tokens`, or tune a reward on a model with a longer context",
) -> None:
    """Check that a network can read as many tokens.

    Raises:
        ContextLengthError: it cannot.
    """
    if limit is not None and length > limit:
        raise ContextLengthError(
            "The sequence is longer than the reward's context.",
            expected=f"at most {limit} tokens (max_position_embeddings)",
            found=f"{length} tokens",
            remedy=remedy,
        )


def pretrained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that do not belong to an adapter, by name."""
    tuner = getattr(network.base_model, "prefix", "lora_") if isinstance(network, PeftModel) else None
    return {
        name: parameter
        for name, parameter in network.named_parameters()
        if not (tuner and any(part in name for part in (tuner, *_ADAPTER_PARTS)))
    }


def frozen_norms(network: nn.Module) -> list[nn.Module]:
    """Return the layers with batch statistics that are not trained.

    Under an adapter the statistics belong to the base, which other networks share.
    """
    return [
        module
        for module in network.modules()
        if getattr(module, "running_mean", None) is not None
        and not any(parameter.requires_grad for parameter in module.parameters())
    ]


def task_of_class(class_name: str, model_id: str) -> str:
    """Return the task of a model's class.

    Args:
        class_name: name of the class.
        model_id: name of the model in the message.

    Raises:
        PRTValueError: the class has no head that predicts tokens or labels.
    """
    for task, names in _CLASS_NAMES.items():
        if class_name in names:
            return task
    raise PRTValueError(
        f"{model_id or class_name} has no head that predicts tokens or class labels.",
        expected="a causal language model, a sequence classifier or an image classifier",
        found=class_name,
        remedy="use a checkpoint that was trained for the task, because a reward cannot build on a new head; "
        "`zero_shot_classifier` makes an image classifier of CLIP and similar models",
    )
