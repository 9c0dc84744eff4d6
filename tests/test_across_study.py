"""What notebooks/across_vocabularies.md says is what was measured, and its control is one model throughout."""

import json
import os
from pathlib import Path

import across_vocabularies
import pytest
import torch
from across_models import Bytes, Merged, Plain, bullets

ASSETS = Path(os.environ.get("PRT_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
NOTEBOOKS = Path(across_vocabularies.__file__).parent
TEXT = "- They liked to pretend.\n- She saw the frame!\n- He was very"


def test_the_tables_are_those_of_the_figures():
    results = json.loads((NOTEBOOKS / "across_vocabularies.json").read_text())
    assert across_vocabularies.table(results) in (NOTEBOOKS / "across_vocabularies.md").read_text()


@pytest.fixture(scope="module")
def plain():
    if not ASSETS.is_dir():
        pytest.skip(f"no assets at {ASSETS} (set PRT_ASSETS)")
    return Plain(ASSETS / "stories260K")


def nats(view):
    return across_vocabularies.nats(view.tokenizer, TEXT, view(TEXT), None)


@pytest.mark.real
def test_merged_tokens_change_no_probability(plain):
    view = Merged(plain.model, plain.tokenizer, bullets(ASSETS, "train"))
    seen = view(TEXT)
    assert (len(seen.ids), len(plain(TEXT).ids)) == (18, 27)
    torch.testing.assert_close(seen.logits.exp().sum(-1), torch.ones(len(seen.logits), dtype=torch.float64))
    assert nats(view) == pytest.approx(nats(plain), abs=1e-5)


@pytest.mark.real
def test_bytes_change_next_to_none(plain):
    view = Bytes(plain.model, plain.tokenizer)
    assert view(TEXT).logits.shape == (len(TEXT) - 1, 257)
    assert nats(view) == pytest.approx(nats(plain), abs=0.01)
