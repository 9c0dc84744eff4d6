"""`prt-hf check` tells what a backbone and a reward are to each other, from configurations or from data."""

import json

import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, ViTImageProcessorPil

from prt_hf import RewardModel
from prt_hf.cli import main
from prt_hf.evaluation import measure_portability
from prt_hf.networks.auto import load_processing_class

TEXTS = [" ".join(f"w{3 + (7 * row + column) % 90}" for column in range(9)) for row in range(5)]


def save(folder, model, processing_class=None):
    model.save_pretrained(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    return model


def make_reward(base, folder, **kwargs):
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    reward = RewardModel.from_base(str(base), peft_config=config, **kwargs)
    reward.save_pretrained(folder)
    return reward


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`source` and a padded `target` with another end token, neither of which has weights, and `reward`."""
    save(tmp_path / "source", tiny.llama(1), tiny.tokenizer())
    make_reward(tmp_path / "source", tmp_path / "reward")
    save(tmp_path / "target", tiny.gpt2(2, vocab_size=104, n_positions=64, n_embd=64), tiny.tokenizer(pad_token="w3"))
    for name in ("source", "target"):
        (tmp_path / name / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def weights(folder):
    for name in ("source", "target"):
        (folder / f"{name}.safetensors").rename(folder / name / "model.safetensors")


def check(capsys, *arguments):
    status = main(["check", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_fit_is_told_without_weights(folder, capsys):
    source, target = tiny.llama(1), tiny.gpt2(2, vocab_size=104, n_positions=64, n_embd=64)
    adapter = RewardModel.from_base(source, tiny.tokenizer(), LoraConfig(target_modules="all-linear")).network
    added = sum(value.numel() for name, value in adapter.named_parameters() if "lora_" in name)
    c = (source.num_parameters() + added) / target.num_parameters()
    status, out, _ = check(capsys, "reward", "target", "--dtype", "bfloat16")
    assert status == 0
    sizes = {name: f"{model.num_parameters() / 1e6:.3g} M" for name, model in (("base", source), ("target", target))}
    held = 2 * (source.num_parameters() + target.num_parameters()) + 4 * added  # as PEFT keeps adapters
    reward = RewardModel.from_pretrained(folder / "reward", base_model=source, dtype=torch.bfloat16).to("cpu")
    assert next(value.dtype for name, value in reward.network.named_parameters() if "lora_" in name) == torch.float32
    assert out.splitlines() == [
        "reward     reward: text-generation, reward adapter, kl_coef 1, strength 1",
        f"base       {folder / 'source'}, LlamaForCausalLM",
        "source     the base",
        f"backbone   {folder / 'target'}, GPT2LMHeadModel",
        "vocabulary 97 tokens, the same; 7 rows pad the backbone's head; pad_token '<pad>' -> 'w3'",
        "context    reward 256, backbone 64 tokens",
        f"parameters backbone {sizes['target']}, reward's base {sizes['base']}, adapter {added / 1e6:.3g} M",
        f"weights    {held / 1e6:.3g} MB in memory, bfloat16",
        f"decoding   c = {c:.3g}, reward / backbone by parameters; at best 1 / (1 + c) = {1 / (1 + c):.0%} of the bare "
        "backbone's speed if not speculative",
        "fits: yes",
    ]
    found = json.loads(check(capsys, "reward", "target", "--json")[1])
    assert (found["fits"], found["reasons"]) == (True, [])
    assert found["backbone_parameters"] == target.num_parameters()
    assert (found["base_parameters"], found["adapter_parameters"]) == (source.num_parameters(), added)
    assert (found["weight_bytes"], found["cost_ratio"]) == (2 * (held - 2 * added), pytest.approx(c))


def test_the_base_itself_is_held_once(folder, capsys):
    found = json.loads(check(capsys, "reward", "source", "--json")[1])
    assert found["is_base_shared"] is True
    assert found["weight_bytes"] == 4 * (found["base_parameters"] + found["adapter_parameters"])
    assert "one pass for both, on the same weights" in check(capsys, "reward", "source")[1]


def test_a_full_reward_is_all_base(folder, weights, capsys):
    reward = RewardModel.from_base(str(folder / "source"))
    reward.save_pretrained(folder / "full")
    found = json.loads(check(capsys, "full", "source", "--json")[1])
    parameters = tiny.llama(1).num_parameters()
    assert (found["base_parameters"], found["adapter_parameters"]) == (parameters, 0)
    assert (found["is_base_shared"], found["weight_bytes"]) == (False, 8 * parameters)
    assert "text-generation, full reward, " in check(capsys, "full", "source")[1]


def test_another_vocabulary_does_not_fit(folder, capsys):
    save(folder / "other", tiny.llama(2), tiny.tokenizer(changed={"w5": "v5"}))
    status, out, _ = check(capsys, "reward", "other")
    assert status == 1
    assert out.splitlines()[-5:] == [
        "fits: no",
        "The vocabulary of the backbone is not the reward's.",
        "  expected: the 97 tokens that the reward was tuned with, or an update of that vocabulary",
        "  found: 97 tokens, 98.94 % of the ordinary ones shared; 2 differ, as token (id in the reward -> id in the "
        "backbone): 'w5' (5 -> absent), 'v5' (absent -> 5)",
        "  remedy: `across_vocabularies=True` in a language model, a backbone of the same family, or a reward that is "
        "tuned for this one",
    ]
    status, out, _ = check(capsys, "reward", "other", "--json", "--data", "never read")
    found = json.loads(out)
    assert (status, found["fits"]) == (1, False)
    assert found["reasons"][0].startswith("The vocabulary of the backbone is not the reward's.")


def test_labels_are_matched_or_do_not_fit(folder, capsys):
    save(folder / "vit", tiny.vit(1))
    make_reward(folder / "vit", folder / "images")
    save(folder / "permuted", tiny.resnet(2, names=tiny.COLOURS[::-1]))
    status, out, _ = check(capsys, "images", "permuted")
    assert status == 0
    assert "labels     4, in another order, matched by name" in out.splitlines()
    assert "context" not in out and "decoding" not in out
    save(folder / "other", tiny.resnet(2, names=["red", "green", "blue", "black"]))
    status, out, _ = check(capsys, "images", "other")
    assert status == 1 and "found: 4 labels; absent: ['grey'], unknown: ['black']" in out
    save(folder / "texts", tiny.bert(2), tiny.tokenizer())
    status, out, _ = check(capsys, "images", "texts")
    assert status == 1
    assert "expected: image-classification\n  found: text-classification" in out
    assert check(capsys, "reward", "texts")[0] == 1


MISTAKES = {
    "no such backbone": ("reward", "no/such"),
    "no such reward": ("no/such", "target"),
    "no reward there": ("target", "target"),
    "damaged": ("damaged", "target"),
    "an unknown architecture": ("reward", "alien"),
    "a base in memory": ("memory", "target"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_read_is_told_in_a_message(mistake, folder, weights, capsys):
    make_reward(folder / "source", folder / "damaged")
    (folder / "damaged" / "adapter_model.safetensors").write_bytes(b"cut off")
    RewardModel.from_base(tiny.llama(1), tiny.tokenizer(), LoraConfig()).save_pretrained(folder / "memory")
    (folder / "alien").mkdir()
    (folder / "alien" / "config.json").write_text('{"model_type": "alien", "architectures": ["AlienForCausalLM"]}')
    capsys.readouterr()
    status, out, err = check(capsys, *MISTAKES[mistake])
    assert (status, out) == (1, "")
    assert err.count("prt-hf check: ") == 1 and "Traceback" not in err
    status, out, _ = check(capsys, *MISTAKES[mistake], "--json")
    found = json.loads(out)
    assert (status, list(found)) == (1, ["error"])
    assert f"prt-hf check: {found['error']}\n" in err


@pytest.fixture
def data(folder):
    rows = [{"text": text} for text in TEXTS]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "texts.txt").write_text("\n".join(TEXTS))
    completions = [{"prompt": text[:12], "completion": text[12:]} for text in TEXTS]
    (folder / "completions.jsonl").write_text("\n".join(map(json.dumps, completions)))
    return folder


def test_data_is_measured(data, weights, capsys):
    reward = RewardModel.from_pretrained("reward")
    target = AutoModelForCausalLM.from_pretrained("target").eval()
    ids = torch.tensor(tiny.tokenizer()([text + "<eos>" for text in TEXTS])["input_ids"])
    expected = measure_portability(reward, target, [{"input_ids": ids}])
    for file in ("texts.jsonl", "texts.txt"):
        status, out, _ = check(capsys, "reward", "target", "--data", file, "--batch_size", 2, "--json")
        found = json.loads(out)
        assert (status, found["fits"], found["portability"]["positions"]) == (0, True, 45)
        assert found["portability"].pop("task") == "text-generation"
        assert found["portability"].pop("proposal")["rows"] == 2, "of the shuffled rows"
        for name, value in found["portability"].items():
            assert value == pytest.approx(getattr(expected, name), rel=1e-4), name
        assert (found["worth_porting"], found["verdict"]) == expected.verdict()
    out = check(capsys, "reward", "target", "--data", "texts.jsonl")[1]
    assert f"eps = {expected.eps:.4g} " in out and f"C   = {expected.c_mean:.4g} " in out
    assert "on 5 rows, 45 tokens, strength 1" in out
    lines = [line.split() for line in out.splitlines()]
    nll, accuracy = (
        [f"{value:.3f}" for value in expected.nll.values()],
        [f"{100 * x:.1f}" for x in expected.accuracy.values()],
    )
    for values in (nll, accuracy):
        assert ["by", "itself", *values[:2]] in lines
        assert ["with", "the", "reward", *values[2:4]] in lines
        assert ["reward", "by", "itself", values[4], values[4]] in lines
    assert f"worth porting: { {True: 'yes', False: 'no', None: 'cannot tell'}[expected.verdict()[0]] }" in out
    found = json.loads(check(capsys, "reward", "target", "--data", "completions.jsonl", "--samples", 3, "--json")[1])
    assert (found["portability"]["rows"], found["portability"]["positions"]) == (3, 21)


def test_columns_and_splits_have_any_name(data, weights, capsys):
    """A folder of files, of which one is no data of the task."""
    rows = [{"text": 3, "story": text} for text in TEXTS]
    (data / "stories").mkdir()
    (data / "stories" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (data / "stories" / "test.jsonl").write_text(json.dumps({"text": 4, "story": "w3"}))
    named = ("--data", "stories", "--split", "train", "--text-column", "story", "--json")
    found, expected = (
        json.loads(check(capsys, "reward", "target", *arguments)[1])["portability"]
        for arguments in (named, ("--data", "texts.jsonl", "--json"))
    )
    assert found["nll"] == pytest.approx(expected["nll"], rel=1e-6)
    assert "has no split 'dev'" in check(capsys, "reward", "target", "--data", "stories", "--split", "dev")[2]
    assert "has no column 'tale'" in check(capsys, "reward", "target", "--data", "stories", "--text_column", "tale")[2]


def test_images_are_measured_with_labels_by_name(folder, capsys):
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    save(folder / "vit", tiny.vit(1, num_channels=3), processor)
    if load_processing_class("vit", "image-classification") is None:
        pytest.skip("this transformers reads image processors with torchvision only")
    make_reward(folder / "vit", folder / "images")
    save(folder / "permuted", tiny.vit(2, names=tiny.COLOURS[::-1], num_channels=3), processor)
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=tiny.COLOURS[::-1])})
    rows = Dataset.from_dict({"image": list(pixels), "label": [0, 1, 2, 3, 0, 1]}, features=features)
    rows.to_parquet("images.parquet")
    found = json.loads(check(capsys, "images", "permuted", "--data", "images.parquet", "--json")[1])
    target = AutoModelForImageClassification.from_pretrained("permuted")
    inputs = processor(list(pixels), return_tensors="pt")
    assert found["portability"]["accuracy"]["target"] == pytest.approx(
        (target(**inputs).logits.argmax(-1) == torch.tensor([0, 1, 2, 3, 0, 1])).double().mean().item()
    )
    for index, picture in enumerate(pixels):
        PILImage.fromarray(picture).save(f"{index}.png")
    paths = [{"picture": f"{folder}/{index}.png", "colour": tiny.COLOURS[::-1][index % 4]} for index in range(6)]
    Dataset.from_list(paths).to_csv("paths.csv")
    columns = ("--data", "paths.csv", "--image_column", "picture", "--label_column", "colour", "--json")
    assert json.loads(check(capsys, "images", "permuted", *columns)[1])["portability"] == found["portability"]
    rows.remove_columns("label").to_parquet("unlabelled.parquet")
    out = check(capsys, "images", "permuted", "--data", "unlabelled.parquet")[1]
    assert f"eps = {found['portability']['eps']:.4g} " in out
    assert out.endswith("worth porting: cannot tell\n  the data has no labels, so better and worse are unknown\n")
    rows.cast_column("label", Value("int64")).to_parquet("numbers.parquet")
    numbers = json.loads(check(capsys, "images", "permuted", "--data", "numbers.parquet", "--json")[1])
    assert numbers["portability"]["accuracy"]["target"] == pytest.approx(
        (target(**inputs).logits.flip(-1).argmax(-1) == torch.tensor([0, 1, 2, 3, 0, 1])).double().mean().item()
    ), "numbers are the reward's"


def test_data_that_cannot_be_used_is_told_in_a_message(data, weights, capsys):
    (data / "questions.jsonl").write_text('{"question": "w5"}')
    for file, message in {
        "questions.jsonl": "The data has no text.\n  expected: columns: input_ids, or messages, or conversations, or ",
        "nothing.jsonl": "The dataset nothing.jsonl cannot be loaded.",
    }.items():
        status, _, err = check(capsys, "reward", "target", "--data", file)
        assert status == 1 and message in err and "Traceback" not in err


def test_one_row_tells_nothing_and_rows_without_tokens_are_counted(data, weights, capsys):
    (data / "one.jsonl").write_text("\n".join(map(json.dumps, [{"input_ids": [3, 4, 5]}, {"input_ids": [6]}])))
    out = check(capsys, "reward", "target", "--data", "one.jsonl")[1]
    assert "on 1 rows, 2 tokens, strength 1; 1 more had nothing left to predict" in out
    assert out.endswith("worth porting: cannot tell\n  one row gives no estimate of the noise\n")
    found = json.loads(check(capsys, "reward", "target", "--data", "one.jsonl", "--json")[1])
    assert (found["worth_porting"], found["rows_without_predictions"]) == (None, 1)
    assert set(found["portability"]["standard_error"].values()) == {None}


def test_an_ordinary_adapter_fits_where_the_reward_that_it_becomes_fits(folder, capsys):
    """Without weights, and as `RewardModel.from_adapter` carries it over; refused for measurements, with a remedy."""
    save(folder / "base", tiny.llama(1), tiny.tokenizer())
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).save_pretrained("lora")
    carried = RewardModel.from_adapter("lora")
    status, out, _ = check(capsys, "lora", "target", "--json")
    found = json.loads(out)
    assert (status, found["fits"]) == (0, True)
    assert found["reward"]["contract"]["fingerprint"] == carried.contract.fingerprint
    assert found["reward"]["terms"] == ["network", "-base"]
    parameters = sum(value.numel() for name, value in carried.network.named_parameters() if "lora_" in name)
    assert found["adapter_parameters"] == parameters
    assert "lora: text-generation, adapter that is carried over" in check(capsys, "lora", "target")[1]
    status, _, err = check(capsys, "lora", "nowhere")
    assert status == 1 and "There is no folder nowhere here" in err
    assert "There is no folder rewrd here" in check(capsys, "rewrd", "target")[2]
    assert "reward is a reward, which is no model by itself" in check(capsys, "reward", "reward")[2]
