"""A PRT model to a folder or the Hub, and back."""

import copy
import json
import shutil
import tempfile

import pytest
import tiny
import torch
from huggingface_hub import constants
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTImageProcessor,
)

from prt_hf import (
    BaseModelMismatchError,
    PRTError,
    PRTForCausalLM,
    PRTForImageClassification,
    PRTForSequenceClassification,
    PRTModelConfig,
    RewardFileError,
    RewardModel,
    UnsupportedError,
)
from prt_hf.errors import PRTValueError

TOKENIZER = tiny.tokenizer()


def adapter(base, seed=0):
    torch.manual_seed(seed)
    return RewardModel.from_base(base, TOKENIZER, LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a backbone, `base`, and a recipe, `recipe`: a reward on the backbone, two on another base, and a
    full one; and the model."""
    folder = tmp_path_factory.mktemp("made")
    tiny.llama(1).save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    tiny.llama(2).save_pretrained(folder / "other")
    backbone, other = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("base", "other"))
    rewards = [adapter(backbone), adapter(other, 1), adapter(other, 2), RewardModel.from_base(tiny.gpt2(3), TOKENIZER)]
    model = PRTForCausalLM.from_parts(backbone, rewards, [0.7, 1.0, -0.2, 0.3]).eval()
    model.save_pretrained(folder / "recipe")
    return folder, model


@pytest.fixture
def base(made):
    return made[0] / "base"


@pytest.fixture
def model(made):
    return copy.deepcopy(made[1])


@pytest.fixture
def recipe(made, tmp_path):
    return shutil.copytree(made[0] / "recipe", tmp_path / "recipe")


@torch.no_grad()
def logits(model, rows=None):
    return model(tiny.prompts(2) if rows is None else rows).logits


def edit(recipe, **changes):
    """Entries `a__b` are those of `a`; None removes."""
    path = recipe / "config.json"
    entries = json.loads(path.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        place = entries
        for key in outer:
            place = place[int(key) if key.isdigit() else key]
        if value is None:
            place.pop(last)
        else:
            place[last] = value
    path.write_text(json.dumps(entries))


# Round trips


@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, PRTForCausalLM])
def test_round_trip(model, tmp_path, auto_class):
    model.generation_config.max_new_tokens = 4
    model.generation_config.pad_token_id = 5
    model.strengths[1] = 1.5
    model.save_pretrained(tmp_path / "recipe")
    loaded = auto_class.from_pretrained(tmp_path / "recipe")
    assert type(loaded) is PRTForCausalLM and not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.strengths == [0.7, 1.5, -0.2, 0.3]
    assert loaded.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()
    rows = tiny.prompts(2)
    assert torch.equal(loaded.generate(rows), model.generate(rows)) and loaded.generate(rows).shape == (2, 11)
    assert [len(each.parts) for each in loaded._mixed] == [2, 2, 1], "one copy of each base"
    assert AutoTokenizer.from_pretrained(tmp_path / "recipe").get_vocab() == TOKENIZER.get_vocab()


def test_round_trip_of_image_classifiers(tmp_path):
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    for name, network in (("base", tiny.vit(1)), ("other", tiny.resnet(2, names=tiny.COLOURS[::-1]))):
        network.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    rewards = [RewardModel.from_base(str(tmp_path / "other"))]
    model = PRTForImageClassification.from_parts(str(tmp_path / "base"), rewards, [0.5])
    model.save_pretrained(tmp_path / "recipe")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "recipe")
    pixels = torch.randn(2, 1, 8, 8)
    assert type(loaded) is PRTForImageClassification
    assert torch.equal(logits(loaded, pixels), logits(model, pixels))
    with pytest.raises(PRTValueError, match="(?s)recipe of a PRTForCausalLM.*PRTForImageClassification"):
        PRTForCausalLM.from_pretrained(tmp_path / "recipe")
    if loaded.processing_class is None:
        pytest.skip("this transformers reads image processors with torchvision only")
    assert list(loaded.processing_class.image_mean) == [0.5]


def test_round_trip_of_text_classifiers(tmp_path):
    tiny.bert(1).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    reward = RewardModel.from_base(tiny.bert(2, names=tiny.COLOURS[::-1]), TOKENIZER)
    model = PRTForSequenceClassification.from_parts(str(tmp_path / "base"), [reward])
    model.save_pretrained(tmp_path / "recipe")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "recipe")
    assert type(loaded) is PRTForSequenceClassification
    assert torch.equal(logits(loaded), logits(model))


def test_nothing_of_the_backbone_is_copied(recipe, base):
    weights = {path.relative_to(recipe).as_posix(): path.stat().st_size for path in recipe.rglob("*.safetensors")}
    adapters = [f"reward-{index}/adapter_model.safetensors" for index in range(3)]
    assert sorted(weights) == [*adapters, "reward-3/model.safetensors"]
    assert all(weights[name] < (base / "model.safetensors").stat().st_size / 10 for name in adapters)
    assert not list(recipe.rglob("*.bin")) + list(recipe.rglob("*.pt"))


def test_rewards_beside_a_recipe_load_by_themselves(recipe, model):
    for index, reward in enumerate(model.rewards):
        loaded = RewardModel.from_pretrained(recipe / f"reward-{index}")
        assert torch.equal(loaded(input_ids=tiny.prompts()), reward(input_ids=tiny.prompts()))


def test_the_configuration_survives(recipe, model):
    config = AutoConfig.from_pretrained(recipe)
    assert type(config) is PRTModelConfig and config.architectures == ["PRTForCausalLM"]
    assert config.backbone_config.to_dict() == model.backbone.config.to_dict()
    assert [type(part).__name__ for part in config.reward_configs] == ["LlamaConfig"] * 3 + ["GPT2Config"]
    assert (config.hidden_size, config.vocab_size) == (32, tiny.VOCABULARY)
    config.save_pretrained(recipe.parent / "again")
    assert AutoConfig.from_pretrained(recipe.parent / "again").to_json_string() == config.to_json_string()


def test_saving_again(recipe, model):
    files = {path.relative_to(recipe) for path in recipe.rglob("*")}
    loaded = AutoModelForCausalLM.from_pretrained(recipe)
    loaded.save_pretrained(recipe)
    assert {path.relative_to(recipe) for path in recipe.rglob("*")} == files
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(recipe)), logits(model))


def test_rewards_of_an_earlier_recipe_go(recipe, model):
    """And nothing else does."""
    (recipe / "README.md").write_text("mine")
    (recipe / "reward-notes").mkdir()
    fewer = PRTForCausalLM.from_parts(model.backbone, model.rewards[:1])
    fewer.save_pretrained(recipe)
    assert sorted(path.name for path in recipe.iterdir() if path.is_dir()) == ["reward-0", "reward-notes"]
    assert (recipe / "README.md").read_text().endswith("\n---\nmine")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(recipe)), logits(fewer.eval()))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rewards_that_no_recipe_names_stay(model, tmp_path):
    project = tmp_path / "project"
    model.rewards[0].save_pretrained(project / "reward-math")
    model.rewards[1].save_pretrained(project / "reward-1")
    before = contents(project)
    with pytest.raises(RewardFileError, match="(?s)holds reward-1, which the recipe would overwrite.*rename"):
        model.save_pretrained(project)
    assert contents(project) == before
    fewer = PRTForCausalLM.from_parts(model.backbone, model.rewards[:1])
    for _ in range(2):
        fewer.save_pretrained(project)
        assert before.items() <= contents(project).items()


def test_an_interrupted_save_leaves_the_earlier_recipe_whole(recipe, model):
    (recipe / "reward-0" / "notes.txt").write_text("mine")
    before = contents(recipe)
    other = PRTForCausalLM.from_parts(model.backbone, model.rewards[1::-1]).eval()

    def full(*_):
        raise OSError("no space left")

    other.processing_class = type("Full", (), {"save_pretrained": full})()
    with pytest.raises(OSError, match="no space left"):
        other.save_pretrained(recipe)
    assert contents(recipe) == before
    other.processing_class = TOKENIZER
    other.save_pretrained(recipe)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(recipe)), logits(other))
    assert (recipe / "reward-0" / "notes.txt").read_text() == "mine"
    assert not (recipe / "reward-2").exists() and not list(recipe.glob(".*"))


def test_a_save_that_is_killed_leaves_the_earlier_recipe_or_the_new_one_whole(recipe, model, tmp_path):
    other = PRTForCausalLM.from_parts(model.backbone, model.rewards[1::-1]).eval()
    is_new, steps = [], 0
    while True:
        folder = shutil.copytree(recipe, tmp_path / f"killed-{steps}")
        is_whole = not tiny.killed_after(steps, lambda folder=folder: other.save_pretrained(folder))
        before = contents(folder)
        found = logits(AutoModelForCausalLM.from_pretrained(folder))
        is_new.append(torch.equal(found, logits(other)))
        assert is_new[-1] or torch.equal(found, logits(model))
        assert contents(folder) == before
        if is_whole:
            break
        steps += 17
    assert is_new == sorted(is_new) and not is_new[0] and is_new[-1] and steps > 70
    model.save_pretrained(folder)
    assert torch.equal(logits(PRTForCausalLM.from_pretrained(folder)), logits(model))
    assert not list(folder.glob(".*"))


def test_a_recipe_that_moves(recipe, model, tmp_path):
    shutil.move(recipe, tmp_path / "elsewhere")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere")), logits(model))


def test_a_backbone_that_moves(base, tmp_path):
    place = shutil.copytree(base, tmp_path / "base")
    model = PRTForCausalLM.from_parts(str(place), [RewardModel.from_base(tiny.gpt2(3), TOKENIZER)])
    model.save_pretrained(tmp_path / "recipe")
    shutil.move(place, tmp_path / "moved")
    for backbone in (tmp_path / "moved", model.backbone):
        loaded = PRTForCausalLM.from_pretrained(tmp_path / "recipe", backbone=backbone)
        assert torch.equal(logits(loaded), logits(model.eval()))
    with pytest.raises((PRTError, OSError), match="base"):
        PRTForCausalLM.from_pretrained(tmp_path / "recipe")


def test_loading_in_another_precision(recipe, model):
    loaded = AutoModelForCausalLM.from_pretrained(recipe, dtype=torch.bfloat16)
    assert {value.dtype for value in loaded.backbone.parameters()} == {torch.bfloat16}
    assert (logits(loaded) - logits(model)).abs().max() < 0.05 * logits(model).abs().max()


def test_a_tuned_reward_tells_its_training(model, tmp_path, base):
    model.train()
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    model(tiny.prompts(2), labels=tiny.prompts(2)).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    reward = RewardModel.from_pretrained(tmp_path / "tuned" / "reward-0")
    assert reward.config.source_backbone.id == str(base) and reward.config.kl_coef == pytest.approx(1 / 0.7)
    assert reward.config.strength == pytest.approx(0.7)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")), logits(model.eval()))


def test_tuned_biases_are_the_rewards_own(tmp_path):
    """Loading them leaves the base as it is."""
    tiny.gpt2(1).save_pretrained(tmp_path / "base")
    backbone = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = LoraConfig(init_lora_weights=False, bias="lora_only", target_modules=["c_attn"])
    try:
        reward = RewardModel.from_base(backbone, TOKENIZER, config)
    except UnsupportedError as error:
        assert "does not save all" in str(error)
        pytest.skip("PEFT before 0.20 loses tuned biases, and rewards with them are refused")
    expected = logits(backbone)
    for name, parameter in reward.network.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            parameter.data.add_(1.0)
    model = PRTForCausalLM.from_parts(backbone, [reward], tokenizer=TOKENIZER).eval()
    model.save_pretrained(tmp_path / "recipe")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "recipe")
    assert torch.equal(logits(loaded), logits(model))
    for network in (backbone, loaded.backbone):
        assert torch.equal(logits(network), expected)


def test_only_looking_is_no_training(model, tmp_path):
    model.train()
    with torch.no_grad():
        model(tiny.prompts(2))
    model.eval()(tiny.prompts(2))
    model.save_pretrained(tmp_path / "recipe")
    assert RewardModel.from_pretrained(tmp_path / "recipe" / "reward-0").config.source_backbone is None


def test_other_processes_do_not_write(model, tmp_path):
    model.save_pretrained(tmp_path / "recipe", is_main_process=False)
    assert not (tmp_path / "recipe").exists()


def test_a_state_dict_that_was_gathered(model, tmp_path):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name in state:
        if name.startswith("reward_networks.0.") and "lora_B" in name:
            state[name].zero_()
    model.save_pretrained(tmp_path / "recipe", state_dict=state)
    saved = load_file(tmp_path / "recipe" / "reward-0" / "adapter_model.safetensors")
    assert all((value == 0).all() for name, value in saved.items() if "lora_B" in name)
    loaded = RewardModel.from_pretrained(tmp_path / "recipe" / "reward-1")
    assert torch.equal(loaded(input_ids=tiny.prompts()), model.rewards[1](input_ids=tiny.prompts()))


# The Hub


@pytest.fixture
def repositories(hub, tmp_path):
    """`me/base`, `me/reward` on it, and their PRT model."""
    put(hub, "me/base", tiny.llama(1), TOKENIZER)
    torch.manual_seed(0)
    put(hub, "me/reward", RewardModel.from_base("me/base", peft_config=LoraConfig(init_lora_weights=False)))
    return PRTForCausalLM.from_parts("me/base", ["me/reward"], [0.6]).eval()


def put(hub, repo_id, *parts):
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            part.save_pretrained(folder)
        return hub.put(repo_id, folder)


def test_rewards_of_the_hub_are_named(hub, repositories, tmp_path):
    commits = {name: hub.repositories[f"me/{name}"].resolve("main") for name in ("base", "reward")}
    repositories.save_pretrained(tmp_path / "recipe")
    assert not list(tmp_path.glob("recipe/reward-*"))
    entries = json.loads((tmp_path / "recipe" / "config.json").read_text())
    (reward,) = entries["reward_references"]
    assert (reward["id"], reward["revision"], reward["strength"]) == ("me/reward", commits["reward"], 0.6)
    assert entries["backbone_reference"]["id"] == "me/base"
    assert entries["backbone_reference"]["revision"] == commits["base"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "recipe")
    assert torch.equal(logits(loaded), logits(repositories))
    loaded.save_pretrained(tmp_path / "again")
    assert not list(tmp_path.glob("again/reward-*"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(repositories))


def test_rewards_of_the_hub_that_changed_are_saved_beside(repositories, tmp_path):
    for parameter in repositories.reward_networks[0].parameters():
        parameter.data.mul_(1.1 if parameter.requires_grad else 1.0)
    repositories.save_pretrained(tmp_path / "recipe")
    (reward,) = json.loads((tmp_path / "recipe" / "config.json").read_text())["reward_references"]
    assert (reward["id"], reward["revision"], reward["folder"]) == (None, None, "reward-0")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "recipe")), logits(repositories))


def test_recipes_are_pinned(repositories, hub, tmp_path, monkeypatch):
    """A newer commit does not change what they load, here or on a machine that has nothing yet."""
    repositories.save_pretrained(tmp_path / "recipe")
    expected = logits(repositories)
    put(hub, "me/base", tiny.llama(9))
    put(hub, "me/reward", adapter(tiny.llama(9)))
    for cache in ("cache", "cache of another machine"):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / cache))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "recipe")), expected)
    assert (logits(AutoModelForCausalLM.from_pretrained("me/base")) - logits(tiny.llama(9))).abs().max() < 1e-5


def test_a_recipe_of_the_hub(repositories, hub, tmp_path):
    """With one reward named, and one beside it."""
    rewards = ["me/reward", RewardModel.from_base(tiny.gpt2(3), TOKENIZER)]
    model = PRTForCausalLM.from_parts("me/base", rewards).eval()
    put(hub, "me/recipe", model)
    loaded = AutoModelForCausalLM.from_pretrained("me/recipe")
    assert torch.equal(logits(loaded), logits(model))
    assert AutoTokenizer.from_pretrained("me/recipe").get_vocab() == TOKENIZER.get_vocab()


# What cannot be right is refused


def test_a_newer_recipe(recipe):
    edit(recipe, recipe_version="2.0")
    with pytest.raises(RewardFileError, match="(?s)newer prt_hf.*1.0 or older.*'2.0'"):
        AutoModelForCausalLM.from_pretrained(recipe)
    edit(recipe, recipe_version="1.7")
    AutoModelForCausalLM.from_pretrained(recipe)


def test_a_reward_that_is_gone(recipe):
    shutil.rmtree(recipe / "reward-1")
    with pytest.raises(RewardFileError, match="(?s)reward is gone.*folder reward-1.*reward-0, reward-2"):
        AutoModelForCausalLM.from_pretrained(recipe)


def test_a_reward_that_changed(recipe):
    path = recipe / "reward-0" / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RewardFileError, match="(?s)reward has changed.*SHA-256.*reward-0"):
        AutoModelForCausalLM.from_pretrained(recipe)


@pytest.mark.parametrize("name, entry, value", [("adapter_config", "lora_alpha", 99), ("prt_config", "kl_coef", 3.0)])
def test_a_reward_whose_configuration_changed(recipe, name, entry, value):
    """It decides what the weights say."""
    path = recipe / "reward-0" / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {entry: value}))
    with pytest.raises(RewardFileError, match="(?s)reward has changed.*SHA-256.*reward-0"):
        AutoModelForCausalLM.from_pretrained(recipe)


def test_weights_beside_their_shards_are_refused(base, tmp_path):
    """transformers would read the one file, and the digest covers the shards."""
    model = PRTForCausalLM.from_parts(str(base), [RewardModel.from_base(tiny.llama(3), TOKENIZER)])
    model.save_pretrained(tmp_path / "recipe")
    place = tmp_path / "recipe" / "reward-0"
    weights = load_file(place / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(place / "model.safetensors", place / "model-00001-of-00001.safetensors")
    for load, folder in ((AutoModelForCausalLM, tmp_path / "recipe"), (RewardModel, place)):
        with pytest.raises(RewardFileError, match="holds weights twice"):
            load.from_pretrained(folder)


def test_a_backbone_that_changed(recipe, base, tmp_path):
    place = shutil.copytree(base, tmp_path / "base")
    edit(recipe, backbone_reference__id=str(place))
    AutoModelForCausalLM.from_pretrained(recipe)
    other = tiny.llama(1)
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    other.save_pretrained(place)
    with pytest.raises(BaseModelMismatchError, match="not the one that was used before"):
        AutoModelForCausalLM.from_pretrained(recipe)
    with pytest.raises(BaseModelMismatchError, match="not the one that was used before"):
        PRTForCausalLM.from_pretrained(recipe, backbone=tiny.llama(6))


def test_a_backbone_made_in_memory(tmp_path):
    backbone, reward = tiny.llama(1), RewardModel.from_base(tiny.gpt2(2), TOKENIZER)
    model = PRTForCausalLM.from_parts(backbone, [reward], tokenizer=TOKENIZER).eval()
    model.save_pretrained(tmp_path / "recipe")
    with pytest.raises(RewardFileError, match="(?s)made in memory.*`backbone=` of a PRT model"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "recipe")
    loaded = PRTForCausalLM.from_pretrained(tmp_path / "recipe", backbone=tiny.llama(1))
    assert torch.equal(logits(loaded), logits(model))


def test_recipes_of_other_classes(recipe):
    with pytest.raises(PRTValueError, match="(?s)no recipe of a PRTForImageClassification.*PRTForCausalLM"):
        PRTForImageClassification.from_pretrained(recipe)
    with pytest.raises(PRTValueError, match="(?s)no recipe of a PRTForSequenceClassification.*PRTForCausalLM"):
        AutoModelForSequenceClassification.from_pretrained(recipe)


def test_folders_that_hold_no_recipe(recipe, base, tmp_path):
    with pytest.raises(PRTValueError, match="(?s)no recipe of a PRTForCausalLM.*found: llama"):
        PRTForCausalLM.from_pretrained(base)
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match="config.json"):
        PRTForCausalLM.from_pretrained(tmp_path / "empty")
    with pytest.raises(PRTError, match="nowhere/at/all"):
        PRTForCausalLM.from_pretrained("nowhere/at/all")


@pytest.mark.parametrize(
    "name",
    ["../other", "{parent}/other", "reward-0/../../other", ".", "..", "reward-0/inner", "reward-0\0", "reward-0\n"],
)
def test_rewards_outside_the_recipe(recipe, tmp_path, name):
    """Whoever wrote the recipe does not choose where it reads."""
    shutil.copytree(recipe / "reward-0", tmp_path / "other", dirs_exist_ok=True)
    shutil.copytree(recipe / "reward-0", recipe / "reward-0" / "inner")
    edit(recipe, reward_references__0__folder=name.format(parent=tmp_path))
    with pytest.raises(RewardFileError, match="(?s)not where rewards are saved.*a folder"):
        AutoModelForCausalLM.from_pretrained(recipe)


def test_a_link_out_of_the_recipe(recipe, tmp_path):
    shutil.move(recipe / "reward-0", tmp_path / "elsewhere")
    (recipe / "reward-0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RewardFileError, match="reward is gone"):
        AutoModelForCausalLM.from_pretrained(recipe)


DAMAGED = {
    "no version": {"recipe_version": []},
    "no backbone": {"backbone_reference": None},
    "backbone of another kind": {"backbone_reference": "base"},
    "unknown entry of the backbone": {"backbone_reference__colour": "red"},
    "backbone's id of another kind": {"backbone_reference__id": 5},
    "backbone configuration of another kind": {"backbone_config": [1]},
    "unknown backbone": {"backbone_config__model_type": "unheard-of"},
    "no model type": {"backbone_config__model_type": None},
    "no rewards": {"reward_references": None},
    "empty rewards": {"reward_references": []},
    "rewards of another kind": {"reward_references": {"0": {}}},
    "reward of another kind": {"reward_references": ["reward-0"]},
    "no strength": {"reward_references__0__strength": None},
    "strength of another kind": {"reward_references__0__strength": "strong"},
    "no id": {"reward_references__0__id": None},
    "id of another kind": {"reward_references__0__id": 7},
    "no folder": {"reward_references__0__folder": None},
    "folder of another kind": {"reward_references__0__folder": 7},
    "no hash": {"reward_references__0__digest": None},
    "configurations of another kind": {"reward_configs": 3},
    "configuration of another kind": {"reward_configs": ["llama"]},
    "no architecture": {"architectures": None},
    "many rewards": {
        "reward_references": [{"id": "a/b", "revision": None, "digest": None, "folder": None, "strength": 1.0}] * 10**5
    },
    "many labels": {"num_labels": 10**9},
    "many labels of the backbone": {"backbone_config__num_labels": 10**9},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_recipes(recipe, damage):
    edit(recipe, **DAMAGED[damage])
    with pytest.raises(PRTError):
        AutoModelForCausalLM.from_pretrained(recipe)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
    ],
)
def test_damaged_generation_configurations(recipe, content):
    (recipe / "generation_config.json").write_text(content)
    with pytest.raises(PRTError, match="generation_config.json cannot be read"):
        PRTForCausalLM.from_pretrained(recipe)


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_recipes_that_are_no_json(recipe, content):
    (recipe / "config.json").write_text(content)
    # The last is transformers' own, for a list; newer ones say more.
    with pytest.raises((PRTError, OSError, ValueError, TypeError), match="config|recipe|model_type|list"):
        AutoModelForCausalLM.from_pretrained(recipe)


def test_saving_over_something_else(model, base, recipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[]")
    for place, found in (
        (base, r"a model of another kind \(llama\)"),
        (recipe / "reward-0", "a reward"),
        (tmp_path / "file", "a file"),
        (tmp_path / "odd", "a model of another kind"),
    ):
        before = sorted((path.name, path.stat().st_mtime_ns) for path in place.parent.rglob("*"))
        with pytest.raises(RewardFileError, match=f"(?s)would spoil it.*found: {found}"):
            model.save_pretrained(place)
        assert sorted((path.name, path.stat().st_mtime_ns) for path in place.parent.rglob("*")) == before


def test_strengths_are_checked_before_saving(model, recipe):
    before = (recipe / "config.json").read_text()
    model.strengths = [[1.0, 0.5], 1.0, 1.0, 1.0]  # of two prompts
    with pytest.raises(PRTValueError, match="(?s)`strengths` is not usable.*4 finite numbers"):
        model.save_pretrained(recipe)
    assert (recipe / "config.json").read_text() == before


def test_what_a_recipe_cannot_do(model, recipe):
    with pytest.raises(UnsupportedError, match="push_to_hub"):
        model.save_pretrained(recipe, push_to_hub=True)
    with pytest.raises(UnsupportedError, match="a recipe has no weights"):
        AutoModelForCausalLM.from_pretrained(recipe, output_loading_info=True)


def test_a_recipe_says_what_it_needs_to_be_loaded(made, tmp_path):
    """Where transformers alone reports an unknown model type; the entry stays what it is over loads and saves."""
    folder, _ = made
    about = "a recipe of prt_hf: `import prt_hf.inference` before an Auto class of transformers loads it"
    assert json.loads((folder / "recipe" / "config.json").read_text())["about"] == about
    assert "**Load it after `import prt_hf.inference`:**" in (folder / "recipe" / "README.md").read_text()
    PRTForCausalLM.from_pretrained(folder / "recipe").save_pretrained(tmp_path / "again")
    ours, theirs = (place / "config.json" for place in (folder / "recipe", tmp_path / "again"))
    assert json.loads(ours.read_text())["about"] == json.loads(theirs.read_text())["about"]
    assert not hasattr(PRTModelConfig.from_pretrained(tmp_path / "again"), "about")
