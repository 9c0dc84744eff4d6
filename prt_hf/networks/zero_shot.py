"""Zero-shot image classifiers: a CLIP-like model's image encoder under a fixed head made of class names.

The paper's vision set-up: for every data set the classification layer is built from prompts and then fixed; what is
tuned is the image encoder (Sec. 4).
"""

from collections.abc import Iterator, Sequence

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

from ..contract import IMAGE_CLASSIFICATION, TEXT_CLASSIFICATION, unwrap_tokenizer
from ..errors import PRTValueError
from .anatomy import FixedLinear, register_model
from .auto import load_processing_class
from .checkpoints import load_whole

# Templates for the paper's data sets; `{}` is the class's name.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "default": (
        "a photo of a {}.",
        "a close photo of a {}.",
        "a blurred photo of a {}.",
        "a photo of a small {}.",
        "a photo of a large {}.",
        "a picture with a {} in it.",
    ),
    "aircraft": (
        "a photo of a {}, which is an aircraft.",
        "a {} aeroplane on the runway.",
        "a {} aeroplane in the sky.",
        "a side view of the aircraft {}.",
    ),
    "caltech101": (
        "a photo of a {}.",
        "a drawing of a {}.",
        "a {} on a plain background.",
        "a {} among other things.",
        "one single {}.",
    ),
    "cars": (
        "a photo of a {}, which is a car.",
        "a {} parked in the street.",
        "a {} in a dealer's showroom.",
        "the car {}, seen from the front.",
        "the car {}, seen from the side.",
    ),
    "cifar100": (
        "a photo of a {}.",
        "a tiny photo of a {}.",
        "a coarse, blurred photo of a {}.",
        "a photo of {}.",
        "a {} that fills the picture.",
    ),
    "country211": (
        "a photo taken in {}.",
        "a street in {}.",
        "a landscape in {}.",
        "a day of travel through {}.",
        "people who live in {}.",
    ),
    "cub": (
        "a photo of a {}, which is a bird.",
        "a {} on a branch.",
        "a {} in flight.",
        "the bird {}, seen from near.",
    ),
    "flowers": (
        "a photo of a {}, which is a flower.",
        "a {} in bloom.",
        "the flower {}, seen from near.",
        "a {} in a garden.",
    ),
    "resisc45": (
        "a satellite image of {}.",
        "an aerial photo of {}.",
        "{}, seen from above.",
        "a remote sensing image that shows {}.",
    ),
}

# Families of models with one encoder for texts and one for images, each by the class of the latter.
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
    """Configuration of a zero-shot classifier. What it does not say itself (image size, number of layers, ...) is its
    image encoder's.

    Args:
        family (`str`): `model_type` of the model that the encoder comes from.
        vision_config (`PreTrainedConfig` or `dict`): of the encoder.
        projection_dim (`int`, *optional*): of the features, where a projection makes them of the encoder's output.
        has_bias (`bool`): whether the head has one, as SigLIP's.
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
    """logits = exp(logit_scale) cos(image features, class features) (+ logit_bias), as the model that it was made of
    scores images and texts. Made by [`zero_shot_classifier`]; `classifier` is never tuned."""

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
        # FSDP looks for every block that is named here, and the encoder's class names the text encoder's too.
        there = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = there.intersection(self._no_split_modules)

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def forward(
        self, pixel_values: torch.FloatTensor, labels: torch.LongTensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
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
    tokenizer=None,
    **load_kwargs,
) -> ZeroShotForImageClassification:
    """An image classifier from a model that scores images against texts, without training.

    The features of a class are the mean of its prompts' normalised features, normalised again. With one template the
    logits are the model's own `logits_per_image`. Reward and backbone alike may be such classifiers: the head of a
    reward stays as it is, the encoder moves.

    Args:
        model_or_id: CLIP, SigLIP, AltCLIP, Chinese-CLIP, CLIPSeg or MetaCLIP 2: a Hub id, a path, or a model in memory,
            which is left as it is.
        class_names: the labels, in the order of the logits. Prompts have spaces for underscores.
        templates: prompts, with `{}` for the class; [`TEMPLATES`] has some for the paper's data sets.
        tokenizer: of a model in memory (or its processor); by default what lies beside the weights.
        load_kwargs: for `from_pretrained` of an id (`revision`, `dtype`, ...).

    Returns:
        [`ZeroShotForImageClassification`]: in evaluation mode, with the class names as labels. It is saved and loaded
        as every image classifier is, without the text encoder; save the model's image processor beside it.

    Raises:
        PRTValueError: a model without a text encoder, or of another family; fewer than two class names, empty ones, or
            two that make the same prompts; templates without `{}`; a prompt longer than the text encoder reads.
    """
    names, templates = _checked_names(class_names), _checked_templates(templates)
    model = model_or_id
    if not isinstance(model, PreTrainedModel):
        trusted = {"trust_remote_code": bool(load_kwargs.get("trust_remote_code"))}
        model = load_whole(AutoModel, model_or_id, **load_kwargs | trusted)
    elif load_kwargs:
        raise PRTValueError(
            "A model in memory is not loaded again.",
            expected="load arguments with an id or path only",
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
            "Class names are read by the model's tokenizer.",
            expected="`tokenizer=`, or a model that has one beside its weights",
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
    """`torch.FloatTensor` of shape `(len(prompts), features)`, each of length 1; float32."""
    context = model.config.text_config.max_position_embeddings
    # SigLIP reads the last position, and was trained with texts that are padded up to there.
    padding = {"padding": True}
    if hasattr(model, "logit_bias"):
        padding = {"padding": "max_length", "max_length": context}
    was_training = model.training
    model.eval()
    features = []
    for batch in _batches(prompts):
        inputs = tokenizer(batch, **padding, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if length > context:
            raise PRTValueError(
                "A prompt is longer than the text encoder reads.",
                expected=f"at most {context} tokens",
                found=f"{length} tokens in {max(batch, key=len)!r}",
                remedy="shorten the class's name or the template",
            )
        output = model.get_text_features(**inputs.to(model.device))
        features.append(_normalised(output.pooler_output.float()))
    model.train(was_training)
    return torch.cat(features)


def _batches(prompts: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(prompts), _PROMPTS_PER_BATCH):
        yield prompts[start : start + _PROMPTS_PER_BATCH]


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
    same: dict[str, list[str]] = {}
    for name in names:
        same.setdefault(_spoken(name).casefold(), []).append(name)
    if colliding := [group for group in same.values() if len(group) > 1]:
        raise PRTValueError(
            "Some classes have the same prompts, so that nothing tells them apart.",
            expected="names that differ in more than case, spaces and underscores",
            found="; ".join(" = ".join(map(repr, group)) for group in colliding),
            remedy="say in the names what the difference is ('crane (bird)', 'crane (machine)')",
        )
    return names


def _checked_templates(templates: Sequence[str]) -> list[str]:
    checked = [] if isinstance(templates, str) else list(templates)
    if not checked or not all(isinstance(template, str) and "{}" in template for template in checked):
        raise PRTValueError(
            "`templates` is not usable.",
            expected="a list of prompts, each with {} for the class's name",
            found=repr(templates)[:200],
            remedy="TEMPLATES['default']",
        )
    return checked
