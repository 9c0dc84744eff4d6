"""The old tuning laid on the target's weights, against weights added up here; other rivals are read as given."""

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from test_report import adapted, assert_figures, labelled, reward_on, softmax, text_logits
from transformers import ViTImageProcessorPil, set_seed
from trl import SFTConfig, SFTTrainer

from prt_hf import RewardModel
from prt_hf.cli import main
from prt_hf.errors import PRTValueError
from prt_hf.evaluation import portability_report
from prt_hf.evaluation.rivals import FewShot, context_of
from prt_hf.evaluation.tuned_rivals import Tuning
from prt_hf.networks.adapters import wrap

METHODS = ("pretrained", "eft", "transplanted")
PIXELS = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def by_hand(target, tuned, source):
    """Add W_tuned - W_source to every weight of the target."""
    network = copy.deepcopy(target)
    weights = [dict(model.named_parameters()) for model in (tuned, source)]
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight += weights[0][name] - weights[1][name]
    return network


def assert_is(report, name, method, model, rows):
    (logits,), labels, where = text_logits([model], rows)
    assert_figures(report.targets[name].figures[method], softmax(logits.double()), labels, where)


@pytest.mark.parametrize("kind", ["LoRA", "LoRA of the head", "DoRA"])
def test_an_adapter_is_laid_on_the_target(tokenizer, kind):
    """Merged into its base it is a difference of weights, but for DoRA, which scales what is there."""
    options = {"LoRA of the head": {"target_modules": ["q_proj", "lm_head"]}, "DoRA": {"use_dora": True}}.get(kind, {})
    source, target, rows = tiny.llama(1), tiny.llama(3), tiny.texts(6)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    tuned = adapted(source, 7, **options)
    report = portability_report(reward_on(source, tokenizer), {"new": target}, rows, METHODS, eft=tuned, batch_size=4)
    if kind == "DoRA":
        expected = adapted(target, 7, **options)  # magnitudes start as the norms of the base's weights
        own = dict(expected.named_parameters())
        with torch.no_grad():
            for name, value in tuned.named_parameters():
                if "lora_" in name:
                    own[name].copy_(value)
    else:
        merged = copy.deepcopy(tuned).merge_and_unload()
        expected = by_hand(target, merged, tiny.llama(1))
    assert_is(report, "new", "transplanted", expected, rows)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items()), "left as it is"
    assert report.notes == [] and "transplanted" not in report.source.figures


def test_the_difference_of_a_whole_model_is_added_to_the_target(tokenizer):
    source, tuned, target, rows = tiny.llama(1), tiny.llama(5), tiny.llama(3), tiny.texts(6)
    report = portability_report(reward_on(source, tokenizer), {"new": target}, rows, METHODS, eft=tuned, batch_size=4)
    assert_is(report, "new", "transplanted", by_hand(target, tuned, source), rows)
    assert_is(report, "new", "pretrained", target, rows)


@torch.no_grad()
def test_classifiers_are_transplanted_too():
    source, tuned, target = tiny.vit(1), tiny.vit(5), tiny.vit(3)
    report = portability_report(reward_on(source), {"new": target}, labelled(), METHODS, eft=tuned)
    probabilities = softmax(by_hand(target, tuned, source)(pixel_values=PIXELS).logits.double())
    labels = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0])
    found = report.targets["new"].figures["transplanted"]
    assert found.nll.value == pytest.approx(-probabilities[torch.arange(9), labels].log().mean().item(), rel=1e-4)


def test_other_shapes_are_told_and_left_out(tokenizer):
    source, tuned = tiny.llama(1), tiny.llama(5)
    targets = {"same": tiny.llama(3), "wider": tiny.llama(2, intermediate_size=48), "other": tiny.gpt2(2)}
    report = portability_report(reward_on(source, tokenizer), targets, tiny.texts(4), METHODS, eft=tuned)
    assert "transplanted" in report.targets["same"].figures
    for name in ("wider", "other"):
        assert list(report.targets[name].figures) == ["pretrained", "eft"]
    assert len(report.notes) == 2
    assert report.notes[0].startswith("transplanted is left out at wider: ")
    assert "weights differ in shape, such as model.layers.0.mlp.down_proj.weight: [" in report.notes[0]
    targets["same"].config.quantization_config = {"quant_method": "some"}
    report = portability_report(reward_on(source, tokenizer), targets, tiny.texts(4), METHODS, eft=tuned)
    assert report.notes[0] == "transplanted is left out at same: its weights are quantised"
    with pytest.raises(PRTValueError, match="only the methods transplanted, without a model that they need"):
        portability_report(reward_on(source, tokenizer), targets, tiny.texts(4), ("transplanted",))


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("source", 1), ("new", 3), ("lora-there", 6), ("baked-there", 8)):
        tiny.llama(seed).save_pretrained(name)
        tiny.tokenizer().save_pretrained(name)
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    RewardModel.from_base("source", peft_config=config).save_pretrained("reward")
    tuned = adapted(tiny.llama(1), 7)
    tuned.peft_config["default"].base_model_name_or_path = "source"
    tuned.save_pretrained("tuned")
    return tmp_path


def test_by_folder_it_is_the_same_and_measured_once(places):
    passes = []

    def progress(batches, text):
        passes.append(text)
        return batches

    kwargs = {"eft": "tuned", "lora": {"new": "lora-there"}, "baked": {"new": "baked-there"}, "progress": progress}
    report = portability_report("reward", ["new"], tiny.texts(5), output_dir="out", **kwargs)
    assert passes == [
        "new: pretrained, EFT, PRT, reward only, fine-tuned",
        "new: transplanted",
        "new: LoRA",
        "new: baked",
    ]
    there = portability_report(
        RewardModel.from_pretrained("reward"),
        {"new": tiny.llama(3)},
        tiny.texts(5),
        METHODS,
        eft=adapted(tiny.llama(1), 7),
    )
    expected = there.targets["new"].figures["transplanted"].nll
    assert report.targets["new"].figures["transplanted"].nll == pytest.approx(expected)
    for method, seed in (("lora", 6), ("baked", 8)):
        assert_is(report, "new", method, tiny.llama(seed), tiny.texts(5))
    table = report.table()
    assert "| transplanted |  | " in table and "| LoRA |  | " in table and "| baked |  | " in table
    report.save("out")
    passes.clear()
    again = portability_report("reward", ["new"], tiny.texts(5), output_dir="out", **kwargs)
    assert passes == [] and again.table() == table
    torch.manual_seed(2)
    adapted(tiny.llama(1), 9).save_pretrained("other")
    text = Path("tuned/adapter_config.json").read_text()
    Path("other/adapter_config.json").write_text(text)
    portability_report("reward", ["new"], tiny.texts(5), output_dir="out", **kwargs | {"eft": "other"})
    assert "new: transplanted" in passes and "new: LoRA" not in passes, "of another adapter"


def test_the_command_takes_loras(places, capsys):
    Path("texts.jsonl").write_text('{"text": "w3 w4 w5"}\n{"text": "w6 w7 w8 w9"}\n')
    command = ["evaluate", "reward", "--targets", "new", "--data", "texts.jsonl", "--lora"]
    assert main([*command, "lora-there", "--baked", "baked-there", "--eft", "tuned", "--output_dir", "out"]) == 0
    out = capsys.readouterr().out
    assert "| LoRA |" in out and "| baked |" in out and "| transplanted |" in out
    assert main([*command, "lora-there", "new"]) == 1
    assert "expected: 1, as many as --targets, in the same order\n  found: 2 of --lora" in capsys.readouterr().err


@pytest.mark.parametrize("start", [None, "w5"])
def test_few_shot_is_the_target_with_examples_in_front(start, monkeypatch):
    """Every row is read with the examples before it, one at a time; only its own tokens count."""
    tokenizer = tiny.tokenizer(bos_token=start)
    target = tiny.llama(3)
    rows = tiny.texts(6, supervised=False)["input_ids"]
    rows = [[*([] if start is None else [tokenizer.bos_token_id]), *ids] for ids in rows]
    examples = Dataset.from_dict({"input_ids": [[*ids, tokenizer.eos_token_id] for ids in rows[4:]]})
    rows = rows[:4]
    first = int(start is not None)
    context = [*rows_of(examples)[0][:-1], *rows_of(examples)[1][first:-1]]
    losses = []
    for ids in rows:
        log_probs = target(torch.tensor([context + ids[first:]])).logits[0].double().log_softmax(-1)
        shift = len(context) - first
        losses += [-log_probs[shift + at - 1, ids[at]].item() for at in range(1, len(ids))]
    methods, data = ("pretrained", "few_shot"), Dataset.from_dict({"input_ids": rows})
    reward = reward_on(tiny.llama(1), tokenizer)
    for problem in (None, "on purpose"):
        monkeypatch.setattr(FewShot, "why_not_projected", lambda self, batch, problem=problem: problem)
        report = portability_report(reward, {"new": target}, data, methods, few_shot=examples)
        found = {method: each.nll.value for method, each in report.targets["new"].figures.items()}
        assert found["few_shot"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert abs(found["few_shot"] - found["pretrained"]) > 1e-3 and report.notes == []
    short = tiny.llama(3, max_position_embeddings=len(context) + 9)
    report = portability_report(reward, {"short": short}, data, methods, few_shot=examples)
    needed = len(context) + max(map(len, rows))
    told = f"few-shot is left out at short: it reads {len(context) + 9} tokens, and {needed} are needed"
    assert report.notes == [told] and "few_shot" not in report.targets["short"].figures


def rows_of(dataset):
    return list(dataset["input_ids"])


def test_examples_of_a_chat_are_its_turns():
    tokenizer = tiny.tokenizer(chat_template=tiny.CHAT_TEMPLATE)
    turns = [[{"role": "user", "content": "w5"}, {"role": "assistant", "content": f"w{end}"}] for end in (6, 7)]
    reward = reward_on(tiny.llama(1), tokenizer)
    expected = tokenizer("w3 w5 w4 w6 w3 w5 w4 w7", add_special_tokens=False)["input_ids"]
    assert context_of(Dataset.from_dict({"messages": turns}), reward, 99) == expected
    with pytest.raises(PRTValueError, match="Only language models read examples"):
        portability_report(reward_on(tiny.vit(1)), {"new": tiny.vit(3)}, labelled(), few_shot=labelled())


def test_loras_are_tuned_as_long_as_the_reward_and_with_as_much_compute(tokenizer, tmp_path):
    source, target, rows = tiny.llama(1), tiny.llama(3, num_hidden_layers=9), tiny.texts(16)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    reward = reward_on(source, tokenizer)
    tuning = Tuning(rows.select_columns("input_ids"), steps=6, learning_rate=1e-2, batch_size=4)
    sizes = [sum(each.numel() for each in model.parameters()) for model in (reward.network, source, target)]
    compute = round(6 * (2 * sizes[0] + sizes[1]) / (2 * sizes[2]))
    passes = []
    kwargs = {"tuning": tuning, "output_dir": tmp_path / "report"}
    kwargs |= {"progress": lambda batches, text: passes.append(text) or batches}
    methods = ("pretrained", "lora_steps", "lora_compute")
    report = portability_report(reward, {"new": target}, rows, methods, **kwargs)
    assert report.notes == [f"LoRA at new: 6 steps, and {compute} for as much compute"] and compute not in (1, 6)
    for method, steps in (("lora_steps", 6), ("lora_compute", compute)):
        set_seed(0)
        args = SFTConfig(
            tmp_path / "trl",
            max_steps=steps,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
        )
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        model = wrap(copy.deepcopy(target), lora)
        trainer = SFTTrainer(model, args, train_dataset=tuning.rows, processing_class=tokenizer)
        trainer.train()
        assert_is(report, "new", method, trainer.model.eval(), rows)
    assert report.targets["new"].figures["lora_steps"].nll < report.targets["new"].figures["pretrained"].nll
    assert "| LoRA, as many steps |  | " in report.table()
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items()), "left as it is"
    passes.clear()
    again = portability_report(reward, {"new": target}, rows, methods, **kwargs)
    assert passes == [] and again.table() == report.table()


def test_classifiers_are_tuned_too(tmp_path):
    source, target = tiny.resnet(1), tiny.resnet(3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    images = [Image.fromarray(np.random.default_rng(index).integers(0, 255, (8, 8), "uint8")) for index in range(8)]
    rows = Dataset.from_dict({"image": images, "label": list(tiny.COLOURS) * 2})
    reward = reward_on(source)
    size = {"height": 8, "width": 8}
    reward.processing_class = ViTImageProcessorPil(size=size, image_mean=[0.5], image_std=[0.5])
    report = portability_report(
        reward, {"new": target}, rows, ("pretrained", "lora_steps"), tuning=Tuning(rows, 20, 1e-2)
    )
    figures = report.targets["new"].figures
    assert figures["lora_steps"].nll.value < figures["pretrained"].nll.value - 0.1
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items()), "statistics too"


def test_the_command_asks_with_examples_and_tunes_rivals(places, capsys):
    Path("test.jsonl").write_text('{"text": "w3 w4 w5"}\n{"text": "w6 w7 w8 w9"}\n')
    Path("train.jsonl").write_text('{"text": "w3 w4 w6"}\n' * 9)
    command = ["evaluate", "reward", "--targets", "new", "--data", "test.jsonl", "--few_shot", "1"]
    assert main([*command, "--tune_rivals", "2", "--train_data", "train.jsonl", "--output_dir", "out"]) == 0
    assert Path("out/report.png").is_file()
    out = capsys.readouterr().out
    assert all(f"| {name} |" in out for name in ("few-shot", "LoRA, as many steps", "LoRA, as much compute"))
    assert "LoRA at new: 2 steps, and 4 for as much compute" in out
    assert main(command) == 1
    assert "The examples to learn from are those that are measured on." in capsys.readouterr().err
