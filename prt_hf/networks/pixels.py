"""Batches whose models need different image preprocessing: sizes, crops, normalisation.

Trainer and PRT model follow one rule: all models read an input, unless its name starts with that of one model. In
`PRTTrainer`, which tunes the reward, the plain name is the reward's:

    pixel_values                  for the reward, and for every backbone that needs the same
    backbone_0_pixel_values       for the first backbone, if it needs others

In a PRT model, which pipelines call as its backbone, it is the backbone's:

    pixel_values                  for the backbone, and for every reward that needs the same
    reward_0_pixel_values         for the first reward, if it needs others
"""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor, BatchFeature
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from ..errors import PRTValueError, UnsupportedError

PIXELS = "pixel_values"
_TIMM = "data_config"  # the whole configuration of timm's processors
_SETTINGS = ("size", "crop_size", "crop_pct", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


class PRTImageProcessor(BaseImageProcessor):
    """Makes the pixels of several models from the same images; saved and loaded like any image processor.

    ```
    PRTImageProcessor(processor, {"reward_0": other})(images, return_tensors="pt")
    ->  pixel_values (batch_size, 3, 224, 224)  reward_0_pixel_values (batch_size, 3, 384, 384)
    ```

    Args:
        main: image processor of the model whose pixels have the plain name.
        others: those of other models, by the prefix of their pixels' names.
        kwargs: entries of a saved configuration, which are not used.
    """

    def __init__(
        self,
        main: BaseImageProcessor | dict,
        others: Mapping[str, BaseImageProcessor | dict] | None = None,
        **kwargs: Any,
    ):
        super().__init__()
        self.main = _as_processor(main)
        self.others = {owner: _as_processor(other) for owner, other in (others or {}).items()}

    @classmethod
    def of(
        cls, main: BaseImageProcessor | None, role: str, others: Sequence[BaseImageProcessor | None]
    ) -> "PRTImageProcessor":
        """Return a processor of `main` and of those `others` that make other pixels.

        Args:
            main: makes the pixels with the plain name.
            role: prefix of the others' names, which are `{role}_0`, `{role}_1`, ...
            others: image processors; None for models that read the plain pixels.
        """
        own = {f"{role}_{index}": other for index, other in enumerate(others) if not is_same_pixels(main, other)}
        return cls(main, own)

    def preprocess(
        self, images: Image.Image | Sequence[Image.Image], return_tensors: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Return the pixels of all models.

        Args:
            images: Pillow images are converted to as many colours as each processor normalises.
            return_tensors: `"pt"` for tensors.
            kwargs: for each processor.
        """
        pixels = {}
        for owner, processor in {None: self.main, **self.others}.items():
            prefix = "" if owner is None else f"{owner}_"
            made = processor(_coloured(images, processor), return_tensors=return_tensors, **kwargs)
            pixels |= {prefix + name: values for name, values in made.items()}
        return BatchFeature(pixels)

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of its file."""
        return {
            "image_processor_type": type(self).__name__,
            "main": _entries(self.main),
            "others": {owner: _entries(other) for owner, other in self.others.items()},
        }


def is_same_pixels(ours: BaseImageProcessor | None, theirs: BaseImageProcessor | None) -> bool:
    """Return whether two image processors make the same pixels of an image; None is taken for an equal one."""
    return ours is None or theirs is None or _settings(ours) == _settings(theirs)


def is_saved_apart(processor: object) -> bool:
    """Return whether an image processor is saved in the model's configuration, which adapters do not have: timm's."""
    return isinstance(getattr(processor, _TIMM, None), dict)


def split_inputs(inputs: dict, role: str, count: int) -> tuple[dict, list[dict]]:
    """Return the inputs of all models, and those of each of `count` models alone, without their prefix.

    The `role` in the prefix is `"backbone"` or `"reward"`. Inputs of a model that does not exist raise `PRTValueError`.
    """
    shared, own = {}, [{} for _ in range(count)]
    for name, value in inputs.items():
        match = re.fullmatch(rf"{role}_(\d+)_(.+)", name)
        if match is None:
            shared[name] = value
        elif int(match[1]) < count:
            own[int(match[1])][match[2]] = value
        else:
            raise PRTValueError(
                f"The input {name!r} belongs to a {role} that does not exist.",
                expected=f"{role}_0 ... {role}_{count - 1}",
                found=f"{role}_{match[1]}",
            )
    return shared, own


def missing_pixels(
    role: str, index: int, ours: BaseImageProcessor, theirs: BaseImageProcessor, remedy: str
) -> UnsupportedError:
    """Return the error for a model that would read another's pixels.

    Args:
        role: The kind of the model that lacks pixels, `"backbone"` or `"reward"`.
        index: Its place among those of its role.
        ours: The image processor of the pixels in the batch.
        theirs: The image processor of the model that lacks pixels.
        remedy: What to do.
    """
    ours, theirs = _settings(ours), _settings(theirs)
    differing = [name for name in ours if ours[name] != theirs[name]]
    return UnsupportedError(
        "Reward and backbone need different pixels, but get the same.",
        expected=f"`{role}_{index}_{PIXELS}` with " + ", ".join(f"{name}={theirs[name]}" for name in differing),
        found=f"only `{PIXELS}` with " + ", ".join(f"{name}={ours[name]}" for name in differing),
        remedy=remedy,
    )


def _settings(processor: BaseImageProcessor) -> dict[str, str]:
    """Return the entries that decide about pixels, as they are in files, where tuples are lists."""
    entries = processor.to_dict()
    return {name: json.dumps(entries.get(name), sort_keys=True, default=str) for name in (*_SETTINGS, _TIMM)}


def _entries(processor: BaseImageProcessor) -> dict:
    entries = processor.to_dict()
    return entries | {"pretrained_cfg": entries.pop(_TIMM)} if is_saved_apart(processor) else entries


def _as_processor(processor: BaseImageProcessor | dict) -> BaseImageProcessor:
    if not isinstance(processor, dict):
        return processor
    with tempfile.TemporaryDirectory() as folder:  # the Auto class knows the types, but reads only files
        name = CONFIG_NAME if "pretrained_cfg" in processor else IMAGE_PROCESSOR_NAME
        (Path(folder) / name).write_text(json.dumps(processor), encoding="utf-8")
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)


def _coloured(images, processor: BaseImageProcessor):
    if isinstance(images, list | tuple):
        return [_coloured(image, processor) for image in images]
    if not isinstance(images, Image.Image):
        return images
    mean = processor.data_config["mean"] if is_saved_apart(processor) else getattr(processor, "image_mean", None)
    return images.convert("L" if isinstance(mean, Sequence) and len(mean) == 1 else "RGB")
