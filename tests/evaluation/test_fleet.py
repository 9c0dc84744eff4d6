"""Several rewards on several backbones: what fits, one table, and what is worse than in an earlier report."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig
from PIL import Image

from prt_hf import PRTForCausalLM, RewardModel
from prt_hf.cli import main
from prt_hf.errors import PRTValueError
from prt_hf.evaluation import Change, Fleet, check_fits, compare, measure_fleet, portability_report
from prt_hf.evaluation.figure import Cell, draw_heat_map
from prt_hf.evaluation.fleet import change_table, folder_name
from prt_hf.networks.adapters import wrap
from prt_hf.networks.auto import load_pretrained

ROWS = tiny.texts(6)


def save(folder, model, tokenizer=None):
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def save_reward(folder, base="source", seed=0):
    torch.manual_seed(seed)
    config = LoraConfig(init_lora_weights=False, target_modules="all-linear")
    RewardModel.from_base(base, peft_config=config).save_pretrained(folder)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two rewards of `source`, one for images, a plain LoRA; backbones `one`, `two`, `words` and `images`."""
    home = tmp_path_factory.mktemp("fleet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        tokenizer = tiny.tokenizer()
        for name, model in {"source": tiny.llama(1), "one": tiny.gpt2(2), "two": tiny.llama(3)}.items():
            save(name, model, tokenizer)
        save("words", tiny.llama(4), tiny.tokenizer(changed={"w5": "v5"}))
        save("vit", tiny.vit(1))
        save_reward("first")
        save_reward("me/second", seed=1)
        save_reward("pictures", "vit")
        lora = wrap(tiny.llama(1), LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
        lora.peft_config["default"].base_model_name_or_path = "source"
        lora.save_pretrained("lora")
        texts = [{"text": " ".join(f"w{3 + (7 * row + column) % 90}" for column in range(9))} for row in range(6)]
        for name, rows in {"texts": texts, "others": texts[::-1][:5]}.items():
            Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


@pytest.fixture(autouse=True)
def _there(home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for path in home.iterdir():
        Path(path.name).symlink_to(path)


def fleet_of(rewards=("first", "lora"), targets=("one", "two", "words"), rows=ROWS, passes=None, **kwargs):
    def load(name):
        return (RewardModel.from_adapter if name == "lora" else RewardModel.from_pretrained)(name)

    def progress(batches, text):
        passes is None or passes.append(text)
        return batches

    return measure_fleet(
        check_fits(rewards, targets), dict.fromkeys(rewards, rows), load, batch_size=3, progress=progress, **kwargs
    )


def evaluate(capsys, *arguments, status=0):
    assert main(["evaluate", *map(str, arguments)]) == status
    return capsys.readouterr()


@torch.no_grad()
def test_gains_equal_the_prt_models_own_likelihoods():
    """PRTForCausalLM in float64, row by row, for a reward and for a plain LoRA."""
    fleet = fleet_of(targets=("one", "two"))
    for name in ("first", "lora"):
        for target in ("one", "two"):
            backbone = load_pretrained(target).double()
            model = PRTForCausalLM.from_parts(load_pretrained(target), [name]).double()
            sums = {"bare": 0.0, "prt": 0.0, "count": 0}
            for row in ROWS:
                ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
                kept = labels != -100
                for way, network in (("bare", backbone), ("prt", model)):
                    log_probs = network(ids).logits[0, :-1].double().log_softmax(-1)[kept]
                    sums[way] -= log_probs.gather(-1, labels[kept][:, None]).sum().item()
                sums["count"] += int(kept.sum())
            gain = (sums["bare"] - sums["prt"]) / sums["count"]
            assert fleet.portability(name, target).advantage["target"] == pytest.approx(gain, rel=1e-4)


def test_what_fits_is_told_first_and_without_weights(capsys, monkeypatch):
    monkeypatch.setattr("prt_hf.networks.auto.load_whole", pytest.fail)
    rewards = ("first", "lora", "pictures")
    out = evaluate(capsys, *rewards, "--targets", "one", "words", "vit").out
    lines = out.splitlines()
    assert lines[:7] == [
        "## What fits",
        "",
        "| reward | `one` | `words` | `vit` |",
        "| --- | --- | --- | --- |",
        "| `first` | yes | no | no |",
        "| `lora` | yes | no | no |",
        "| `pictures` | no | no | yes |",
    ]
    assert "- `first` on `words`: The vocabulary of the backbone is not the reward's. expected: the 97 tokens" in out
    assert "- `pictures` on `one`: The backbone is made for another task. expected: image-classification" in out
    found = json.loads(evaluate(capsys, *rewards, "--targets", "one", "--json").out)
    assert [cell["fits"] for cell in found["cells"]] == [True, True, False]
    evaluate(capsys, "first", "lora", "--targets", "words", status=1)


def test_one_table_with_what_does_not_fit_and_a_rerun_measures_what_is_missing(capsys):
    passes = []
    fleet = fleet_of(passes=passes, output_dir="out")
    assert len(passes) == 4 and list(fleet.reports["first"].targets) == ["one", "two"]
    table = Path("out/fleet.md").read_text()
    assert table == fleet.table()
    first = fleet.portability("first", "one")
    gain, noise = first.advantage["target"], 1.959964 * first.standard_error["target"]
    word = {True: "yes", False: "no", None: "cannot tell"}[first.verdict()[0]]
    assert f"| `first` | `evaluation data` | {gain:+.3f} +- {noise:.3f}, {word} | " in table
    assert table.count("| does not fit |") == 2 and "\n## What fits\n" in table
    with Image.open("out/fleet.png") as picture:
        assert picture.format == "PNG"
    cells = json.loads(Path("out/fleet.json").read_text())["cells"]
    assert [(cell["reward"], cell["target"], cell["fits"]) for cell in cells][:3] == [
        ("first", "one", True),
        ("first", "two", True),
        ("first", "words", False),
    ]
    assert cells[0]["gain"] == gain and cells[0]["worth_porting"] == first.verdict()[0]

    passes.clear()
    again = fleet_of(passes=passes, output_dir="out")
    assert passes == [] and again.table() == fleet.table()
    fleet_of(("first", "me/second"), ("one",), passes=passes, output_dir="out")
    assert passes == ["one: pretrained, PRT, reward only"], "of the new reward"
    assert Path("out/me--second/report.json").is_file() and Path("out/lora/report.json").is_file()


def test_an_earlier_report_is_compared_row_by_row(tokenizer):
    """The difference and its error are those of the rows' differences, not of two independent means."""
    reward = RewardModel.from_pretrained("first")
    now, then = (portability_report(reward, {"new": model}, ROWS, ("prt",)) for model in (tiny.llama(3), tiny.llama(4)))
    (change,) = compare(now, then)
    counts = torch.tensor(now.counts).double()
    apart = torch.tensor(then.targets["new"].scores) - torch.tensor(now.targets["new"].scores)
    mean = (apart.sum() / counts.sum()).item()
    error = math.sqrt(6 / 5 * ((apart - mean * counts) ** 2).sum()) / counts.sum()
    assert (change.better, change.standard_error) == pytest.approx((mean, error.item()), rel=1e-5)
    assert change.then - change.now == pytest.approx(change.better, abs=1e-5), "less is better"
    assert sum(now.targets["new"].scores) / sum(now.counts) == pytest.approx(change.now, abs=1e-5)
    (same,) = compare(now, now)
    assert (same.better, same.is_better) == (0, None)
    assert "| +0.0000 +- 0.0000 | the same |" in change_table([same])


def test_a_new_backbone_is_compared_with_the_one_that_it_replaces():
    reward = RewardModel.from_pretrained("first")
    measure = partial(portability_report, reward, dataset=ROWS, methods=("prt",))
    both, new, other = (measure(targets=names) for names in (["one", "source"], ["two", "source"], ["two"]))
    pairs = [(change.target, change.earlier_target) for change in compare(new, both)]
    assert pairs == [("two", "one"), ("source", "source")]
    assert "| `first` | `two` (was `one`) | " in change_table(compare(new, both, "first"))
    with pytest.raises(PRTValueError, match="No backbone of .* can be compared"):
        compare(other, both)
    rows = measure(targets=["one"], dataset=tiny.texts(5))
    with pytest.raises(PRTValueError, match="expected: the rows of evaluation data, cut at the same length"):
        compare(rows, both)
    older = replace(both, counts=[])
    with pytest.raises(PRTValueError, match="or a report of an earlier version"):
        compare(new, older)


def test_the_exit_status_tells_a_regression(capsys):
    """The bare source is what the reward was made for; one of the two directions is a regression."""
    arguments = ("--data", "texts.jsonl", "--batch_size", 3)
    evaluate(capsys, "first", "lora", "--targets", "one", *arguments, "--output_dir", "old")
    out = evaluate(capsys, "first", "lora", "--targets", "one", *arguments, "--compare", "old").out
    assert out.count("| the same |") == 2
    statuses = {}
    for before, after in (("one", "two"), ("two", "one")):
        evaluate(capsys, "first", "me/second", "--targets", before, *arguments, "--output_dir", f"of-{before}")
        statuses[after] = main(
            ["evaluate", "first", "me/second", "--targets", after, *map(str, arguments), "--compare", f"of-{before}"]
        )
        out = capsys.readouterr().out
        assert statuses[after] == int("| worse |" in out) and f"`{after}` (was `{before}`)" in out
    assert 1 in statuses.values(), "what is worse in one direction"
    evaluate(capsys, "first", "--targets", "one", *arguments, "--compare", "old")
    evaluate(capsys, "first", "--targets", "one", *arguments, "--output_dir", "single")
    out = evaluate(capsys, "first", "--targets", "one", *arguments, "--compare", "single").out
    assert out.endswith(" | the same |\n")


def test_a_list_gives_each_reward_its_data(capsys):
    Path("rewards.yaml").write_text(
        "- {reward: first, data: texts.jsonl, samples: 4}\n- {reward: me/second, data: others.jsonl, max_length: 6}\n"
    )
    evaluate(capsys, "rewards.yaml", "--targets", "one", "--output_dir", "out")
    entries = [json.loads(Path("out", name, "report.json").read_text()) for name in ("first", "me--second")]
    assert [(each["dataset"], each["rows"]) for each in entries] == [("texts.jsonl", 4), ("others.jsonl", 5)]
    assert entries[1]["counts"] == 5 * [5], "six tokens each, of which the first is not predicted"


def test_what_cannot_be_right_is_refused_before_anything_is_measured(capsys, monkeypatch):
    monkeypatch.setattr("prt_hf.networks.auto.load_whole", pytest.fail)
    lists = {
        "typo": ("- {reward: first, dta: x}", "found: 'dta'\n  remedy: did you mean 'data'?"),
        "none": ("reward: first", "none.yaml lists no rewards."),
        "empty": ("- {data: x}", "An entry in empty.yaml has no reward."),
        "number": (
            "- {reward: first, samples: many}",
            "expected: samples: a positive number\n  found: samples: 'many'",
        ),
        "twice": ("- {reward: first}\n- {reward: first}", "A reward is named twice."),
        "half": ("- {reward: first, data: texts.jsonl}\n- {reward: lora}", "There is no data to measure on."),
        "syntax": ("- {reward: first", "syntax.yaml cannot be read."),
    }
    for name, (text, _) in lists.items():
        Path(f"{name}.yaml").write_text(text)
    Path("nothing").mkdir()
    data = ("--data", "texts.jsonl")
    for arguments, message in [
        *(((f"{name}.yaml",), message) for name, (_, message) in lists.items()),
        (("first", "first", *data), "A reward is named twice."),
        (("first", "lora", *data, "--eft", "lora"), "--eft goes with one reward."),
        (("first", "lora", *data, "--compare", "nothing"), "There is no report to compare with."),
        (("first", "lora", *data, "--compare", "x", "--output_dir", "x"), "A report cannot be compared with itself."),
        (("first", *data, "--compare", "nothing"), "There is no report to compare with."),
        (("first", "--tasks", "gsm8k", "--compare", "nothing"), "Reports of data are compared."),
    ]:
        assert message in evaluate(capsys, *arguments, "--targets", "one", status=1).err, arguments
    with pytest.raises(PRTValueError, match="Two rewards would share a folder"):
        measure_fleet(dict.fromkeys([("me/a", "one"), ("me//a", "one")]), {}, pytest.fail)


def test_folders_are_named_after_rewards():
    names = {"me/style": "me--style", "/runs/a b/final/": "runs--a--b--final", "../x": "x", "..": "reward"}
    assert {name: folder_name(name) for name in names} == names


def test_the_verdict_on_a_change_asks_for_two_standard_errors():
    change = Change("r", "t", "t", 1.0, 1.1, -0.1, 0.04)
    assert change.is_better is False and Fleet({}, changes=[change]).regressions == [change]
    assert replace(change, standard_error=0.06).is_better is None
    assert replace(change, standard_error=math.nan).is_better is None, "of a single row"
    assert replace(change, better=0.1).is_better is True


def test_the_heat_map_takes_any_figures(tmp_path):
    cells = [
        [Cell(0.4, "nats", "+0.4"), Cell(None, "nats", "does not fit")],
        [Cell(-1.0, "points", ""), Cell(0.0, "points", "")],
    ]
    draw_heat_map(["a/" + 40 * "long", "b"], ["one", "two"], cells, tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as picture:
        pixels = picture.convert("RGB")
        found = {colour for _, colour in pixels.getcolors(2**24)}
    for colour in ((30, 79, 119), (230, 230, 230), (175, 58, 45)):  # the largest gain, no figure, the largest loss
        assert any(max(abs(a - b) for a, b in zip(colour, each, strict=True)) <= 1 for each in found), colour
    draw_heat_map(["a"], ["b"], [[Cell(math.inf, "nats", "inf")]], tmp_path / "map.png")
