"""Zero-shot image classifiers: a CLIP-like model's image encoder under a fixed head made of class names.

This is the paper's set-up for images: the classification layer of every data set is built from prompts and then fixed,
and the image encoder is tuned (Sec. 4).
"""

import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from ..contract import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION
from ..errors import PRTValueError
from ..vocabulary import unwrap_tokenizer
from .anatomy import FixedLinear, ProcessingClass, register_model
from .auto import load_processing_class
from .checkpoints import load_whole

# Prompts for the paper's data sets, by name; `{}` is the class's name.
TEMPLATES: dict[str, tuple[str, ...]] = {
    name: tuple(prompts) for name, prompts in json.loads((files(__package__) / "templates.json").read_text()).items()
}
# Families of models with encoders of texts and images, and the class of the image encoder.
_IMAGE_ENCODERS = {
    "altclip": "AltCLIPVisionModel",
    "chinese_clip": "ChineseCLIPVisionModel",
    "clip": "CLIPVisionModel",
    "clipseg": "CLIPSegVisionModel",
    "metaclip_2": "MetaClip2VisionModel",
    "siglip": "SiglipVisionModel",
}
_PROMPTS_PER_BATCH = 256


class ZeroShotConfig(PreTrainedConfig):
    """Configuration of a zero-shot classifier; other entries (image size, number of layers, ...) are the encoder's.

    Args:
        family (`str`): `model_type` of the model with the encoder.
        vision_config (`PreTrainedConfig` or `dict`): of the encoder.
        projection_dim (`int`, *optional*): size of the features, if a projection makes them of the encoder's output.
        has_bias (`bool`): whether the head has a bias, like SigLIP's.
    """

    model_type = "prt_zero_shot"
    sub_configs = {"vision_config": AutoConfig}

    family: str = "clip"
    vision_config: PreTrainedConfig | dict | None = None
    projection_dim: int | None = None
    has_bias: bool = False

    def __post_init__(self, **kwargs):
        if isinstance(self.vision_config, dict):
            entries = dict(self.vision_config)
            self.vision_config = AutoConfig.for_model(entries.pop("model_type"), **entries)
        super().__post_init__(**kwargs)

    def __getattr__(self, name):
        config = self.__dict__.get("vision_config")
        if name.startswith("_") or not isinstance(config, PreTrainedConfig):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(config, name)


class ZeroShotForImageClassification(PreTrainedModel):
    """An image classifier whose head is made of class names; [`zero_shot_classifier`] makes it.

    Its logits are exp(logit_scale) cos(image features, class features) (+ logit_bias), the original model's scores of
    images and texts. `classifier` is never tuned.
    """

    config_class = ZeroShotConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: ZeroShotConfig):
        super().__init__(config)
        encoder_class = getattr(transformers, _IMAGE_ENCODERS[config.family])
        self.vision_model = encoder_class(config.vision_config)
        size = config.vision_config.hidden_size
        self.visual_projection = None
        if config.projection_dim is not None:
            self.visual_projection = nn.Linear(size, config.projection_dim, bias=False)
            size = config.projection_dim
        self.classifier = FixedLinear(size, config.num_labels, bias=config.has_bias)
        self.post_init()
        # FSDP expects every block that is named here, but the encoder's class also names those of the text encoder.
        there = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = there.intersection(self._no_split_modules)

    def get_input_embeddings(self) -> nn.Module:
        """Return the image encoder's."""
        return self.vision_model.get_input_embeddings()

    def forward(
        self, pixel_values: torch.FloatTensor, labels: torch.LongTensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Classify images `(batch_size, channels, height, width)`; labels `(batch_size,)` give `loss`."""
        output = self.vision_model(pixel_values, **kwargs)
        features = output.pooler_output
        if self.visual_projection is not None:
            features = self.visual_projection(features)
        logits = self.classifier(_normalised(features))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=output.hidden_states, attentions=output.attentions
        )


register_model(IMAGE_CLASSIFICATION, ZeroShotConfig, ZeroShotForImageClassification)


def zero_shot_classifier(
    model_or_id: str | PreTrainedModel,
    class_names: Sequence[str],
    templates: Sequence[str] = TEMPLATES["default"],
    tokenizer: ProcessingClass | None = None,
    **load_kwargs: Any,
) -> ZeroShotForImageClassification:
    """Make an image classifier of a model that scores images against texts, without training.

    The features of a class are the mean of its prompts' normalised features, normalised again. With one template the
    logits are the model's own `logits_per_image`. Rewards and backbones can be such classifiers: the head of a reward
    is fixed, and its encoder is tuned.

    Args:
        model_or_id: CLIP, SigLIP, AltCLIP, Chinese-CLIP, CLIPSeg or MetaCLIP 2: a Hub id, a path, or a model in memory,
            which is left unchanged.
        class_names: the labels, in the order of the logits. Underscores become spaces in prompts.
        templates: prompts, with `{}` for the class; [`TEMPLATES`] has those for the paper's data sets.
        tokenizer: of a model in memory (or its processor); by default the one in the model's folder.
        load_kwargs: for `from_pretrained` of an id (`revision`, `dtype`, ...).

    Returns:
        [`ZeroShotForImageClassification`]: in evaluation mode, with the class names as labels. It is saved and loaded
        like any image classifier, without the text encoder; save the model's image processor in the same folder.

    Raises:
        PRTValueError: the model has no text encoder or is of another family; there are fewer than two class names, an
            empty one, or two with the same prompts; a template has no `{}`; a prompt is too long.
    """
    names, templates = _checked_names(class_names), _checked_templates(templates)
    model = model_or_id
    if not isinstance(model, PreTrainedModel):
        trusted = {"trust_remote_code": bool(load_kwargs.get("trust_remote_code"))}
        model = load_whole(AutoModel, model_or_id, **load_kwargs | trusted)
    elif load_kwargs:
        raise PRTValueError(
            "A model in memory takes no arguments for loading.",
            expected="load arguments only with an id or path",
            found=", ".join(load_kwargs),
        )
    family = model.config.model_type
    if family not in _IMAGE_ENCODERS or not hasattr(model, "get_text_features"):
        raise PRTValueError(
            "The model cannot score images against class names.",
            expected=f"a model with encoders of texts and of images, one of {', '.join(_IMAGE_ENCODERS)}",
            found=f"{type(model).__name__} ({family})",
            remedy="name a CLIP or SigLIP checkpoint",
        )
    if tokenizer is None and model.name_or_path:
        tokenizer = load_processing_class(model.name_or_path, TEXT_CLASSIFICATION, **load_kwargs)
    tokenizer = unwrap_tokenizer(tokenizer)
    if tokenizer is None:
        raise PRTValueError(
            "Class names need the model's tokenizer.",
            expected="`tokenizer=`, or a model with a tokenizer in its folder",
            found="none",
            remedy="tokenizer=AutoTokenizer.from_pretrained(...)",
        )
    prompts = [template.replace("{}", _spoken(name)) for name in names for template in templates]
    features = _text_features(model, tokenizer, prompts).unflatten(0, (len(names), len(templates)))
    weight = model.logit_scale.detach().exp().to(features.dtype) * _normalised(features.mean(1))
    return _classifier(model, names, weight)


@torch.no_grad()
def _classifier(model: PreTrainedModel, names: list[str], weight: torch.Tensor) -> ZeroShotForImageClassification:
    bias, projection = getattr(model, "logit_bias", None), getattr(model, "visual_projection", None)
    config = ZeroShotConfig(
        family=model.config.model_type,
        vision_config=model.vision_model.config.to_dict(),
        projection_dim=None if projection is None else projection.out_features,
        has_bias=bias is not None,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        dtype=model.dtype,
    )
    config._attn_implementation = model.vision_model.config._attn_implementation
    classifier = ZeroShotForImageClassification(config).to(model.device, model.dtype)
    classifier.vision_model.load_state_dict(model.vision_model.state_dict())
    if projection is not None:
        classifier.visual_projection.load_state_dict(projection.state_dict())
    classifier.classifier.weight.copy_(weight)
    if bias is not None:
        classifier.classifier.bias.copy_(bias.expand(len(names)))
    return classifier.eval()


@torch.no_grad()
def _text_features(model: PreTrainedModel, tokenizer, prompts: list[str]) -> torch.Tensor:
    """Return normalised features of prompts, `(len(prompts), features)`, in float32."""
    context = model.config.text_config.max_position_embeddings
    # SigLIP reads the last position, and was trained on texts that are padded to full length.
    padding = {"padding": "max_length", "max_length": context} if hasattr(model, "logit_bias") else {"padding": True}
    was_training = model.training
    model.eval()
    features = []
    for start in range(0, len(prompts), _PROMPTS_PER_BATCH):
        batch = prompts[start : start + _PROMPTS_PER_BATCH]
        inputs = tokenizer(batch, **padding, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if length > context:
            raise PRTValueError(
                "A prompt is longer than the text encoder can read.",
                expected=f"at most {context} tokens",
                found=f"{length} tokens in {max(batch, key=len)!r}",
                remedy="shorten the class's name or the template",
            )
        output = model.get_text_features(**inputs.to(model.device))
        features.append(_normalised(output.pooler_output.float()))
    model.train(was_training)
    return torch.cat(features)


def _normalised(features: torch.Tensor) -> torch.Tensor:
    return features / features.norm(p=2, dim=-1, keepdim=True)


def _spoken(name: str) -> str:
    return " ".join(name.replace("_", " ").split())


def _checked_names(class_names: Sequence[str]) -> list[str]:
    names = [] if isinstance(class_names, str) else list(class_names)
    if len(names) < 2 or not all(isinstance(name, str) and _spoken(name) for name in names):
        raise PRTValueError(
            "`class_names` is not usable.",
            expected="a list of two names or more, none of them empty",
            found=repr(class_names)[:200],
        )
    counts = Counter(_spoken(name).casefold() for name in names)
    if same := [name for name in names if counts[_spoken(name).casefold()] > 1]:
        raise PRTValueError(
            "Some classes have the same prompts, so they cannot be distinguished.",
            expected="names that differ in more than case, spaces and underscores",
            found=", ".join(map(repr, same)),
            remedy="name the difference ('crane (bird)', 'crane (machine)')",
        )
    return names


def _checked_templates(templates: Sequence[str]) -> list[str]:
    is_right = not isinstance(templates, str) and all(isinstance(each, str) and "{}" in each for each in templates)
    if not templates or not is_right:
        raise PRTValueError(
            "`templates` is not usable.",
            expected="a list of prompts, each with {} for the class's name",
            found=repr(templates)[:200],
            remedy="TEMPLATES['default']",
        )
    return list(templates)
