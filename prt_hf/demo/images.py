"""Run the image task: two classifiers of handwritten digits, tuned on digits that are rotated and noisy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from .. import LabelContract
from ..training.data import label_ids, pixel_values, require_column
from .comparison import hits, tune_all
from .data import load, load_splits
from .report import Measure, Result, spread_note
from .training import Steps, fit, tuning_seeds

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MEAN, DEVIATION = 0.305, 0.376  # of the digits' pixels in [0, 1]
BATCH_SIZE = 64

Rows = list[dict[str, torch.Tensor]]  # `pixel_values` (channels, height, width), `labels` ()


@dataclass(frozen=True)
class ImageSettings:
    """Sizes, steps, and the shift: degrees of rotation, and standard deviation of the noise on pixels in [0, 1]."""

    old: dict = field(default_factory=lambda: {"hidden_size": 48, "num_hidden_layers": 3})
    new: dict = field(default_factory=lambda: {"hidden_sizes": [48, 96], "depths": [1, 2]})
    old_images: int = 300
    new_images: int = 900
    tuning_images: int = 400
    degrees: float = 10.0
    noise: float = 0.1
    old_pretraining: Steps = Steps(500, 2e-3, 32)
    new_pretraining: Steps = Steps(300, 2e-3, 32)
    tuning: Steps = Steps(100, 2e-3, 32)
    tunings: int = 3

    @property
    def stages(self) -> int:
        """The number of progress bars: two of pretraining, four for each tuning."""
        return 2 + 4 * self.tunings


@dataclass
class ImageTask:
    """Two classifiers with the same labels, and images for tuning and evaluation."""

    source: nn.Module
    target: nn.Module
    train: Rows
    test: Rows
    image_processor: BaseImageProcessor | None = None


def turned_digits(folder: Path, settings: ImageSettings, seed: int, stage: Callable[[str], str] = str) -> ImageTask:
    """Pretrain on clean digits, the old model on fewer of them; return shifted other digits to tune and test on."""
    images, labels = digits(seed)
    start, end = settings.new_images, settings.new_images + settings.tuning_images
    folders = {}
    for name, make, size, count, steps in (
        ("source", _vit, settings.old, settings.old_images, settings.old_pretraining),
        ("target", _convnext, settings.new, settings.new_images, settings.new_pretraining),
    ):
        set_seed(seed)
        model = make(size)
        description = stage(f"pretraining the {'old' if name == 'source' else 'new'} classifier")
        fit(model, _rows(images[:count], labels[:count]), steps, seed, description, _collate)
        folders[name] = folder / f"images-{name}"
        model.save_pretrained(folders[name])
    shifted = shift(images, settings.degrees, settings.noise, seed)
    models = (AutoModelForImageClassification.from_pretrained(folders[name]) for name in ("source", "target"))
    return ImageTask(*models, _rows(shifted[start:end], labels[start:end]), _rows(shifted[end:], labels[end:]))


def own_images(source: str, target: str, dataset: str, seed: int) -> ImageTask:
    """Return the user's classifiers and rows of the columns `image` and `label` of the user's data."""
    models = [load(AutoModelForImageClassification, place) for place in (source, target)]
    LabelContract.from_model_config(models[0].config).match(LabelContract.from_model_config(models[1].config))
    image_processor = load(AutoImageProcessor, source)
    parts = load_splits(dataset, seed)
    for column in ("image", "label"):
        require_column(parts[0], column, dataset)
    train, test = (_own_rows(part, image_processor, models[0].config) for part in parts)
    return ImageTask(*models, train, test, image_processor)


def run_images(
    task: ImageTask, folder: Path, settings: ImageSettings, seed: int, stage: Callable[[str], str]
) -> Result:
    """Tune rewards and their competitors with several seeds, and judge their accuracy; save the first reward."""
    save_file(_collate(task.test), folder / "images-test.safetensors")
    batches = [_collate(task.test[start : start + BATCH_SIZE]) for start in range(0, len(task.test), BATCH_SIZE)]
    runs = []
    for each in tuning_seeds(seed, settings.tunings):
        contenders = tune_all(
            task,
            settings.tuning,
            each,
            _collate,
            stage,
            adapter=False,  # whole classifiers, as in the paper
            processing_class=task.image_processor,
        )
        if not runs:
            contenders.reward.save_pretrained(folder / "images-reward")
        runs.append(contenders.scores(tqdm(batches, desc=stage(f"seed {each}, judging"), unit="batch"), hits))
    measures = [Measure.from_runs("accuracy (%)", runs)]
    title = f"{len(task.test)} images, after tuning on the old model with {len(task.train)} others"
    return Result("images", title, measures, contenders.models_held, notes=[spread_note(settings.tunings)])


def usage(folder: Path, target: str | Path) -> str:
    """Return lines of Python that use the saved reward."""
    return f"""\
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification
from prt_hf import LabelContract, RewardModel, combine

reward = RewardModel.from_pretrained({str(folder / "images-reward")!r})
target = AutoModelForImageClassification.from_pretrained({str(target)!r})
order = reward.contract.match(LabelContract.from_model_config(target.config))
pixel_values = load_file({str(folder / "images-test.safetensors")!r})["pixel_values"][:8]
with torch.no_grad():
    log_probs = combine(target(pixel_values).logits, reward(pixel_values=pixel_values)[:, order])
print([target.config.id2label[label] for label in log_probs.argmax(-1).tolist()])"""


def digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's 1797 digits in a seeded order: pixels in [0, 1], `(1797, 8, 8)`, and labels `(1797,)`."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    return pixels[order].reshape(-1, 8, 8) / 16, labels[order]


def shift(images: np.ndarray, degrees: float, noise: float, seed: int) -> np.ndarray:
    """Rotate every image by the same angle and add Gaussian noise to every pixel."""
    turned = np.stack([rotate(image, degrees, reshape=False, order=1) for image in images])
    return turned + noise * np.random.default_rng(seed).normal(size=turned.shape)


def _vit(size: dict) -> ViTForImageClassification:
    config = {"num_attention_heads": 4, "intermediate_size": 2 * size["hidden_size"], "patch_size": 2} | size
    return ViTForImageClassification(ViTConfig(image_size=8, num_channels=1, **_labels(), **config))


def _convnext(size: dict) -> ConvNextForImageClassification:
    # Small networks need no layer scale; it would only slow them down.
    config = {"patch_size": 2, "num_stages": len(size["depths"]), "layer_scale_init_value": 0.0} | size
    return ConvNextForImageClassification(ConvNextConfig(image_size=8, num_channels=1, **_labels(), **config))


def _labels() -> dict[str, dict]:
    return {"id2label": dict(enumerate(DIGITS)), "label2id": {name: index for index, name in enumerate(DIGITS)}}


def _rows(images: np.ndarray, labels: np.ndarray) -> Rows:
    pixels = torch.tensor((images - MEAN) / DEVIATION, dtype=torch.float32)[:, None]
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, torch.tensor(labels), strict=True)]


def _own_rows(part: Dataset, image_processor: BaseImageProcessor, config: PreTrainedConfig) -> Rows:
    images = tqdm(part["image"], desc="reading images", unit="image")
    return [
        {"pixel_values": pixel_values(image, image_processor, config), "labels": torch.tensor(label)}
        for image, label in zip(images, label_ids(part, "label", config.id2label), strict=True)
    ]


def _collate(rows: Rows) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels")}
