"""Rewards that score some of a backbone's labels, or read texts in other tokens, and the recipes that keep this."""

import json

import families
import pytest
import tiny
import torch
from families import BACKBONES, REWARD
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, BatchEncoding

from prt_hf import (
    LabelMismatchError,
    PRTForCausalLM,
    PRTForImageClassification,
    PRTForSequenceClassification,
    PRTLogitsProcessor,
    RewardModel,
    UnsupportedError,
    speculative_decoding,
)
from prt_hf.errors import PRTValueError
from prt_hf.networks.auto import load_processing_class

NAMES = ["violet", "green", "tench, Tinca tinca", "red", "black", "grey"]  # of backbones; rewards score COLOURS
LABEL_MAP = {"tench, Tinca tinca": "blue"}
TEXT = "abcde<|user|>xyz<think>qq"


def by_definition(backbone, rewards, names, label_map):
    """Labels that a reward does not score keep what they have; the others share the rest as pi e^(s r)."""
    p = backbone.double().softmax(-1)
    for r, theirs, strength in rewards:
        index = [theirs.index(name) if (name := label_map.get(each, each)) in theirs else None for each in names]
        scored = [column for column, each in enumerate(index) if each is not None]
        weights = p[:, scored] * (strength * r[:, [index[column] for column in scored]].double()).exp()
        p = p.clone()
        p[:, scored] = weights / weights.sum(-1, keepdim=True) * p[:, scored].sum(-1, keepdim=True)
    return p


def assert_partial(log_probs, backbone, expected, neutral):
    """The neutral rule to 1e-6 and 1e-5, as probabilities."""
    found, before = log_probs.double().exp(), backbone.double().softmax(-1)
    assert (found[:, neutral] - before[:, neutral]).abs().max() < 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert (found - before).abs().max() > 1e-2


def pixels(rows=3):
    return tiny.images(rows)["pixel_values"][:]


@torch.no_grad()
def test_labels_that_a_reward_does_not_score_keep_their_probability():
    backbone = tiny.vit(1, NAMES)
    networks = [tiny.resnet(2), tiny.vit(3, ["grey", "black", "pink"])]  # the second lacks most, and has another one
    rewards = [RewardModel.from_base(network) for network in networks]
    inputs = {"pixel_values": torch.stack(list(pixels()))}
    before, *outputs = (network(**inputs).logits for network in (backbone, *networks))
    maps = {"label_map": LABEL_MAP, "allow_partial": True}
    model = PRTForImageClassification.from_parts(backbone, rewards[:1], [1.5], **maps)
    expected = by_definition(before, [(outputs[0], tiny.COLOURS, 1.5)], NAMES, LABEL_MAP)
    neutral = [NAMES.index("violet"), NAMES.index("black")]
    assert_partial(model(**inputs).logits, before, expected, neutral)

    model = PRTForImageClassification.from_parts(backbone, rewards[1:], [0.7], allow_partial=True)
    second = (outputs[1], ["grey", "black", "pink"], 0.7)
    expected = by_definition(before, [second], NAMES, {})
    assert_partial(model(**inputs).logits, before, expected, [0, 1, 2, 3])

    renamed = [name if name != "tench, Tinca tinca" else "blue" for name in NAMES]
    backbone.config.id2label = dict(enumerate(renamed))
    model = PRTForImageClassification.from_parts(backbone, rewards, [1.5, 0.7], allow_partial=True)
    expected = by_definition(before, [(outputs[0], tiny.COLOURS, 1.5), second], renamed, {})
    assert_partial(model(**inputs).logits, before, expected, [0])
    loss = model(**inputs, labels=torch.tensor([0, 2, 5])).loss
    assert loss.item() == pytest.approx(-expected[range(3), [0, 2, 5]].log().mean().item(), rel=1e-5)


@torch.no_grad()
def test_a_backbone_with_fewer_labels():
    backbone, network = tiny.vit(1, ["grey", "red"]), tiny.resnet(2)
    inputs = {"pixel_values": torch.stack(list(pixels()))}
    model = PRTForImageClassification.from_parts(backbone, [RewardModel.from_base(network)], allow_partial=True)
    before = backbone(**inputs).logits
    expected = by_definition(before, [(network(**inputs).logits, tiny.COLOURS, 1.0)], ["grey", "red"], {})
    torch.testing.assert_close(model(**inputs).logits.double().exp(), expected, rtol=1e-5, atol=1e-7)


def test_a_map_of_all_labels_needs_no_partial_match():
    names = ["Rot", "Grau", "Blau", "Gruen"]
    label_map = dict(zip(names, ["red", "grey", "blue", "green"], strict=True))
    reward, backbone = RewardModel.from_base(tiny.resnet(2)), tiny.vit(1, names)
    model = PRTForImageClassification.from_parts(backbone, [reward], label_map=label_map)
    twin = PRTForImageClassification.from_parts(tiny.vit(1, list(label_map.values())), [reward])
    inputs = {"pixel_values": torch.stack(list(pixels()))}
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, twin(**inputs).logits)


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        ({}, LabelMismatchError, "absent: .'blue'., unknown: .'violet', 'tench"),
        ({"label_map": LABEL_MAP}, LabelMismatchError, "pass `allow_partial=True` to score those that both have"),
        ({"label_map": {"cyan": "blue"}}, PRTValueError, "names an unknown label"),
        ({"label_map": {"violet": "cyan"}}, PRTValueError, "names an unknown label"),
        ({"label_map": {"violet": "red"}}, PRTValueError, "maps two labels onto one"),
        ({"label_map": {"violet": "blue", "black": "blue"}}, PRTValueError, "maps two labels onto one"),
    ],
)
def test_labels_that_do_not_match(maps, error, message):
    with pytest.raises(error, match=message):
        PRTForImageClassification.from_parts(tiny.vit(1, NAMES), [RewardModel.from_base(tiny.resnet(2))], **maps)


def test_no_label_in_common():
    with pytest.raises(LabelMismatchError, match="absent"):
        PRTForImageClassification.from_parts(
            tiny.vit(1, ["a", "b"]), [RewardModel.from_base(tiny.resnet(2))], allow_partial=True
        )


# Text classifiers


@pytest.fixture
def classifier(tmp_path):
    """The folder of a text classifier with a tokenizer of its own, and the classifier."""

    def make(kind, names=tiny.COLOURS):
        network = tiny.bert(1, names, vocab_size=len(BACKBONES[kind]), pad_token_id=BACKBONES[kind].pad_token_id)
        network.save_pretrained(tmp_path / kind)
        BACKBONES[kind].save_pretrained(tmp_path / kind)
        return str(tmp_path / kind), network

    return make


@pytest.mark.parametrize("kind", ["identical", "extended", "renamed", "moved", "reduced"])
@pytest.mark.parametrize("names", [["blue", "grey", "red", "green"], NAMES])
@torch.no_grad()
def test_text_classifiers_read_translated_tokens(classifier, kind, names):
    """Short and long texts in one batch, with tokens that the reward does not know."""
    folder, backbone = classifier(kind, names)
    network = tiny.bert(2, vocab_size=len(REWARD), pad_token_id=REWARD.pad_token_id)
    maps = {"label_map": LABEL_MAP, "allow_partial": True} if names is NAMES else {}
    model = PRTForSequenceClassification.from_parts(folder, [RewardModel.from_base(network, REWARD)], [1.5], **maps)
    inputs = BACKBONES[kind]([TEXT, "ab<think>", "xyz"], padding=True, padding_side="right", return_tensors="pt")
    read = families.BruteForce(network, BACKBONES[kind]).read
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    before = torch.cat([backbone(torch.tensor([row])).logits for row in rows])
    outputs = torch.cat([network(torch.tensor([read(row)])).logits for row in rows])
    expected = by_definition(before, [(outputs, tiny.COLOURS, 1.5)], names, maps.get("label_map", {}))
    torch.testing.assert_close(model(**inputs).logits.double().exp(), expected, rtol=2e-4, atol=1e-6)
    found = model(**inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}).logits
    torch.testing.assert_close(found.double().exp(), expected, rtol=2e-4, atol=1e-6)
    if names is NAMES:
        assert (found.double().exp() - before.double().softmax(-1))[:, [0, 4]].abs().max() < 1e-5


# Drafts of a source backbone that is an update of the reward's vocabulary


@pytest.mark.parametrize("kind", ["extended", "moved", "reduced"])
def test_drafts_of_a_source_of_another_vocabulary(tmp_path, kind):
    """It reads the reward's ids if they are its own; it may have more of them."""
    families.build(kind, tiny.llama, 3).save_pretrained(tmp_path)
    BACKBONES[kind].save_pretrained(tmp_path)
    source, backbone = AutoModelForCausalLM.from_pretrained(tmp_path), families.build("identical", tiny.llama, 1)
    if kind == "reduced":
        source.resize_token_embeddings(len(BACKBONES[kind]))
    reward = RewardModel.from_base(families.build("identical", tiny.llama, 2), REWARD)
    processor = PRTLogitsProcessor(reward, REWARD, source_backbone=source)
    inputs = REWARD(["abc<|user|>xyz"], return_tensors="pt")
    options = {"max_new_tokens": 9, "do_sample": False, "logits_processor": [processor]}
    text = backbone.generate(**inputs, **options)
    if kind == "extended":
        assert torch.equal(backbone.generate(**inputs, **options, custom_generate=speculative_decoding), text)
        return
    with pytest.raises(UnsupportedError, match="The source backbone has other token ids than the reward"):
        backbone.generate(**inputs, **options, custom_generate=speculative_decoding)


@pytest.mark.parametrize("build", [tiny.gpt2, tiny.mamba, tiny.llama, tiny.bert])
def test_a_model_without_files_of_a_tokenizer_has_none(tmp_path, build):
    """From the architecture alone, transformers makes some with no more than special tokens."""
    build().save_pretrained(tmp_path)
    assert load_processing_class(tmp_path, "text-generation") is None


# Recipes


def image_model(backbone):
    rewards = [RewardModel.from_base(tiny.resnet(2))]
    return PRTForImageClassification.from_parts(backbone, rewards, label_map=LABEL_MAP, allow_partial=True)


def causal_model(backbone):
    """`<think>` of the backbone stands for a token that the reward knows by another name."""
    reward = RewardModel.from_base(tiny.llama(2, vocab_size=len(REWARD)), REWARD)
    return PRTForCausalLM.from_parts(backbone, [reward], token_map={"<think>": "<|reserved_1|>"})


@pytest.fixture
def parts(tmp_path):
    """Folders of an image classifier and of a language model."""
    tiny.vit(1, NAMES).save_pretrained(tmp_path / "images")
    families.build("renamed", tiny.llama, 1).save_pretrained(tmp_path / "texts")
    BACKBONES["renamed"].save_pretrained(tmp_path / "texts")
    return tmp_path


def both(folder):
    """For images and for texts: the model, its inputs, the Auto class, and what the recipe says."""
    images = {"pixel_values": torch.stack(list(pixels()))}
    texts = {"input_ids": torch.tensor(BACKBONES["renamed"]([TEXT])["input_ids"])}
    maps = {"label_map": LABEL_MAP, "allow_partial": True, "token_map": None}
    yield image_model(f"{folder}/images"), images, AutoModelForImageClassification, maps
    maps = {"label_map": None, "allow_partial": False, "token_map": {"<think>": "<|reserved_1|>"}}
    yield causal_model(f"{folder}/texts"), texts, AutoModelForCausalLM, maps


@torch.no_grad()
def test_recipes_keep_how_labels_and_tokens_match(parts):
    for model, inputs, auto_class, maps in both(parts):
        folder = parts / f"recipe of {auto_class.__name__}"
        model.save_pretrained(folder)
        written = json.loads((folder / "config.json").read_text())
        assert {name: written.get(name) for name in maps} == maps
        for load in (auto_class.from_pretrained, type(model).from_pretrained):
            again = load(folder)
            assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        again.save_pretrained(parts / "again")
        assert json.loads((parts / "again" / "config.json").read_text())["label_map"] == maps["label_map"]


@torch.no_grad()
def test_the_token_map_of_a_recipe_is_read(parts):
    """Beside a brute force, and unlike a model without it."""
    model = causal_model(str(parts / "texts"))
    network, tokenizer = model.rewards[0].network, BACKBONES["renamed"]
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    brute_force = families.BruteForce(network, tokenizer, token_map={"<think>": "<|reserved_1|>"})
    expected = brute_force(ids, model.backbone(ids).logits[:, -1])[:, : len(tokenizer)]
    torch.testing.assert_close(model(ids).logits[:, -1], expected, rtol=1e-4, atol=1e-4)
    plain = PRTForCausalLM.from_parts(model.backbone, model.rewards, tokenizer=tokenizer)
    assert (plain(ids).logits[:, -1] - expected).abs().max() > 1e-2
    prompt = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    model.save_pretrained(parts / "recipe")
    again = AutoModelForCausalLM.from_pretrained(parts / "recipe")
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(again.generate(**prompt, **options), model.generate(**prompt, **options))


@torch.no_grad()
def test_pushed_recipes_keep_how_labels_and_tokens_match(hub, parts):
    for name in ("images", "texts"):
        hub.put(f"me/{name}", parts / name)
    for model, inputs, auto_class, maps in [
        (image_model("me/images"), *list(both(parts))[0][1:]),
        (causal_model("me/texts"), *list(both(parts))[1][1:]),
    ]:
        repository = f"me/{auto_class.__name__.lower()}"
        model.push_to_hub(repository)
        again = auto_class.from_pretrained(repository)
        assert {name: getattr(again.config, name) for name in maps} == maps
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
