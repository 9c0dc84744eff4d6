"""What the pages of the studies say is what was measured."""

import json
import statistics
from pathlib import Path

import bake
import lora_rewards
import pytest
import tiny
import update

from prt_hf import default_peft_config

NOTEBOOKS = Path(lora_rewards.__file__).parent


@pytest.fixture(scope="module")
def results():
    return json.loads((NOTEBOOKS / "lora_rewards.json").read_text())


def test_the_tables_are_those_of_the_figures(results):
    assert lora_rewards.table(results).strip() in (NOTEBOOKS / "lora_rewards.md").read_text()


def test_the_table_of_starts_is_that_of_the_figures():
    results = json.loads((NOTEBOOKS / "lora_rewards_starts.json").read_text())
    assert lora_rewards.table(results).strip() in (NOTEBOOKS / "lora_rewards.md").read_text()


@pytest.mark.parametrize(("study", "page"), [(bake, "bake.md"), (update, "../prt_hf/evaluation/README.md")])
def test_the_tables_of_other_studies_are_those_of_their_figures(study, page):
    results = json.loads((NOTEBOOKS / f"{study.__name__}.json").read_text())
    assert study.table(results).strip() in (NOTEBOOKS / page).read_text()


def test_every_configuration_has_three_seeds(results):
    for name, entry in results["pairs"].items():
        seeds = {
            label: sorted(run["seed"] for run in entry["runs"] if run["label"] == label)
            for label in entry_labels(entry)
        }
        assert seeds == {label: [0, 1, 2] for label in lora_rewards.configurations(name)}


def test_the_default_is_the_recommended_one(results):
    """Better at both ends than LoRA's customary scale, or level, and at the target than EFT."""
    base = tiny.llama(1)
    assert default_peft_config(base).lora_alpha == 64 and default_peft_config(tiny.vit(1)).lora_alpha == 32

    def mean(pair, label, place):
        runs = results["pairs"][pair]["runs"]
        return statistics.mean(run["figures"][place] for run in runs if run["label"] == label)

    for pair in ("prose", "stories"):
        for place in ("source", "target"):
            chosen = mean(pair, "PRT, LoRA head, alpha 64", place)
            assert chosen < mean(pair, "PRT, LoRA head, alpha 32", place) + 0.021
        for alpha in (32, 64, 128):
            assert chosen < mean(pair, f"EFT, LoRA head, alpha {alpha}", "target")
    assert mean("cifar", "PRT, alpha 32", "target") > mean("cifar", "EFT", "target") + 4


def entry_labels(entry):
    return {run["label"] for run in entry["runs"]}
