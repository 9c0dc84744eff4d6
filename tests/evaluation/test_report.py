"""The portability report against a brute force in float64; interrupted or not, it is the same report."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import ClassLabel, Dataset, Features, Value
from peft import LoraConfig, PeftModel
from PIL import Image

from prt_hf import RewardConfig, RewardModel
from prt_hf.errors import (
    BaseModelMismatchError,
    LabelMismatchError,
    PRTValueError,
    RewardFileError,
    VocabularyMismatchError,
)
from prt_hf.evaluation import PortabilityReport, measure_portability, portability_report
from prt_hf.evaluation.figure import Bar, draw
from prt_hf.evaluation.rows import batches
from prt_hf.evaluation.tally import Z, wilson
from prt_hf.hub.card import METHODS, Measurement
from prt_hf.networks.adapters import wrap

METHODS = tuple(METHODS)[:5]  # those of the paper; others have tests of their own


def adapted(base, seed=0, **config):
    """A fine-tuned model, so to speak: LoRA that is not zero."""
    torch.manual_seed(seed)
    return wrap(base, LoraConfig(**{"target_modules": "all-linear", "init_lora_weights": False} | config)).eval()


def reward_on(base, tokenizer=None, seed=0):
    torch.manual_seed(seed)
    return RewardModel.from_base(base, tokenizer, LoraConfig(target_modules="all-linear", init_lora_weights=False))


def softmax(logits):
    weights = (logits - logits.max(-1, keepdim=True).values).exp()
    return weights / weights.sum(-1, keepdim=True)


def by_definition(reward, source, target, tuned_source, tuned_target, strength):
    """method -> probabilities, of logits `(positions, size)`: the paper's formulas, with nothing rearranged."""
    pi, new, ft, oracle = (softmax(logits.double()) for logits in (source, target, tuned_source, tuned_target))
    e_r = (strength * reward.double()).exp()
    at_target = {"pretrained": new, "eft": new * ft / pi, "prt": new * e_r, "reward_only": e_r, "finetuned": oracle}
    at_source = {"pretrained": pi, "eft": pi * ft / pi, "prt": pi * e_r, "reward_only": e_r, "finetuned": ft}
    return at_source, at_target


def assert_figures(found, weights, labels, rows):
    """
    Args:
        weights: probabilities up to a factor, `(positions, size)`.
        rows: of each position.
    """
    p = weights / weights.sum(-1, keepdim=True)
    losses = -p[torch.arange(len(labels)), labels].log().numpy()
    hits = (p.argmax(-1) == labels).double().numpy()
    names, counts = np.unique(rows, return_counts=True)

    def mean_and_error(values):
        sums = np.array([values[rows == name].sum() for name in names])
        mean = values.mean()
        variance = len(names) / (len(names) - 1) * ((sums - mean * counts) ** 2).sum() / counts.sum() ** 2
        return mean, math.sqrt(variance)

    mean, error = mean_and_error(losses)
    assert found.nll == pytest.approx((mean, mean - 1.959964 * error, mean + 1.959964 * error), rel=1e-4)
    assert found.entropy == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-4)
    mean, error = mean_and_error(hits)
    assert found.accuracy.value == pytest.approx(mean)
    count = len(names)
    if len(labels) > count and error:
        count = min(len(labels), mean * (1 - mean) / error**2)
    for end in (found.accuracy.low, found.accuracy.high):  # where the share is Z standard errors away
        assert abs(mean - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / count), abs=1e-6)


@torch.no_grad()
def text_logits(networks, rows):
    parts, where = [], []
    for index, row in enumerate(rows):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        logits = [network(ids).logits[0, :-1, : tiny.VOCABULARY] for network in networks]
        parts.append([value[labels != -100] for value in (*logits, labels)])
        where += [index] * int((labels != -100).sum())
    *logits, labels = map(torch.cat, zip(*parts, strict=True))
    return logits, labels, np.array(where)


def test_language_models_equal_the_definitions(tokenizer):
    source, targets = tiny.llama(1), {"one": tiny.gpt2(2, vocab_size=104), "two": tiny.mamba(3)}
    reward, tuned = reward_on(source, tokenizer), adapted(source, 7, target_modules=["q_proj"])
    oracles = {"one": tiny.gpt2(4, vocab_size=100), "two": adapted(targets["two"], 5, target_modules=["in_proj"])}
    rows = tiny.texts(7)
    report = portability_report(
        reward, targets, rows, METHODS, eft=tuned, finetuned=oracles, strength=0.5, batch_size=3, source=source
    )
    assert (report.rows, report.strength, report.methods, report.notes) == (7, 0.5, list(METHODS), [])
    for name, target in targets.items():
        logits, labels, where = text_logits([reward.network, source, target, tuned, oracles[name]], rows)
        at_source, at_target = by_definition(*logits, 0.5)
        for place, expected in ((report.source, at_source), (report.targets[name], at_target)):
            assert list(place.figures) == list(METHODS)
            for method in METHODS:
                assert_figures(place.figures[method], expected[method], labels, where)
        batched = batches(rows, reward, 3, 99)
        assert report.targets[name].portability == measure_portability(
            reward, target, batched, strength=0.5, source=source
        )
        bare, prt, oracle = (report.targets[name].figures[m].nll.value for m in ("pretrained", "prt", "finetuned"))
        expected = (prt - bare) / (oracle - bare) if oracle < bare else None
        assert report.gain_recovered(name) == (expected if expected is None else pytest.approx(expected))


PIXELS = torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))
CLASSES = [0, 1, 2, 3, 0, 1, 2, 3, 0]


def labelled(names=tiny.COLOURS, rows=9):
    """Labels of the data by name, in an order of their own."""
    features = Features({"pixel_values": [[[Value("float32")]]], "label": ClassLabel(names=names)})
    columns = {"pixel_values": PIXELS[:rows].tolist(), "label": CLASSES[:rows]}
    return Dataset.from_dict(columns, features=features)


def test_images_equal_the_definitions_with_every_model_in_an_order_of_labels_of_its_own():
    turned = [*tiny.COLOURS[2:], *tiny.COLOURS[:2]]
    source, target = tiny.vit(1), tiny.resnet(2, names=tiny.COLOURS[::-1])
    tuned, oracle = tiny.vit(3, names=turned), tiny.convnext(4)
    reward = reward_on(source)
    report = portability_report(
        reward, {"resnet": target}, labelled(turned), eft=tuned, finetuned={"resnet": oracle}, batch_size=4
    )
    labels = torch.tensor([tiny.COLOURS.index(turned[label]) for label in CLASSES])
    with torch.no_grad():
        logits = [network(pixel_values=PIXELS).logits for network in (reward.network, source, target, tuned, oracle)]
    logits[2], logits[3] = logits[2].flip(-1), logits[3].roll(2, -1)
    for place, expected in zip(report.places, by_definition(*logits, 1.0), strict=True):
        for method in METHODS:
            assert_figures(place.figures[method], expected[method], labels, np.arange(9))
    assert [(row.metric, row.is_lower_better) for row in report.measurements()[:2]] == [
        ("accuracy", False),
        ("nll", True),
    ]


def test_texts_are_classified(tokenizer):
    source, target, tuned = tiny.bert(1), tiny.bert(2, names=tiny.COLOURS[::-1]), tiny.bert(3)
    reward = reward_on(source, tokenizer)
    rows = Dataset.from_dict({"text": ["w3 w4 w5", "w6", "w7 w8"], "label": ["blue", "red", "grey"]})
    report = portability_report(reward, {"bert": target}, rows, ("pretrained", "eft"), eft=tuned, batch_size=1)
    logits = []
    with torch.no_grad():
        for text in rows["text"]:
            inputs = tokenizer(text, return_tensors="pt")
            logits.append([network(**inputs).logits[0] for network in (reward.network, source, target, tuned, tuned)])
    logits = [torch.stack(each) for each in zip(*logits, strict=True)]
    logits[2] = logits[2].flip(-1)
    _, expected = by_definition(*logits, 1.0)
    for method in ("pretrained", "eft"):
        assert_figures(report.targets["bert"].figures[method], expected[method], torch.tensor([2, 0, 3]), np.arange(3))
    assert report.targets["bert"].portability is None and report.methods == ["pretrained", "eft"]
    assert report.verdict() == {"bert": (None, ["PRT was not measured"])}


def test_the_interval_of_wilson_by_hand():
    assert wilson(0.5, 10) == pytest.approx((0.5, 0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.0, 0.2775), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((1.0, 0.7225, 1.0), abs=1e-4)


def test_a_method_holds_the_weights_of_its_networks_once(tokenizer):
    source, target = tiny.llama(1), tiny.gpt2(2)
    reward, tuned = reward_on(source, tokenizer), adapted(source, 7)
    report = portability_report(reward, {"new": target}, tiny.texts(3), METHODS, eft=tuned)

    def size(*networks):
        tensors = [tensor for each in networks for tensor in (*each.parameters(), *each.buffers())]
        return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())

    found = {method: figures.memory for method, figures in report.targets["new"].figures.items()}
    assert found == {
        "pretrained": size(target),
        "eft": size(target, tuned),
        "prt": size(target, reward.network),
        "reward_only": size(reward.network),
    }
    assert size(target, tuned) == size(target) + size(tuned), "the base of the adapter is the source"
    assert report.source.figures["pretrained"].memory == size(source)
    for place in report.places:
        time = {method: figures.milliseconds for method, figures in place.figures.items()}
        assert time["prt"] == pytest.approx(time["pretrained"] + time["reward_only"])
    assert report.notes == ["fine-tuned is left out, because the model (`finetuned=`) is missing, at: new"]


# Words


def test_the_verdict_says_what_follows(tokenizer):
    """A reward of zero: the target is as good without it."""
    reward = RewardModel.from_base(tiny.llama(1), tokenizer, LoraConfig(), reward_init="zero")
    report = portability_report(reward, {"new": tiny.llama(2)}, tiny.texts(6), ("prt", "pretrained"))
    worth, reasons = report.verdict()["new"]
    assert worth is False
    assert "the target does as well without the reward: no success" in reasons
    place = report.targets["new"]
    figures = {"advantage": {"target": 1.0, "prt_source": 0.1, "reward_only": -0.1}}
    errors = dict.fromkeys(figures["advantage"], 0.06)
    place.portability = replace(place.portability, **figures, standard_error=errors)
    assert report.verdict()["new"] == (
        None,
        [
            "target with the reward better than the target by itself: +1.000 +- 0.060 nats per token",
            "target with the reward within noise of the source with it: +0.100 +- 0.060 nats per token",
            "target with the reward within noise of the reward by itself: -0.100 +- 0.060 nats per token",
            "the data does not rule out that the source with the reward does as well: the target adds nothing",
            "the data does not rule out that the reward does as well without a backbone: nothing is carried over",
        ],
    )
    place.portability = replace(place.portability, standard_error=dict.fromkeys(errors, 0.01))
    worth, reasons = report.verdict()["new"]
    assert (worth, reasons[3:]) == (False, ["the reward does as well without a backbone: nothing is carried over"])


# Files


def saved(folder, model, processing_class=None):
    model.save_pretrained(folder)
    if processing_class is not None:
        processing_class.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def places(tmp_path, tokenizer, monkeypatch):
    """Everything by folder: a source, two targets, a reward and an adapter of the source, an oracle."""
    monkeypatch.chdir(tmp_path)
    source = tiny.llama(1)
    saved("source", source, tokenizer)
    for name, model in {"one": tiny.gpt2(2), "two": tiny.llama(3), "oracle": tiny.gpt2(4)}.items():
        saved(name, model, tokenizer)
    torch.manual_seed(0)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    reward = RewardModel.from_base("source", peft_config=config)
    reward.trained_with(reward.config.reward_base, kl_coef=1.0, entropy_coef=0.0)
    reward.save_pretrained("reward")
    tuned = adapted(source, 7)
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "source")
    tuned.save_pretrained("tuned")
    return tmp_path


def evaluate(targets=("one", "two"), rows=None, **kwargs):
    options = {"methods": METHODS, "eft": "tuned", "batch_size": 3, "output_dir": "report"} | kwargs
    if "one" in targets:
        options = {"finetuned": {"one": "oracle"}} | options
    return portability_report("reward", targets, tiny.texts(7) if rows is None else rows, **options)


def figures_of(report):
    """Without times, which differ from run to run."""
    return {
        (place.name, method): replace(figures, milliseconds=0.0)
        for place in report.places
        for method, figures in place.figures.items()
    }


class Interrupted(Exception):
    pass


def test_what_was_interrupted_goes_on_where_it_was(places, monkeypatch):
    passes = []

    def stopping_at(number):
        def progress(prepared, text):
            passes.append(text)
            if len(passes) == number:
                raise Interrupted
            return prepared

        return progress

    whole = evaluate(output_dir=None)
    with pytest.raises(Interrupted):
        evaluate(progress=stopping_at(2))
    assert passes == ["one: pretrained, EFT, PRT, reward only, fine-tuned", "one: fine-tuned"]
    with pytest.raises(Interrupted):
        evaluate(progress=stopping_at(4))
    assert passes[2:] == ["one: fine-tuned", "two: pretrained, EFT, PRT, reward only"]
    report = evaluate(progress=stopping_at(0))
    assert passes[4:] == ["two: pretrained, EFT, PRT, reward only"]
    assert figures_of(report) == figures_of(whole)
    assert report.verdict() == whole.verdict() and report.targets["two"].portability == whole.targets["two"].portability
    text = Path("report/report.json").read_text()

    calls = []
    forward = torch.nn.Module.__call__
    monkeypatch.setattr(
        torch.nn.Module, "__call__", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    )
    again = evaluate()
    assert calls == [], "no network runs"
    assert again == report and Path("report/report.json").read_text() == text

    # A model that has changed is measured again, and nothing else.
    saved("oracle", tiny.gpt2(5))
    passes.clear()
    assert (
        evaluate(progress=stopping_at(0)).targets["one"].figures["finetuned"]
        != report.targets["one"].figures["finetuned"]
    )
    assert passes == ["one: fine-tuned"]


def test_fewer_rows_at_a_time_are_the_same_evaluation(places):
    """What ran out of memory goes on with smaller batches."""
    before = evaluate(["two"])
    report = evaluate(["one", "two"], batch_size=1)
    assert report.targets["two"] == before.targets["two"] and list(report.targets) == ["two", "one"]


def test_figures_of_weights_that_are_gone_are_left_out(places):
    """Whatever is asked for now: a column of the table is of one model."""
    evaluate(["one", "two"])
    saved("one", tiny.gpt2(9))
    report = evaluate(["one"], methods=("prt",))
    assert set(report.targets["one"].figures) == {"reward_only", "finetuned", "prt"}
    assert list(report.targets["two"].figures) == ["pretrained", "eft", "prt", "reward_only"]

    adapted(tiny.llama(1), 8).save_pretrained("other")
    entries = json.loads(Path("other/adapter_config.json").read_text())
    Path("other/adapter_config.json").write_text(json.dumps(entries | {"base_model_name_or_path": "source"}))
    report = evaluate(["one"], eft="other")
    assert list(report.targets["two"].figures) == ["pretrained", "prt", "reward_only"], "EFT there was of another"
    assert figures_of(report)["one", "eft"] == figures_of(evaluate(["one"], eft="other", output_dir=None))["one", "eft"]


def test_an_adapter_is_told_by_its_base_as_well(places):
    adapted(tiny.gpt2(4), 3).save_pretrained("better")
    with pytest.raises(RewardFileError, match="The adapter better does not name its base"):
        evaluate(["one"], finetuned={"one": "better"})
    entries = json.loads(Path("better/adapter_config.json").read_text())
    Path("better/adapter_config.json").write_text(json.dumps(entries | {"base_model_name_or_path": "oracle"}))
    before = evaluate(["one"], finetuned={"one": "better"}).targets["one"].figures["finetuned"]
    saved("oracle", tiny.gpt2(5))
    after = evaluate(["one"], finetuned={"one": "better"}).targets["one"].figures["finetuned"]
    assert after.nll != before.nll


def test_of_one_row_the_noise_is_not_known(places):
    report = evaluate(["two"], rows=tiny.texts(1))
    again = evaluate(["two"], rows=tiny.texts(1))
    nll = report.targets["two"].figures["prt"].nll
    assert nll[1:] == (-math.inf, math.inf) and again.targets["two"].figures["prt"].nll == nll
    assert f"| PRT | {report.source.figures['prt'].nll.value:.3f} | {nll.value:.3f} |" in report.table()
    assert again.verdict() == report.verdict() and report.verdict()["two"][0] is None
    assert all(reason.startswith("the data does not rule out") for reason in report.verdict()["two"][1][1:])
    json.loads(Path("report/report.json").read_text(), parse_constant=pytest.fail)
    report.save("report")


def test_infinite_bars_are_left_out(tmp_path):
    bars = {"pretrained": Bar(3.0, 2.0, 4.0), "prt": Bar(math.inf, -math.inf, math.inf)}
    names = {"pretrained": "pretrained", "prt": "PRT"}
    draw([("source", bars), ("organisation/" + 40 * "name", {})], names, "nll", tmp_path / "all.png")
    draw([("source", {"prt": bars["prt"]})], names, "nll", tmp_path / "none.png")
    draw([("source", {"pretrained": bars["pretrained"]})], names, "nll", tmp_path / "finite.png")
    for name in ("all", "none", "finite"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.size == (1125, 660)


def test_a_report_grows_by_methods_and_targets(places):
    passes = []

    def progress(prepared, text):
        passes.append(text)
        return prepared

    evaluate(["one"], methods=("pretrained", "prt"), progress=progress)
    report = evaluate(["two"], methods=("eft", "prt"), progress=progress)
    assert passes == ["one: pretrained, PRT", "two: EFT, PRT"]
    assert list(report.targets) == ["one", "two"]
    whole = evaluate(output_dir=None)
    assert figures_of(report) == {key: value for key, value in figures_of(whole).items() if key in figures_of(report)}
    assert list(report.source.figures) == ["pretrained", "prt", "eft"]
    later = evaluate(["two"], methods=("eft", "prt"), eft=None, progress=progress)
    assert "eft" in later.targets["two"].figures and later.notes == [], "EFT is left out of nothing"


def test_the_report_of_another_evaluation_is_not_touched(places):
    evaluate(["two"])
    before = Path("report/report.json").read_text()
    message = (
        "report holds the report of another evaluation.\n"
        "  expected: a new folder, or one with a report of the same reward, source, data and strength\n"
        "  found: reward on evaluation data; another {}\n"
        "  remedy: name another folder, or delete the report"
    )
    with pytest.raises(PRTValueError, match=f"^{re.escape(message.format('data, another strength'))}$"):
        evaluate(["two"], rows=tiny.texts(6), strength=0.5)
    torch.manual_seed(1)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
    RewardModel.from_base("source", peft_config=config).save_pretrained("reward")
    with pytest.raises(PRTValueError, match=re.escape(message.format("reward"))):
        evaluate(["two"])
    assert Path("report/report.json").read_text() == before
    Path("report/report.json").write_text(before[:-20])
    with pytest.raises(RewardFileError, match="report.json cannot be read: JSONDecodeError"):
        evaluate(["two"])


def test_what_is_saved(places):
    report = evaluate(output_dir=None, dataset_name="me/stories")
    report.save("out")
    assert sorted(path.name for path in Path("out").iterdir()) == ["report.json", "report.md", "report.png"]
    assert PortabilityReport.from_folder("out", report.config) == report
    entries = json.loads(Path("out/report.json").read_text())
    assert entries["verdict"]["one"]["reasons"] == report.verdict()["one"][1]
    table = Path("out/report.md").read_text()
    assert table == report.table()
    lines = table.splitlines()
    assert lines[0] == "# `reward`: text-generation"
    assert f"on `me/stories`: 7 rows, {report.positions} tokens." in lines[2]
    at = lines.index("## Negative log-likelihood per token, nats, lower is better")
    assert lines[at + 2] == "|  | `source` (source) | `one` | `two` |"
    prt = [report.source.figures["prt"].nll, *(report.targets[name].figures["prt"].nll for name in ("one", "two"))]
    cells = " | ".join(f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in prt)
    assert f"| PRT | {cells} |" in lines
    assert lines[at + 8].startswith("| fine-tuned | ") and lines[at + 8].endswith(" |  |"), "of `two` not given"
    assert lines[-1] == "- fine-tuned is left out, because the model (`finetuned=`) is missing, at: two"
    with Image.open("out/report.png") as picture:
        assert picture.format == "PNG" and picture.size[0] > 900


def test_the_card_has_the_figures_and_keeps_what_users_wrote(places):
    report = evaluate(["one"], output_dir=None, dataset_name="me/stories")
    card = Path("reward/README.md")
    card.write_text(card.read_text() + "\nMy own words.\n")
    report.write_to_card("reward")
    text = card.read_text()
    assert text.endswith("\nMy own words.\n")
    nll = {method: figures.nll.value for method, figures in report.targets["one"].figures.items()}
    row = " | ".join(f"{nll[method]:.4g}" for method in METHODS)
    assert f"| `one` | `me/stories` | `nll`, lower is better | {row} |" in text
    assert "| `source` (source) | `me/stories` | `accuracy`, higher is better | " in text
    assert report.measurements()[2] == Measurement("one", "me/stories", "nll", nll, is_lower_better=True)

    reward = RewardModel.from_pretrained("reward")
    again = evaluate(["two"], output_dir=None, dataset_name="me/stories")
    again.write_to_card(reward)
    reward.save_pretrained("reward")
    text = card.read_text()
    assert "| `two` | `me/stories` | `nll`" in text and "| `one` |" not in text and "My own words." in text
    with pytest.raises(PRTValueError, match="The report is about another reward"):
        again.write_to_card(reward_on(tiny.llama(1), tiny.tokenizer()))


# Refusals


def test_targets_that_do_not_fit_are_refused_before_anything_is_measured(places):
    started = []
    saved("words", tiny.llama(2), tiny.tokenizer(changed={"w5": "v5"}))
    kwargs = {"progress": lambda prepared, text: started.append(text) or prepared}
    with pytest.raises(VocabularyMismatchError, match="'w5' \\(5 -> absent\\)"):
        evaluate(["one", "words"], **kwargs)
    with pytest.raises(VocabularyMismatchError, match="'w5' \\(5 -> absent\\)"):
        evaluate(["one"], finetuned={"one": "words"}, **kwargs)
    saved("bert", tiny.bert(2), tiny.tokenizer())
    with pytest.raises(PRTValueError, match="expected: text-generation\n  found: text-classification"):
        evaluate(["one", "bert"], **kwargs)
    with pytest.raises(PRTValueError, match="reward is a reward, which is no model by itself"):
        evaluate(["one"], eft="reward", **kwargs)
    Path("tuned/adapter_model.safetensors").rename("tuned/adapter_model.bin")
    with pytest.raises(RewardFileError, match="no weights that can be loaded.\n  expected: adapter_model.safetensors"):
        evaluate(["one"], **kwargs)
    with pytest.raises(BaseModelMismatchError, match="The adapter was tuned from another model"):
        evaluate(["one"], eft=adapted(tiny.llama(5)))
    images = reward_on(tiny.vit(1))
    other, twice = tiny.resnet(2, names=[*tiny.COLOURS[:3], "black"]), ["red", "green", "red", "grey"]
    with pytest.raises(LabelMismatchError, match="unknown: \\['black'\\]"):
        portability_report(images, {"vit": tiny.vit(2), "other": other}, labelled(), **kwargs)
    with pytest.raises(LabelMismatchError, match="\\['red'\\] more than once"):
        colliding = {"other": tiny.resnet(2, names=["green", "red", "red", "grey"])}
        portability_report(reward_on(tiny.vit(1, names=twice)), colliding, labelled(), **kwargs)
    assert started == [] and not Path("report").exists()


def test_arguments_that_cannot_be_right_are_refused(places, tokenizer):
    for kwargs, message in (
        ({"methods": ("prt", "finetune")}, "found: 'finetune'\n  remedy: did you mean 'finetuned'?"),
        ({"methods": ("prompting",)}, "expected: pretrained, eft, prt, .*, lora_compute, baked\n  found: 'prompting'$"),
        ({"methods": ()}, "There is nothing to measure"),
        ({"methods": ("eft",), "eft": None}, "found: only the methods eft, without a model that they need"),
        ({"methods": ("few_shot",), "eft": None}, "or `few_shot=` or `tuning=` for rivals that are made here"),
        ({"strength": math.nan}, "The strength is not a number"),
        ({"output_dir": "one/config.json"}, "Nothing can be written into one/config.json"),
        ({"output_dir": "one/config.json/report"}, "config.json is a file"),
        ({"targets": []}, "There are no targets"),
        ({"targets": ["one", "one"]}, "'one' more than once"),
        ({"targets": [tiny.gpt2(1), tiny.gpt2(2)]}, "'GPT2LMHeadModel' more than once"),
        ({"finetuned": {"on": "oracle"}}, "found: 'on'\n  remedy: did you mean 'one'?"),
        ({"rows": tiny.texts(3).select([])}, "The evaluation set is empty"),
        ({"rows": tiny.texts(3).to_iterable_dataset()}, "found: IterableDataset"),
    ):
        with pytest.raises(PRTValueError, match=message):
            evaluate(**kwargs)
    with pytest.raises(PRTValueError, match="no column 'label'"):
        portability_report(reward_on(tiny.vit(1)), {"vit": tiny.vit(2)}, labelled().remove_columns("label"))


def test_models_in_memory_and_adapters_by_folder_give_the_same(places):
    whole = evaluate(["one"], output_dir=None)
    tuned = PeftModel.from_pretrained(tiny.llama(1), "tuned")
    reward = RewardModel.from_pretrained("reward")
    models = {"one": tiny.gpt2(2)}
    there = portability_report(reward, models, tiny.texts(7), eft=tuned, finetuned={"one": tiny.gpt2(4)}, batch_size=3)
    for method in METHODS:
        for measure in ("nll", "accuracy"):
            expected = getattr(whole.targets["one"].figures[method], measure)
            assert getattr(there.targets["one"].figures[method], measure) == pytest.approx(expected)


def test_the_report_that_is_shown_is_that_of_its_figures(tmp_path):
    folder = Path(__file__).parents[2] / "model_cards" / "report"
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "report.json").read_text())["config"]))
    config = RewardConfig.from_json_file(tmp_path / "config.json")
    assert PortabilityReport.from_folder(folder, config).table() == (folder / "report.md").read_text()
