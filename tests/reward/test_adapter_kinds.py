"""Every kind of adapter that PEFT has, and every option of LoRA: right token by token, or refused at every door."""

import copy
import json
from dataclasses import fields

import pytest
import tiny
import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import DynamicCache

from prt_hf import EFTLogitsProcessor, RewardModel
from prt_hf.errors import PRTError, RewardFileError, UnsupportedError
from prt_hf.networks.anatomy import CACHE
from prt_hf.reward.finetuned import TunedModel

TOKENIZER = tiny.tokenizer()
ROWS = tiny.prompts()
RIGHT = {
    "ADALORA": {"total_step": 10, "init_r": 6, "target_r": 4},
    "C3A": {"block_size": 8},
    "DELORA": {"r": 4},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "LOHA": {"r": 4},
    "LOKR": {"r": 4},
    "LORA": {},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "ROAD": {"group_size": 8},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": ROWS[0, :3].tolist()},
}
LORA_OPTIONS = {
    "use_dora": True,
    "use_rslora": True,
    "lora_bias": True,
    "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.down_proj": 3},
    "alpha_pattern": {"^model.layers.0.self_attn.q_proj$": 3},
    "layers_to_transform": [1],
    "layers_pattern": "layers",
    "exclude_modules": ["model.layers.0.self_attn.q_proj"],
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": ROWS[0, :3].tolist(),
    "target_modules": r".*\.(q_proj|down_proj)",
    "init_lora_weights": "gaussian",
}
REFUSED_OPTIONS = {
    "alora_invocation_tokens": [5],
    "layer_replication": [[0, 2], [0, 2]],
    "megatron_config": {"a": 1},
    "use_qalora": True,
    "arrow_config": {"top_k": 2},
    "kasa_config": {"beta": 0.1},
    "use_bdlora": {"nblocks": 2},
    "velora_config": {"num_groups": 2},
    "monteclora_config": {"num_samples": 2},
}
NAMES = {entry.name for entry in fields(LoraConfig)}


def rewards(reward, rows=ROWS):
    with torch.no_grad():
        return reward(input_ids=rows)


def made(kind: str, **options):
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    known = {entry.name for entry in fields(config_class)}
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | options
    return config_class(**{name: value for name, value in options.items() if name in known})


def moved(network, seed=3):
    torch.manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def check_right(peft_config, folder):
    """Cached = uncached, off = the base, loaded = saved."""
    reward = RewardModel.from_base(tiny.llama(1), copy.deepcopy(TOKENIZER), peft_config)
    moved(reward.network)
    expected = rewards(reward)
    pretrained = rewards(RewardModel.from_base(tiny.llama(1), TOKENIZER))
    assert not torch.allclose(expected, pretrained, atol=1e-3)
    with reward.network.disable_adapter():
        assert torch.equal(rewards(reward), pretrained)
    with torch.no_grad():
        cache, steps = DynamicCache(config=reward.network.config), []
        for position in range(ROWS.shape[1]):
            step = ROWS[:, position : position + 1]
            steps.append(reward.network(input_ids=step, use_cache=True, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(steps, 1), expected, atol=1e-4, rtol=1e-4)
    reward.save_pretrained(folder)
    torch.manual_seed(8)  # of nothing that is drawn at the load
    assert torch.equal(rewards(RewardModel.from_pretrained(folder, base_model=tiny.llama(1))), expected)


@pytest.mark.parametrize("kind", [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING])
def test_every_kind_is_right_or_refused(kind, tmp_path):
    if kind in RIGHT:
        return check_right(made(kind, **RIGHT[kind]), tmp_path)
    peft_config = made(kind, num_virtual_tokens=2)
    with pytest.raises(UnsupportedError, match=kind):
        RewardModel.from_base(tiny.llama(1), TOKENIZER, peft_config)
    folder = tmp_path / "reward"
    RewardModel.from_base(tiny.llama(1), copy.deepcopy(TOKENIZER), LoraConfig()).save_pretrained(folder)
    peft_config.save_pretrained(folder)
    with pytest.raises(PRTError):
        RewardModel.from_pretrained(folder, base_model=tiny.llama(1))


@pytest.mark.parametrize("option", LORA_OPTIONS)
def test_options_of_lora_that_are_right(option, tmp_path):
    options = {option: LORA_OPTIONS[option]}
    if option == "layers_pattern":
        options["layers_to_transform"] = [0]
    check_right(made("LORA", **options), tmp_path)


@pytest.mark.parametrize("option", REFUSED_OPTIONS)
def test_other_options_of_lora_are_refused_at_every_door(option, tmp_path):
    if option not in NAMES:
        pytest.skip("of a later PEFT")
    tiny.llama(1).save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    reward = RewardModel.from_base(str(tmp_path / "base"), peft_config=LoraConfig(task_type="CAUSAL_LM"))
    reward.save_pretrained(tmp_path / "reward")
    reward.network.save_pretrained(tmp_path / "lora")
    peft_config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    setattr(peft_config, option, REFUSED_OPTIONS[option])
    network = get_peft_model(tiny.llama(1), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    network.peft_config["default"] = peft_config
    for name in ("reward", "lora"):
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {option: REFUSED_OPTIONS[option]}))
    doors = [
        lambda: RewardModel.from_base(tiny.llama(1), TOKENIZER, peft_config),
        lambda: RewardModel.from_base(network, TOKENIZER),
        lambda: RewardModel.from_pretrained(tmp_path / "reward"),
        lambda: RewardModel.from_adapter(tmp_path / "lora"),
        lambda: TunedModel(reward, tmp_path / "lora"),
    ]
    if option != "layer_replication":  # which makes a fine-tuned model like others, where it is in memory
        doors += [lambda: TunedModel(reward, network), lambda: EFTLogitsProcessor(network, TOKENIZER)]
    for door in doors:
        with pytest.raises((UnsupportedError, RewardFileError), match=option):
            door()
