"""What every released format saved is still loaded, and gives what it gave then."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prt_hf import PRTForCausalLM, RewardModel
from prt_hf.contract import FORMAT_VERSION

FORMATS = Path(__file__).parent / "formats"
VERSIONS = sorted(folder.name for folder in FORMATS.iterdir() if folder.is_dir())


def test_the_present_format_is_recorded():
    assert FORMAT_VERSION in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_a_released_format(version, tmp_path):
    folder = shutil.copytree(FORMATS / version, tmp_path / version)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    expected = load_file(folder / "expected.safetensors")
    inputs = {"input_ids": expected["input_ids"]}
    adapter = RewardModel.from_pretrained(folder / "adapter", base_model=base)
    full = RewardModel.from_pretrained(folder / "full")
    model = PRTForCausalLM.from_pretrained(folder / "recipe", backbone=base)
    with torch.no_grad():
        torch.testing.assert_close(adapter(**inputs), expected["adapter"])
        torch.testing.assert_close(full(pixel_values=expected["pixel_values"]), expected["full"])
        torch.testing.assert_close(model(**inputs).logits, expected["recipe"])
    config = adapter.config
    assert (config.format_version, config.kl_coef, config.entropy_coef) == (version, 2.0, 0.1)
    assert config.source_backbone.id == "me/base" and config.more_source_backbones == ()
    adapter.save_pretrained(tmp_path / "again")
    again = RewardModel.from_pretrained(tmp_path / "again", base_model=base)
    assert again.config.format_version == FORMAT_VERSION
    with torch.no_grad():
        assert torch.equal(again(**inputs), adapter(**inputs))
