"""Cards: their code runs, their metadata are the Hub's, others' text stays text, and users' edits stay theirs."""

import importlib.util
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from datasets import Dataset, DatasetInfo, NamedSplit
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from transformers import ViTImageProcessorPil

from prt_hf import (
    LabelContract,
    PRTConfig,
    PRTForCausalLM,
    PRTForImageClassification,
    PRTForSequenceClassification,
    PRTTrainer,
    RewardConfig,
    RewardFileError,
    RewardModel,
    VocabularyContract,
)
from prt_hf.contract import ModelReference
from prt_hf.hub import card_merge
from prt_hf.hub.card import Measurement, render_card, render_recipe_card
from prt_hf.hub.card_merge import merge_cards
from prt_hf.hub.training_record import TrainingRecord
from prt_hf.networks.auto import load_processing_class

ROOT = Path(__file__).parents[2]
BASE = ModelReference("me/base", "c0ffee", "LlamaForCausalLM")
TEXT = RewardConfig("text-generation", VocabularyContract(97, "f00d", {"eos_token": "<eos>"}), BASE, BASE, kl_coef=2.0)
IMAGES = RewardConfig("image-classification", LabelContract(tuple(tiny.COLOURS)), BASE, BASE, is_adapter=False)
RECORD = TrainingRecord(
    datasets=("me/data",),
    hyperparameters={"learning_rate": 2e-4},
    evaluation={"eval_loss": 1.5, "eval_accuracy": 0.25},
    rows=[{"step": 10, "eval_loss": 1.75}, {"step": 20, "training_loss": 2.0, "eval_loss": 1.5}],
    versions={"torch": "2.13.0"},
    evaluation_dataset="me/data",
    evaluation_split="test",
)
TARGET = Measurement("me/target", "me/data", "accuracy", {"prt": 0.5, "pretrained": 0.25, "mine": 0.125}, split="test")
CARD = render_card(TEXT, "me/reward", RECORD, [TARGET])


def part(card, name):
    return re.search(rf"(?ms)^<!-- prt_hf:{name} [0-9a-f]{{8}} -->\n(.*?)^<!-- /prt_hf:{name} -->$", card)[1]


def metadata(card):
    return yaml.safe_load(card.split("---\n")[1])


def run(card):
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    scope = {}
    exec(compile(code, "README.md", "exec"), scope)
    return scope


# The code of a card


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def saved(place, model, processor):
    model.save_pretrained(place)
    processor.save_pretrained(place)
    return str(Path(place).resolve())


@pytest.mark.parametrize("is_base_on_hub", [True, False])
def test_the_lines_for_text_generation_run(here, is_base_on_hub, capsys):
    base = saved("base", tiny.llama(1), tiny.tokenizer())
    saved("me/target", tiny.gpt2(2), tiny.tokenizer())
    reward = RewardModel.from_base(base, peft_config=LoraConfig(init_lora_weights=False))
    reward.save_pretrained("me/reward")
    config = replace(reward.config, reward_base=BASE) if is_base_on_hub else reward.config
    card = render_card(config, "me/reward", measurements=[TARGET])
    assert ('base_model="base"' in card) is not is_base_on_hub and str(Path.cwd()) not in card
    scope = run(card)
    model = PRTForCausalLM.from_parts("me/target", rewards=["me/reward"])
    expected = model.generate(**scope["inputs"], max_new_tokens=64)
    assert torch.equal(scope["output"], expected)
    assert capsys.readouterr().out == scope["tokenizer"].decode(expected[0]) + "\n"


def test_the_lines_of_a_reward_that_was_tuned_on_chats_run(here, capsys):
    base = saved("base", tiny.llama(1), tiny.tokenizer(chat_template=tiny.CHAT_TEMPLATE))
    reward = RewardModel.from_base(base, peft_config=LoraConfig(init_lora_weights=False))
    reward.trained_with(reward.config.reward_base, kl_coef=1.0, entropy_coef=0.0, is_chat=True)
    reward.save_pretrained("me/reward")
    loaded = RewardModel.from_pretrained("me/reward")
    assert loaded.config.is_chat
    card = render_card(loaded.config, "me/reward")
    assert "\nprt-hf chat base --reward me/reward\n" in part(card, "usage")
    scope = run(card)
    assert scope["text"] == "w3 What is 2 + 3? w9"
    expected = PRTForCausalLM.from_parts(base, "me/reward").generate(**scope["inputs"], max_new_tokens=64)
    assert torch.equal(scope["output"], expected)


def test_the_lines_for_text_classification_run(here, capsys):
    base = saved("base", tiny.bert(1), tiny.tokenizer())
    saved("me/target", tiny.bert(2, names=tiny.COLOURS[::-1]), tiny.tokenizer())
    reward = RewardModel.from_base(base, peft_config=LoraConfig(init_lora_weights=False))
    reward.save_pretrained("me/reward")
    config = replace(reward.config, reward_base=BASE)
    scope = run(render_card(config, "me/reward", measurements=[replace(TARGET, backbone="me/target")]))
    assert isinstance(scope["model"], PRTForSequenceClassification)
    assert capsys.readouterr().out == f"{scope['classifier']('A text to be classified')}\n"


def test_the_lines_for_images_run(here, capsys):
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    source = saved("source", tiny.vit(1, num_channels=3), processor)
    saved("me/target", tiny.resnet(2, names=tiny.COLOURS[::-1], num_channels=3), processor)
    if load_processing_class(source, "image-classification") is None:
        pytest.skip("this transformers reads image processors with torchvision only")
    Image.new("RGB", (10, 12), (9, 99, 199)).save("photo.png")
    reward = RewardModel.from_base(source)
    reward.save_pretrained("me/reward")
    scope = run(render_card(reward.config, "me/reward", measurements=[replace(TARGET, backbone="me/target")]))
    assert isinstance(scope["model"], PRTForImageClassification)
    assert capsys.readouterr().out == f"{scope['classifier']('photo.png')}\n"


def test_the_lines_of_a_recipe_run(here, capsys):
    base = saved("base", tiny.llama(1), tiny.tokenizer())
    model = PRTForCausalLM.from_parts(base, [RewardModel.from_base(base, peft_config=LoraConfig())], [0.5])
    model.save_pretrained("me/model")
    card = render_recipe_card(
        "me/model", "text-generation", ModelReference(**model.config.backbone_reference), [("reward-0", 0.5)]
    )
    torch.manual_seed(0)
    printed = run(card)["pipe"].model
    assert capsys.readouterr().out.startswith("[{'generated_text': 'Once upon a time")
    assert printed.strengths == [0.5]
    assert "| reward | `reward-0` (in this folder) | 0.5 |\n" in card and "base_model" not in metadata(card)
    assert 'prt_hf.PRTForCausalLM.from_pretrained("me/model", backbone=...)' in card and base not in card


# What a card says


def test_metadata_of_a_reward_adapter():
    result = {"task": {"type": "text-generation"}, "dataset": {"name": "me/data", "type": "me/data", "split": "test"}}
    metrics = [
        {"type": "accuracy", "value": 0.5, "name": "accuracy with me/target"},
        {"type": "loss", "value": 1.5, "name": "loss with me/base"},
        {"type": "accuracy", "value": 0.25, "name": "accuracy with me/base"},
    ]
    assert metadata(CARD) == {
        "base_model": "me/base",
        "base_model_relation": "adapter",
        "datasets": ["me/data"],
        "library_name": "prt_hf",
        "pipeline_tag": "text-generation",
        "tags": ["portable-reward-tuning", "prt", "reward-adapter"],
        "model-index": [{"name": "me/reward", "results": [result | {"metrics": metrics}]}],
    }
    assert str(ModelCard(CARD)) == CARD and ModelCard(CARD).data.eval_results[0].metric_value == 0.5


def test_metadata_of_the_other_kinds():
    assert metadata(render_card(IMAGES, "me/reward")) == {
        "base_model": "me/base",
        "base_model_relation": "finetune",
        "library_name": "prt_hf",
        "pipeline_tag": "image-classification",
        "tags": ["portable-reward-tuning", "prt", "full-reward"],
    }
    assert metadata(render_recipe_card("me/model", "text-generation", BASE, [("me/a", 1.0), ("reward-1", -0.5)])) == {
        "base_model": ["me/base", "me/a"],
        "base_model_relation": "merge",
        "library_name": "prt_hf",
        "pipeline_tag": "text-generation",
        "tags": ["portable-reward-tuning", "prt", "prt-recipe"],
    }


def test_the_tables():
    about, results, training = (part(CARD, name) for name in ("about", "results", "training"))
    assert "| tuned on (source backbone) | [`me/base`](https://huggingface.co/me/base) at `c0ffee` |\n" in about
    assert "| strength at use (1 / kl_coef) | 0.5 |\n| kl_coef (lambda), entropy_coef (alpha) | 2, 0 |\n" in about
    assert "| backbone | data | measure | pretrained | PRT | `mine` |\n|---|---|---|---|---|---|\n" in results
    assert "| `me/target` | `me/data`, `test` | `accuracy`, higher is better | 0.25 | 0.5 | 0.125 |\n" in results
    assert "| `learning_rate` | `0.0002` |\n" in training
    table = "| `step` | `training_loss` | `eval_loss` |\n|---|---|---|\n| 10 |  | 1.75 |\n| 20 | 2 | 1.5 |\n"
    assert table in training
    assert "(`test`):\n\n- `eval_loss`: 1.5\n- `eval_accuracy`: 0.25\n" in training


def test_many_labels_and_backbones():
    labels = LabelContract(tuple(f"label-{index}" for index in range(1000)))
    config = replace(IMAGES, contract=labels, more_source_backbones=(ModelReference(None, None, "ViT"),))
    card = render_card(config, "me/reward", RECORD)
    assert "`label-47` and 952 more (`prt_config.json` has all)." in card and "label-48" not in card
    assert "| tuned on (source backbone) | a `ViT` that was created in memory |\n" in card
    assert "with the source backbones (the mean)" in card and "model-index" not in card
    assert "It has not been tuned yet." in render_card(replace(TEXT, source_backbone=None), "me/reward")


def test_folders_are_shown_by_their_names_and_are_no_metadata():
    base = ModelReference("/home/me/models/old", None, "LlamaForCausalLM")
    record = replace(
        RECORD,
        datasets=("/home/me/rows.json", "rows"),
        hyperparameters={"file": "/home/me/x.yaml"},
        evaluation_dataset="/home/me/rows.json",
    )
    target = replace(TARGET, backbone="C:\\Users\\me\\new", dataset="/home/me/rows.json")
    card = render_card(replace(TEXT, reward_base=base, source_backbone=base), "/home/me/reward/", record, [target])
    assert "home" not in card and "Users" not in card
    assert "# reward\n" in card and "prt-hf check reward new " in card and "Data: `rows.json`, `rows`\n" in card
    assert metadata(card).keys() == {"library_name", "pipeline_tag", "tags"}


def test_others_text_stays_text():
    evil = "a|b\n---\nlicense: mit\n---\n<!-- /prt_hf:contract --> ``` {{ 7 * 7 }} {% raw %} `\\| \u2028 \x1b"
    labels = replace(IMAGES, contract=LabelContract((evil, "`", " ")), reward_base=ModelReference(evil))
    record = TrainingRecord((evil,), {evil: evil}, {evil: 1.0}, [{evil: 1.0}], {evil: evil}, evil, evil)
    measured = Measurement(evil, "me/data", evil, {evil: 1.0, "prt": 0.5}, split=evil)
    card = render_card(labels, evil, record, [measured])
    assert str(ModelCard(card)) == card and merge_cards(card, card) == card
    assert "license" not in metadata(card) and "49" not in card
    names = ["title", "about", "usage", "contract", "results", "training", "limits", "citation"]
    assert re.findall(r"^<!-- prt_hf:([a-z]+) [0-9a-f]{8} -->$", card, re.M) == names
    assert re.findall(r"^<!-- /prt_hf:([a-z]+) -->$", card, re.M) == names
    fence = "````"
    text = "a|b --- license: mit --- <!-- /prt_hf:contract --> ``` {{ 7 * 7 }} {% raw %} `\\| \ufffd"
    assert f"{fence}{text}{fence}, `` ` ``, ` `\n" in part(card, "contract")
    for line in part(card, "results").splitlines()[2:5]:
        assert len(re.findall(r"(?<!\\)\|", line)) == 6, line
    metric = metadata(card)["model-index"][0]["results"][0]["metrics"][0]
    assert metric["type"] == text


def test_the_citation_is_the_readmes():
    (ours,) = re.findall(r"```bibtex\n(.*?)```", CARD, re.DOTALL)
    assert f"```bibtex\n{ours}```" in (ROOT / "README.md").read_text()


def test_the_examples_are_rendered():
    spec = importlib.util.spec_from_file_location("render_cards", ROOT / "model_cards" / "render.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, render in module.EXAMPLES.items():
        assert render().encode() == (ROOT / "model_cards" / name).read_bytes(), name
    assert {path.name for path in (ROOT / "model_cards").glob("*.md")} == {"README.md", *module.EXAMPLES}


# What a trainer knows


def test_a_training_is_recorded(tmp_path, tokenizer):
    file = {"hf://datasets/me/data@c0ffee/test-00000.parquet": {"num_bytes": 1, "checksum": None}}
    rows = tiny.texts()
    on_hub = Dataset(rows.data, DatasetInfo(download_checksums=file), NamedSplit("test")).map(lambda row: row)
    args = PRTConfig(
        str(tmp_path),
        **tiny.TUNING | {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.01},
    )
    trainer = PRTTrainer(
        tiny.llama(1), args, None, rows, on_hub, tokenizer, peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)
    )
    trainer.evaluate()
    assert TrainingRecord.from_trainer(trainer).evaluation == {}, "nothing was tuned yet"
    trainer.train()
    record = TrainingRecord.from_trainer(trainer)
    log = trainer.state.log_history
    first, last = [entry for entry in log if "eval_loss" in entry]
    assert (record.datasets, record.evaluation_dataset, record.evaluation_split) == ((), "me/data", "test")
    figures = {
        "eval_loss",
        "eval_backbone_loss",
        "eval_accuracy",
        "eval_reward_accuracy",
        "eval_reward_entropy",
        "eval_reward_abs",
        "eval_kl",
    }
    assert record.evaluation == {name: last[name] for name in record.evaluation}
    assert record.evaluation.keys() == figures
    losses = {entry["step"]: entry["loss"] for entry in log if "loss" in entry}
    assert [(row["step"], row["training_loss"], row["eval_loss"]) for row in record.rows] == [
        (2, losses[2], first["eval_loss"]),
        (4, losses[4], last["eval_loss"]),
    ]
    found = record.hyperparameters
    assert (found["learning_rate"], found["training_steps"], found["peft_type"]) == (0.01, 4, "LORA")
    assert (found["r"], found["lora_alpha"], found["lora_dropout"]) == (4, 8, 0.0)
    assert found["optimizer"] == f"{args.optim.value}, betas=(0.9, 0.999), epsilon=1e-08"
    assert record.versions["torch"] == torch.__version__
    card = render_card(trainer.reward.config, "me/reward", record)
    assert f"- `eval_loss`: {last['eval_loss']:.4g}\n" in part(card, "training")


def on_hub(name, seed=0):
    """Rows as `load_dataset` takes them from the Hub."""
    rows = tiny.texts(seed=seed)
    return Dataset(rows.data, DatasetInfo(download_checksums={f"hf://datasets/me/{name}@c0ffee/0.parquet": {}}))


def test_the_best_checkpoint_is_recorded_with_its_own_evaluation(tmp_path, tokenizer):
    args = PRTConfig(
        str(tmp_path),
        **tiny.TUNING
        | {
            "max_steps": 8,
            "learning_rate": 0.5,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "load_best_model_at_end": True,
        },
    )
    trainer = PRTTrainer(tiny.llama(1), args, None, tiny.texts(), on_hub("data"), tokenizer, peft_config=LoraConfig())
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = trainer.state.best_global_step
    assert losses[best] != losses[8]
    record = TrainingRecord.from_trainer(trainer)
    assert record.evaluation["eval_loss"] == losses[best]
    assert (record.evaluation_dataset, record.rows[-1]["eval_loss"]) == ("me/data", losses[8])
    later = trainer.evaluate()["eval_loss"]
    assert later == pytest.approx(losses[best], rel=1e-5)
    record = TrainingRecord.from_trainer(trainer)
    assert record.evaluation["eval_loss"] == later
    assert record.rows[-1]["eval_loss"] == losses[8], "the table is of the training"


def test_an_evaluation_of_other_data_does_not_name_the_trainers(tmp_path, tokenizer):
    args = PRTConfig(str(tmp_path), **tiny.TUNING)
    trainer = PRTTrainer(tiny.llama(1), args, None, tiny.texts(), on_hub("data"), tokenizer, peft_config=LoraConfig())
    trainer.train()
    other = trainer.evaluate(on_hub("other", seed=9))["eval_loss"]
    record = TrainingRecord.from_trainer(trainer)
    assert (record.evaluation["eval_loss"], record.evaluation_dataset) == (other, None)
    assert not [row for row in record.rows if "eval_loss" in row]
    own = trainer.evaluate(trainer.eval_dataset)["eval_loss"]
    record = TrainingRecord.from_trainer(trainer)
    assert (record.evaluation["eval_loss"], record.evaluation_dataset) == (own, "me/data")


def test_a_long_log_is_thinned(tmp_path, tokenizer):
    args = PRTConfig(str(tmp_path), **tiny.TUNING | {"max_steps": 45})
    trainer = PRTTrainer(tiny.llama(1), args, None, tiny.texts(4), None, tokenizer, peft_config=LoraConfig())
    trainer.train()
    record = TrainingRecord.from_trainer(trainer)
    steps = [row["step"] for row in record.rows]
    assert (len(steps), steps[0], steps[-1]) == (20, 1, 45) and steps == sorted(set(steps))
    assert record.rows[-1].keys() == {"step", "training_loss"}


# What survives


LATER = render_card(
    replace(TEXT, kl_coef=4.0), "me/renamed", replace(RECORD, hyperparameters={"learning_rate": 1e-3}), [TARGET]
)


def kept(old, new=LATER):
    """Merged, which a second time changes nothing."""
    merged = merge_cards(old, new)
    assert merge_cards(merged, new) == merged
    return merged


def test_a_card_without_edits_is_rendered_again():
    assert kept(CARD, CARD) == CARD
    merged = kept(CARD)
    assert merged.partition("\n---\n")[2] == LATER.partition("\n---\n")[2]


def test_edited_and_deleted_parts_stay_so(caplog):
    caplog.set_level("WARNING")
    card_merge.logger.warning_once.cache_clear()  # other tests have told it
    edited = CARD.replace("## Use\n", "## How I use it\n").replace(
        "# me/reward\n", "My text first.\n\n# me/reward\n", 1
    )
    start, end = edited.index("<!-- prt_hf:training"), edited.index("<!-- prt_hf:limits")
    edited = edited[:start] + "My own training section, {{ x }} \\1.\n" + edited[end:]
    merged = kept(edited)
    for name in ("usage", "title"):
        assert part(merged, name) == part(edited, name)
    assert "My own training section, {{ x }} \\1.\n<!-- prt_hf:limits" in merged and "prt_hf:training" not in merged
    assert part(merged, "about") == part(LATER, "about") != part(CARD, "about")
    assert [record.getMessage() for record in caplog.records[:2]] == [
        f"The card's part {name!r} was edited, and is kept as it is." for name in ("title", "usage")
    ]


def test_parts_that_the_new_card_lacks_stay_and_empty_ones_are_filled():
    bare = render_card(TEXT, "me/reward")
    assert part(kept(CARD, bare), "training") == part(CARD, "training")
    assert part(kept(bare, CARD), "results") == part(CARD, "results")
    assert kept(bare, CARD).partition("\n---\n")[2] == CARD.partition("\n---\n")[2]


def test_parts_that_were_moved_are_found():
    moved = part(CARD, "citation")
    whole = re.search(r"<!-- prt_hf:usage .*<!-- /prt_hf:usage -->\n", CARD, re.DOTALL)[0]
    merged = kept(CARD.replace(whole, "") + "Mine.\n" + whole)
    assert merged.endswith("Mine.\n" + re.search(r"<!-- prt_hf:usage .*?/prt_hf:usage -->\n", LATER, re.DOTALL)[0])
    assert part(merged, "citation") == moved


def test_editors_may_strip_and_windows_may_break_lines():
    merged = kept(CARD.replace("\n", "\r\n").replace("## Use\r\n", "## Use  \r\n"))
    assert merged.partition("\n---\n")[2] == LATER.partition("\n---\n")[2]


def test_a_card_of_ones_own_gets_metadata_only():
    assert kept("# Mine\n\nText.\n").partition("\n---\n")[2] == "# Mine\n\nText.\n"
    assert metadata(kept("# Mine\n")) == metadata(LATER)


@pytest.mark.parametrize("empty", ["", "\n", "\ufeff", "---\n\n---\n"])
def test_an_empty_card_becomes_the_new_one(empty):
    assert kept(empty) == LATER


def test_a_card_with_metadata_only_gets_the_text():
    merged = kept("---\nlicense: mit\n---\n")
    assert metadata(merged) == {"license": "mit"} | metadata(LATER)
    assert merged.partition("\n---\n")[2] == LATER.partition("\n---\n")[2]


def test_metadata_of_the_user_stay():
    mine = {"language": "de", "license": "apache-2.0", "extra": {"a": 1}}
    ours = {"tags": ["mine", "full-reward"], "datasets": "me/first", "pipeline_tag": "text-classification"}
    merged = metadata(kept(f"---\n{yaml.dump(mine | ours)}---\n# Mine\n"))
    assert merged == metadata(LATER) | mine | {
        "tags": ["mine", "portable-reward-tuning", "prt", "reward-adapter"],
        "datasets": ["me/first", "me/data"],
    }


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


@pytest.mark.parametrize(
    "hostile",
    [
        f"---\n{BOMB}---\nMine.\n",
        f"---\na: {'[' * 90_000}\n---\nMine.\n",
        f"---\na: {'{a: ' * 20_000}\n---\nMine.\n",
        "---\nlicense: mit\n---\n" + "<!-- prt_hf:about 01234567 -->\n" * 20_000,
        "---\nlicense: " + "mit" * 100_000 + "\n---\nMine.\n",
    ],
    ids=["references", "brackets", "braces", "comments", "long"],
)
def test_hostile_cards_neither_hang_nor_stop_a_save(hostile, tmp_path, tokenizer):
    """A new card is written, and the old one stays beside it."""
    reward = RewardModel.from_base(tiny.llama(1), tokenizer, LoraConfig(r=2))
    reward.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(hostile)
    started = time.process_time()
    RewardModel.from_pretrained(tmp_path, base_model=tiny.llama(1)).save_pretrained(tmp_path)
    assert time.process_time() - started < 10
    assert (tmp_path / "README.md").read_text() == card
    assert (tmp_path / "README.old.md").read_text() == hostile


def test_results_are_replaced_by_task_data_and_metric():
    mine = {
        "task": {"type": "text-generation", "name": "Mine"},
        "dataset": {"type": "me/data", "name": "My data", "split": "test"},
        "metrics": [
            {"type": "accuracy", "name": "accuracy with me/target", "value": 0.1},
            {"type": "accuracy", "name": "by hand", "value": 0.2, "verified": False},
        ],
        "source": {"name": "A board", "url": "https://example.org"},
    }
    other = {"task": {"type": "x"}, "dataset": {"type": "y", "name": "y"}, "metrics": [{"type": "z", "value": 1}]}
    index = [{"name": "Mine", "results": [other, mine]}, {"name": "Another", "results": []}]
    merged = metadata(kept(f"---\n{yaml.dump({'model-index': index})}---\n# Mine\n"))["model-index"]
    new = metadata(LATER)["model-index"][0]["results"][0]["metrics"]
    assert merged == [
        {"name": "Mine", "results": [other, mine | {"metrics": [new[0], mine["metrics"][1], *new[1:]]}]},
        {"name": "Another", "results": []},
    ]


@pytest.mark.parametrize(
    "broken, found",
    [
        ("---\ntags: [a\nlicense: mit\n---\n# Mine\n", "expected ',' or ']'"),
        ("---\n- a\n- b\n---\n# Mine\n", "found: list: - a"),
        ("---\nlicense: mit\n# Mine\n", "found: it begins with `---` and never ends"),
        (
            "---\nmodel-index:\n- name: mine\n---\n# Mine\n",
            "found: an incomplete model-index (KeyError: 'results')",
        ),
    ],
)
def test_metadata_that_cannot_be_read_are_an_error(broken, found):
    with pytest.raises(RewardFileError) as error:
        merge_cards(broken, CARD)
    assert str(error.value).startswith("The card's metadata cannot be read.\n  expected: entries in YAML between two ")
    assert found in str(error.value)
    assert str(error.value).endswith("remedy: correct README.md, or delete it to get a new one")


def test_text_of_both_places_is_kept(caplog):
    """On the Hub (left), and here."""
    later = render_card(TEXT, "me/later", RECORD)
    mine, theirs = later + "\nMine.\n", CARD + "\nTheirs.\n"
    licensed = CARD.replace("---\n", "---\nlicense: mit\n", 1)
    joined = merge_cards(licensed, mine)
    assert joined.endswith("\nMine.\n") and metadata(joined)["license"] == "mit"
    assert part(joined, "title") == part(later, "title") and part(joined, "results") == part(CARD, "results")
    assert merge_cards(mine, mine) == mine and merge_cards(theirs, later).endswith("\nTheirs.\n")
    assert not caplog.records
    both = merge_cards(theirs, mine)
    assert both == merge_cards(theirs, later) and "edited in two places" in caplog.text


def test_edited_parts_of_both_places_are_kept():
    there, here = CARD.replace("## Limits", "## My limits"), CARD.replace("## Use", "## My use")
    assert merge_cards(there, here) == CARD.replace("## Limits", "## My limits").replace("## Use", "## My use")
