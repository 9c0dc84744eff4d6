"""`prt-hf train`: what it tunes is what the Python API tunes, and bad input gets a message."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file
from test_readme import GUIDES
from test_sft import TEMPLATE
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTImageProcessor,
    set_seed,
)

from prt_hf import PixelCollator, PRTConfig, PRTForImageClassification, PRTTrainer, RewardModel, zero_shot_classifier
from prt_hf.cli import main
from prt_hf.cli.train_options import Options
from prt_hf.reward.adapter import default_peft_config
from prt_hf.training.sft import PRTSFTConfig, PRTSFTTrainer

COMMON = tiny.TUNING | {"max_steps": 3, "learning_rate": 1e-2}
SHUFFLED = ["blue", "grey", "red", "green"]  # another order than the models'


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models in folders, and data of every form in files."""
    home = tmp_path_factory.mktemp("train")
    tokenizer = tiny.tokenizer()
    for name, model in (("lm", tiny.llama()), ("other-lm", tiny.llama(1, hidden_size=64)), ("bert", tiny.bert())):
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    shutil.copytree(home / "lm", home / "chat-lm")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(home / "chat-lm")
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    for name, names in (("vit", tiny.COLOURS), ("unnamed-vit", [f"LABEL_{index}" for index in range(4)])):
        tiny.vit(names=names).save_pretrained(home / name)
        processor.save_pretrained(home / name)

    texts = [" ".join(f"w{3 + (row * step) % 90}" for step in range(1, 12)) for row in range(1, 17)]
    write(home / "text.jsonl", [{"text": text} for text in texts])
    for split, rows in (("train", texts[:12]), ("test", texts[12:])):
        write(home / "split" / f"{split}.jsonl", [{"body": text} for text in rows])
    write(home / "pairs.jsonl", [{"prompt": text[:12], "completion": text[12:]} for text in texts])
    turns = [[{"role": "user", "content": text[:12]}, {"role": "assistant", "content": text[12:]}] for text in texts]
    write(home / "messages.jsonl", [{"messages": turn} for turn in turns])
    write(home / "prompts.jsonl", [{"prompt": text} for text in texts])
    write(home / "numbers.jsonl", [{"text": row} for row in range(4)])
    (home / "empty.jsonl").write_text("")

    labels = [tiny.COLOURS[(3 * row) % 4] for row in range(16)]
    Dataset.from_dict({"sentence": texts, "label": labels}).to_csv(home / "sentences.csv")
    Dataset.from_dict({"text": texts, "label": ["mauve"] * 16}).to_csv(home / "mauve.csv")
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (12, 12), dtype=np.uint8)) for _ in labels]
    for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        folder = home / "folders" / "train" / label
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{index:02}.png")
    for name, classes in (("pictures", SHUFFLED), ("numbered", list("0123")), ("three", list("012"))):
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=classes)})
        places = [SHUFFLED.index(label) % len(classes) for label in labels]
        Dataset.from_dict({"image": pictures, "label": places}, features).to_parquet(home / f"{name}.parquet")
    return home


def write(file, rows):
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)))


def flags(**options):
    """As they are written on the command line."""
    return [
        word
        for name, value in options.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


def train(model, dataset, output_dir, *more, **options):
    places = {"model_name_or_path": model, "dataset_name": dataset, "output_dir": output_dir}
    return main(["train", *flags(**places, **COMMON | options), *more])


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_same_weights(folder, other):
    ours, theirs = weights(folder), other if isinstance(other, dict) else weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def by_api(trainer_class, config_class, model, rows, processing_class, folder, changes=None, **config):
    set_seed(42)
    if config_class is PRTSFTConfig:
        config["bf16"] = False
    args = config_class(str(folder), **COMMON | config)
    peft_config = default_peft_config(model)
    given = {"train_dataset": rows, "processing_class": processing_class, "peft_config": peft_config}
    trainer = trainer_class(model, args, **given | (changes or {}))
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.mark.parametrize(
    ("model", "data"), [("lm", "text.jsonl"), ("lm", "pairs.jsonl"), ("chat-lm", "messages.jsonl")]
)
def test_language_rewards_are_those_of_the_python_api(home, tmp_path, model, data):
    assert train(home / model, home / data, tmp_path / "cli") == 0
    network = AutoModelForCausalLM.from_pretrained(home / model)
    tokenizer = AutoTokenizer.from_pretrained(home / model)
    rows = Dataset.from_json(str(home / data))
    by_api(PRTSFTTrainer, PRTSFTConfig, network, rows, tokenizer, tmp_path / "api", max_length=tiny.CONTEXT)
    assert_same_weights(tmp_path / "cli", tmp_path / "api")
    assert json.loads((tmp_path / "cli" / "prt_config.json").read_text())["reward_base"]["id"] == str(home / model)


def test_text_classifiers_are_those_of_the_python_api(home, tmp_path):
    assert train(home / "bert", home / "sentences.csv", tmp_path / "cli", text_column="sentence") == 0
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    rows = Dataset.from_csv(str(home / "sentences.csv")).map(
        lambda row: tokenizer(row["sentence"]) | {"labels": tiny.COLOURS.index(row["label"])},
        remove_columns=["sentence", "label"],
    )
    network = AutoModelForSequenceClassification.from_pretrained(home / "bert")
    by_api(PRTTrainer, PRTConfig, network, rows, tokenizer, tmp_path / "api")
    assert_same_weights(tmp_path / "cli", tmp_path / "api")


@pytest.fixture(scope="module")
def image_reward(home):
    assert train(home / "vit", home / "pictures.parquet", home / "image-reward") == 0
    return home / "image-reward"


def test_image_classifiers_are_those_of_the_python_api_with_labels_matched_by_name(home, tmp_path, image_reward):
    processor = AutoImageProcessor.from_pretrained(home / "vit")
    rows = Dataset.from_parquet(str(home / "pictures.parquet")).map(
        lambda row: {
            "pixel_values": processor(row["image"], return_tensors="np")["pixel_values"][0],
            "labels": tiny.COLOURS.index(SHUFFLED[row["label"]]),
        },
        remove_columns=["image", "label"],
    )
    network = AutoModelForImageClassification.from_pretrained(home / "vit")
    by_api(PRTTrainer, PRTConfig, network, rows.with_format("torch"), processor, tmp_path / "api")
    assert_same_weights(image_reward, tmp_path / "api")


def test_states_of_an_image_backbone_can_be_stored(home, tmp_path, image_reward):
    stored = flags(precompute_backbone="true", backbone_cache_dir=tmp_path / "states")
    assert train(home / "vit", home / "pictures.parquet", tmp_path / "out", *stored) == 0
    found = weights(tmp_path / "out")
    for name, value in weights(image_reward).items():
        torch.testing.assert_close(found[name], value)


def test_backbones_get_their_own_pixels(home, tmp_path):
    reward, theirs = tmp_path / "reward", tmp_path / "large"
    tiny.vit(2, names=SHUFFLED, num_channels=3, image_size=12).save_pretrained(theirs)
    large = ViTImageProcessor(size={"height": 12, "width": 12}, image_mean=[0.4, 0.5, 0.6])
    large.save_pretrained(theirs)
    places = {"backbone": [home / "vit", theirs], "max_steps": 6}  # the fourth draws the second
    assert train(home / "vit", home / "pictures.parquet", reward, **places) == 0
    rows = Dataset.from_parquet(str(home / "pictures.parquet"))
    rows = rows.map(lambda row: {"labels": tiny.COLOURS.index(SHUFFLED[row["label"]])}, remove_columns=["label"])
    ours = AutoImageProcessor.from_pretrained(home / "vit")
    changes = {"backbone": [None, str(theirs)], "data_collator": PixelCollator(ours, [None, large])}
    network = AutoModelForImageClassification.from_pretrained(home / "vit")
    by_api(PRTTrainer, PRTConfig, network, rows, ours, tmp_path / "api", changes, max_steps=6)
    assert_same_weights(reward, tmp_path / "api")
    # Tuned on, it meets the backbones that it was tuned on; states of each are stored of its own pixels.
    stored = flags(precompute_backbone="true", backbone_cache_dir=tmp_path / "states")
    for folder, more in (("again", []), ("stored", stored)):
        assert train(reward, home / "pictures.parquet", tmp_path / folder, *more, max_steps=6) == 0
    for name, value in weights(tmp_path / "again").items():
        torch.testing.assert_close(weights(tmp_path / "stored")[name], value)


def test_zero_shot_classifiers_in_folders(home, tmp_path, capsys):
    words = dict(zip(["w3", "w4", "w5", "w6"], tiny.COLOURS, strict=True))
    tokenizer = tiny.tokenizer(changed=words, padding_side="right")
    for make, names, mean in ((tiny.clip, tiny.COLOURS, 0.5), (tiny.siglip, SHUFFLED, 0.4)):
        folder = tmp_path / make.__name__
        zero_shot_classifier(make(), names, ["w40 {} w90 <eos>"], tokenizer).save_pretrained(folder)
        ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[mean], image_std=[0.5]).save_pretrained(folder)
    data = home / "pictures.parquet"
    for name, more in (("LoRA", []), ("full", ["--full"])):
        reward = tmp_path / name
        assert train(tmp_path / "clip", data, reward, *more, *flags(backbone=[tmp_path / "siglip"])) == 0
        capsys.readouterr()
        assert main(["check", str(reward), str(tmp_path / "siglip"), "--data", str(data), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["portability"]["nll"]["prt_target"]
        backbone = AutoModelForImageClassification.from_pretrained(tmp_path / "siglip")
        model = PRTForImageClassification.from_parts(backbone, [reward])
        rows = Dataset.from_parquet(str(data))
        with torch.no_grad():
            log_probs = model(**model.processing_class(rows["image"][:], return_tensors="pt")).logits
        assert found == pytest.approx(torch.nn.functional.nll_loss(log_probs, torch.tensor(rows["label"][:])).item())
        assert model.processing_class.others.keys() == {"reward_0"}


def test_folders_of_images_are_classes(home, tmp_path, capsys):
    assert train(home / "vit", home / "folders", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 3


def test_placeholder_labels_are_matched_by_order_and_that_is_said(home, tmp_path, caplog, image_reward):
    assert train(home / "unnamed-vit", home / "pictures.parquet", tmp_path / "names") == 0
    assert "Classes and labels are matched by their order: blue = LABEL_0, grey = LABEL_1, red = " in caplog.text
    assert train(home / "vit", home / "numbered.parquet", tmp_path / "numbers") == 0
    assert "matched by their order: 0 = red, 1 = green, 2 = blue, 3 = grey." in caplog.text
    assert_same_weights(tmp_path / "numbers", weights(tmp_path / "names"))  # the same order
    assert any(
        not torch.equal(value, weights(image_reward)[name]) for name, value in weights(tmp_path / "names").items()
    )


def test_a_yaml_file_is_the_same_as_flags_and_flags_go_before_it(home, tmp_path, capsys):
    options = COMMON | {
        "model_name_or_path": str(home / "lm"),
        "backbone": str(home / "other-lm"),
        "dataset_name": str(home / "text.jsonl"),
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "lm_head"],
        "entropy_coef": 0.01,
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in options.items()]
    (tmp_path / "reward.yaml").write_text("\n".join([*lines, "learning_rate: 1e-2"]))
    config = ["--config", str(tmp_path / "reward.yaml")]
    assert main(["train", *config, *flags(output_dir=tmp_path / "yaml")]) == 0
    assert main(["train", *flags(**options, output_dir=tmp_path / "flags")]) == 0
    assert_same_weights(tmp_path / "yaml", tmp_path / "flags")
    ours, theirs = (torch.load(tmp_path / name / "training_args.bin", weights_only=False) for name in ("yaml", "flags"))
    assert isinstance(ours, PRTSFTConfig) and ours.max_length == tiny.CONTEXT  # TRL's default would be longer
    differing = {name for name, value in ours.to_dict().items() if value != theirs.to_dict()[name]}
    assert differing == {"output_dir"}
    adapter = LoraConfig.from_pretrained(tmp_path / "yaml")
    assert (adapter.r, adapter.lora_alpha, adapter.target_modules) == (4, 16, {"q_proj", "lm_head"})

    capsys.readouterr()
    assert (
        main(["train", f"--config={tmp_path}/reward.yaml", *flags(output_dir=tmp_path / "two", max_steps=2), "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 2


def test_a_checkpoint_is_gone_on_from(home, tmp_path):
    kept = {"save_strategy": "steps", "save_steps": 2}
    assert train(home / "lm", home / "text.jsonl", tmp_path / "whole", max_steps=4) == 0
    assert train(home / "lm", home / "text.jsonl", tmp_path / "parts", **kept | {"max_steps": 2}) == 0
    on = kept | {"max_steps": 4, "resume_from_checkpoint": "true"}
    assert train(home / "lm", home / "text.jsonl", tmp_path / "parts", **on) == 0
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    on["resume_from_checkpoint"] = tmp_path / "parts" / "checkpoint-2"
    assert train(home / "lm", home / "text.jsonl", tmp_path / "elsewhere", **on) == 0
    assert_same_weights(tmp_path / "elsewhere", tmp_path / "whole")


@pytest.mark.parametrize("data", ["text.jsonl", "pairs.jsonl"])
def test_check_measures_what_training_evaluates(home, tmp_path, capsys, data):
    evaluated = flags(eval_strategy="epoch", dataset_test_split="train")
    assert train(home / "lm", home / data, tmp_path, "--json", *evaluated) == 0
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert main(["check", str(tmp_path), str(home / "lm"), "--data", str(home / data), "--json"]) == 0
    nll = json.loads(capsys.readouterr().out)["portability"]["nll"]
    assert nll["prt_source"] == pytest.approx(metrics["eval_loss"], abs=1e-5)


def test_a_finished_run_stays_as_it_is_and_broken_checkpoints_are_passed_over(home, tmp_path, capsys):
    on = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    assert train(home / "lm", home / "text.jsonl", tmp_path, **on) == 0
    before = weights(tmp_path)
    (tmp_path / "checkpoint-9").mkdir()
    capsys.readouterr()
    on["resume_from_checkpoint"] = "true"
    assert train(home / "lm", home / "text.jsonl", tmp_path, **on) == 0
    assert "2 steps in " in (printed := capsys.readouterr().out)
    assert "no further training, weights unchanged" in printed
    assert_same_weights(tmp_path, before)
    with pytest.raises(RuntimeError, match="size mismatch for .*lora_A"):
        train(home / "lm", home / "text.jsonl", tmp_path, **on | {"lora_r": 3, "max_steps": 4})


def test_it_evaluates_and_reports_and_names_the_next_commands(home, tmp_path, capsys):
    more = ["--eval_strategy", "epoch", "--text_column", "body"]
    assert train(home / "lm", home / "split", tmp_path / "out", "--json", *more) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    reward = RewardModel.from_pretrained(tmp_path / "out")
    rows = Dataset.from_json(str(home / "split" / "test.jsonl"))
    args = PRTSFTConfig(str(tmp_path / "again"), dataset_text_field="body", bf16=False, **tiny.TUNING)
    trainer = PRTSFTTrainer(reward, args, train_dataset=rows, eval_dataset=rows)
    assert report["metrics"]["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)
    assert report["train_loss"] == report["metrics"]["train_loss"] > 0
    assert (report["output_dir"], report["steps"]) == (str(tmp_path / "out"), 3)

    assert train(home / "lm", home / "split", tmp_path / "out", *more) == 1
    assert "holds an earlier run." in capsys.readouterr().err
    assert train(home / "lm", home / "split", tmp_path / "text", *more) == 0
    printed = capsys.readouterr().out
    assert f"train_loss {report['train_loss']:.4f}, eval_loss {report['metrics']['eval_loss']:.4f}" in printed
    assert f"prt-hf generate BACKBONE --reward {tmp_path / 'text'} --prompt" in printed


def test_a_saved_reward_is_tuned_on_at_its_scale(home, tmp_path):
    assert train(home / "lm", home / "text.jsonl", tmp_path / "first", kl_coef=2.0) == 0
    assert train(tmp_path / "first", home / "pairs.jsonl", tmp_path / "second") == 0
    set_seed(42)
    args = PRTSFTConfig(str(tmp_path / "api"), kl_coef=2.0, bf16=False, max_length=tiny.CONTEXT, **COMMON)
    rows = Dataset.from_json(str(home / "pairs.jsonl"))
    trainer = PRTSFTTrainer(str(tmp_path / "first"), args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert_same_weights(tmp_path / "second", tmp_path / "api")


def test_a_full_reward_and_several_backbones(home, tmp_path):
    backbones = ["--backbone", str(home / "lm"), str(home / "other-lm")]
    assert train(home / "lm", home / "text.jsonl", tmp_path, "--full", *backbones) == 0
    config = json.loads((tmp_path / "prt_config.json").read_text())
    sources = [config["source_backbone"], *config["more_source_backbones"]]
    assert [source["id"] for source in sources] == [str(home / "lm"), str(home / "other-lm")]
    assert not config["is_adapter"] and not (tmp_path / "adapter_config.json").exists()
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).learning_rate == COMMON["learning_rate"]


@pytest.mark.parametrize(("more", "rate"), [([], 2e-4), (["--full"], PRTSFTConfig.learning_rate)])
def test_the_learning_rate_fits_what_is_tuned(home, tmp_path, more, rate):
    options = COMMON | {"max_steps": 1}
    del options["learning_rate"]
    places = {"model_name_or_path": home / "lm", "dataset_name": home / "text.jsonl", "output_dir": tmp_path}
    assert main(["train", *flags(**places, **options), *more]) == 0
    assert torch.load(tmp_path / "training_args.bin", weights_only=False).learning_rate == rate


@pytest.mark.parametrize(
    ("model", "data", "more", "message"),
    [
        ("lm", "nothing.jsonl", [], "nothing.jsonl cannot be loaded"),
        ("lm", "empty.jsonl", [], "empty.jsonl"),
        ("lm", "sentences.csv", [], "expected: `text`, or `prompt` and `completion`, or `messages`, or `input_ids`"),
        ("lm", "prompts.jsonl", [], "no columns that a language model is tuned on"),
        ("lm", "numbers.jsonl", [], "expected: a string in every row\n  found: 0 in row 0"),
        ("lm", "messages.jsonl", [], "the tokenizer has no chat template"),
        ("lm", "text.jsonl", ["--eval_strategy", "steps"], "no split 'test'.\n  expected: test\n  found: train"),
        ("lm", "text.jsonl", ["--dataset_train_split", "old"], "has no split 'old'"),
        ("lm", "text.jsonl", ["--resume_from_checkpoint", "true"], "There is no checkpoint to resume from"),
        ("lm", "text.jsonl", ["--eos_token", "<end>"], "('<end>') is not found in the vocabulary"),
        ("lm", "text.jsonl", ["--assistant_only_loss"], "The options or the data cannot be used.\n  found: "),
        ("lm", "text.jsonl", ["--full", "--lora_r", "4"], "A full reward has no adapter"),
        ("lm", "text.jsonl", ["--dtype", "half"], "`dtype` is not usable"),
        ("lm", "text.jsonl", ["--kl_coef", "0"], "`kl_coef` is not usable"),
        ("lm", "text.jsonl", ["--config", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        ("nowhere", "text.jsonl", [], "nowhere cannot be loaded"),
        ("bert", "text.jsonl", [], "has no column 'label'"),
        ("bert", "mauve.csv", [], "expected: the model's labels: ['red', 'green', 'blue', 'grey']\n  found: ['mauve']"),
        ("vit", "text.jsonl", [], "has no column 'image'"),
        ("vit", "sentences.csv", ["--image_column", "label", "--label_column", "sentence"], "labels that the model"),
        ("vit", "three.parquet", [], "found: ['0', '1', '2']"),
    ],
)
def test_what_is_wrong_is_said(home, tmp_path, capsys, model, data, more, message):
    model = home / model
    assert train(model, home / data, tmp_path / "out", *more) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] and "prt-hf train: " in printed.err and message in printed.err
    assert printed.out == "" and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("lm", ["--learnin_rate", "1"], "unrecognized arguments: --learnin_rate 1; did you mean --learning_rate?"),
        ("bert", ["--packing"], "--packing is for language models, not for text-classification"),
        ("lm", ["--max_steps", "few"], "argument --max_steps/--max-steps: invalid int value: 'few'"),
        (
            "lm",
            ["--load_best_model_at_end", "true", "--eval_strategy", "epoch"],
            "requires the save and eval strategy to match",
        ),
        ("lm", ["--config"], "argument --config: expected one argument"),
    ],
)
def test_wrong_arguments_leave_with_2(home, tmp_path, capsys, model, more, message):
    with pytest.raises(SystemExit) as leaving:
        train(home / model, home / "text.jsonl", tmp_path / "out", *more)
    printed = capsys.readouterr().err
    assert leaving.value.code == 2 and message in printed
    assert len(printed.splitlines()) < 5  # not the usage of all options


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("learnin_rate: 1", 2, "unrecognized arguments: --learnin_rate 1; did you mean --learning_rate?"),
        ("max_steps: few", 2, "invalid int value: 'few'"),
        ("a: [", 1, "cannot be read"),
        ("- max_steps", 1, "holds no options"),
    ],
)
def test_wrong_files_are_refused(home, tmp_path, capsys, text, code, message):
    (tmp_path / "reward.yaml").write_text(text)
    options = {name: value for name, value in COMMON.items() if name != "max_steps"}
    places = {"model_name_or_path": home / "lm", "dataset_name": home / "text.jsonl", "output_dir": tmp_path / "out"}
    arguments = ["train", *flags(**places, **options), "--config", str(tmp_path / "reward.yaml")]
    if code == 1:
        assert main(arguments) == 1
    else:
        with pytest.raises(SystemExit) as leaving:
            main(arguments)
        assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_foreign_files_and_models_without_a_head_are_refused(home, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert train(home / "lm", home / "text.jsonl", tmp_path) == 1
    assert "found: thesis.txt\n  remedy: choose another one: --output_dir" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]
    tiny.llama().model.save_pretrained(tmp_path / "headless")
    assert train(tmp_path / "headless", home / "text.jsonl", tmp_path / "out") == 1
    assert "has no head that predicts tokens or class labels" in capsys.readouterr().err


def test_a_reward_takes_no_other_adapter(home, tmp_path, capsys, image_reward):
    assert train(image_reward, home / "pictures.parquet", tmp_path / "out", "--lora_r", "2") == 1
    assert "is a reward already" in capsys.readouterr().err


@pytest.mark.parametrize(("given", "trusted"), [([], False), (["false"], False), (["true"], True), ([None], True)])
def test_remote_code_is_trusted_only_where_told(given, trusted):
    arguments = ["--model_name_or_path", "m", "--dataset_name", "d"]
    arguments += ["--trust_remote_code", *filter(None, given)] if given else []
    assert Options(arguments).trust_remote_code is trusted


def test_the_guides_file_is_understood(tmp_path):
    (block,) = re.findall(r"```yaml\n(# reward\.yaml.*?)```", GUIDES["notebooks/tuning.md"], re.S)
    (tmp_path / "reward.yaml").write_text(block)
    options = Options(["--config", str(tmp_path / "reward.yaml"), "--use_cpu"])
    config = options.training_config(PRTSFTConfig, "text-generation", learning_rate=3e-4)
    assert (options.adapter.given, config.packing, config.learning_rate) == ({"top_layers": 6}, True, 3e-4)
    assert (options.data.dataset_name, config.output_dir) == ("train.jsonl", "chat-reward")


def test_help_shows_every_option_ours_first(capsys):
    assert main(["train", "--help"]) == 0
    printed = capsys.readouterr().out
    groups = [printed.index(f"\n{name}:\n") for name in ("model", "data", "adapter", "training")]
    assert groups == sorted(groups) and printed.count("\n  prt-hf train --") == 3
    names = [*PRTSFTConfig.__dataclass_fields__, "backbone", "top_layers", "label_column", "config", "json"]
    missing = [
        name for name in names if PRTSFTConfig.__dataclass_fields__.get(name, True) and f"--{name} " not in printed
    ]
    assert missing == []


def test_the_module_runs_as_the_command(home):
    command = [sys.executable, "-m", "prt_hf.cli", "train", "--model_name_or_path", "x"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 2
    assert "prt-hf train: error: the following arguments are required: --dataset_name" in finished.stderr


def test_other_commands_still_refuse_what_they_do_not_know(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["demo", "--learning_rat", "1"])
    assert leaving.value.code == 2 and "unrecognized arguments: --learning_rat 1" in capsys.readouterr().err
