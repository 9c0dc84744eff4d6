"""The demo: its data, its table, its files, and the command around it, all at tiny sizes."""

import json
import sys
from argparse import ArgumentParser
from dataclasses import asdict, replace

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTImageProcessor

from prt_hf import PRTError, RewardModel, VocabularyMismatchError
from prt_hf.cli import demo, main
from prt_hf.demo import OwnModels, answers, facts, images, run_demo
from prt_hf.demo.comparison import EFT, FINE_TUNED, METHODS, PLACES, PRETRAINED, PRT, REWARD_ONLY, hits
from prt_hf.demo.data import load_splits
from prt_hf.demo.report import Measure, table
from prt_hf.demo.training import Steps
from prt_hf.errors import PRTValueError

SMALL = {"hidden_size": 32, "num_hidden_layers": 1}
TEXT = answers.AnswerSettings(
    world=facts.WorldSettings(
        old=SMALL, new=SMALL, old_pretraining=Steps(2, 1e-3, 4), new_pretraining=Steps(3, 1e-3, 4), texts=1
    ),
    tuning=Steps(3, 1e-2, 4),
    tunings=2,
    new_tokens=8,
    samples=1,
)
IMAGES = images.ImageSettings(
    old={"hidden_size": 16, "num_hidden_layers": 1},
    new={"hidden_sizes": [8, 16], "depths": [1, 1]},
    old_pretraining=Steps(5, 3e-3, 16),
    new_pretraining=Steps(5, 3e-3, 16),
    tuning=Steps(3, 1e-2, 16),
    tunings=2,
)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Both tasks, run once into one folder."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    return {
        "text": run_demo("text", folder, seed=3, text_settings=TEXT),
        "images": run_demo("images", folder, seed=3, image_settings=IMAGES),
    }


def test_digits_are_disjoint_and_turned():
    pixels, labels = images.digits(seed=0)
    assert pixels.shape == (1797, 8, 8) and (pixels.min(), pixels.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(images.shift(pixels[:5], 0.0, 0.0, 0), pixels[:5])
    np.testing.assert_allclose(images.shift(pixels[:5], 90.0, 0.0, 0), np.rot90(pixels[:5], axes=(1, 2)), atol=1e-12)
    noise = images.shift(pixels, 0.0, 0.1, 0) - pixels
    assert abs(noise.std() - 0.1) < 0.002  # 115,008 pixels: a standard error of 0.0002
    order = images.digits(seed=1)[1]
    assert (order != labels).any() and sorted(order) == sorted(labels)


def test_hits_are_percent():
    log_probs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]]).log()
    assert hits(log_probs, torch.tensor([1, 0, 1])).mean() == pytest.approx(200 / 3)


@pytest.fixture(scope="module")
def saved(outcomes):
    """What the text task saved: the reward of the first tuning, and both models."""
    outcome = outcomes["text"]
    reward = RewardModel.from_pretrained(outcome.reward)
    folder = outcome.reward.parent
    models = {place: AutoModelForCausalLM.from_pretrained(folder / f"text-{place}") for place in PLACES}
    return reward, models


@torch.no_grad()
def probabilities(scores, ids):
    """softmax in float64 of the sum of what the models say about every next token."""
    logits = sum(model(input_ids=ids) if isinstance(model, RewardModel) else model(ids).logits for model in scores)
    return logits.double().softmax(-1)[0]


def test_losses_equal_a_recomputation_token_by_token(outcomes, saved):
    """From what was saved, in float64 and without batches: pretrained, reward only and PRT, at both places."""
    reward, models = saved
    tokenizer = reward.processing_class
    sums, count = dict.fromkeys(((m, p) for m in (PRETRAINED, REWARD_ONLY, PRT) for p in PLACES), 0.0), 0
    for country in facts.halves(3)[1]:
        start = len(tokenizer(country.prompt)["input_ids"])
        row = [*tokenizer(country.prompt + country.answer)["input_ids"], tokenizer.eos_token_id]
        ids, places = torch.tensor([row]), range(start - 1, len(row) - 1)
        count += len(places)
        for place, model in models.items():
            for method, terms in ((PRETRAINED, [model]), (REWARD_ONLY, [reward]), (PRT, [model, reward])):
                sums[method, place] -= probabilities(terms, ids)[places, row[start:]].log().sum().item()
    losses = outcomes["text"].result.measures[-1]
    for (method, place), value in sums.items():
        assert losses.values[method][place][0] == pytest.approx(value / count, abs=2e-5), (method, place)


def test_printed_answers_equal_a_recomputation(outcomes, saved):
    """The likeliest next token, one after another, of log pi + r without caches, batches and processors."""
    reward, models = saved
    tokenizer, (sample,) = reward.processing_class, outcomes["text"].result.samples
    for name, terms in (
        ("new model, pretrained", [models["target"]]),
        ("new model + PRT", [models["target"], reward]),
        ("reward only", [reward]),
    ):
        ids = start = tokenizer(sample.prompt + "\n", return_tensors="pt")["input_ids"]
        while ids.shape[1] < start.shape[1] + TEXT.new_tokens and ids[0, -1] != tokenizer.eos_token_id:
            ids = torch.cat([ids, probabilities(terms, ids)[-1].argmax().reshape(1, 1)], -1)
        answer = tokenizer.decode(ids[0, start.shape[1] :], skip_special_tokens=True)
        assert sample.texts[name] == answer.strip(), name


def test_shares_are_percent_of_answers():
    countries = facts.halves(0)[1][:4]
    right, other = countries[0], countries[1]
    wrong = replace(other, capital="Oslo").answer
    shares = answers.shares_of({(PRT, "target"): [right.answer, wrong, "", "Oslo"]}, countries)
    assert [share[PRT]["target"] for share in shares] == [50.0, 25.0, 25.0]


def test_measures_are_means_and_deviations_over_tunings():
    runs = [{method: dict.fromkeys(PLACES, value) for method in METHODS} for value in (10.0, 20.0, 60.0)]
    measure = Measure.from_runs("form (%)", runs)
    assert measure.mean(PRT, "target") == 30.0
    assert measure.spread(PRT, "target") == pytest.approx(700**0.5)  # ((20^2 + 10^2 + 30^2) / 2)^0.5
    assert measure.shown(PRT, "target") == "30.0 ± 26.5"
    assert Measure.from_runs("form (%)", runs[:1]).shown(EFT, "source") == "10.0"


def test_image_scores_equal_a_recount(outcomes):
    outcome = outcomes["images"]
    from safetensors.torch import load_file
    from transformers import AutoModelForImageClassification

    folder = outcome.reward.parent
    test = load_file(folder / "images-test.safetensors")
    reward = RewardModel.from_pretrained(outcome.reward)
    target = AutoModelForImageClassification.from_pretrained(folder / "images-target")
    with torch.no_grad():
        r, logits = reward(pixel_values=test["pixel_values"]), target(test["pixel_values"]).logits
    for method, scores in ((PRETRAINED, logits), (REWARD_ONLY, r), (PRT, logits.log_softmax(-1) + r)):
        accuracy = 100 * (scores.argmax(-1) == test["labels"]).double().mean().item()
        # a tie within float32 may fall either way
        assert outcome.result.measures[0].values[method]["target"][0] == pytest.approx(accuracy, abs=0.3), method
    assert len(test["labels"]) == 1797 - IMAGES.new_images - IMAGES.tuning_images


@pytest.mark.parametrize("task", ["text", "images"])
def test_what_has_to_hold_by_definition(outcomes, task):
    for measure in outcomes[task].result.measures:
        values = measure.values
        assert set(values) == set(METHODS)
        # With its own source, EFT is the fine-tuned old model; a reward alone knows no place; tuning changes no base.
        assert values[EFT]["source"] == pytest.approx(values[FINE_TUNED]["source"], abs=1e-4)
        assert values[REWARD_ONLY]["source"] == values[REWARD_ONLY]["target"]
        assert len(set(values[PRETRAINED]["target"])) == 1
    prt = values[PRT]["target"]
    assert len(prt) == 2 and prt[0] != prt[1] != values[EFT]["target"][1]


def test_the_table_and_the_file_show_the_scores(outcomes):
    folder = outcomes["text"].reward.parent
    written = json.loads((folder / "results.json").read_text())
    for task, outcome in outcomes.items():
        result = outcome.result
        assert written[task]["measures"] == [asdict(measure) for measure in result.measures]
        assert written[task]["seed"] == 3 and written[task]["versions"]["torch"] == torch.__version__
        assert written[task]["hardware"]["threads"] == 1
        lines = table(result).splitlines()
        assert lines[0] == result.title
        blocks = {"source": lines[3 : 3 + len(METHODS)], "target": lines[4 + len(METHODS) :]}
        for place, block in blocks.items():
            for line, method in zip(block, METHODS, strict=False):
                assert line.startswith(f"  {method} ")
                shown = [measure.shown(method, place) for measure in result.measures]
                held = {PRT: 2, EFT: 2 if task == "text" else 3}.get(method, 1)
                assert " ".join(line[14:].split()) == " ".join([*shown, str(held)] if place == "target" else shown)


@pytest.mark.parametrize("task", ["text", "images"])
def test_the_printed_lines_run(outcomes, task, capsys):
    exec(outcomes[task].usage, {})
    printed = capsys.readouterr().out
    assert (
        printed.startswith("Tell me about ") if task == "text" else all(word in images.DIGITS for word in eval(printed))
    )


def test_figures_are_drawn(outcomes):
    for outcome in outcomes.values():
        with Image.open(outcome.figure) as figure:
            assert figure.format == "PNG" and figure.width > 800
            assert len(figure.convert("RGB").getcolors(2**20)) > 10


@pytest.mark.parametrize("task", ["text", "images"])
def test_the_same_seed_gives_the_same_numbers_whatever_the_threads(outcomes, task, tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = run_demo(task, tmp_path, seed=3, text_settings=TEXT, image_settings=IMAGES)
        assert torch.get_num_threads() == 2, "which the demo gives back"
    finally:
        torch.set_num_threads(threads)
    assert table(again.result) == table(outcomes[task].result)
    assert again.result == outcomes[task].result
    bars = capsys.readouterr().err
    assert all(f"stage {number} of 10: " in bars for number in range(1, 11)) and "stage 11" not in bars


def test_another_seed_gives_other_numbers_in_the_same_folder(outcomes, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"made_by": "prt-hf demo", "images": {"seed": 3}}))
    (tmp_path / "images.png").touch()
    last = 2**32 - 1  # of numpy; the seeds of the tunings go on from 0
    other = run_demo("images", tmp_path, seed=last, image_settings=IMAGES)
    assert other.result.measures[0].values[PRT] != outcomes["images"].result.measures[0].values[PRT]
    assert json.loads((tmp_path / "results.json").read_text())["images"]["seed"] == last


def test_the_command_says_at_once_what_it_does(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "prt_hf.demo", None)  # which cannot be imported then
    with pytest.raises(ImportError):
        commands = ArgumentParser().add_subparsers()
        demo.run(demo.add_parser(commands).parse_args(["--task", "text", "--output_dir", "here"]))
    assert capsys.readouterr().err.startswith("prt-hf demo: text, ")


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(PRTValueError, match=r"(?s)the demo did not write.*found: thesis\.txt.*--output-dir"):
        run_demo("images", tmp_path, image_settings=IMAGES)
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture
def own(tmp_path):
    """Two language models, two classifiers with their labels in different orders, and data for both, in folders."""
    tokenizer = tiny.tokenizer()
    for name, model in (("old", tiny.llama(0)), ("new", tiny.llama(1, hidden_size=64))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    for name, model in (
        ("old-classifier", tiny.vit(0, num_channels=3)),
        ("new-classifier", tiny.resnet(1, names=tiny.COLOURS[::-1], num_channels=3)),
    ):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    lines = [{"text": " ".join(f"w{3 + (row * step) % 90}" for step in range(1, 20))} for row in range(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({"body": line["text"]}) for line in lines))
    generator = np.random.default_rng(0)
    rows = [
        {
            "image": Image.fromarray(generator.integers(0, 255, (12, 12, 3), dtype=np.uint8)),
            "label": tiny.COLOURS[row % 4],
        }
        for row in range(20)
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "images.parquet")
    return tmp_path


def arguments(own, source, target, dataset, *more):
    places = ["--source", str(own / source), "--target", str(own / target), "--dataset", str(own / dataset)]
    return ["demo", *places, "--output-dir", str(own / "out"), "--steps", "2", *more]


def test_command_with_own_language_models(own, capsys):
    assert main(arguments(own, "old", "new", "text.jsonl", "--task", "text")) == 0
    printed = capsys.readouterr().out
    written = json.loads((own / "out" / "results.json").read_text())["text"]
    assert f"{written['measures'][0]['values'][PRT]['target'][0]:.3f}" in printed
    assert written["models"]["source"] == str(own / "old") and written["models"]["tuning"]["steps"] == 2
    assert f"reward: {own / 'out' / 'text-reward'}" in printed
    usage = printed[printed.index("Use the reward:") :].partition("\n\n")[2]
    exec("\n".join(line.removeprefix("    ") for line in usage.splitlines()), {})


def test_command_with_own_classifiers(own, capsys):
    assert main(arguments(own, "old-classifier", "new-classifier", "images.parquet", "--task", "images")) == 0
    printed = capsys.readouterr().out
    usage = printed[printed.index("Use the reward:") :].partition("\n\n")[2]
    exec("\n".join(line.removeprefix("    ") for line in usage.splitlines()), {})
    assert set(eval(capsys.readouterr().out)) <= set(tiny.COLOURS)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--source", "x"], "--source, --target and --dataset together\n  found: no --target, no --dataset"),
        (["--source", "x", "--target", "y", "--dataset", "z"], "--task text or --task images"),
        (["--task", "text", "--source", "nowhere/x", "--target", "y", "--dataset", "z"], "nowhere/x cannot be loaded"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, capsys, more, message):
    assert main(["demo", "--output-dir", str(tmp_path / "out"), *more]) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("prt-hf demo: ") and "Traceback" not in printed.err
    assert printed.out == ""


def test_command_names_the_missing_column(own, capsys):
    assert main(arguments(own, "old", "new", "other.jsonl", "--task", "text")) == 1
    assert "has no column 'text'" in capsys.readouterr().err
    assert main(arguments(own, "old", "new", "nothing.jsonl", "--task", "text")) == 1
    assert "nothing.jsonl cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [["--task", "music"], ["--steps", "0"], ["--seed", "x"], ["--learning-rate", "-1"]])
def test_bad_arguments_leave_with_2(bad, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["demo", *bad])
    assert leaving.value.code == 2
    assert "prt-hf demo: error: argument" in capsys.readouterr().err


def test_unlike_vocabularies_are_refused(own):
    other = tiny.tokenizer(changed={"w5": "five"})
    other.save_pretrained(own / "new")
    with pytest.raises(VocabularyMismatchError):
        run_demo("text", own / "out", own=OwnModels(str(own / "old"), str(own / "new"), str(own / "text.jsonl")))


def test_rows_are_set_aside_to_judge_on(own):
    train, test = load_splits(str(own / "text.jsonl"), seed=0)
    assert (len(train), len(test)) == (27, 3)
    assert not set(train["text"]) & set(test["text"])
    assert issubclass(PRTValueError, PRTError)


def test_tokenizer_of_the_demo_opens_texts_for_the_models(outcomes):
    tokenizer = AutoTokenizer.from_pretrained(outcomes["text"].reward)
    assert set(tokenizer("return", return_tensors="pt")) == {"input_ids", "attention_mask"}
