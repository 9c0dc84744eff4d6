"""The control of notebooks/across_vocabularies.py: one model, seen through other vocabularies, says the same of a text."""

import os
from pathlib import Path

import across_vocabularies
import pytest
import torch
from across_models import Bytes, Merged, Plain, bullets

ASSETS = Path(os.environ.get("PRT_ASSETS", Path(__file__).parents[2] / "shared" / "assets"))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not ASSETS.is_dir(), reason=f"no assets at {ASSETS} (set PRT_ASSETS)"),
]
TEXT = "- They liked to pretend.\n- She saw the frame!\n- He was very"


@pytest.fixture(scope="module")
def plain():
    return Plain(ASSETS / "stories260K")


def nats(view):
    return across_vocabularies.nats(view.tokenizer, TEXT, view(TEXT), None)


def test_merged_tokens_change_no_probability(plain):
    view = Merged(plain.model, plain.tokenizer, bullets(ASSETS, "train"))
    seen = view(TEXT)
    assert (len(seen.ids), len(plain(TEXT).ids)) == (18, 27)
    torch.testing.assert_close(seen.logits.exp().sum(-1), torch.ones(len(seen.logits), dtype=torch.float64))
    assert nats(view) == pytest.approx(nats(plain), abs=1e-5)


def test_bytes_change_next_to_none(plain):
    view = Bytes(plain.model, plain.tokenizer)
    assert view(TEXT).logits.shape == (len(TEXT) - 1, 257)
    assert nats(view) == pytest.approx(nats(plain), abs=0.01)
