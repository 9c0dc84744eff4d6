"""notebooks/paper.py goes on where it stopped, and notebooks/paper.md says what was measured."""

import json
import statistics
from pathlib import Path

import paper
import paper_tables
import pytest

NOTEBOOKS = Path(paper.__file__).parent


@pytest.fixture(scope="module")
def results():
    return json.loads((NOTEBOOKS / "paper.json").read_text())


def mean(results, experiment, case, place, method):
    return statistics.mean(
        paper_tables.over_seeds(paper_tables.figures(results, experiment, case), place, method, experiment)
    )


def test_a_killed_run_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    started = []

    def measured(assets, seed):
        started.append(seed)
        if len(started) == 2:
            raise KeyboardInterrupt
        return {"seed": seed}

    monkeypatch.setattr(paper, "runs", lambda seeds: [paper.Run("noise", "mild", seed, measured) for seed in seeds])
    output = tmp_path / "paper.json"
    with pytest.raises(KeyboardInterrupt):
        paper.measure(["noise"], [0, 1], tmp_path, output)
    assert [run["figures"] for run in json.loads(output.read_text())["runs"]] == [{"seed": 0}]
    results = paper.measure(["noise"], [0, 1], tmp_path, output)
    assert started == [0, 1, 1]
    assert results == json.loads(output.read_text())
    assert [run["figures"] for run in results["runs"]] == [{"seed": 0}, {"seed": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["paper.json"]


def test_the_runs_are_those_of_the_script_and_each_case_has_its_first_seed(results):
    made = {(run["experiment"], run["case"], run["seed"]) for run in results["runs"]}
    assert len(made) == len(results["runs"])
    assert made <= {(run.experiment, run.case, run.seed) for run in paper.runs([0, 1, 2])}
    assert {(*case, 0) for case in paper_tables.CASES} <= made


def test_the_tables_are_those_of_the_figures(results):
    assert paper_tables.tables(results).strip() in (NOTEBOOKS / "paper.md").read_text()


def test_the_charts_are_drawn_anew_from_the_figures(results, tmp_path):
    paper_tables.draw_all(results, tmp_path)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert drawn == sorted(path.name for path in (NOTEBOOKS / "paper").iterdir())
    assert all(path.stat().st_size < 60_000 for path in (NOTEBOOKS / "paper").iterdir())


def test_ported_rewards_are_ahead_of_eft_and_of_both_controls(results):
    for experiment, case, margin in (
        ("noise", "mild", 4),
        ("noise", "strong", 4),
        ("architectures", "ViT to ConvNeXt", 4),
        ("architectures", "ConvNeXt to ViT", 4),
        ("upscaling", "bullet_stories", 0.02),
    ):
        sign = -1 if experiment == "upscaling" else 1
        prt = mean(results, experiment, case, "target", "prt")
        for method in ("pretrained", "eft", "reward_only"):
            assert sign * (prt - mean(results, experiment, case, "target", method)) > margin, (case, method)
        behind = mean(results, experiment, case, "source", "eft") - mean(results, experiment, case, "source", "prt")
        assert sign * behind > 0, case  # at the source EFT is ahead everywhere


def test_a_target_that_lacks_the_knowledge_stays_behind_the_source(results):
    prt = {place: mean(results, "upscaling", "gsm8k", place, "prt") for place in paper_tables.PLACES}
    assert prt["source"] < prt["target"] - 0.4
    for method in ("pretrained", "eft"):
        assert prt["target"] < mean(results, "upscaling", "gsm8k", "target", method) - 0.3


def test_entropy_maximisation_costs_the_reward_alone_and_not_the_combination(results):
    before, after = (paper_tables.alphas(results)[alpha] for alpha in (0.0, 0.1))
    assert before["source"]["reward_only"]["accuracy"][0] - after["source"]["reward_only"]["accuracy"][0] > 0.05
    for place in paper_tables.PLACES:
        assert abs(before[place]["prt"]["accuracy"][0] - after[place]["prt"]["accuracy"][0]) < 0.005


def test_what_is_far_from_proposition_3_2_ports_all_the_same(results):
    for case in paper_tables.CASES:
        assert all(one["eps"] > 1 for one in paper_tables.figures(results, *case))


def test_a_few_more_steps_take_a_reward_to_another_shift(results):
    (one,) = paper_tables.figures(results, "shift", "")
    for noise, lost, won_back in (("mild noise", 6, 3), ("strong noise", 30, 16)):
        for place in ("source", "target"):
            clean, shifted, tuned_on = (
                paper_tables.value(one[stage], place, "prt", "shift")[0]
                for stage in ("clean", noise, f"{noise}, tuned on")
            )
            assert clean - shifted > lost and tuned_on - shifted > won_back
    for stage, is_ahead in (("strong noise", True), ("mild noise", False), ("strong noise, tuned on", False)):
        of_stage = one[stage]["target"]
        assert (of_stage["reward_only"]["accuracy"][0] > of_stage["prt"]["accuracy"][0]) == is_ahead


def test_the_readme_has_the_means_at_the_target(results):
    readme = (NOTEBOOKS.parent / "README.md").read_text()
    for experiment, case, digits in (
        ("noise", "mild", 1),
        ("architectures", "ConvNeXt to ViT", 1),
        ("upscaling", "bullet_stories", 3),
    ):
        cells = [f"{mean(results, experiment, case, 'target', m):.{digits}f}" for m in paper_tables.METHODS]
        assert " | ".join(cells) in readme.replace("**", "")
