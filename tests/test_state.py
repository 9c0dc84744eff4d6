"""Whatever is asked, in whatever order: the cached reward equals a recomputation."""

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import RwkvConfig, RwkvForCausalLM

from prt_hf import ContextLengthError, RewardModel, UnsupportedError
from prt_hf.generation import RewardState

STEPS = ("extend", "reorder", "crop", "new prompt", "repeat", "draft", "pad", "shorter")


@pytest.fixture(scope="module")
def networks():
    return {name: make(seed=1) for name, make in tiny.LANGUAGE_MODELS.items()}


def assert_exact(state, rows, mask=None):
    expected = tiny.next_logits(state.network, rows, mask)
    torch.testing.assert_close(state(rows, mask), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", tiny.LANGUAGE_MODELS)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(calls=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2**31 - 1)), min_size=2, max_size=9))
def test_any_order_of_calls(networks, name, calls):
    state = RewardState(networks[name])
    rows, mask = tiny.prompts(2, 8), None
    for step, seed in calls:
        generator = torch.Generator().manual_seed(seed)
        new = torch.randint(3, tiny.VOCABULARY, (len(rows), 4), generator=generator)
        choice = torch.randint(0, len(rows), (len(rows) + seed % 2,), generator=generator)
        if step == "extend":
            rows = torch.cat([rows, new[:, :1]], 1)
        elif step == "reorder":  # as beam search does: rows from rows, one token each
            rows = torch.cat([rows[choice], new[:1, :1].expand(len(choice), 1)], 1)
        elif step == "crop":  # a rejected draft
            rows = torch.cat([rows[:, : -1 - seed % 4], new[:, :1]], 1)
        elif step == "new prompt":
            rows = torch.randint(3, tiny.VOCABULARY, (1 + seed % 3, 6 + seed % 5), generator=generator)
        elif step == "draft":
            rows = torch.cat([rows[:1], new[:1]], 1)
        elif step == "shorter":
            rows = rows[:, : max(2, rows.shape[1] - seed % 4)]
        elif step == "pad":
            padding = seed % 4
            rows = torch.cat([torch.zeros_like(new)[:, :padding], rows], 1)
        mask = (rows != 0).long()
        assert_exact(state, rows, None if mask.all() else mask)


@pytest.mark.parametrize("name", tiny.LANGUAGE_MODELS)
def test_decoding_computes_each_token_once(networks, name):
    state, rows = RewardState(networks[name]), tiny.prompts(3, 7)
    for _ in range(5):
        assert_exact(state, rows)
        rows = torch.cat([rows, rows[:, :1]], 1)
    assert state.tokens_computed == 3 * 7 + 4 * 3


def test_equal_rows_are_computed_once(networks):
    state, rows = RewardState(networks["llama"]), tiny.prompts(2, 7).repeat_interleave(4, 0)
    assert_exact(state, rows)
    assert state.tokens_computed == 2 * 7
    rows = torch.cat([rows, torch.arange(3, 11)[:, None]], 1)  # now they part
    assert_exact(state, rows)
    assert state.tokens_computed == 2 * 7 + 8


def test_drafts_are_scored_once(networks):
    """Assisted decoding: drafted forwards, then verified position by position, then partly rejected."""
    for name in ("llama", "gpt2"):
        state, rows = RewardState(networks[name]), tiny.prompts(1, 12)
        for length in [*range(7, 13), *range(7, 13)]:
            assert_exact(state, rows[:, :length])
        assert state.tokens_computed == 12, name
        rejected = torch.cat([rows[:, :9], rows[:, :2]], 1)
        for length in range(9, 12):
            assert_exact(state, rejected[:, :length])
        assert state.tokens_computed == 12 + 2, name
        other = torch.cat([rows[:, :8], rows[:, :4]], 1)  # several tokens at once: what was kept behind them is stale
        assert_exact(state, other)
        assert_exact(state, other[:, :10])


def test_sliding_window_forgets_what_lies_far_back():
    """After a rollback the window's older tokens are gone: a second, deeper rollback has to recompute."""
    state, rows = RewardState(tiny.sliding_window(seed=1, window=4)), tiny.prompts(1, 24)
    assert_exact(state, rows)
    assert_exact(state, torch.cat([rows[:, :20], rows[:, :1]], 1))
    assert_exact(state, torch.cat([rows[:, :12], rows[:, :1]], 1))


def test_recurrent_states_are_not_rewound(networks):
    state, rows = RewardState(networks["state-space"]), tiny.prompts(1, 10)
    assert_exact(state, rows)
    assert_exact(state, rows[:, :6])
    assert_exact(state, torch.cat([rows[:, :6], rows[:, :3]], 1))  # three tokens at once
    assert state.tokens_computed == 10 + 6 + 9


def test_padding_is_part_of_the_content(networks):
    """The same ids under another mask are other rows."""
    state, rows = RewardState(networks["gpt2"]), tiny.prompts(2, 9)
    rows[:, :3] = 0
    mask = (rows != 0).long()
    assert_exact(state, rows, mask)
    assert_exact(state, rows)
    assert_exact(state, rows, mask)


def test_an_interrupted_call_leaves_no_half_aligned_cache(networks, monkeypatch):
    state, rows = RewardState(networks["llama"]), tiny.prompts(2, 9)
    assert_exact(state, rows)
    shorter = torch.cat([rows[:, :5], rows[:, :1]], 1)
    with monkeypatch.context() as patch:
        patch.setattr(state, "_forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            state(shorter)
    assert_exact(state, shorter)
    assert_exact(state, rows)


def test_context_is_counted_without_padding():
    state, rows = RewardState(tiny.gpt2(n_positions=8)), tiny.prompts(1, 8)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), rows], 1)
    assert_exact(state, padded, (padded != 0).long())
    with pytest.raises(ContextLengthError, match="(?s)at most 8 tokens.*found: 9 tokens"):
        state(tiny.prompts(1, 9))
    assert_exact(state, rows)


def test_changed_networks_are_computed_anew(tokenizer):
    """Training, another adapter, another precision: what was cached belongs to another reward."""
    network = RewardModel.from_base(
        tiny.gpt2(1, resid_pdrop=0.5), tokenizer, LoraConfig(init_lora_weights=False)
    ).network
    state, rows = RewardState(network.eval()), tiny.prompts(2, 9)
    before = state(rows)
    network.train()
    network(input_ids=rows, labels=rows).loss.backward()
    torch.optim.SGD([value for value in network.parameters() if value.requires_grad], lr=1.0).step()
    after = state(rows)  # still in training mode, which a reward has no use for
    assert network.training
    network.eval()
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, tiny.next_logits(network, rows), atol=2e-4, rtol=2e-4)
    network.add_adapter("other", LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True))
    network.set_adapter("other")
    assert_exact(state, rows)
    network.to(torch.float64)
    assert state(rows).dtype == torch.float64


def test_hooks_do_not_outlive_their_state(networks):
    state = RewardState(networks["llama"])
    hooks = len(networks["llama"].base_model._forward_pre_hooks)
    del state
    assert len(networks["llama"].base_model._forward_pre_hooks) == hooks - 1


def test_models_that_cannot_tell_padding(tokenizer):
    network = RwkvForCausalLM(RwkvConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, context_length=64)).eval()
    state, rows = RewardState(network), tiny.prompts(2, 6)
    assert_exact(state, rows)
    assert_exact(state, torch.cat([rows, rows[:, :1]], 1))
    with pytest.raises(UnsupportedError, match="does not tell padding from text"):
        state(rows, torch.tensor([[0] + [1] * 5, [1] * 6]))
