"""Files of rewards that anybody may have written: refused as one kind of error, or the same rewards."""

import copy
import json
import math
import resource
import shutil
import struct
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, HRAConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from prt_hf import BaseModelMismatchError, PRTForCausalLM, PRTTrainer, RewardFileError, RewardModel
from prt_hf.errors import PRTError, PRTValueError
from prt_hf.evaluation.fit import check_fit
from prt_hf.networks.auto import load_pretrained, load_skeleton
from prt_hf.training.config import PRTConfig

TOKENIZER, ROWS = tiny.tokenizer(), tiny.prompts()
# What a reward is tuned or told with, and a reward by itself has no second record of: another value makes another
# reward, in which nothing is wrong.
KNOBS = {
    "adapter_config.json": {"lora_alpha", "use_rslora", "alpha_pattern"},
    "config.json": {"rms_norm_eps", "rope_theta", "rope_parameters", "rope_type", "hidden_act", "num_attention_heads"},
}
NESTED = {"a": [{"b": [None, {"c": ["d"] * 3}]}] * 3}
JUNK = [
    *(None, True, False, 0, 1, -1, 3, 10**9, -(10**9), 10**40, 0.5, 1e300, math.nan, math.inf, -math.inf),
    *("", "x", "../x", "/x", "a" * 5000, "a/" * 3000, "\0", "(a+)+$", "((", ".*", "NaN", "10", "ünï", "org/kernels"),
    *([], {}, [1], [[]], [None], ["x"], {"x": 1}, NESTED, [10**9] * 50, ["(a*)*b"], {"(a|a)*$": 4}, {"": math.nan}),
]
CONFIGS = {
    "adapter": ("adapter_config.json", "prt_config.json", "tokenizer.json", "tokenizer_config.json"),
    "full": ("config.json", "prt_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"),
}
WEIGHTS = {"adapter": "adapter_model.safetensors", "full": "model.safetensors"}


def rewards(reward):
    with torch.no_grad():
        return reward(input_ids=ROWS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of each form, a folder and the rewards that it gives."""
    made = {}
    for form, peft_config in (("adapter", LoraConfig(r=4, lora_alpha=9)), ("full", None)):
        reward = RewardModel.from_base(tiny.llama(1), copy.deepcopy(TOKENIZER), peft_config)
        torch.manual_seed(5)
        for parameter in reward.network.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
        folder = tmp_path_factory.mktemp(form)
        reward.save_pretrained(folder)
        made[form] = folder, rewards(reward)
    return made


def places(entries, path=()):
    """Paths to all entries of a JSON file, of a vocabulary the first few."""
    items = list(entries.items()) if isinstance(entries, dict) else list(enumerate(entries))
    for key, value in items if len(items) < 60 else items[:4]:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def mutated(text: str, path: tuple, change: str, junk) -> str:
    entries = json.loads(text)
    owner = entries
    for key in path[:-1]:
        owner = owner[key]
    if change == "delete":
        del owner[path[-1]]
    elif change == "twice":
        line = f"{json.dumps(str(path[-1]))}: {json.dumps(junk)}"
        return json.dumps(entries).replace("{", "{" + line + ", ", 1) if isinstance(owner, dict) else ""
    else:
        owner[path[-1]] = junk
    return json.dumps(entries)


@st.composite
def mutations(draw, texts: dict[str, str]):
    """(file, what happens to it, its new bytes)"""
    name = draw(st.sampled_from(sorted(texts)))
    text = texts[name]
    change = draw(st.sampled_from(["delete", "replace", "replace", "replace", "twice", "truncate", "binary", "gone"]))
    path = draw(st.sampled_from(sorted(places(json.loads(text)), key=str)))
    if change == "truncate":
        content = text.encode()[: draw(st.integers(0, len(text) - 1))]
    elif change == "binary":
        content = draw(st.binary(max_size=64))
    elif change == "gone":
        content = None
    else:
        content = mutated(text, path, change, draw(st.sampled_from(JUNK))).encode()
    return name, path, content


def headers(file: Path):
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


@st.composite
def broken_weights(draw, header: dict, data: bytes):
    """A safetensors file whose header says something else."""
    header = copy.deepcopy(header)
    name = draw(st.sampled_from(sorted(header)))
    kinds = ["delete", "rename", "shape", "dtype", "offsets", "junk", "length", "metadata", "short"]
    change = draw(st.sampled_from(kinds))
    entry = header[name]
    if change == "delete":
        del header[name]
    elif change == "rename":
        header[draw(st.sampled_from(["x", "", "../x", name + ".x", name[1:]]))] = header.pop(name)
    elif change in ("shape", "offsets", "dtype") and name != "__metadata__":
        key = {"shape": "shape", "offsets": "data_offsets", "dtype": "dtype"}[change]
        entry[key] = draw(st.sampled_from([*JUNK, "F16", "I8", "I32", [0], [0, 0], [1] * 60, [2**62, 4], [-1, 4]]))
    elif change == "junk":
        header[name] = draw(st.sampled_from(JUNK))
    elif change == "metadata":
        header["__metadata__"] = draw(st.sampled_from(JUNK))
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([0, 1, 2**40, 2**63])) if change == "length" else len(text)
    return name, struct.pack("<Q", length) + text + (data[:-5] if change == "short" else data)


def check(whole, form, folder, file, path, content):
    """Refused as PRTError, or the rewards of before."""
    source, expected = whole[form]
    shutil.copytree(source, folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    try:
        # Of a full reward, a class of the user's own would be given.
        found = rewards(RewardModel.from_pretrained(folder, base_model=tiny.llama(1) if form == "adapter" else None))
    except PRTError:
        return "refused"
    finally:
        shutil.rmtree(folder)
    if torch.equal(found, expected):
        return "same"
    assert KNOBS.get(file, set()) & set(path), (file, path, (content or b"")[:2000])
    return "another reward"


BOUNDED = settings(
    max_examples=60, derandomize=True, deadline=10_000, suppress_health_check=list(HealthCheck), database=None
)


@pytest.mark.parametrize("form", CONFIGS)
def test_damaged_configurations_and_tokenizers(whole, form, tmp_path):
    texts = {name: (whole[form][0] / name).read_text() for name in CONFIGS[form]}

    @BOUNDED
    @given(mutations(texts))
    def run(mutation):
        check(whole, form, tmp_path / "reward", *mutation)

    run()


@pytest.mark.parametrize("form", WEIGHTS)
def test_damaged_weights(whole, form, tmp_path):
    file = WEIGHTS[form]

    @BOUNDED
    @given(broken_weights(*headers(whole[form][0] / file)))
    def run(mutation):
        name, content = mutation
        check(whole, form, tmp_path / "reward", file, (name,), content)

    run()


# Each hole by itself


@contextmanager
def cheaply(seconds=5.0, megabytes=300):
    """It takes neither long nor much memory."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - started < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes * 1024


def edited(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def adapter(whole, tmp_path):
    return shutil.copytree(whole["adapter"][0], tmp_path / "adapter")


@pytest.fixture
def full(whole, tmp_path):
    return shutil.copytree(whole["full"][0], tmp_path / "full")


@pytest.fixture
def base(tmp_path):
    tiny.llama(1).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"r": 10**9}, "larger weights than there are"),
        ({"r": True}, "r = True"),
        ({"rank_pattern": {"q_proj": 10**9}}, "larger weights than there are"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"(.*)*x": 4}}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "NaN"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "alpha_pattern"),
        ({"lora_alpha": math.nan}, "lora_alpha = NaN"),
        ({"lora_alpha": math.inf}, "lora_alpha = inf"),
        ({"lora_alpha": "9"}, "lora_alpha = 9"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"use_rslora": 1}, "use_rslora = 1"),
        ({"use_rslora": "no"}, "use_rslora = no"),
        ({"use_dora": 0.0}, "use_dora = 0.0"),
        ({"modules_to_save": ["(a*)*b"]}, "modules_to_save"),
        ({"layers_pattern": "(a*)*b", "layers_to_transform": [0]}, "layers_pattern"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ({"layer_replication": [[0, 1]] * 10**5}, "layer_replication"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"base_model_name_or_path": "a" * 5000}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "a/" + "b" * 300}, "base_model_name_or_path"),
        ({"revision": "a\0b"}, "revision"),
        ({"peft_type": "NONE"}, "cannot be read"),
    ],
)
def test_configurations_of_adapters_are_looked_at_before_any_base_is_loaded(adapter, changes, text):
    edited(adapter / "adapter_config.json", **changes)
    with cheaply(), pytest.raises(RewardFileError, match=text):
        RewardModel.from_pretrained(adapter, base_model="there/is-none")


def test_a_tensor_without_values_does_not_hide_a_rank(adapter):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(weights | {"x": torch.zeros(0, 10**9)}, adapter / "adapter_model.safetensors", {"format": "pt"})
    edited(adapter / "adapter_config.json", r=10**9)
    with cheaply(), pytest.raises(RewardFileError, match="larger weights than there are"):
        RewardModel.from_pretrained(adapter, base_model=tiny.llama(1))


@pytest.mark.parametrize(
    ("peft_config", "changes"),
    [
        (LoraConfig(r=4), {"r": 90}),
        (AdaLoraConfig(init_r=6, target_r=4, total_step=9), {"init_r": 90}),
        (LoHaConfig(r=4), {"r": 60_000}),
        (LoKrConfig(r=4), {"r": 60_000}),
        (HRAConfig(r=4), {"r": 60_000}),
        (OFTConfig(oft_block_size=4), {"oft_block_size": 32}),
    ],
)
def test_no_memory_for_weights_that_are_not_there(tmp_path, peft_config, changes):
    peft_config.task_type, peft_config.target_modules = "CAUSAL_LM", ["q_proj", "down_proj"]
    wide = {"hidden_size": 4096, "intermediate_size": 32}
    with torch.device("meta"):
        base = tiny.llama(1, **wide)
    base = base.to_empty(device="cpu")
    for parameter in base.parameters():
        parameter.data.zero_()
    RewardModel.from_base(base, copy.deepcopy(TOKENIZER), peft_config).save_pretrained(tmp_path)
    edited(tmp_path / "adapter_config.json", **changes)
    with cheaply(15), pytest.raises((BaseModelMismatchError, RewardFileError)):
        RewardModel.from_pretrained(tmp_path, base_model=base)


@pytest.mark.parametrize("pattern", [r"(.*a)*(.*b)*$", r"^(([a-z_.0-9])+)+$", ".*", "all-linear", "("])
def test_regular_expressions_of_others_are_not_run(adapter, whole, pattern):
    edited(adapter / "adapter_config.json", target_modules=pattern)
    with cheaply():
        reward = RewardModel.from_pretrained(adapter, base_model=tiny.llama(1))
    assert torch.equal(rewards(reward), whole["adapter"][1])
    edited(adapter / "adapter_config.json", target_modules=["q_proj"], exclude_modules=pattern)
    with cheaply():
        reward = RewardModel.from_pretrained(adapter, base_model=tiny.llama(1))
    assert torch.equal(rewards(reward), whole["adapter"][1])


def test_ordinary_adapters_are_looked_at_first_too(base, tmp_path):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(LlamaForCausalLM.from_pretrained(base), lora).save_pretrained(tmp_path / "lora")
    edited(tmp_path / "lora" / "adapter_config.json", r=10**9, base_model_name_or_path="there/is-none")
    reward = RewardModel.from_base(str(base), peft_config=LoraConfig())
    for door in (
        lambda: RewardModel.from_adapter(tmp_path / "lora"),
        lambda: PRTForCausalLM.from_parts(tiny.llama(2), [str(tmp_path / "lora")]),
        lambda: PRTTrainer(
            reward,
            PRTConfig(str(tmp_path / "out"), **tiny.TUNING),
            train_dataset=tiny.texts(),
            distill_from=tmp_path / "lora",
        ),
    ):
        with cheaply(), pytest.raises(RewardFileError, match="larger weights than there are"):
            door()


# Weights that are not there


def without(file: Path, *names: str) -> None:
    weights = load_file(file)
    assert set(names) <= weights.keys()
    save_file({name: value for name, value in weights.items() if name not in names}, file, {"format": "pt"})


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_no_weight_is_random(full, base, name):
    for folder, kind, load in (
        (full, RewardFileError, RewardModel.from_pretrained),
        (base, PRTValueError, lambda folder: load_pretrained(str(folder))),
    ):
        without(folder / "model.safetensors", name)
        with pytest.raises(kind, match=f"1 missing: {name}"):
            load(folder)


def test_bases_backbones_and_teachers_without_some_weights(base, tmp_path):
    RewardModel.from_base(str(base), peft_config=LoraConfig()).save_pretrained(tmp_path / "reward")
    tiny.llama(2).save_pretrained(tmp_path / "backbone")
    TOKENIZER.save_pretrained(tmp_path / "backbone")
    PRTForCausalLM.from_parts(str(tmp_path / "backbone"), [tmp_path / "reward"]).save_pretrained(tmp_path / "recipe")
    reward = RewardModel.from_pretrained(tmp_path / "reward")
    without(tmp_path / "backbone" / "model.safetensors", "lm_head.weight")
    without(base / "model.safetensors", "lm_head.weight")
    for door in (
        lambda: RewardModel.from_pretrained(tmp_path / "reward"),
        lambda: RewardModel.from_base(str(base)),
        lambda: PRTForCausalLM.from_parts(str(tmp_path / "backbone"), [reward]),
        lambda: PRTForCausalLM.from_pretrained(tmp_path / "recipe"),
        lambda: PRTTrainer(
            reward,
            PRTConfig(str(tmp_path / "out"), **tiny.TUNING),
            train_dataset=tiny.texts(),
            distill_from=str(tmp_path / "backbone"),
        ),
    ):
        with pytest.raises(PRTValueError, match="1 missing: lm_head.weight"):
            door()


@pytest.mark.parametrize("layers", [1, 3])
def test_another_depth_than_the_weights(full, base, layers):
    for folder in (full, base):
        edited(folder / "config.json", num_hidden_layers=layers, layer_types=None)
    with pytest.raises(RewardFileError, match=r"9 left over: model\.layers\.1" if layers == 1 else "9 missing"):
        RewardModel.from_pretrained(full)
    if layers == 1:  # what a pretrained checkpoint holds besides is not asked for
        assert load_pretrained(str(base)).config.num_hidden_layers == 1
    else:
        with pytest.raises(PRTValueError, match="9 missing"):
            load_pretrained(str(base))


def test_another_width_than_the_weights(full, base):
    for folder in (full, base):
        edited(folder / "config.json", intermediate_size=65)
    with pytest.raises(RewardFileError, match="6 of another shape: model.layers.0.mlp.down_proj.weight"):
        RewardModel.from_pretrained(full)
    for asked in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(PRTValueError, match="6 of another shape: model.layers.0.mlp.down_proj.weight"):
            load_pretrained(str(base), **asked)


def test_weights_that_are_tied_are_in_no_file(tmp_path):
    for make in (lambda: tiny.llama(1, tie_word_embeddings=True), lambda: tiny.gpt2(1), lambda: tiny.mamba(1)):
        expected = make()
        expected.save_pretrained(tmp_path / "base")
        TOKENIZER.save_pretrained(tmp_path / "base")
        assert torch.equal(load_pretrained(str(tmp_path / "base"))(ROWS).logits, expected(ROWS).logits)
        RewardModel.from_base(make(), TOKENIZER).save_pretrained(tmp_path / "reward")
        found = RewardModel.from_pretrained(tmp_path / "reward", dtype=torch.float32, device_map="cpu")
        assert torch.equal(rewards(found), expected(ROWS).logits)
        shutil.rmtree(tmp_path / "reward")


def test_bases_may_be_pickled_and_rewards_may_not(base, tmp_path):
    reward = RewardModel.from_base(str(base))
    expected = rewards(reward)
    reward.save_pretrained(tmp_path / "reward")
    for folder in (base, tmp_path / "reward"):
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert torch.equal(load_pretrained(str(base))(ROWS).logits, expected)
    with pytest.raises(RewardFileError, match="pickled weights can run code"):
        RewardModel.from_pretrained(tmp_path / "reward")


@pytest.mark.parametrize("form", WEIGHTS)
def test_integers_are_no_weights(whole, form, adapter, full):
    folder = adapter if form == "adapter" else full
    header, data = headers(folder / WEIGHTS[form])
    header[min(name for name in header if name.endswith("weight"))]["dtype"] = "I32"  # of as many bytes
    text = json.dumps(header).encode()
    (folder / WEIGHTS[form]).write_bytes(struct.pack("<Q", len(text)) + text + data)
    with pytest.raises(PRTError, match="do not fit its base" if form == "adapter" else "integers where"):
        RewardModel.from_pretrained(folder, base_model=tiny.llama(1) if form == "adapter" else None)


def test_counts_that_no_network_has(base, adapter):
    """As of a base that a reward names."""
    config = json.loads((base / "config.json").read_text())
    for name, value in (("num_labels", 10**9), ("num_hidden_layers", 10**9)):
        (base / "config.json").write_text(json.dumps(config | {name: value}))
        for load in (load_pretrained, load_skeleton, RewardModel.from_base):
            with cheaply(), pytest.raises(PRTValueError, match=f"{name} of"):
                load(str(base))
        with cheaply(), pytest.raises(PRTValueError, match=f"{name} of"):
            RewardModel.from_pretrained(adapter, base_model=str(base))
    (base / "config.json").write_text(json.dumps(config | {"hidden_size": "x"}))
    with pytest.raises(PRTValueError, match="The configuration of .* cannot be used"):
        load_pretrained(str(base))


# Configurations of full rewards


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size": 10**9}, "hidden_size = 1000000000"),
        ({"hidden_size": 65_536, "head_dim": 16_384}, "larger network than there are weights for"),
        ({"hidden_size": -32}, "cannot be used"),
        ({"hidden_size": "32"}, "cannot be used"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"num_hidden_layers": 60_000, "layer_types": None}, "more layers than there are weights for"),
        ({"num_labels": 10**9}, "num_labels = 1000000000"),
        ({"vocab_size": 10**12}, "vocab_size = 1000000000000"),
        ({"rms_norm_eps": math.nan}, "NaN"),
        ({"quantization_config": {"quant_method": "magic"}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantization_config"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"fusion_config": {"a": True}}, "fusion_config"),
        ({"model_type": "nothing"}, "cannot load"),
        ({"attn_implementation": "org/kernels"}, "kernels from elsewhere"),
        ({"_attn_implementation": "org/kernels@main:fn"}, "kernels from elsewhere"),
        ({"_attn_implementation_internal": "org/kernels"}, "kernels from elsewhere"),
        ({"attn_implementation": {"": "org/kernels"}}, "kernels from elsewhere"),
    ],
)
def test_configurations_are_held_against_the_weights_before_they_are_loaded(full, changes, text):
    edited(full / "config.json", **changes)
    with cheaply(10), pytest.raises(RewardFileError, match=text):
        RewardModel.from_pretrained(full)
    with cheaply(10), pytest.raises(RewardFileError, match=text):
        check_fit(full, str(full))


def test_other_weights_beside_a_full_reward(full):
    stranger = full / "shard-00000-model-00001-of-00001.safetensors"  # which transformers would take instead
    shutil.copy(full / "model.safetensors", stranger)
    with pytest.raises(RewardFileError, match=f"other weights(?s:.)*{stranger.name}"):
        RewardModel.from_pretrained(full)


def test_full_rewards_of_a_class_of_the_users_own_are_checked_too(full):
    edited(full / "config.json", num_hidden_layers=60_000, layer_types=None)
    with cheaply(10), pytest.raises(RewardFileError, match="more layers"):
        RewardModel.from_pretrained(full, base_model=tiny.llama(3))


@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation"])
def test_bases_and_backbones_do_not_choose_kernels_of_others(base, entry):
    edited(base / "config.json", **{entry: "org/kernels"})
    for load in (load_pretrained, load_skeleton, RewardModel.from_base):
        with pytest.raises(PRTValueError, match="kernels from elsewhere(?s:.)*attn_implementation='sdpa'"):
            load(str(base))
    if entry == "attn_implementation":  # the other is stronger than what is asked for
        assert load_pretrained(str(base), attn_implementation="eager").config._attn_implementation == "eager"
    else:
        with pytest.raises(PRTValueError, match="kernels from elsewhere"):
            load_pretrained(str(base), attn_implementation="eager")
    edited(base / "config.json", **{entry: "eager"})
    assert load_pretrained(str(base)).config._attn_implementation == "eager"


# Code beside a reward

CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({marker!r}).touch()

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def hostile(tmp_path):
    """Makes a folder bring code along; returns what that code would leave."""
    marker = tmp_path / "code-was-run"

    def make(folder: Path) -> Path:
        (folder / "code.py").write_text(CODE.format(marker=str(marker)))
        edited(
            folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "code.Tokenizer"]}, tokenizer_class="X"
        )
        return marker

    return make


@pytest.mark.parametrize("trusted", [True, False, None])
def test_code_beside_a_reward_is_never_run(adapter, full, base, hostile, monkeypatch, trusted, tmp_path):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    for folder in (adapter, full):
        marker = hostile(folder)
    get_peft_model(
        LlamaForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    ).save_pretrained(tmp_path / "lora")
    TOKENIZER.save_pretrained(tmp_path / "lora")
    hostile(tmp_path / "lora")
    reward = RewardModel.from_base(str(base), peft_config=LoraConfig())
    PRTForCausalLM.from_parts(str(base), [reward]).save_pretrained(tmp_path / "recipe")
    hostile(tmp_path / "recipe")
    for door in (
        lambda: RewardModel.from_pretrained(adapter, base_model=str(base), trust_remote_code=trusted),
        lambda: RewardModel.from_pretrained(full, trust_remote_code=trusted),
        lambda: RewardModel.from_adapter(tmp_path / "lora", trust_remote_code=trusted),
        lambda: PRTForCausalLM.from_pretrained(tmp_path / "recipe", trust_remote_code=trusted),
    ):
        try:
            door()
        except PRTError as error:
            assert "tokenizer" in str(error)
        assert not marker.exists()


def test_code_beside_a_base_is_run_where_it_is_trusted(base, hostile, tmp_path):
    marker = hostile(base)
    RewardModel.from_base(str(base), TOKENIZER, LoraConfig()).save_pretrained(tmp_path / "reward")
    (tmp_path / "reward" / "tokenizer_config.json").unlink()
    (tmp_path / "reward" / "tokenizer.json").unlink()
    assert not marker.exists()
    RewardModel.from_pretrained(tmp_path / "reward", trust_remote_code=True)
    assert marker.exists()


# Names and tokenizers


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000, "org/" + "b" * 300, "a\0b", "a\nb"])
def test_names_that_no_file_system_takes(adapter, name):
    config = json.loads((adapter / "prt_config.json").read_text())
    for owner in ("reward_base", "source_backbone", "distilled_from"):
        edited(adapter / "prt_config.json", **config | {owner: config["reward_base"] | {"id": name}})
        with pytest.raises(RewardFileError, match="prt_config.json cannot be read(?s:.)*id = "):
            RewardModel.from_pretrained(adapter, base_model=tiny.llama(1))


def test_ids_that_are_too_long_for_the_hub(adapter):
    config = json.loads((adapter / "prt_config.json").read_text())
    edited(adapter / "prt_config.json", reward_base=config["reward_base"] | {"id": "org/" + "b" * 100})
    edited(adapter / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(PRTError, match="There is no model at org/"):
        RewardModel.from_pretrained(adapter)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model": {"type": "WordLevel"}}', '{"version": NaN}'])
def test_tokenizers_that_cannot_be_used(adapter, full, content):
    for folder in (adapter, full):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(RewardFileError, match="tokenizer(?s:.)*cannot be read"):
            RewardModel.from_pretrained(folder, base_model=tiny.llama(1) if folder == adapter else None)


def test_the_size_of_the_vocabulary_is_the_tokenizers(adapter):
    config = json.loads((adapter / "prt_config.json").read_text())
    edited(adapter / "prt_config.json", contract=config["contract"] | {"size": 5})
    with pytest.raises(PRTError, match="the same 5 tokens"):
        RewardModel.from_pretrained(adapter, base_model=tiny.llama(1))


def test_image_processors_that_cannot_be_used(tmp_path):
    RewardModel.from_base(tiny.vit(1)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": ')
    with pytest.raises(RewardFileError, match="preprocessor_config.json"):
        RewardModel.from_pretrained(tmp_path)
