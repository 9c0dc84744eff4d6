"""Whatever is asked, in whatever order: the cached reward equals a recomputation."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import Phi3Config, Phi3ForCausalLM, RwkvConfig, RwkvForCausalLM

from prt_hf import ContextLengthError, RewardModel, UnsupportedError
from prt_hf.inference import RewardState
from prt_hf.inference.state import THREADS
from prt_hf.networks.adapters import wrapped_layers

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


CHANGES = {
    "load_state_dict": lambda network: network.load_state_dict(
        {name: value + 0.1 for name, value in network.state_dict().items()}
    ),
    "assigned": lambda network: network.load_state_dict(
        {name: value + 0.1 for name, value in network.state_dict().items()}, assign=True
    ),
    "in place": lambda network: torch.nn.init.normal_(next(network.parameters()), std=0.3),
    "other data": lambda network: [setattr(value, "data", value.data + 0.1) for value in network.parameters()],
    "in inference mode": torch.inference_mode(lambda network: [value.add_(0.1) for value in network.parameters()]),
    "switched off": lambda network: network.base_model.disable_adapter_layers(),
    "scaled": lambda network: [layer.scale_layer(3.0) for _, layer in wrapped_layers(network.get_base_model())],
    "cast": lambda network: network.to(torch.bfloat16).to(torch.float32),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_between_calls(tokenizer, change):
    network = RewardModel.from_base(tiny.llama(1), tokenizer, LoraConfig(init_lora_weights=False)).network.eval()
    state, rows = RewardState(network), tiny.prompts(2, 9)
    before = state(rows)
    with torch.no_grad():
        CHANGES[change](network)
    assert_exact(state, rows)
    assert (state(rows) - before).abs().max() > 1e-3
    computed = state.tokens_computed
    state(rows)
    assert state.tokens_computed == computed, "what was asked after the change is remembered"


def test_both_see_a_merge(tokenizer):
    network = RewardModel.from_base(tiny.llama(1), tokenizer, LoraConfig(init_lora_weights=False)).network.eval()
    state, rows = RewardState(network, of="both"), tiny.prompts(2, 9)
    state.blocks(rows)
    network.merge_adapter()
    with pytest.raises(UnsupportedError, match="merged into weights"):
        state.blocks(rows)


def test_precision_and_inference_mode_of_the_caller(networks):
    """What was computed under autocast is asked anew outside of it; what inference mode made is left behind."""
    for name in ("llama", "state-space"):
        state, rows = RewardState(networks[name]), tiny.prompts(2, 9)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = state(rows)
        assert_exact(state, rows)
        assert not torch.equal(rounded.float(), state(rows))
        with torch.inference_mode():
            state(rows)
        assert_exact(state, torch.cat([rows, rows[:, :1]], 1))


def test_threads(networks):
    """Each thread goes on from its own text; more threads than are remembered are right as well."""
    for name in tiny.LANGUAGE_MODELS:
        state = RewardState(networks[name])
        barrier = threading.Barrier(4, timeout=60)

        def decode(seed, state=state, barrier=barrier):
            rows = tiny.prompts(2, 6 + seed % 3, seed)
            for _ in range(5):
                barrier.wait()
                assert_exact(state, rows)
                rows = torch.cat([rows, rows[:, :1]], 1)
            return rows

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(decode, range(4)))
        assert state.tokens_computed == sum(2 * (6 + seed % 3 + 4) for seed in range(4)), "none costs another its cache"
    state, barrier = RewardState(networks["gpt2"]), threading.Barrier(THREADS + 4, timeout=60)
    with ThreadPoolExecutor(THREADS + 4) as threads:
        list(threads.map(lambda seed: decode(seed, state, barrier), range(THREADS + 4)))
    assert len(state._memories) == THREADS


def test_reset_while_another_thread_is_at_work(networks):
    state, rows, stop = RewardState(networks["llama"]), tiny.prompts(2, 7), threading.Event()

    def disturb():
        while not stop.is_set():
            state.reset()

    with ThreadPoolExecutor(1) as threads:
        disturbing = threads.submit(disturb)
        try:
            for _ in range(20):
                assert_exact(state, rows)
                rows = torch.cat([rows, rows[:, :1]], 1)
        finally:
            stop.set()
        disturbing.result()


def test_networks_in_training_mode_under_threads(tokenizer):
    """Two states of one network, which each switches it to evaluation and back."""
    network = RewardModel.from_base(tiny.gpt2(1, resid_pdrop=0.5), tokenizer).network
    expected = {seed: tiny.next_logits(network.eval(), tiny.prompts(2, 9, seed)) for seed in range(4)}
    network.train()
    states = [RewardState(network), RewardState(network)]

    def ask(seed):
        state = states[seed % 2]
        for _ in range(10):
            state.reset()
            torch.testing.assert_close(state(tiny.prompts(2, 9, seed)), expected[seed], atol=2e-4, rtol=2e-4)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask, range(4)))
    assert network.training


def test_a_head_of_zeros_tells_nothing_of_its_network():
    """Nor is it taken for one that tells, when it is tuned later."""
    network = tiny.gpt2(1, tie_word_embeddings=False)
    network.lm_head.weight.data.zero_()
    state, rows = RewardState(network), tiny.prompts(2, 9)
    rows[0, :3] = 0
    mask = (rows != 0).long()
    assert not state(rows, mask).any()
    torch.nn.init.normal_(network.lm_head.weight)
    assert_exact(state, rows, mask)
    assert_exact(state, torch.cat([rows, rows[:, -1:]], 1), torch.cat([mask, mask[:, -1:]], 1))
    assert state.tokens_computed == 2 * (9 + 9 + 1)


def test_longrope_reads_long_texts_anew():
    """Beyond the length of pretraining the whole text is turned by other frequencies, also what the cache holds."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12, "factor": 2.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    torch.manual_seed(1)
    config = tiny._ATTENTION | {"rope_parameters": rope, "original_max_position_embeddings": 12}
    state = RewardState(Phi3ForCausalLM(Phi3Config(**config)).eval())
    rows = tiny.prompts(2, 16)
    for length in (9, 10, 11, 12, 13, 14, 15, 12, 11, 14):
        assert_exact(state, rows[:, :length])
    assert state.tokens_computed == 2 * (12 + 13 + 2 + 12 + 1 + 14)
    mask = torch.ones_like(rows)
    mask[1, :8] = 0
    with pytest.raises(UnsupportedError, match="(?s)longrope.*found: 1 short, 1 long"):
        state(rows, mask)
    mask[1, :8], mask[1, :2] = 1, 0
    assert_exact(state, rows, mask)


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
