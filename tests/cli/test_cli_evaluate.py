"""`prt-hf evaluate` prints what `portability_report` gives, and goes on after an interruption."""

import json
from functools import partial
from pathlib import Path

import lm_eval.tasks
import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, Image
from lm_eval.tasks import TaskManager
from peft import LoraConfig, PeftModel
from transformers import ViTImageProcessorPil

from prt_hf import RewardModel
from prt_hf.cli import main
from prt_hf.evaluation import PortabilityReport, portability_report
from prt_hf.networks.adapters import wrap
from prt_hf.networks.auto import load_processing_class

TEXTS = [" ".join(f"w{3 + (7 * row + column) % 90}" for column in range(9)) for row in range(5)]


def save(folder, model, processing_class):
    model.save_pretrained(folder)
    processing_class.save_pretrained(folder)
    return model


def make_reward(base):
    torch.manual_seed(0)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    reward = RewardModel.from_base(base, peft_config=config)
    reward.trained_with(reward.config.reward_base, kl_coef=1.0, entropy_coef=0.0)
    reward.save_pretrained("reward")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny.tokenizer()
    source = save("source", tiny.llama(1), tokenizer)
    for name, model in {"one": tiny.gpt2(2), "two": tiny.llama(3), "tuned-two": tiny.llama(4)}.items():
        save(name, model, tokenizer)
    save("tuned-one", tiny.gpt2(5), tokenizer)
    make_reward("source")
    tuned = wrap(source, LoraConfig(init_lora_weights=False, target_modules="all-linear"))
    tuned.peft_config["default"].base_model_name_or_path = "source"
    tuned.save_pretrained("tuned")
    Path("texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return tmp_path


def evaluate(capsys, *arguments, status=0):
    assert main(["evaluate", *map(str, arguments)]) == status
    return capsys.readouterr()


def test_the_table_is_printed_and_all_is_written(folder, capsys):
    arguments = ("reward", "--targets", "one", "two", "--data", "texts.jsonl", "--eft", "tuned", "--batch_size", 2)
    more = ("--finetuned", "tuned-one", "tuned-two", "--output_dir", "out", "--write_card")
    printed = evaluate(capsys, *arguments, *more)
    assert "one: pretrained, EFT, PRT, reward only" in printed.err, "progress"
    expected = portability_report(
        "reward",
        ["one", "two"],
        Dataset.from_list([{"text": text} for text in TEXTS]).shuffle(seed=0),
        eft="tuned",
        finetuned={"one": "tuned-one", "two": "tuned-two"},
        batch_size=2,
        dataset_name="texts.jsonl",
    )
    report = PortabilityReport.from_folder("out", expected.config)
    assert printed.out == report.table() == Path("out/report.md").read_text()
    assert "(train)" not in printed.out, "a file has no splits"
    for place, there in zip(report.places, expected.places, strict=True):
        for method, figures in place.figures.items():
            assert (figures.nll, figures.accuracy) == (there.figures[method].nll, there.figures[method].accuracy)
    assert report.verdict() == expected.verdict()
    card = Path("reward/README.md").read_text()
    value = report.targets["two"].figures["pretrained"].nll.value
    assert f"| `two` | `texts.jsonl` | `nll`, lower is better | {value:.4g} |" in card
    assert Path("out/report.png").read_bytes().startswith(b"\x89PNG")

    again = evaluate(capsys, *arguments, *more, "--json")
    assert json.loads(again.out) == json.loads(Path("out/report.json").read_text())
    assert "one:" not in again.err, "nothing is measured again"


def test_rows_and_methods_are_chosen(folder, capsys):
    options = ("--methods", "pretrained", "prt", "--samples", 3, "--json")
    found = json.loads(evaluate(capsys, "reward", "--targets", "one", "--data", "texts.jsonl", *options).out)
    assert (found["rows"], found["positions"], found["notes"]) == (3, 27, [])
    assert list(found["targets"][0]["figures"]) == ["pretrained", "prt"]
    options = (*options, "--max_length", 5)
    found = json.loads(evaluate(capsys, "reward", "--targets", "one", "--data", "texts.jsonl", *options).out)
    assert found["positions"] == 3 * (5 - 1)
    assert not Path("out").exists()


def test_images_by_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    save("vit", tiny.vit(1, num_channels=3), processor)
    save("other", tiny.vit(2, names=tiny.COLOURS[::-1], num_channels=3), processor)
    if load_processing_class("vit", "image-classification") is None:
        pytest.skip("this transformers reads image processors with torchvision only")
    make_reward("vit")
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 8, 3), dtype=np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=tiny.COLOURS[::-1])})
    labels = [0, 1, 2, 3, 0, 1]
    Dataset.from_dict({"image": list(pixels), "label": labels}, features=features).to_parquet("images.parquet")
    out = evaluate(capsys, "reward", "--targets", "other", "--data", "images.parquet", "--json").out
    found = json.loads(out)["targets"][0]["figures"]["pretrained"]["accuracy"][0]
    with torch.no_grad():
        logits = tiny.vit(2, num_channels=3)(**processor(list(pixels), return_tensors="pt")).logits
    assert found == pytest.approx((logits.argmax(-1) == torch.tensor(labels)).double().mean().item())


def test_mistakes_are_told_in_a_message(folder, capsys):
    save("words", tiny.llama(2), tiny.tokenizer(changed={"w5": "v5"}))
    given = ("reward", "--targets", "one", "two", "--data", "texts.jsonl")
    for arguments, message in (
        ((*given, "--finetuned", "tuned-one"), "expected: 2, as many as --targets, in the same order\n  found: 1"),
        ((*given, "--methods", "ptr"), "Unknown method.\n"),
        ((*given, "--methods", "ptr"), "did you mean 'prt'?"),
        ((*given[:2], "one", "words", *given[4:]), "'w5' (5 -> absent)"),
        (("no/reward", *given[1:], "--write_card"), "The card can only be written into a folder."),
        ((*given, "--eft", "reward"), "reward is a reward, which is no model by itself."),
        ((*given[:4], "--data", "nothing.jsonl"), "The dataset nothing.jsonl cannot be loaded."),
    ):
        printed = evaluate(capsys, *arguments, status=1)
        assert printed.out == "" and printed.err.count("prt-hf evaluate: ") == 1
        assert message in printed.err and "Traceback" not in printed.err
    with pytest.raises(SystemExit):
        main(["evaluate", "reward", "--data", "texts.jsonl"])
    assert "the following arguments are required: --targets" in capsys.readouterr().err


TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
QUESTIONS = [{"question": f"w{5 + i} w6", "choices": ["w7 w8", f"w{9 + i}"], "answer": i % 2} for i in range(6)]


@pytest.fixture
def tasks(folder):
    file = folder / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "words.yaml").write_text(TASK.format(name="words", file=file))
    return folder


@pytest.fixture
def own_tasks_alone(monkeypatch):
    """The harness's own thousands are looked through anew for every evaluation, which takes seconds."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))


@torch.no_grad()
def share_right(log_probs_of):
    """Of the choices, the one with the larger log pi(choice | question)."""
    tokenizer, right = tiny.tokenizer(), []
    for question in QUESTIONS:
        scores = []
        for choice in question["choices"]:
            ids = tokenizer(f"{question['question']} {choice}", return_tensors="pt")["input_ids"]
            log_probs = log_probs_of(ids)[0, 1:-1].log_softmax(-1)  # behind the two words of the question
            scores.append(log_probs.gather(-1, ids[0, 2:, None]).sum().item())
        right.append(scores[question["answer"]] == max(scores))
    return sum(right) / len(right)


def test_the_harness_asks_the_backbone_and_the_prt_model(tasks, own_tasks_alone, capsys):
    arguments = ("reward", "--targets", "one", "--tasks", "words", "--include_path", "tasks", "--output_dir", "out")
    printed = evaluate(capsys, *arguments, "--write_card")
    reward, target = RewardModel.from_pretrained("reward"), tiny.gpt2(2)
    alone = share_right(lambda ids: target(ids).logits)
    ported = share_right(lambda ids: target(ids).logits.log_softmax(-1) + reward(input_ids=ids))
    assert printed.out == Path("out/tasks.md").read_text()
    lines = printed.out.splitlines()
    assert lines[4:7] == ["## words: acc, higher is better", "", "|  | `one` |"]
    for line, name, share in ((lines[8], "pretrained", alone), (lines[9], "PRT", ported)):
        error = 1.959964 * (share * (1 - share) / (len(QUESTIONS) - 1)) ** 0.5
        interval = f" [{share - error:.4g}, {share + error:.4g}]" if error else ""
        assert line == f"| {name} | {share:.4g}{interval} |"
    card = Path("reward/README.md").read_text()
    assert f"| `one` | `words` | `acc`, higher is better | {alone:.4g} | {ported:.4g} |" in card

    again = evaluate(capsys, *arguments, "--json")
    assert json.loads(again.out)["tasks"]["one"]["prt"]["words"]["acc"][0] == pytest.approx(ported)
    assert "Running loglikelihood" not in again.err, "nothing is asked again"


def test_an_unknown_task_is_told_with_the_nearest(tasks, capsys):
    given = ("reward", "--targets", "one", "--include_path", "tasks", "--tasks")
    assert "found: 'wordz'\n  remedy: did you mean 'words" in evaluate(capsys, *given, "words", "wordz", status=1).err
    printed = evaluate(capsys, *given[:3], status=1)
    assert "There is nothing to evaluate on.\n  expected: --data, or --tasks, or both" in printed.err


PERPLEXITY = """\
task: far
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " w3 w4"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""


@torch.no_grad()
def perplexity(log_probs_of):
    """exp of the mean over the questions of -log pi(w3 w4 | question)."""
    sums, tokenizer = [], tiny.tokenizer()
    for question in QUESTIONS:
        ids = tokenizer(f"{question['question']} w3 w4", return_tensors="pt")["input_ids"]
        sums.append(log_probs_of(ids)[0, 1:-1].log_softmax(-1).gather(-1, ids[0, 2:, None]).sum())
    return torch.stack(sums).mean().neg().exp().item()


@pytest.mark.parametrize("eft", ["tuned", "whole"])
def test_the_harness_asks_eft_and_fine_tuned_models(tasks, own_tasks_alone, capsys, eft):
    (tasks / "tasks" / "far.yaml").write_text(PERPLEXITY.format(file=tasks / "questions.jsonl"))
    source, target, oracle = tiny.llama(1), tiny.gpt2(2), tiny.gpt2(5)
    whole = save("whole", tiny.llama(9), tiny.tokenizer())
    tuned = whole if eft == "whole" else PeftModel.from_pretrained(tiny.llama(1), "tuned")
    arguments = ("reward", "--targets", "one", "--tasks", "far", "--include_path", "tasks", "--output_dir", "out")
    arguments += ("--eft", eft, "--finetuned", "tuned-one", "--json")
    found = json.loads(evaluate(capsys, *arguments).out)["tasks"]["one"]
    expected = {
        "eft": lambda ids: target(ids).logits + tuned(ids).logits - source(ids).logits,
        "finetuned": lambda ids: oracle(ids).logits,
    }
    for method, logits_of in expected.items():
        assert found[method]["far"]["perplexity"][0] == pytest.approx(perplexity(logits_of), rel=1e-4), method
    assert list(found) == ["pretrained", "eft", "prt", "finetuned"]
    assert "Running loglikelihood" not in evaluate(capsys, *arguments).err, "nothing is asked again"


def test_stdout_is_json_alone_and_changed_tasks_are_asked_again(tasks, own_tasks_alone, capsys):
    """The harness prints while it bootstraps."""
    (tasks / "tasks" / "far.yaml").write_text(PERPLEXITY.format(file=tasks / "questions.jsonl"))
    given = ("reward", "--targets", "one", "--include_path", "tasks", "--output_dir", "out", "--tasks")
    printed = evaluate(capsys, *given, "far", "words", "--json")
    before = json.loads(printed.out, parse_constant=pytest.fail)["tasks"]["one"]["prt"]
    assert before["far"]["perplexity"][0] > 1
    words = tasks / "tasks" / "words.yaml"
    words.write_text(words.read_text().replace("{{answer}}", "{{1 - answer}}"))
    after = json.loads(evaluate(capsys, *given, "words", "--json").out)["tasks"]["one"]["prt"]
    assert after["words"]["acc"][0] == pytest.approx(1 - before["words"]["acc"][0])


def test_damaged_scores_and_targets_of_one_name_are_told(tasks, own_tasks_alone, capsys):
    given = ("reward", "--targets", "one", "--include_path", "tasks", "--tasks", "words")
    Path("out").mkdir()
    for text in (
        '{"one pretrained words": 3}',
        '{"one pretrained words": {"key": "", "scores": {"acc": 1}}}',
        "[1]",
        "{",
    ):
        Path("out/tasks.json").write_text(text)
        message = evaluate(capsys, *given, "--output_dir", "out", status=1).err
        assert "out/tasks.json cannot be read: " in message and "Traceback" not in message
    assert "'one' more than once" in evaluate(capsys, *given[:3], *given[2:], status=1).err
    assert (
        "Nothing can be written into questions.jsonl"
        in evaluate(capsys, *given, "--output_dir", "questions.jsonl", status=1).err
    )


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_loaded(folder, capsys):
    given = ("reward", "--targets", "one", "--data", "texts.jsonl", "--output_dir", "texts.jsonl/report")
    printed = evaluate(capsys, *given, status=1)
    assert (
        "Nothing can be written into texts.jsonl/report" in printed.err
        and "batch" not in printed.err
        and "Traceback" not in printed.err
    )
