"""Reward and backbone that need different pixels: trainer, PRT model, pipeline."""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from prt_hf import (
    PixelCollator,
    PRTConfig,
    PRTForImageClassification,
    PRTImageProcessor,
    PRTTrainer,
    RewardModel,
    UnsupportedError,
    combine,
)
from prt_hf.errors import PRTValueError
from prt_hf.evaluation import portability_report
from prt_hf.networks.pixels import is_same_pixels, split_inputs

GREY = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
LARGE = ViTImageProcessorPil(size={"height": 12, "width": 12}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.2])
CROPPED = CLIPImageProcessorPil(size={"shortest_edge": 10}, crop_size={"height": 8, "width": 8})


def pictures(count=6):
    generator = torch.Generator().manual_seed(0)
    sizes = [(9, 14), (20, 11)]
    return [
        Image.fromarray(torch.randint(0, 255, (*sizes[index % 2], 3), generator=generator, dtype=torch.uint8).numpy())
        for index in range(count)
    ]


PHOTOS = Dataset.from_list([{"image": picture, "label": index % 4} for index, picture in enumerate(pictures())])
LABELS = torch.tensor(PHOTOS["label"][:])
ORDER = [2, 0, 3, 1]


def pixels(processor):
    """Row by row, by the processor alone."""
    mode = "L" if processor is GREY else "RGB"
    made = [processor(row["image"].convert(mode), return_tensors="pt")["pixel_values"] for row in PHOTOS]
    return torch.cat(made)


def large(seed=2, names=tuple(tiny.COLOURS[index] for index in ORDER)):
    return tiny.vit(seed, names=names, num_channels=3, image_size=12)


def reward():
    return RewardModel.from_base(tiny.vit(1), GREY)


@pytest.fixture
def reads_processors():
    try:
        AutoImageProcessor.from_pretrained  # noqa: B018
    except ImportError:
        pytest.skip("this transformers reads image processors with torchvision only")


@pytest.fixture
def target(tmp_path, reads_processors):
    """The folder of a backbone with its image processor."""
    large().save_pretrained(tmp_path / "target")
    LARGE.save_pretrained(tmp_path / "target")
    return str(tmp_path / "target")


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "backbone_cache_dir": str(tmp_path / "states"),
            "per_device_train_batch_size": 6,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 2,
        }
        return PRTConfig(**tiny.TUNING | defaults | changes)

    return make


@torch.no_grad()
def expected_log_probs(reward_network, backbone=None):
    """In the reward's order of labels."""
    order = sorted(range(4), key=ORDER.__getitem__)
    return combine((backbone or large())(pixels(LARGE)).logits[:, order], reward_network.eval()(pixels(GREY)).logits)


# Pixels


def test_every_model_gets_its_own():
    processor = PRTImageProcessor.of(GREY, "backbone", [None, LARGE, GREY, CROPPED])
    made = processor(pictures(), return_tensors="pt")
    assert list(made) == ["pixel_values", "backbone_1_pixel_values", "backbone_3_pixel_values"]
    for name, own in zip(made, (GREY, LARGE, CROPPED), strict=True):
        assert torch.equal(made[name], pixels(own))


def test_the_processor_is_saved_as_every_other(tmp_path, reads_processors):
    processor = PRTImageProcessor(LARGE, {"reward_0": GREY, "reward_2": CROPPED})
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, PRTImageProcessor) and loaded.to_dict() == processor.to_dict()
    made, again = (each(pictures(), return_tensors="pt") for each in (processor, loaded))
    assert made.keys() == again.keys() and all(torch.equal(made[name], again[name]) for name in made)


def test_the_collator_makes_a_batch():
    rows = [PHOTOS[index] for index in range(6)]
    batch = PixelCollator(GREY, [LARGE])(rows)
    assert list(batch) == ["pixel_values", "backbone_0_pixel_values", "labels"]
    assert torch.equal(batch["pixel_values"], pixels(GREY))
    assert torch.equal(batch["backbone_0_pixel_values"], pixels(LARGE))
    assert batch["labels"].tolist() == [0, 1, 2, 3, 0, 1]
    assert list(PixelCollator(GREY, [GREY])([{"image": row["image"]} for row in rows])) == ["pixel_values"]


def test_processors_that_make_the_same():
    assert is_same_pixels(GREY, None) and is_same_pixels(None, GREY)
    assert is_same_pixels(LARGE, ViTImageProcessorPil.from_dict(LARGE.to_dict()))
    assert not is_same_pixels(LARGE, GREY) and not is_same_pixels(CROPPED, GREY)
    assert not is_same_pixels(ConvNextImageProcessorPil(crop_pct=0.9), ConvNextImageProcessorPil(crop_pct=0.8))


def test_inputs_go_to_whom_they_belong():
    inputs = {"pixel_values": 1, "reward_1_pixel_values": 2, "reward_1_mask": 3, "reward_pixels": 4}
    assert split_inputs(inputs, "reward", 2) == (
        {"pixel_values": 1, "reward_pixels": 4},
        [{}, {"pixel_values": 2, "mask": 3}],
    )
    with pytest.raises(PRTValueError, match="(?s)'reward_1_pixel_values' belongs to a reward that does not exist"):
        split_inputs(inputs, "reward", 1)


# The PRT model


@torch.no_grad()
def test_the_prt_model_combines_what_each_makes_of_its_own():
    made = reward()
    model = PRTForImageClassification.from_parts(large(), [made], [0.5], LARGE)
    output = model(**model.processing_class(pictures(), return_tensors="pt"), labels=LABELS)
    expected = combine(large()(pixels(LARGE)).logits, 0.5 * made(pixel_values=pixels(GREY))[:, ORDER])
    assert torch.equal(output.logits, expected)
    assert output.loss.item() == pytest.approx(F.nll_loss(expected, LABELS).item())


@torch.no_grad()
def test_only_the_reward_that_wants_other_pixels_gets_them():
    same = RewardModel.from_base(large(3), LARGE)
    model = PRTForImageClassification.from_parts(large(), [same, reward()], tokenizer=LARGE)
    assert list(model.processing_class.others) == ["reward_1"]
    expected = combine(
        large()(pixels(LARGE)).logits,
        large(3)(pixels(LARGE)).logits + tiny.vit(1)(pixels(GREY)).logits[:, ORDER],
    )
    found = model(**model.processing_class(pictures(), return_tensors="pt")).logits
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_pipelines_and_recipes(target, tmp_path):
    model = PRTForImageClassification.from_parts(target, [reward()])
    model.save_pretrained(tmp_path / "recipe")
    expected = model(**model.processing_class(pictures(), return_tensors="pt")).logits.exp()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "recipe")
    assert loaded.processing_class.to_dict() == model.processing_class.to_dict()
    for pipe in (
        pipeline("image-classification", model=model, image_processor=model.processing_class, batch_size=4),
        pipeline("image-classification", model=loaded, image_processor=loaded.processing_class),
        pipeline("image-classification", model=str(tmp_path / "recipe")),
    ):
        for scores, probabilities in zip(pipe(pictures()), expected, strict=True):
            found = {entry["label"]: entry["score"] for entry in scores}
            for index, name in model.config.id2label.items():
                assert found[name] == pytest.approx(probabilities[index].item(), rel=1e-5)


def test_the_backbones_pixels_alone_are_refused():
    model = PRTForImageClassification.from_parts(large(), [reward()], tokenizer=LARGE)
    message = (
        r'(?s)need different pixels, but get the same.*expected: `reward_0_pixel_values` with size=."height": 8.*'
        r'image_mean=.0\.5\].*found: only `pixel_values` with size=."height": 12.*model\.processing_class\(images'
    )
    with pytest.raises(UnsupportedError, match=message):
        model(pixels(LARGE))
    with pytest.raises(UnsupportedError, match="get the same"):
        pipeline("image-classification", model=model, image_processor=LARGE)(pictures(1))
    with pytest.raises(PRTValueError, match="(?s)belongs to a reward that does not exist.*reward_0 ... reward_0"):
        model(pixels(LARGE), reward_1_pixel_values=pixels(GREY))


def test_a_plain_trainer_tunes_the_reward(tmp_path):
    model = PRTForImageClassification.from_parts(large(), [reward()], tokenizer=LARGE)
    model.train()
    args = TrainingArguments(
        **tiny.TUNING | {"per_device_train_batch_size": 6},
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        learning_rate=1e-2,
        remove_unused_columns=False,
    )
    trainer = Trainer(model, args, PixelCollator(model.processing_class), PHOTOS)
    trainer.train()
    expected = expected_log_probs(tiny.vit(1))[:, ORDER]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(F.nll_loss(expected, LABELS).item(), rel=1e-4)
    tuned = expected_log_probs(model.reward_networks[0])
    assert F.nll_loss(tuned[:, ORDER], LABELS) < F.nll_loss(expected, LABELS)


# The trainer


@pytest.mark.parametrize("kind", ["id", "memory"])
@pytest.mark.parametrize("peft_config", [None, LoraConfig()], ids=["full", "LoRA"])
def test_losses_are_those_of_both_pixels(config, target, kind, peft_config):
    backbone = target if kind == "id" else AutoModelForImageClassification.from_pretrained(target)
    collator = PixelCollator(GREY, [LARGE])
    trainer = PRTTrainer(
        tiny.vit(1), config(), collator, PHOTOS, PHOTOS, GREY, backbone=backbone, peft_config=peft_config
    )
    first = F.nll_loss(expected_log_probs(tiny.vit(1)), LABELS).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-5)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(first, rel=1e-5)
    last = F.nll_loss(expected_log_probs(trainer.reward.network), LABELS).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(last, rel=1e-5) and last < first
    log_probs = torch.tensor(trainer.predict(PHOTOS.remove_columns("label")).predictions)
    torch.testing.assert_close(log_probs, expected_log_probs(trainer.reward.network))


def test_stored_backbones(config, target):
    figures = []
    for changes in ({}, {"precompute_backbone": True}, {"precompute_backbone": True}):
        collator = PixelCollator(GREY, [LARGE])
        trainer = PRTTrainer(tiny.vit(1), config(**changes), collator, PHOTOS, PHOTOS, GREY, backbone=target)
        trainer.train()
        figures.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        figures[-1].append(trainer.evaluate()["eval_loss"])
    assert figures[1] == pytest.approx(figures[0], rel=1e-6) and figures[2] == figures[1]
    assert trainer.backbone is None, "the states were there"


def test_rows_may_have_the_pixels_already(config, target):
    rows = Dataset.from_dict(
        {
            "pixel_values": pixels(GREY).tolist(),
            "backbone_0_pixel_values": pixels(LARGE).tolist(),
            "label": LABELS.tolist(),
        }
    ).with_format("torch")
    found = PRTTrainer(tiny.vit(1), config(), None, None, rows, GREY, backbone=target).evaluate()["eval_loss"]
    assert found == pytest.approx(F.nll_loss(expected_log_probs(tiny.vit(1)), LABELS).item(), rel=1e-5)


def test_several_backbones(config, target):
    """The own base reads the reward's pixels; evaluation is the mean over both."""
    trainer = PRTTrainer(
        tiny.vit(1),
        config(),
        PixelCollator(GREY, [None, LARGE]),
        None,
        PHOTOS,
        GREY,
        backbone=[None, target],
        peft_config=LoraConfig(),
    )
    with torch.no_grad():
        own = F.cross_entropy(2 * tiny.vit(1)(pixels(GREY)).logits, LABELS)
    expected = (own + F.nll_loss(expected_log_probs(tiny.vit(1)), LABELS)) / 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_rewards_pixels_alone_are_refused(config, target):
    message = (
        r'(?s)need different pixels, but get the same.*expected: `backbone_0_pixel_values` with size=."height": 12.*'
        r'found: only `pixel_values` with size=."height": 8.*PixelCollator\(reward_processor, \[backbone_processor\]\)'
    )
    for changes in ({}, {"precompute_backbone": True}):
        with pytest.raises(UnsupportedError, match=message):
            PRTTrainer(
                tiny.vit(1), config(**changes), PixelCollator(GREY), PHOTOS, processing_class=GREY, backbone=target
            ).train()
    adapter = PRTTrainer(
        tiny.vit(1), config(), PixelCollator(GREY, [LARGE]), PHOTOS, None, GREY, peft_config=LoraConfig()
    )
    with pytest.raises(PRTValueError, match="(?s)own base reads what the reward reads.*backbone_0_pixel_values"):
        adapter.train()
    collator = PixelCollator(GREY, [LARGE, LARGE])
    with pytest.raises(PRTValueError, match="(?s)'backbone_1_pixel_values' belongs to a backbone that does not exist"):
        PRTTrainer(tiny.vit(1), config(), collator, PHOTOS, None, GREY, backbone=target).train()


def test_a_report_gives_every_model_its_own_pixels(target):
    ported, backbone = reward(), AutoModelForImageClassification.from_pretrained(target)
    report = portability_report(ported, [target], PHOTOS, source=tiny.vit(1), batch_size=4)
    with torch.no_grad():
        r, old = ported(pixel_values=pixels(GREY)).double(), tiny.vit(1)(pixels(GREY)).logits.double()
        # PHOTOS have numbers for labels, which are the reward's.
        new = backbone(pixels(LARGE)).logits.double()[:, torch.tensor(ORDER).argsort()]
    expected = {"pretrained": new, "prt": new.log_softmax(-1) + r, "reward_only": r}
    found = report.targets[target]
    for method, logits in expected.items():
        assert found.figures[method].nll.value == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-5)
    eps = F.kl_div(new.log_softmax(-1), old.log_softmax(-1), log_target=True, reduction="batchmean")
    assert found.portability.eps == pytest.approx(eps.item(), rel=1e-5)
    with pytest.raises(UnsupportedError, match="need different pixels"):  # one model's alone
        rows = Dataset.from_dict({"pixel_values": pixels(GREY).numpy(), "label": PHOTOS["label"]})
        portability_report(ported, [target], rows, source=tiny.vit(1))
