"""Models of one batch that want other pixels than one another: sizes, crops, normalisation.

One rule for trainer and PRT model: an input is every model's, unless its name starts with the model it belongs to. What
is called has the plain name. For `PRTTrainer`, which calls the reward, that is

    pixel_values                  of the reward, and of every backbone that wants the same
    backbone_0_pixel_values       of the first backbone, if it wants others

and for a PRT model, whose plain inputs are the backbone's as pipelines make them,

    pixel_values                  of the backbone, and of every reward that wants the same
    reward_0_pixel_values         of the first reward, if it wants others
"""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor, BatchFeature
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME

from ..errors import PRTValueError, UnsupportedError

PIXELS = "pixel_values"
_TIMM = "data_config"  # all that timm's processors say of their pixels
_TELLING = ("size", "crop_size", "crop_pct", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")


class PRTImageProcessor(BaseImageProcessor):
    """Makes the pixels of several models from the same images. Saved and loaded as every image processor is.

    ```
    PRTImageProcessor(processor, {"reward_0": other})(images, return_tensors="pt")
    ->  pixel_values (batch_size, 3, 224, 224)  reward_0_pixel_values (batch_size, 3, 384, 384)
    ```

    Args:
        main: image processor of the model whose pixels have the plain name.
        others: those of other models, by the beginning of their pixels' names.
    """

    def __init__(
        self,
        main: BaseImageProcessor | dict,
        others: Mapping[str, BaseImageProcessor | dict] | None = None,
        **kwargs,
    ):
        super().__init__()
        self.main = _as_processor(main)
        self.others = {owner: _as_processor(other) for owner, other in (others or {}).items()}

    @classmethod
    def of(
        cls, main: BaseImageProcessor | None, role: str, others: Sequence[BaseImageProcessor | None]
    ) -> "PRTImageProcessor":
        """With those of `others` that make other pixels than `main`, as `{role}_0`, `{role}_1`, ..."""
        own = {f"{role}_{index}": other for index, other in enumerate(others) if not is_same_pixels(main, other)}
        return cls(main, own)

    def preprocess(self, images, return_tensors: str | None = None, **kwargs) -> BatchFeature:
        """Pillow images get as many colours as each processor normalises."""
        pixels = {}
        for owner, processor in {None: self.main, **self.others}.items():
            prefix = "" if owner is None else f"{owner}_"
            made = processor(_coloured(images, processor), return_tensors=return_tensors, **kwargs)
            pixels |= {prefix + name: values for name, values in made.items()}
        return BatchFeature(pixels)

    def to_dict(self) -> dict:
        return {
            "image_processor_type": type(self).__name__,
            "main": _entries(self.main),
            "others": {owner: _entries(other) for owner, other in self.others.items()},
        }


def is_same_pixels(ours: BaseImageProcessor | None, theirs: BaseImageProcessor | None) -> bool:
    """Whether two image processors make the same of an image; an unknown one is taken to be the other."""
    return ours is None or theirs is None or _told(ours) == _told(theirs)


def is_saved_apart(processor) -> bool:
    """Whether an image processor does not save itself: transformers leaves timm's in the model's configuration, which
    an adapter has not."""
    return isinstance(getattr(processor, _TIMM, None), dict)


def split_inputs(inputs: dict, role: str, count: int) -> tuple[dict, list[dict]]:
    """Inputs of all, and those that belong to each of `count` models alone, without their prefix.

    Raises:
        PRTValueError: some belong to a model that is not there.
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
                f"The input {name!r} belongs to a {role} that is not there.",
                expected=f"{role}_0 ... {role}_{count - 1}",
                found=f"{role}_{match[1]}",
            )
    return shared, own


def missing_pixels(
    role: str, index: int, ours: BaseImageProcessor, theirs: BaseImageProcessor, remedy: str
) -> UnsupportedError:
    """The error where one model would get the other's pixels; `theirs` are those of the `role`."""
    ours, theirs = _told(ours), _told(theirs)
    differing = [name for name in ours if ours[name] != theirs[name]]
    return UnsupportedError(
        "Reward and backbone want other pixels, and get the same.",
        expected=f"`{role}_{index}_{PIXELS}` with " + ", ".join(f"{name}={theirs[name]}" for name in differing),
        found=f"only `{PIXELS}` with " + ", ".join(f"{name}={ours[name]}" for name in differing),
        remedy=remedy,
    )


def _told(processor: BaseImageProcessor) -> dict[str, str]:
    """As in files, where tuples are lists."""
    entries = processor.to_dict()
    return {name: json.dumps(entries.get(name), sort_keys=True, default=str) for name in (*_TELLING, _TIMM)}


def _entries(processor: BaseImageProcessor) -> dict:
    entries = processor.to_dict()
    return entries | {"pretrained_cfg": entries.pop(_TIMM)} if is_saved_apart(processor) else entries


def _as_processor(processor: BaseImageProcessor | dict) -> BaseImageProcessor:
    if not isinstance(processor, dict):
        return processor
    with tempfile.TemporaryDirectory() as folder:  # the Auto class, which knows the types, reads files only
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
