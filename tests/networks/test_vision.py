"""Zero-shot classifiers against the models that they are made of, and as rewards and backbones."""

import copy

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tiny import images
from torch.nn import functional as F
from transformers import (
    AltCLIPConfig,
    AltCLIPModel,
    AutoModelForImageClassification,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPForImageClassification,
    CLIPSegConfig,
    CLIPSegModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    MetaClip2Config,
    MetaClip2Model,
    Siglip2Config,
    Siglip2Model,
    SwinConfig,
    SwinForImageClassification,
    ViTImageProcessorPil,
)

from prt_hf import (
    TEMPLATES,
    PixelCollator,
    PRTConfig,
    PRTForImageClassification,
    PRTTrainer,
    RewardModel,
    default_peft_config,
    zero_shot_classifier,
)
from prt_hf.errors import PRTValueError
from prt_hf.networks import zero_shot as vision
from prt_hf.networks.anatomy import task_of
from prt_hf.networks.auto import task_of_checkpoint
from prt_hf.networks.identity import reference_to

TOKENIZER = tiny.tokenizer(padding_side="right")
CLASSES = ["w3", "w4_w9", "w5", "w6"]
PROMPTS = ["w40 {} w90 <eos>", "w91 {} w92 <eos>", "{} w93 <eos>"]
LORA = LoraConfig(init_lora_weights=False)

MODELS = {
    "clip": tiny.clip,
    "siglip": tiny.siglip,
    "clipseg": lambda: tiny.two_encoders(CLIPSegModel, CLIPSegConfig, projection_dim=24),
    "metaclip-2": lambda: tiny.two_encoders(MetaClip2Model, MetaClip2Config, projection_dim=24),
    "chinese-clip": lambda: tiny.two_encoders(ChineseCLIPModel, ChineseCLIPConfig, projection_dim=24),
    "altclip": lambda: tiny.two_encoders(AltCLIPModel, AltCLIPConfig, text={"project_dim": 16}, projection_dim=24),
}


def classifier(make=tiny.clip, names=CLASSES, templates=PROMPTS, **changes):
    return zero_shot_classifier(make(), names, templates, TOKENIZER, **changes)


def pixels(rows=5, seed=0):
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def tokens(model, template):
    padding = "max_length" if "siglip" in model.config.model_type else True
    texts = [template.replace("{}", name.replace("_", " ")) for name in CLASSES]
    return TOKENIZER(texts, padding=padding, max_length=16, return_tensors="pt")


@pytest.fixture
def config(tmp_path):
    def make(**changes):
        defaults = {"output_dir": str(tmp_path / "out"), "learning_rate": 1e-2, "max_steps": 2}
        return PRTConfig(**tiny.TUNING | defaults | changes)

    return make


# Numbers


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_with_one_template_logits_are_the_models_own(family):
    model = MODELS[family]()
    expected = model(pixel_values=pixels(), **tokens(model, PROMPTS[0])).logits_per_image
    assert expected.std(1).min() > 1e-3, "classes are told apart"
    found = classifier(lambda: model, templates=PROMPTS[:1])(pixels()).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny.clip, tiny.siglip])
@torch.no_grad()
def test_templates_are_averaged_as_directions(make, monkeypatch):
    model = make()
    features = [model.get_text_features(**tokens(model, template)).pooler_output.double() for template in PROMPTS]
    mean = sum(each / each.norm(dim=-1, keepdim=True) for each in features) / len(PROMPTS)
    image_features = model.get_image_features(pixels()).pooler_output.double()
    cosine = F.cosine_similarity(image_features[:, None], mean[None], dim=-1)
    expected = model.logit_scale.double().exp() * cosine + (model.logit_bias if make is tiny.siglip else 0)
    torch.testing.assert_close(classifier(make)(pixels()).logits.double(), expected, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(vision, "_PROMPTS_PER_BATCH", 5)  # of 12
    torch.testing.assert_close(classifier(make)(pixels()).logits.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_model_in_memory_is_left_as_it_is(config):
    model = tiny.clip().train()
    before = copy.deepcopy(model.state_dict())
    made = classifier(lambda: model)
    assert not made.training and model.training
    PRTTrainer(made, config(), train_dataset=images()).train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_loss_is_the_cross_entropy_of_the_logits():
    labels = torch.tensor([0, 3, 1, 1, 2])
    output = classifier()(pixels(), labels=labels)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_of_the_papers_data_sets(name):
    templates = TEMPLATES[name]
    assert 3 <= len(templates) <= 8 and len(set(templates)) == len(templates)
    assert all(template.count("{}") == 1 for template in templates)


# Saved and loaded


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_saved_is_loaded(family, tmp_path):
    made = classifier(MODELS[family])
    made.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixels()).logits, made(pixels()).logits)
    assert loaded.config.id2label == dict(enumerate(CLASSES)) and loaded.config.label2id["w4_w9"] == 1
    assert reference_to(loaded).weights == reference_to(made).weights
    assert task_of(loaded) == task_of_checkpoint(str(tmp_path)) == "image-classification"
    assert not any("text" in name for name in loaded.state_dict())
    blocks = loaded._no_split_modules
    assert blocks and blocks <= {type(module).__name__ for module in loaded.modules()}, "FSDP looks for all of them"
    loaded.requires_grad_(True)
    assert not [name for name, _ in loaded.named_parameters() if name.startswith("classifier")]
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.classifier.weight.dtype == half(pixels().bfloat16()).logits.dtype == torch.bfloat16


def test_other_class_names_make_another_model():
    fingerprints = {reference_to(classifier(names=names)).weights for names in (CLASSES, CLASSES[::-1], CLASSES[1:])}
    assert len(fingerprints) == 3 and None not in fingerprints


@torch.no_grad()
def test_from_a_folder(tmp_path, config):
    tiny.clip().save_pretrained(tmp_path / "clip")
    TOKENIZER.save_pretrained(tmp_path / "clip")
    made = zero_shot_classifier(str(tmp_path / "clip"), CLASSES, PROMPTS)
    assert torch.equal(made(pixels()).logits, classifier()(pixels()).logits)
    made.save_pretrained(tmp_path / "base")
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    processor.save_pretrained(tmp_path / "base")
    rows = Dataset.from_list([{"image": Image.new("RGB", (9, 7), (40 * i, 9, 99)), "label": i} for i in range(4)])
    with torch.enable_grad():
        trainer = PRTTrainer(
            str(tmp_path / "base"), config(), PixelCollator(processor), rows, peft_config=LoraConfig(r=2)
        )
        trainer.train()
    trainer.save_model()
    again = RewardModel.from_pretrained(tmp_path / "out")
    inputs = processor(rows[0]["image"].convert("L"), return_tensors="pt")
    assert torch.equal(again(**inputs), trainer.reward.network.eval()(**inputs).logits)
    assert again.config.reward_base.architecture == "ZeroShotForImageClassification"


# As a reward and as a backbone


@pytest.mark.parametrize("make", [tiny.clip, tiny.siglip])
@pytest.mark.parametrize("peft_config", [None, LoraConfig()], ids=["full", "LoRA"])
def test_the_encoder_moves_and_the_head_stays(config, tmp_path, make, peft_config):
    base = classifier(make)
    before = copy.deepcopy(base.state_dict())
    rows = images()
    trainer = PRTTrainer(base, config(max_steps=3), None, rows, rows, peft_config=peft_config)
    expected = F.cross_entropy(2 * classifier(make)(rows["pixel_values"][:]).logits, rows["label"][:])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5), "r starts as the base's logits"
    trainer.train()
    network = trainer.reward.network
    optimised = {id(value) for group in trainer.optimizer.param_groups for value in group["params"]}
    heads = {name: value for name, value in network.state_dict().items() if ".classifier." in f".{name}"}
    assert len(heads) == (2 if make is tiny.siglip else 1)
    for name, value in heads.items():
        assert torch.equal(value, before[f"classifier.{name.rpartition('.')[2]}"]) and id(value) not in optimised
    moved = [value for value in network.parameters() if value.requires_grad]
    assert {id(value) for value in moved} == optimised
    assert trainer.evaluate()["eval_loss"] < expected
    trainer.save_model()
    again = RewardModel.from_pretrained(tmp_path / "out", base_model=classifier(make))
    assert torch.equal(again(pixel_values=pixels()), network.eval()(pixel_values=pixels()).logits)


def test_every_adapted_layer_learns(config):
    """Attention of torch's own (SigLIP's pooling) would read past an adapter."""
    trainer = PRTTrainer(classifier(tiny.siglip), config(max_steps=1), None, images(), peft_config=LoraConfig())
    trainer.train()
    learned = {name: bool(value.any()) for name, value in trainer.model.named_parameters() if "lora_B" in name}
    assert all(learned.values()) and len(learned) == 15


def test_a_fixed_head_is_not_adapted():
    base = classifier()
    assert default_peft_config(base).modules_to_save is None
    assert default_peft_config(base, top_layers=1).target_modules >= {"vision_model.encoder.layers.1.mlp.fc1"}
    for peft_config in (LoraConfig(target_modules="all-linear"), LoraConfig(modules_to_save=["classifier"])):
        with pytest.raises(PRTValueError, match=r"(?s)changes a head that is fixed.*exclude_modules=.'classifier'"):
            RewardModel.from_base(base, peft_config=peft_config)
    RewardModel.from_base(base, peft_config=LoraConfig(target_modules="all-linear", exclude_modules=["classifier"]))


@pytest.mark.parametrize("peft_config", [None, LoraConfig()], ids=["full", "LoRA"])
def test_a_fixed_head_cannot_start_at_zero(peft_config):
    with pytest.raises(PRTValueError, match="(?s)fixed head cannot start at zero.*reward_init='pretrained'"):
        RewardModel.from_base(classifier(), peft_config=peft_config, reward_init="zero")


@torch.no_grad()
def test_recipe_with_zero_shot_parts(tmp_path):
    classifier(tiny.siglip).save_pretrained(tmp_path / "target")
    reward = RewardModel.from_base(classifier(names=CLASSES[::-1]))
    model = PRTForImageClassification.from_parts(str(tmp_path / "target"), [reward], [0.5])
    rewards = reward(pixel_values=pixels())[:, [3, 2, 1, 0]]
    expected = (classifier(tiny.siglip)(pixels()).logits.log_softmax(-1) + 0.5 * rewards).log_softmax(-1)
    torch.testing.assert_close(model(pixels()).logits, expected)
    model.save_pretrained(tmp_path / "recipe")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "recipe")
    assert torch.equal(loaded(pixels()).logits, model(pixels()).logits)


# Any architecture with any other


def swin(seed=0, names=tiny.COLOURS):
    torch.manual_seed(seed)
    sizes = {"image_size": 8, "patch_size": 2, "window_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    return SwinForImageClassification(SwinConfig(**tiny.labels(names), num_channels=1, **sizes)).eval()


def dinov2(seed=0, names=tiny.COLOURS):
    torch.manual_seed(seed)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return Dinov2ForImageClassification(Dinov2Config(**tiny.labels(names), num_channels=1, **sizes)).eval()


def zero_shot(seed=0, names=tiny.COLOURS):
    made = zero_shot_classifier(tiny.clip(seed), CLASSES, PROMPTS, TOKENIZER)
    made.config.update(tiny.labels(names))
    return made


ARCHITECTURES = {
    "resnet": tiny.resnet,
    "convnext": tiny.convnext,
    "vit": tiny.vit,
    "swin": swin,
    "dinov2": dinov2,
    "zero-shot": zero_shot,
}


@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("source", ARCHITECTURES)
@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "LoRA"])
def test_rewards_port_between_architectures(config, source, target, peft_config):
    order = [2, 0, 3, 1]
    backbone = ARCHITECTURES[target](2, [tiny.COLOURS[index] for index in order])
    trainer = PRTTrainer(
        ARCHITECTURES[source](1), config(), None, images(), images(), backbone=backbone, peft_config=peft_config
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after != before
    inputs, labels = images()["pixel_values"][:], images()["label"][:]
    reward = trainer.reward.network.eval()
    with torch.no_grad():
        log_probs = backbone(inputs).logits.log_softmax(-1) + reward(inputs).logits[:, order]
        model = PRTForImageClassification.from_parts(backbone, [trainer.reward])
        output = model(inputs, labels=torch.tensor([order.index(label) for label in labels.tolist()]))
    torch.testing.assert_close(output.logits, log_probs.log_softmax(-1))
    assert output.loss.item() == pytest.approx(after, rel=1e-5)


# What cannot be right is refused


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cat", "(?s)`class_names` is not usable.*two names or more"),
        (["cat"], "(?s)two names or more, none of them empty.*'cat'"),
        (["cat", " _"], "none of them empty"),
        (["cat", 3], "`class_names` is not usable"),
        (["Red_fox", "cat", "red  fox", "Cat"], "(?s)found: 'Red_fox', 'cat', 'red  fox', 'Cat'\n.*crane .bird."),
    ],
)
def test_class_names(names, message):
    with pytest.raises(PRTValueError, match=message):
        classifier(names=names)


@pytest.mark.parametrize("templates", ["a {}", [], ["a photo"], [3]], ids=repr)
def test_templates_that_say_no_class(templates):
    with pytest.raises(PRTValueError, match="(?s)`templates` is not usable.*each with {} for the class's name"):
        classifier(templates=templates)


def test_prompts_that_would_be_cut_off():
    with pytest.raises(
        PRTValueError, match="(?s)longer than the text encoder can read.*at most 16 tokens.*21 tokens in 'w7"
    ):
        classifier(templates=["w7 " * 19 + "{}"])


def test_models_that_cannot_score_texts():
    vision_only = CLIPForImageClassification(tiny.clip().config)
    siglip2 = Siglip2Model(
        Siglip2Config(text_config=tiny.TEXT_ENCODER, vision_config=tiny.IMAGE_ENCODER | {"num_patches": 4})
    )
    for model, name in ((vision_only, "CLIPForImageClassification"), (siglip2, "Siglip2Model"), (tiny.vit(), "ViTFor")):
        with pytest.raises(PRTValueError, match=f"(?s)cannot score images against class names.*clip.*found: {name}"):
            zero_shot_classifier(model, CLASSES, tokenizer=TOKENIZER)
    with pytest.raises(PRTValueError, match="(?s)need the model's tokenizer.*AutoTokenizer.from_pretrained"):
        zero_shot_classifier(tiny.clip(), CLASSES)
    with pytest.raises(PRTValueError, match="(?s)takes no arguments for loading.*dtype"):
        classifier(dtype=torch.bfloat16)
