"""timm's models as rewards and as backbones, beside those of transformers; their image processors."""

import json

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import save_file
from test_own_pixels import pictures
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, ViTImageProcessor

from prt_hf import (
    PixelCollator,
    PRTConfig,
    PRTForImageClassification,
    PRTImageProcessor,
    PRTTrainer,
    RewardModel,
    combine,
    default_peft_config,
)
from prt_hf.errors import PRTValueError
from prt_hf.networks.auto import load_pretrained, load_processing_class, save_processing_class, task_of_checkpoint
from prt_hf.networks.identity import reference_to
from prt_hf.networks.pixels import is_same_pixels, missing_pixels

CONFIG = {
    "architecture": "test_resnet.r160_in1k",
    "num_classes": 4,
    "label_names": tiny.COLOURS,
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "num_classes": 4,
    },
}
ORDER = [2, 0, 3, 1]
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
PHOTOS = Dataset.from_list([{"image": image, "label": index % 4} for index, image in enumerate(pictures())])


class Processor(BaseImageProcessor):
    """Tells of itself what transformers' TimmWrapperImageProcessor does, and does not save itself either."""

    def __init__(self, pretrained_cfg, architecture=None):
        super().__init__(architecture=architecture)
        self.data_config = {name: value for name, value in pretrained_cfg.items() if name != "num_classes"}

    def save_pretrained(self, *args, **kwargs):
        pass


# Their configuration


def test_checkpoints_that_name_no_class_are_image_classifiers(tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))
    assert task_of_checkpoint(str(tmp_path)) == "image-classification"
    config.write_text(json.dumps(CONFIG | {"num_classes": 0, "label_names": []}))
    with pytest.raises(PRTValueError, match="has no head that predicts tokens or class labels"):
        task_of_checkpoint(str(tmp_path))


def test_processors_are_told_apart_by_all_that_they_do():
    ours = Processor(CONFIG["pretrained_cfg"])
    assert is_same_pixels(ours, Processor(CONFIG["pretrained_cfg"], "another"))
    for name, value in {"crop_pct": 0.9, "mean": [0.5] * 3, "input_size": [3, 48, 48]}.items():
        theirs = Processor(CONFIG["pretrained_cfg"] | {name: value})
        assert not is_same_pixels(ours, theirs) and list(PRTImageProcessor.of(ours, "reward", [theirs]).others)
    assert not is_same_pixels(ours, ViTImageProcessor()) and not is_same_pixels(ViTImageProcessor(), ours)
    message = str(missing_pixels("reward", 0, ours, theirs, "both"))
    assert '"input_size": [3, 48, 48]' in message and '"input_size": [3, 32, 32]' in message


def test_processors_that_do_not_save_themselves_are_saved(tmp_path):
    ours = Processor(CONFIG["pretrained_cfg"], "test_resnet")
    save_processing_class(ours, tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "PRTImageProcessor" and saved["others"] == {}
    assert saved["main"]["pretrained_cfg"] == ours.data_config and saved["main"]["architecture"] == "test_resnet"


# With timm


@pytest.fixture
def folders(tmp_path):
    """Of models and their processors, as on the Hub."""
    timm, _ = pytest.importorskip("timm"), pytest.importorskip("torchvision")

    def make(name, seed, names=tiny.COLOURS):
        folder = tmp_path / f"{name}-{seed}"
        if name == "vit":
            tiny.vit(seed, names=names, num_channels=3, image_size=12).save_pretrained(folder)
            ViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(folder)
            return str(folder)
        torch.manual_seed(seed)
        model = timm.create_model(f"test_{name}.r160_in1k", num_classes=4)
        folder.mkdir()
        changes = {"architecture": f"test_{name}.r160_in1k", "label_names": list(names)}
        (folder / "config.json").write_text(json.dumps(CONFIG | changes))
        save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        return str(folder)

    return make


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "LoRA"])
@pytest.mark.parametrize(
    ("source", "target"), [("resnet", "convnext"), ("resnet", "vit"), ("vit", "resnet"), ("convnext", "convnext")]
)
def test_rewards_port_between_timm_and_transformers(folders, tmp_path, source, target, is_full):
    base, backbone = folders(source, 1), folders(target, 2, [tiny.COLOURS[index] for index in ORDER])
    ours, theirs = (load_processing_class(folder, "image-classification") for folder in (base, backbone))
    peft_config = None if is_full else default_peft_config(load_pretrained(base), r=2)
    args = PRTConfig(**tiny.TUNING | {"output_dir": str(tmp_path / "out"), "learning_rate": 1e-2, "max_steps": 1})
    collator = PixelCollator(ours, [theirs])
    trainer = PRTTrainer(base, args, collator, PHOTOS, PHOTOS, ours, backbone=backbone, peft_config=peft_config)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    assert after != before
    reward = RewardModel.from_pretrained(tmp_path / "out")
    assert type(reward.processing_class) is type(ours) and is_same_pixels(reward.processing_class, ours)
    assert reward.config.reward_base.weights == reference_to(load_pretrained(base)).weights

    model = PRTForImageClassification.from_parts(backbone, [reward])
    images = PHOTOS["image"][:]
    pixels = [processor(images, return_tensors="pt")["pixel_values"] for processor in (ours, theirs)]
    with torch.no_grad():
        expected = combine(load_pretrained(backbone)(pixels[1]).logits, reward(pixel_values=pixels[0])[:, ORDER])
        found = model(**model.processing_class(images, return_tensors="pt")).logits
    torch.testing.assert_close(found, expected)
    loss = F.nll_loss(expected, torch.tensor([ORDER.index(label) for label in LABELS]))
    assert after == pytest.approx(loss.item(), rel=1e-4)
    model.save_pretrained(tmp_path / "recipe")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "recipe")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "recipe")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**processor(images, return_tensors="pt")).logits, expected)
