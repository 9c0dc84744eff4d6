"""A reward from its base, to a folder, and back."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
import yaml
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from prt_hf import (
    BaseModelMismatchError,
    ContextLengthError,
    PRTForCausalLM,
    PRTLogitsProcessor,
    RewardFileError,
    RewardModel,
    VocabularyMismatchError,
    default_peft_config,
)
from prt_hf.errors import PRTValueError, UnsupportedError
from prt_hf.evaluation import check_fit
from prt_hf.networks.anatomy import head_of, task_of
from prt_hf.networks.auto import load_pretrained
from prt_hf.networks.identity import reference_to, weights_fingerprint


def randomised(reward, seed=5):
    """As if tuned: every adapter parameter moved."""
    torch.manual_seed(seed)
    for parameter in reward.network.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return reward


def logits(reward):
    return reward(input_ids=tiny.prompts()).detach()


@pytest.fixture
def base_folder(tmp_path, tokenizer):
    tiny.llama(1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(tmp_path, base_folder):
    """A folder with a reward adapter, and the rewards that it gives."""
    reward = randomised(RewardModel.from_base(str(base_folder), peft_config=LoraConfig()))
    reward.save_pretrained(tmp_path / "reward")
    return tmp_path / "reward", logits(reward)


# What the reward is


@pytest.mark.parametrize("name", tiny.LANGUAGE_MODELS)
def test_rewards_start_as_the_pretrained_logits(name, tokenizer):
    base = tiny.LANGUAGE_MODELS[name](1)
    expected = base(tiny.prompts()).logits
    for peft_config in (None, default_peft_config(base)):
        reward = RewardModel.from_base(base, tokenizer, peft_config)
        torch.testing.assert_close(logits(reward), expected)


@pytest.mark.parametrize("make", [*tiny.LANGUAGE_MODELS.values(), tiny.vit, tiny.resnet, tiny.bert])
@pytest.mark.parametrize("is_adapter", [True, False])
def test_zero_start(make, is_adapter, tokenizer):
    base = make(1)
    inputs = (
        {"pixel_values": torch.randn(2, 1, 8, 8)} if make in (tiny.vit, tiny.resnet) else {"input_ids": tiny.prompts()}
    )
    reward = RewardModel.from_base(base, tokenizer, LoraConfig() if is_adapter else None, reward_init="zero")
    rewards = reward(**inputs)
    assert not rewards.any()
    rewards.sum().backward()
    head = [p.grad for name, p in reward.network.named_parameters() if p.requires_grad and p.grad is not None]
    assert any(gradient.any() for gradient in head), "the head must be able to leave zero"


def test_zero_start_of_a_tied_head_leaves_the_embeddings(tokenizer, tmp_path):
    for peft_config in (LoraConfig(), None):
        base = tiny.llama(1, tie_word_embeddings=True)
        embeddings = base.get_input_embeddings().weight.clone()
        reward = RewardModel.from_base(base, tokenizer, peft_config, reward_init="zero")
        randomised(reward)
        if peft_config is None:
            head_of(base)[1].weight.data.normal_()
        else:
            assert torch.equal(base.get_input_embeddings().weight, embeddings)
        reward.save_pretrained(tmp_path / "tied")
        source = tiny.llama(1, tie_word_embeddings=True) if peft_config else None
        again = RewardModel.from_pretrained(tmp_path / "tied", base_model=source)
        torch.testing.assert_close(logits(again), logits(reward))
        shutil.rmtree(tmp_path / "tied")


@pytest.mark.parametrize("make", [*tiny.LANGUAGE_MODELS.values(), tiny.vit, tiny.resnet, tiny.convnext, tiny.bert])
def test_default_adapter_takes_in_the_head(make, tokenizer):
    base = make(1)
    reward = RewardModel.from_base(base, tokenizer, default_peft_config(base, r=4))
    head, _ = head_of(base)
    trained = [name for name, parameter in reward.network.named_parameters() if parameter.requires_grad]
    assert any(f".{head}." in name for name in trained)
    assert len(trained) > 4, "the body is adapted as well"
    assert all(".lora_" in name or f".{head}.modules_to_save." in name for name in trained)


def test_plain_lora_config_gets_the_default_layers(tokenizer):
    base, mine = tiny.llama(1), LoraConfig(r=3)
    reward = RewardModel.from_base(base, tokenizer, mine)
    chosen = reward.network.peft_config["default"]
    assert chosen.target_modules == set(default_peft_config(base).target_modules) and chosen.r == 3
    assert mine.target_modules is None, "the caller's config is not changed"
    explicit = RewardModel.from_base(base, tokenizer, LoraConfig(target_modules=["q_proj"])).network
    assert explicit.peft_config["default"].target_modules == {"q_proj"}


def test_layers_and_scale_of_the_default_adapter():
    base = tiny.llama(1, num_hidden_layers=4)
    config = default_peft_config(base, r=4)
    assert (config.r, config.lora_alpha, config.task_type) == (4, 16, "CAUSAL_LM")
    assert default_peft_config(tiny.vit(1)).lora_alpha == 2 * default_peft_config(tiny.vit(1)).r
    top = RewardModel.from_base(base, tiny.tokenizer(), default_peft_config(base, top_layers=1))
    adapted = {name.partition(".lora_A")[0] for name, _ in top.network.named_parameters() if ".lora_A." in name}
    inside = {name.removeprefix("base_model.model.") for name in adapted}
    assert inside == {"lm_head"} | {
        f"model.layers.3.{name}"
        for name in [f"self_attn.{part}_proj" for part in "qkvo"]
        + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    }
    every, all_four = default_peft_config(base), default_peft_config(base, top_layers=4)
    assert all_four.target_modules == every.target_modules
    for count in (0, 5):
        with pytest.raises(PRTValueError, match=f"(?s)`top_layers` is not usable.*1 ... 4.*found: {count}"):
            default_peft_config(base, top_layers=count)
    with pytest.raises(PRTValueError, match="(?s)`top_layers` is not usable.*layers are in one list"):
        default_peft_config(tiny.resnet(1), top_layers=1)


def test_the_base_stays_as_it_is(tokenizer):
    base = tiny.llama(1)
    before, grads = base(tiny.prompts()).logits, [p.requires_grad for p in base.parameters()]
    reward = randomised(RewardModel.from_base(base, tokenizer, LoraConfig()))
    assert (logits(reward) - before).abs().max() > 0.01
    assert torch.equal(base(tiny.prompts()).logits, before)
    assert [p.requires_grad for p in base.parameters()] == grads
    shared = {p.data_ptr() for p in base.parameters()}
    assert shared <= {p.data_ptr() for p in reward.network.parameters()}, "and shares its weights"


def test_padded_vocabulary_rows_are_cut_off(tokenizer):
    assert logits(RewardModel.from_base(tiny.llama(1, vocab_size=128), tokenizer)).shape == (2, 7, 97)


def test_sequences_longer_than_the_context(tokenizer):
    with pytest.raises(ContextLengthError, match="(?s)at most 5 tokens.*found: 7 tokens"):
        logits(RewardModel.from_base(tiny.gpt2(n_positions=5), tokenizer))


# Telling models apart


def test_tasks():
    assert {task_of(make(0)) for make in tiny.LANGUAGE_MODELS.values()} == {"text-generation"}
    assert task_of(tiny.bert()) == "text-classification"
    assert task_of(tiny.vit()) == task_of(tiny.resnet()) == "image-classification"


@pytest.mark.parametrize("model_class", [BertForMaskedLM, BertForTokenClassification])
def test_models_without_a_fitting_head(model_class):
    model = model_class(BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(
        PRTValueError, match=rf"(?s)no head that predicts tokens or class labels.*{model_class.__name__}"
    ):
        task_of(model)


def test_regression_and_multi_label_heads():
    with pytest.raises(PRTValueError, match="num_labels = 1"):
        task_of(tiny.bert(names=["score"]))
    with pytest.raises(PRTValueError, match="problem_type = 'multi_label_classification'"):
        task_of(tiny.bert(problem_type="multi_label_classification"))


def test_arguments_that_exclude_each_other(tokenizer):
    base = tiny.llama(1)
    with pytest.raises(PRTValueError, match="(?s)load arguments with an id or path only.*revision"):
        RewardModel.from_base(base, tokenizer, revision="main")
    with pytest.raises(PRTValueError, match="pretrained or zero"):
        RewardModel.from_base(base, tokenizer, reward_init="random")
    adapted = get_peft_model(tiny.llama(1), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PRTValueError, match="PeftModel already"):
        RewardModel.from_base(adapted, tokenizer, LoraConfig())
    with pytest.raises(PRTValueError, match="carries an adapter"):
        RewardModel.from_base(adapted.get_base_model(), tokenizer, LoraConfig())
    with pytest.raises(PRTValueError, match="a PreTrainedModel, or a PeftModel"):
        task_of(torch.nn.Linear(2, 2))


def test_initialisations_that_change_the_base(tokenizer):
    with pytest.raises(PRTValueError, match="(?s)would change the base's weights.*'olora'"):
        RewardModel.from_base(tiny.llama(1), tokenizer, LoraConfig(init_lora_weights="olora"))


# To a folder and back


def test_round_trip(saved, base_folder):
    folder, expected = saved
    for reward in (
        RewardModel.from_pretrained(folder),
        RewardModel.from_pretrained(str(folder), base_model=tiny.llama(1)),
        RewardModel.from_pretrained(folder, base_model=str(base_folder)),
    ):
        assert torch.equal(logits(reward), expected)
        assert not reward.network.training
        assert reward.processing_class.get_vocab() == tiny.tokenizer().get_vocab()


@pytest.mark.parametrize("init", ["pretrained", "zero"])
@pytest.mark.parametrize("make", [*tiny.LANGUAGE_MODELS.values(), tiny.vit, tiny.resnet, tiny.bert])
def test_round_trip_of_every_kind(tmp_path, tokenizer, make, init):
    inputs = (
        {"pixel_values": torch.randn(2, 1, 8, 8)} if make in (tiny.vit, tiny.resnet) else {"input_ids": tiny.prompts()}
    )
    for peft_config in (LoraConfig(), None):
        reward = randomised(RewardModel.from_base(make(1), tokenizer, peft_config, reward_init=init))
        reward.network.eval()
        reward.save_pretrained(tmp_path / "reward")
        again = RewardModel.from_pretrained(tmp_path / "reward", base_model=make(1) if peft_config else None)
        torch.testing.assert_close(again(**inputs), reward(**inputs))
        assert again.config == reward.config


def test_plain_peft_loads_the_adapter(saved):
    folder, expected = saved
    plain = PeftModel.from_pretrained(tiny.llama(1), folder).eval()
    torch.testing.assert_close(plain(tiny.prompts()).logits, expected)
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "prt_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_full_rewards_are_plain_models(tmp_path, tokenizer):
    reward = RewardModel.from_base(tiny.llama(1), tokenizer)
    reward.save_pretrained(tmp_path / "full")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(plain(tiny.prompts()).logits, logits(reward))


def test_what_is_written_down(saved, base_folder):
    entries = json.loads((saved[0] / "prt_config.json").read_text())
    assert entries["format_version"] == "1.0" and entries["task"] == "text-generation"
    assert entries["contract"]["kind"] == "vocabulary" and entries["contract"]["size"] == 97
    assert entries["reward_base"] == {
        "id": str(base_folder),
        "revision": None,
        "architecture": "LlamaForCausalLM",
        "weights": weights_fingerprint(tiny.llama(1)),
    }
    assert json.loads((saved[0] / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base_folder)


def test_relative_paths_are_written_down_whole(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(base_folder.parent)
    RewardModel.from_base("base", peft_config=LoraConfig()).save_pretrained("reward")
    monkeypatch.chdir("/")
    assert RewardModel.from_pretrained(tmp_path / "reward").config.reward_base.id == str(base_folder)


def test_a_base_that_moved(saved, base_folder, tmp_path):
    folder, expected = saved
    moved = base_folder.rename(tmp_path / "moved")
    with pytest.raises(PRTValueError, match="(?s)no model at .*base.*pass `base_model=` where it is now"):
        RewardModel.from_pretrained(folder)
    assert torch.equal(logits(RewardModel.from_pretrained(folder, base_model=str(moved))), expected)


def test_another_base_of_the_same_shape(saved, tmp_path):
    other = tiny.llama(2)
    with pytest.raises(BaseModelMismatchError, match="(?s)not the one.*expected: .*base.*found: a LlamaForCausalLM"):
        RewardModel.from_pretrained(saved[0], base_model=other)
    assert not any("lora" in name for name, _ in other.named_modules()), "the refused base is left as it is"
    other.save_pretrained(tmp_path / "base")  # other weights under the same name
    with pytest.raises(BaseModelMismatchError):
        RewardModel.from_pretrained(saved[0])


def test_a_base_in_another_precision_is_the_same_base(saved):
    reward = RewardModel.from_pretrained(saved[0], base_model=tiny.llama(1).to(torch.bfloat16))
    assert (logits(reward).float() - saved[1]).abs().mean() < 0.1


def test_a_base_in_float16_is_known_by_its_id(saved, base_folder):
    """Rounded twice, its weights tell nothing."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float16)
    assert weights_fingerprint(base) is None
    reward = RewardModel.from_pretrained(saved[0], base_model=base)
    assert (logits(reward).float() - saved[1]).abs().mean() < 0.1
    with pytest.raises(BaseModelMismatchError):
        RewardModel.from_pretrained(saved[0], base_model=tiny.llama(1).half())


def test_a_base_that_carries_an_adapter(saved):
    with pytest.raises(PRTValueError, match="carries an adapter"):
        RewardModel.from_pretrained(
            saved[0], base_model=get_peft_model(tiny.llama(1), LoraConfig(target_modules=["q_proj"]))
        )


def test_a_base_made_in_memory_has_to_be_given(tmp_path, tokenizer):
    RewardModel.from_base(tiny.llama(1), tokenizer, LoraConfig()).save_pretrained(tmp_path)
    with pytest.raises(RewardFileError, match="`base_model=` of a reward"):
        RewardModel.from_pretrained(tmp_path)


def test_fingerprints_ignore_adapters_and_see_weights(tokenizer):
    base = tiny.llama(1)
    reward = randomised(RewardModel.from_base(base, tokenizer, LoraConfig(), reward_init="zero"))
    assert reference_to(reward.network).weights == reference_to(base).weights
    base.model.layers[0].mlp.up_proj.weight.data[0, 0] += 0.1
    assert weights_fingerprint(base) != weights_fingerprint(tiny.llama(1))


# Damage


def test_not_a_reward(base_folder, tmp_path):
    with pytest.raises(RewardFileError, match="(?s)holds no reward.*found: config.json"):
        RewardModel.from_pretrained(base_folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "prt_config.json"])
def test_missing_files(saved, name):
    (saved[0] / name).unlink()
    with pytest.raises(RewardFileError, match=name):
        RewardModel.from_pretrained(saved[0])


def test_pickled_weights_are_not_loaded(saved):
    weights = saved[0] / "adapter_model.safetensors"
    torch.save(load_file(weights), saved[0] / "adapter_model.bin")
    weights.unlink()
    with pytest.raises(RewardFileError, match="pickled weights can run code and are not loaded"):
        RewardModel.from_pretrained(saved[0])


@pytest.mark.parametrize("is_adapter", [True, False])
def test_truncated_weights(tmp_path, tokenizer, is_adapter):
    reward = RewardModel.from_base(tiny.llama(1), tokenizer, LoraConfig() if is_adapter else None)
    reward.save_pretrained(tmp_path)
    weights = tmp_path / ("adapter_model.safetensors" if is_adapter else "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(RewardFileError, match=rf"(?s){weights.name} is damaged.*found: \d+ bytes"):
        RewardModel.from_pretrained(tmp_path, base_model=tiny.llama(1))


@pytest.mark.parametrize("change", ["drop", "rename", "reshape"])
def test_weights_that_do_not_fit(saved, change):
    path = saved[0] / "adapter_model.safetensors"
    weights = load_file(path)
    name = min(weights)
    tensor = weights.pop(name)
    if change == "rename":
        weights[f"{name}.other"] = tensor
    elif change == "reshape":
        weights[name] = tensor[:-1].clone()
    save_file(weights, path)
    with pytest.raises(BaseModelMismatchError, match="do not fit its base"):
        RewardModel.from_pretrained(saved[0])


def test_another_tokenizer_beside_the_reward(saved):
    tiny.tokenizer(changed={"w5": "other"}).save_pretrained(saved[0])
    with pytest.raises(VocabularyMismatchError):
        RewardModel.from_pretrained(saved[0])


# Saving


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("moment", ["weights", "tokenizer"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_earlier_one_whole(saved, monkeypatch, moment, error):
    folder, expected = saved
    reward = randomised(RewardModel.from_pretrained(folder))
    before = contents(folder)

    def fail(*_, **__):
        raise error

    if moment == "weights":
        monkeypatch.setattr("peft.peft_model.safe_save_file", fail)
    else:
        monkeypatch.setattr(reward.processing_class, "save_pretrained", fail)
    with pytest.raises(type(error)):
        reward.save_pretrained(folder)
    monkeypatch.undo()
    assert contents(folder) == before
    assert torch.equal(logits(RewardModel.from_pretrained(folder)), expected)
    reward.save_pretrained(folder)
    assert torch.equal(logits(RewardModel.from_pretrained(folder)), logits(reward))


def test_a_save_that_is_killed_leaves_the_earlier_one_or_the_new_one_whole(saved, tmp_path):
    """Loading it changes nothing; the next save puts it in order, with the notes that a user has in the folder."""
    earlier, expected = saved
    (earlier / "notes").mkdir()
    (earlier / "notes" / "mine.txt").write_text("mine")
    reward = randomised(RewardModel.from_pretrained(earlier))
    new, is_new, steps = logits(reward), [], 0
    while True:
        folder = shutil.copytree(earlier, tmp_path / f"killed-{steps}")
        is_whole = not tiny.killed_after(steps, lambda folder=folder: reward.save_pretrained(folder))
        before = contents(folder)
        loaded = RewardModel.from_pretrained(folder)
        found = logits(loaded)
        is_new.append(torch.equal(found, new))
        assert is_new[-1] or torch.equal(found, expected)
        assert contents(folder) == before
        loaded.save_pretrained(folder)
        assert torch.equal(logits(RewardModel.from_pretrained(folder)), found)
        assert {path.name for path in folder.iterdir() if path.is_dir()} == {"notes"}
        assert (folder / "notes" / "mine.txt").read_text() == "mine"
        if is_whole:
            break
        steps += 1
    assert is_new == sorted(is_new) and not is_new[0] and is_new[-1] and steps > 20


def test_a_half_placed_reward_of_another_kind_is_read_and_replaced_whole(saved, tokenizer, monkeypatch):
    """Killed between the files of a full reward in the place of an adapter."""
    folder, _ = saved
    full = RewardModel.from_base(tiny.llama(3), tokenizer)

    def full_disk(source, target):
        raise OSError("no space left")

    monkeypatch.setattr("prt_hf.hub.folder.link_or_copy", full_disk)
    with pytest.raises(OSError, match="no space left"):
        full.save_pretrained(folder)
    monkeypatch.undo()
    assert not (folder / "adapter_config.json").exists() and not (folder / "model.safetensors").exists()
    assert torch.equal(logits(RewardModel.from_pretrained(folder)), logits(full))
    full.save_pretrained(folder)
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".", "adapter"))]
    assert torch.equal(logits(RewardModel.from_pretrained(folder)), logits(full))


def test_adapters_and_recipes_are_not_overwritten(saved, tmp_path):
    reward = RewardModel.from_pretrained(saved[0])
    lora = get_peft_model(tiny.llama(1), LoraConfig(r=4, task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    PRTForCausalLM.from_parts(tiny.llama(1), [reward]).save_pretrained(tmp_path / "recipe")
    for name, found in (("lora", "an adapter that is no reward"), ("recipe", "a recipe")):
        before = contents(tmp_path / name)
        with pytest.raises(RewardFileError, match=f"holds {found}; saving a reward there would spoil it"):
            reward.save_pretrained(tmp_path / name)
        assert contents(tmp_path / name) == before


def test_savers_at_the_same_time_do_not_lose_the_reward(saved):
    folder, _ = saved
    rewards = [randomised(RewardModel.from_pretrained(folder), seed) for seed in (1, 2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda reward: [reward.save_pretrained(folder) for _ in range(8)], rewards))
    final = logits(RewardModel.from_pretrained(folder))
    assert any(torch.equal(final, logits(reward)) for reward in rewards)


def test_cards_and_other_files_are_kept(saved):
    (saved[0] / "README.md").write_text("my words")  # over the card that it was saved with
    (saved[0] / "checkpoint-1").mkdir()
    RewardModel.from_pretrained(saved[0]).save_pretrained(saved[0])
    metadata, words = (saved[0] / "README.md").read_text().removeprefix("---\n").split("\n---\n")
    assert words == "my words" and yaml.safe_load(metadata)["library_name"] == "prt_hf"
    assert (saved[0] / "checkpoint-1").is_dir()


def test_a_full_reward_replaces_an_adapter_whole(saved, tokenizer):
    RewardModel.from_base(tiny.llama(3), tokenizer).save_pretrained(saved[0])
    assert not list(saved[0].glob("adapter_*"))
    assert torch.equal(logits(RewardModel.from_pretrained(saved[0])), tiny.llama(3)(tiny.prompts()).logits)


def test_models_that_are_no_rewards_are_not_overwritten(base_folder, tokenizer):
    before = contents(base_folder)
    with pytest.raises(RewardFileError, match="saving a reward there would spoil it"):
        RewardModel.from_base(tiny.llama(3), tokenizer).save_pretrained(base_folder)
    assert contents(base_folder) == before


def test_saving_to_a_file(saved):
    with pytest.raises(RewardFileError, match="is a file"):
        RewardModel.from_pretrained(saved[0]).save_pretrained(saved[0] / "prt_config.json")


def test_a_loaded_reward_generates(saved, tokenizer):
    backbone, prompts = tiny.llama(4), tiny.prompts()
    processor = PRTLogitsProcessor(RewardModel.from_pretrained(saved[0]), tokenizer)
    scores = backbone(prompts).logits[:, -1].detach()
    expected = (scores.double().log_softmax(-1) + saved[1][:, -1].double()).log_softmax(-1)
    torch.testing.assert_close(processor(prompts, scores).double(), expected, atol=1e-4, rtol=1e-4)


# Architectures with a peculiarity


def test_heads_whose_names_end_alike(tmp_path):
    """DistilBERT's `pre_classifier` ends as its head, `classifier`, does."""
    config = DistilBertConfig(vocab_size=97, dim=16, hidden_dim=32, n_layers=1, n_heads=2, **tiny.labels())
    base = DistilBertForSequenceClassification(config).eval()
    for init in ("pretrained", "zero"):
        reward = randomised(RewardModel.from_base(base, None, LoraConfig(), reward_init=init))
        reward.network.eval()
        reward.save_pretrained(tmp_path / init)
        again = RewardModel.from_pretrained(tmp_path / init, base_model=base)
        torch.testing.assert_close(logits(again), logits(reward))


def test_rewards_of_two_heads_do_not_start_at_zero():
    model = DeiTForImageClassificationWithTeacher(
        DeiTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    for peft_config in (LoraConfig(), None):
        with pytest.raises(PRTValueError, match="two heads"):
            RewardModel.from_base(model, None, peft_config, reward_init="zero")


def test_context_that_starts_behind_the_padding_index():
    """RoBERTa's first position is pad_token_id + 1."""
    config = RobertaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=1)
    config.max_position_embeddings, config.num_labels = 10, 3
    reward = RewardModel.from_base(RobertaForSequenceClassification(config).eval())
    assert reward(input_ids=tiny.prompts(1, 8)).shape == (1, 3)
    with pytest.raises(ContextLengthError, match="at most 8 tokens"):
        reward(input_ids=tiny.prompts(1, 9))


def test_batch_statistics_are_part_of_the_base(tmp_path):
    base = tiny.resnet(1)
    RewardModel.from_base(base, None, LoraConfig()).save_pretrained(tmp_path)
    base.resnet.embedder.embedder.normalization.running_mean += 1
    with pytest.raises(BaseModelMismatchError):
        RewardModel.from_pretrained(tmp_path, base_model=base)


def test_float16_bases_without_a_name_are_not_the_same_base(tmp_path, tokenizer):
    RewardModel.from_base(tiny.llama(1).half(), tokenizer, LoraConfig()).save_pretrained(tmp_path)
    with pytest.raises(BaseModelMismatchError):
        RewardModel.from_pretrained(tmp_path, base_model=tiny.llama(2).half())


def test_other_adapters_than_lora(tmp_path, tokenizer):
    reward = RewardModel.from_base(tiny.llama(1), tokenizer, IA3Config(task_type="CAUSAL_LM"))
    assert reference_to(reward.network).weights == weights_fingerprint(tiny.llama(1))
    randomised(reward).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(RewardModel.from_pretrained(tmp_path, base_model=tiny.llama(1))), logits(reward))
    with pytest.raises(UnsupportedError, match="tokens of its own before the text"):
        RewardModel.from_base(tiny.llama(1), tokenizer, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def test_peft_models_that_could_not_be_loaded_again(tokenizer):
    named = get_peft_model(tiny.llama(1), LoraConfig(target_modules=["q_proj"]), adapter_name="tuned")
    with pytest.raises(PRTValueError, match="(?s)one adapter, named 'default'.*'tuned'"):
        RewardModel.from_base(named, tokenizer)


def test_nothing_there(tmp_path):
    with pytest.raises(RewardFileError, match="(?s)There is nothing at .*nowhere"):
        RewardModel.from_pretrained(tmp_path / "nowhere")


# First mistakes


def test_a_reward_is_described_in_a_line(saved, tokenizer):
    reward = RewardModel.from_pretrained(saved[0])
    base = reward.config.reward_base.id
    assert repr(reward) == f"RewardModel(text-generation, reward adapter, base {base}, strength 1, 97 tokens)"
    reward = RewardModel.from_base(tiny.vit())
    reward.trained_with(reward.config.reward_base, kl_coef=4.0, entropy_coef=0.0)
    found = "RewardModel(image-classification, full reward, base ViTForImageClassification, strength 0.25, 4 labels)"
    assert repr(reward) == found and reward.strength == 0.25
    with pytest.raises(AttributeError):
        reward.strength = 1.0  # which nothing would read


def test_backbones_that_a_processor_cannot_be_for(saved, base_folder, tokenizer):
    reward = RewardModel.from_pretrained(saved[0])
    model = PRTForCausalLM.from_parts(str(base_folder), saved[0])
    with pytest.raises(PRTValueError, match="(?s)is a PRT model, which adds its rewards by itself.*model.backbone"):
        reward.processor(model)
    reward.to("meta")
    with pytest.raises(PRTValueError, match="(?s)The reward has no weights.*found: meta"):
        reward.processor(model.backbone)


@pytest.mark.parametrize("is_adapter", [True, False])
def test_a_reward_in_the_place_of_a_model_is_named(base_folder, tmp_path, is_adapter):
    """Transformers and PEFT would load it: the files say what it is."""
    reward = RewardModel.from_base(str(base_folder), peft_config=LoraConfig() if is_adapter else None)
    reward.save_pretrained(tmp_path / "reward")
    place = str(tmp_path / "reward")
    assert json.loads((tmp_path / "reward" / "prt_config.json").read_text())["about"].startswith(
        "a reward of prt_hf, not"
    )
    for door in (
        lambda: PRTForCausalLM.from_parts(place, [place]),
        lambda: RewardModel.from_base(place),
        lambda: RewardModel.from_pretrained(place, base_model=place) if is_adapter else load_pretrained(place),
        lambda: check_fit(place, place),
    ):
        with pytest.raises(PRTValueError, match="reward is a reward, which is no model by itself"):
            door()
    card = (tmp_path / "reward" / "README.md").read_text().split("# reward\n")[1]
    words = re.sub("<!--.*?-->", "", card).split()
    assert " ".join(words).startswith("**This is a reward, not a model: load it with `RewardModel` of prt_hf.**")
    assert ("pipelines and PEFT open" in " ".join(words)) is is_adapter
