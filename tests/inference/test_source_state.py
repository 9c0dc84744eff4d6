"""Whatever texts are asked for, in whatever order: the cached logits of both source models equal a recomputation."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MptConfig,
    MptForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from prt_hf import ContextLengthError, UnsupportedError
from prt_hf.inference import source_state
from prt_hf.inference.probe import Behaviour
from prt_hf.inference.source_state import SourceState
from prt_hf.networks.adapters import bare_base

SIZE = 90  # tokens; the heads have more columns
STEPS = ("extend", "take back", "reorder", "new", "branch", "shorter", "repeat")
WANTED = 7


def gemma3(seed=0, window=6):
    torch.manual_seed(seed)
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = {"num_hidden_layers": 3, "head_dim": 8, "sliding_window": window, "layer_types": layers}
    return Gemma3ForCausalLM(Gemma3TextConfig(**tiny._ATTENTION | sizes)).eval()


def gpt_neo(seed=0, window=4):
    """Its local attention counts slots of the cache, whether they hold a token or not."""
    torch.manual_seed(seed)
    sizes = {"num_layers": 2, "num_heads": 4, "hidden_size": 32, "max_position_embeddings": 64, "window_size": window}
    config = GPTNeoConfig(**tiny._TEXT, **sizes, attention_types=[[["global", "local"], 1]], initializer_range=0.3)
    return GPTNeoForCausalLM(config).eval()


def bloom(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "n_head": 4, "n_layer": 2, "initializer_range": 0.3}
    return BloomForCausalLM(BloomConfig(vocab_size=tiny.VOCABULARY, **sizes)).eval()


def mpt(seed=0):
    """Counts the slots between two tokens."""
    torch.manual_seed(seed)
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "initializer_range": 0.3}
    return MptForCausalLM(MptConfig(vocab_size=tiny.VOCABULARY, **sizes)).eval()


def lora(base, seed=5, **config):
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False, **config)).eval()


def adapted(make):
    network = lora(make(1).double())
    return network, bare_base(network)


def separate(make, dtype=torch.float64):
    return make(1).to(dtype), make(2).to(dtype)


NETWORKS = {
    "llama": lambda: separate(tiny.llama),
    "llama, LoRA": lambda: adapted(tiny.llama),
    "llama, LoRA of the head": lambda: adapted(lambda seed: tiny.llama(seed, tie_word_embeddings=False)),
    "gpt2, LoRA": lambda: adapted(tiny.gpt2),
    "gpt2 and llama": lambda: (tiny.gpt2(1).double(), tiny.llama(2).double()),
    "sliding window, LoRA": lambda: adapted(tiny.sliding_window),
    "gemma3": lambda: separate(gemma3),
    "gemma3, LoRA": lambda: adapted(gemma3),
    # These add float32 to whatever they compute in.
    "gpt_neo": lambda: separate(gpt_neo, torch.float32),
    "bloom": lambda: separate(bloom, torch.float32),
    "mpt": lambda: separate(mpt, torch.float32),
}


class Checked:
    """A state that is held against recomputation at every call."""

    def __init__(self, tuned, untuned):
        self.networks, self.atol = (tuned, untuned), 1e-9 if tuned.dtype == torch.float64 else 2e-5
        self.state = SourceState(tuned, untuned, SIZE)

    @torch.no_grad()
    def expected(self, path, wanted):
        rows = torch.tensor([path])
        return torch.stack([network(rows, use_cache=False).logits[0, -wanted:, :SIZE] for network in self.networks])

    def __call__(self, paths, wanted=1, peek=False):
        found = (self.state.peek if peek else self.state.read)(paths, wanted)
        assert len(found) == len(paths)
        for path, logits in zip(paths, found, strict=True):
            torch.testing.assert_close(logits, self.expected(path, wanted), atol=self.atol, rtol=self.atol)


def some(generator, length):
    return torch.randint(3, SIZE, (length,), generator=generator).tolist()


def follow(check, calls):
    """Make calls as `generate` does, and others."""
    paths, wanted = [[5, 6, 7], [8]], WANTED
    for step, seed in calls:
        generator = torch.Generator().manual_seed(seed)
        choices = torch.randint(0, len(paths), (1 + seed % 4,), generator=generator).tolist()
        if step == "extend":
            paths = [path + some(generator, (seed + row) % 4) for row, path in enumerate(paths)]
        elif step == "take back":
            paths = [path[: max(1, len(path) - (seed + row) % 5)] for row, path in enumerate(paths)]
            paths = [path + some(generator, (seed // 5 + row) % 3) for row, path in enumerate(paths)]
        elif step == "reorder":
            paths = [paths[row] + some(generator, 1) for row in choices]
        elif step == "new":
            paths = [some(generator, 1 + (seed + 3 * row) % 11) for row in choices]
        elif step == "branch":
            branches = [paths[row] + some(generator, 1 + seed % 2) for row in choices]
            check(branches, 1, peek=True)
        elif step == "shorter":
            paths = [path[: 1 + seed % len(path)] for path in paths]
        wanted = 1 + seed % WANTED if step in ("extend", "shorter") else wanted
        check(paths, wanted)
        if seed % 3 == 0:
            check([[*path, 4] for path in paths], 1, peek=True)


CALLS = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2**31 - 1)), min_size=2, max_size=7)
unhurried = settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def networks():
    return {name: make() for name, make in NETWORKS.items()}


@pytest.mark.parametrize("name", NETWORKS)
@unhurried
@given(calls=CALLS)
def test_any_order_of_calls(networks, name, calls):
    follow(Checked(*networks[name]), calls)


@unhurried
@given(calls=CALLS)
def test_networks_that_see_gaps(networks, calls):
    """Nothing is kept then that would leave a gap."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source_state, "behaviour_of", lambda run: Behaviour(True, True, True, skips=False))
        check = Checked(*networks["llama, LoRA"])
    slots = []
    forward = check.state._forward
    check.state._forward = lambda tokens, *rest: slots.append(rest[0]) or forward(tokens, *rest)
    follow(check, calls)
    assert not any(bool((~each & (each.cumsum(1) > 0)).any()) for each in slots)


def test_networks_that_see_gaps_are_found_out(networks):
    assert SourceState(*networks["mpt"], SIZE)._behaviours[0] == Behaviour(True, True, True, skips=False)
    assert all(each.skips for each in SourceState(*networks["bloom"], SIZE)._behaviours)


def test_networks_that_see_padding(networks, monkeypatch):
    """Texts of one length, or one at a time; others are refused, and leave nothing behind."""
    seen = Behaviour(sees_padding=False, steps=True, rewinds=True, skips=False)
    monkeypatch.setattr(source_state, "behaviour_of", lambda run: seen)
    monkeypatch.setattr("prt_hf.inference.probe.behaviour_of", lambda run: seen)
    check = Checked(*networks["llama"])
    check([[5, 6, 7], [5, 6, 8]], 3)
    check([[5, 6, 7, 9], [5, 6, 8, 9]], 3)
    with pytest.raises(UnsupportedError, match="does not tell padding from text"):
        check([[5, 6, 7, 9, 4], [5, 6, 8, 9]], 3)
    check([[5, 6, 7, 9, 4, 4], [5, 6, 8, 9, 4, 4]], 3)
    check([[5, 6, 7, 8]], 3)
    check([[5, 6, 7, 8, 3], [5, 6, 7, 8, 4]], peek=True)


@pytest.mark.parametrize("name", ["llama, LoRA", "gpt2 and llama", "gemma3"])
def test_each_token_is_read_once(networks, name):
    check = Checked(*networks[name])
    text = some(torch.Generator().manual_seed(0), 30)
    for length in (9, 10, 12):
        check([text[:length]], WANTED)
    assert check.state.tokens_computed == 12
    check([text[:11]], WANTED - 1)  # of which all logits are still known
    check([text[:11], text[:11]], WANTED - 1)
    assert check.state.tokens_computed == 12
    check([text[:13]], WANTED)
    before = check.state.tokens_computed
    assert before == 12 + 2
    check([text[:13]] * 3, WANTED)
    check([text[:13] + [token] for token in (3, 4, 3)], peek=True)
    assert check.state.tokens_computed == before + 2, "equal texts are read once, branches share what was read"
    check([text[:13] + [7]], WANTED)
    assert check.state.tokens_computed == before + 3


def test_logits_that_were_forgotten_are_read_again(networks):
    check, text = Checked(*networks["llama"]), some(torch.Generator().manual_seed(0), 20)
    check([text], 1)
    check([text], 5)
    check([text[:12]], 3)
    check([text], 20)
    check([text[:3]], 7)


@pytest.mark.parametrize("name", ["llama, LoRA", "sliding window, LoRA"])
def test_gaps_do_not_grow_without_end(networks, name):
    """Rows of very different growth; a slot without a token costs as much as one with."""
    check = Checked(*networks[name])
    paths = [[5], [6]]
    for step in range(90):
        paths = [path + [3 + step] * (1 if row == step % 2 else 0) for row, path in enumerate(paths)]
        check(paths, 2)
    assert check.state._memory.slots.shape[1] <= 2 * 46 + source_state._SPARE


def test_windows_of_any_name_count_slots():
    """Long before the probe's few tokens would tell."""
    check = Checked(*(gpt_neo(seed, window=16) for seed in (1, 2)))
    paths = [some(torch.Generator().manual_seed(row), 12 + row) for row in range(3)]
    for step in range(14):
        paths = [path + [3 + step] * ((row + step) % 3) for row, path in enumerate(paths)]
        check(paths, 2)


def test_adapters_and_weights_that_change(networks):
    network = lora(tiny.llama(1).double())
    check, paths = Checked(network, bare_base(network)), [[5, 6, 7, 8], [9, 10]]
    check(paths, 2)
    with network.disable_adapter():
        check(paths, 2)
        check([path + [11] for path in paths], 2)
    check([path + [11] for path in paths], 2)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.5)
    network.train()
    network(torch.tensor([paths[0]]), labels=torch.tensor([paths[0]])).loss.backward()
    optimizer.step()
    network.eval()
    check([path + [11] for path in paths], 2)
    with torch.no_grad():
        network.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight.mul_(1.5)
    check([path + [11, 12] for path in paths], 2)


def test_a_network_in_training_mode_is_evaluated(networks):
    network = lora(tiny.llama(1).double(), lora_dropout=0.5)
    check = Checked(network, bare_base(network))
    network.train()
    found = check.state.read([[5, 6, 7]], 2)
    assert network.training and any(module.training for module in network.modules())
    network.eval()
    torch.testing.assert_close(found[0], check.expected([5, 6, 7], 2), atol=1e-9, rtol=1e-9)


def test_precision_of_the_call():
    """What was read in one precision is not taken for another's."""
    check = Checked(tiny.llama(1), tiny.llama(2))
    paths = [[5, 6, 7, 8], [9, 10]]
    check(paths, 2)
    with torch.autocast("cpu", torch.bfloat16):
        low = check.state.read(paths, 2)
        fresh = SourceState(*check.networks, SIZE).read(paths, 2)
    assert all(torch.equal(one, other) for one, other in zip(low, fresh, strict=True))
    assert float((low[0] - check.expected(paths[0], 2)).abs().max()) > 1e-3
    check(paths, 2)
    with torch.inference_mode():
        check([path + [3] for path in paths], 2)
    check([path + [3, 4] for path in paths], 2)


def test_an_interrupted_call_leaves_nothing_half_read(networks, monkeypatch):
    check, paths = Checked(*networks["gpt2, LoRA"]), [[5, 6, 7, 8], [9, 10]]
    check(paths, 2)
    with monkeypatch.context() as patch:
        patch.setattr(check.state, "_forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            check.state.read([[5, 6, 3], [9, 10, 4]], 2)
    check([[5, 6, 3], [9, 10, 4]], 2)
    check(paths, 2)


def test_threads(networks):
    check = Checked(*networks["llama, LoRA"])
    texts = [some(torch.Generator().manual_seed(seed), 12) for seed in range(4)]

    def decode(text):
        for length in range(3, 12):
            check([text[:length]], 3)
            check([[*text[:length], 4], [*text[:length], 5]], peek=True)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(decode, texts * 2))


def test_context():
    check = Checked(tiny.gpt2(1, n_positions=8), tiny.llama(2))
    check([[5] * 8, [6]], 2)
    with pytest.raises(ContextLengthError, match="(?s)at most 8 tokens.*found: 9 tokens"):
        check.state.read([[5] * 9, [6]], 2)
    check([[5] * 8, [6, 7]], 2)


def test_recurrent_networks_are_refused():
    with pytest.raises(UnsupportedError, match="(?s)Mamba.* cannot take back.*attention alone"):
        SourceState(tiny.llama(1), tiny.mamba(2), SIZE)
    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        vocab_size=97, hidden_size=32, lru_width=32, num_attention_heads=4, num_hidden_layers=3, intermediate_size=64
    )
    network = RecurrentGemmaForCausalLM(config).eval()
    with pytest.raises(UnsupportedError, match="(?s)RecurrentGemma.* cannot take back"):
        SourceState(network, network, SIZE)


def test_a_mixed_pass_is_one_pass(networks):
    """A plain LoRA and its base; not an adapter that is none, nor two networks."""
    assert len(SourceState(*networks["llama, LoRA"], SIZE)._mixed) == 1
    assert len(SourceState(*networks["llama"], SIZE)._mixed) == 2
    network = lora(tiny.llama(1).double(), use_dora=True)
    assert isinstance(network, PeftModel) and len(SourceState(network, bare_base(network), SIZE)._mixed) == 2
    follow(Checked(network, bare_base(network)), [("extend", 3), ("take back", 7), ("reorder", 9)])
