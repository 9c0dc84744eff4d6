"""The demo: its data, its table, its files, and the command around it, all at tiny sizes."""

import json

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTImageProcessor

from prt_hf import PRTError, RewardModel, VocabularyMismatchError
from prt_hf.cli import main
from prt_hf.demo import OwnModels, images, prose, run_demo, text
from prt_hf.demo.comparison import EFT, FINE_TUNED, METHODS, PLACES, PRETRAINED, PRT, REWARD_ONLY, gain_recovered, hits
from prt_hf.demo.data import load_splits
from prt_hf.demo.report import table
from prt_hf.demo.training import Steps
from prt_hf.errors import PRTValueError

TEXT = text.TextSettings(
    old={"hidden_size": 32, "num_hidden_layers": 1},
    new={"hidden_size": 32, "num_hidden_layers": 2},
    vocabulary_size=300,
    length=32,
    old_pretraining=Steps(2, 1e-3, 4),
    new_pretraining=Steps(3, 1e-3, 4),
    tuning=Steps(3, 1e-2, 4),
    new_tokens=6,
    timed_repeats=1,
)
IMAGES = images.ImageSettings(
    old={"hidden_size": 16, "num_hidden_layers": 1},
    new={"hidden_sizes": [8, 16], "depths": [1, 1]},
    old_pretraining=Steps(5, 3e-3, 16),
    new_pretraining=Steps(5, 3e-3, 16),
    tuning=Steps(3, 1e-2, 16),
    timed_repeats=1,
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A small standard library: ten modules of documented functions, and what has to be left out of it."""
    folder = tmp_path_factory.mktemp("library")
    for module in range(10):
        prose_of = "\n\n".join(
            f'def f{index}():\n    """Return value {module * 10 + index} of the module that is shown here.\n\n'
            f'    The number {index} stands alone in file {module} of them all. See below.\n    """'
            for index in range(6)
        )
        (folder / f"m{module}.py").write_text(
            f'"""Module {module} holds some functions that do nothing at all."""\n{prose_of}'
        )
    (folder / "broken.py").write_text("def (:\n")
    (folder / "test").mkdir()
    (folder / "test" / "test_m.py").write_text('"""These are tests and nobody reads them as a text in prose."""')
    return folder


@pytest.fixture(scope="module")
def outcomes(library, tmp_path_factory):
    """Both tasks, run once into one folder."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    documents = prose.standard_library_documents(library)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prose, "standard_library_documents", lambda: documents)
        return {
            "text": run_demo("text", folder, seed=3, text_settings=TEXT),
            "images": run_demo("images", folder, seed=3, image_settings=IMAGES),
        }


def test_bullets_are_what_the_docstring_says():
    passage = ["The first one.", "Is this the second?", "JSON text comes third (see below)."]
    assert prose.as_bullets(passage) == (
        "- the first one\n- is this the second?\n- jSON text comes third (see below)\nThe end."
    )


def test_prose_is_told_from_code_and_tables():
    document = (
        "Open a file and\nreturn a stream. It may\nraise an error.\n\n"
        ">>> open('x')  # This looks like a sentence but it is code.\n\n"
        "| a | b | c | d | e | f | g | h | 1 | 2 | 3 | 4 | 5 |.\n\nShort.\n\nnot a sentence, since it starts small."
    )
    assert prose.sentences(document) == ["Open a file and return a stream.", "It may raise an error."]


def test_documents_are_docstrings_in_a_fixed_order(library):
    documents = prose.standard_library_documents(library)
    names = list(documents)
    assert names[:10] == [f"m{module}.py" for module in range(10)]
    assert all(name.startswith("help(") for name in names[10:])
    assert documents["m0.py"].startswith("Module 0 holds some functions that do nothing at all.\n\nReturn value 0 of")


def test_no_sentence_is_in_two_splits(library):
    documents = prose.standard_library_documents(library)
    splits = prose.split(documents, seed=0)
    seen = [sentence for part in splits for passage in part for sentence in passage]
    assert len(seen) == len(set(seen)) > 100
    assert all(splits)
    # whole documents: file 4's sentences are all in one split
    owners = {
        name
        for name, part in zip(splits._fields, splits, strict=True)
        if any("in file 4 of" in s for p in part for s in p)
    }
    assert len(owners) == 1
    assert splits == prose.split(documents, seed=0) != prose.split(documents, seed=1)


def test_the_tokenizer_gives_text_back():
    tokenizer = prose.train_tokenizer(["Return the value of the key, or a default."] * 3, 280)
    ids = tokenizer("- return ütf\n")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "- return ütf\n"
    assert len(tokenizer) <= 280


def test_digits_are_disjoint_and_turned():
    pixels, labels = images.digits(seed=0)
    assert pixels.shape == (1797, 8, 8) and (pixels.min(), pixels.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(images.shift(pixels[:5], 0.0, 0.0, 0), pixels[:5])
    np.testing.assert_allclose(images.shift(pixels[:5], 90.0, 0.0, 0), np.rot90(pixels[:5], axes=(1, 2)), atol=1e-12)
    noise = images.shift(pixels, 0.0, 0.1, 0) - pixels
    assert abs(noise.std() - 0.1) < 0.002  # 115,008 pixels: a standard error of 0.0002
    order = images.digits(seed=1)[1]
    assert (order != labels).any() and sorted(order) == sorted(labels)


def test_gain_recovered():
    scores = {PRETRAINED: {"target": 4.0}, PRT: {"target": 2.5}, FINE_TUNED: {"target": 2.0}}
    assert gain_recovered(scores) == 0.75
    assert gain_recovered(scores | {FINE_TUNED: {"target": 4.0}}) is None


def test_hits_are_percent():
    log_probs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4]]).log()
    assert hits(log_probs, torch.tensor([1, 0, 1])).mean() == pytest.approx(200 / 3)


def test_text_scores_equal_a_recomputation_token_by_token(outcomes, library):
    """From what was saved, in float64 and without batches: pretrained, reward only and PRT, at both places."""
    outcome = outcomes["text"]
    folder = outcome.reward.parent
    reward = RewardModel.from_pretrained(outcome.reward)
    models = {place: AutoModelForCausalLM.from_pretrained(folder / f"text-{place}") for place in PLACES}
    passages = prose.split(prose.standard_library_documents(library), seed=3).test
    tokenizer = reward.processing_class
    texts = tokenizer([prose.as_bullets(passage) for passage in passages])["input_ids"]
    rows = [[*ids, tokenizer.eos_token_id][: TEXT.length] for ids in texts]
    sums, count = dict.fromkeys(((m, p) for m in (PRETRAINED, REWARD_ONLY, PRT) for p in PLACES), 0.0), 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row])
            r = reward(input_ids=ids).double()[0, :-1]
            count += len(row) - 1
            for place, model in models.items():
                logits = model(input_ids=ids).logits.double()[0, :-1]
                for method, scores in ((PRETRAINED, logits), (REWARD_ONLY, r), (PRT, logits + r)):
                    probs = scores.exp() / scores.exp().sum(-1, keepdim=True)
                    sums[method, place] -= probs[range(len(row) - 1), row[1:]].log().sum().item()
    for (method, place), value in sums.items():
        assert outcome.result.scores[method][place] == pytest.approx(value / count, abs=2e-5), (method, place)


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
        assert outcome.result.scores[method]["target"] == pytest.approx(accuracy, abs=0.3), method
    assert len(test["labels"]) == 1797 - IMAGES.new_images - IMAGES.tuning_images


@pytest.mark.parametrize("task", ["text", "images"])
def test_what_has_to_hold_by_definition(outcomes, task):
    scores = outcomes[task].result.scores
    assert tuple(scores) == METHODS
    # With its own source, EFT is the fine-tuned old model; and a reward alone knows no place.
    assert scores[EFT]["source"] == pytest.approx(scores[FINE_TUNED]["source"], abs=1e-4)
    assert scores[REWARD_ONLY]["source"] == scores[REWARD_ONLY]["target"]
    assert scores[PRT]["target"] != scores[PRETRAINED]["target"] != scores[EFT]["target"]


def test_the_table_and_the_file_show_the_scores(outcomes):
    folder = outcomes["text"].reward.parent
    written = json.loads((folder / "results.json").read_text())
    for task, outcome in outcomes.items():
        result = outcome.result
        assert written[task]["scores"] == result.scores
        assert written[task]["seed"] == 3 and written[task]["versions"]["torch"] == torch.__version__
        lines = table(result).splitlines()
        digits = 3 if task == "text" else 1
        for line, method in zip(lines[2:7], METHODS, strict=True):
            name, (source, target, milliseconds, held, forwards) = line[:12].strip(), line[12:].split()
            assert name == method
            assert (source, target) == tuple(f"{result.scores[method][place]:.{digits}f}" for place in PLACES)
            assert milliseconds == f"{result.milliseconds[method]:.2f}" and float(milliseconds) > 0
            assert (int(held), int(forwards)) == {PRT: (2, 2), EFT: (2 if task == "text" else 3, 3)}.get(method, (1, 1))
        gain = gain_recovered(result.scores)
        assert lines[7].endswith("undefined" if gain is None else f"{gain:.0%}")


@pytest.mark.parametrize("task", ["text", "images"])
def test_the_printed_lines_run(outcomes, task, capsys):
    exec(outcomes[task].usage, {})
    printed = capsys.readouterr().out
    assert printed.startswith(text.PROMPT) if task == "text" else all(word in images.DIGITS for word in eval(printed))


def test_figures_are_drawn(outcomes):
    for outcome in outcomes.values():
        with Image.open(outcome.figure) as figure:
            assert figure.format == "PNG" and figure.width > 800
            assert len(figure.convert("RGB").getcolors(2**20)) > 10


def test_the_same_seed_gives_the_same_numbers(outcomes, tmp_path):
    again = run_demo("images", tmp_path, seed=3, image_settings=IMAGES)
    assert again.result.scores == outcomes["images"].result.scores
    other = run_demo("images", tmp_path, seed=4, image_settings=IMAGES)  # over the first, which is the demo's own
    assert other.result.scores != again.result.scores
    assert json.loads((tmp_path / "results.json").read_text())["images"]["seed"] == 4


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
    assert f"{written['scores'][PRT]['target']:.3f}" in printed
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
