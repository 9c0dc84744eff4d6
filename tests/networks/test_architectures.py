"""Every causal language model of the installed transformers, made small: decoding is right, or refused."""

import copy

import pytest
import tiny
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prt_hf import PRTForCausalLM, PRTLogitsProcessor, RewardModel, UnsupportedError, speculative_decoding
from prt_hf.inference import RewardState
from prt_hf.inference.configuration import PRTModelConfig

# What attributes of configurations are set to, by their names.
_SIZES = {
    tiny.VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    32: "hidden_size d_model n_embd dim embed_dim embedding_size input_embedding_size word_embed_proj_dim "
    "embedding_dim attention_hidden_size lru_width emb_dim hidden_dim decoder_hidden_size backbone_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks num_key_value_heads "
    "num_kv_heads n_kv_heads multi_query_group_num num_experts_per_tok moe_topk top_k_experts moe_k experts_per_token "
    "first_k_dense_replace num_encoder_layers num_decoder_layers linear_num_key_heads mamba_n_groups n_groups "
    "num_global_key_value_heads num_mem_blocks index_topk attn_layer_period expert_layer_period num_experts_per_token",
    1: "n_group topk_group attn_layer_offset expert_layer_offset n_shared_experts num_zero_experts num_shared_experts "
    "num_nextn_predict_layers num_expert_group",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts num_routed_experts rotary_dim linear_num_value_heads "
    "mamba_num_heads mamba_n_heads linear_num_heads",
    8: "head_dim attention_head_dim d_kv v_head_dim qk_rope_head_dim qk_nope_head_dim global_head_dim qkv_head_dim "
    "kv_channels sliding_window attention_chunk_size local_attention_window attention_window_size window_size "
    "index_head_dim linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input mamba_d_state state_size "
    "mamba_state_dim mamba_chunk_size chunk_size linear_head_dim",
    16: "index_n_heads q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim mamba_headdim mamba_dt_rank time_step_rank "
    "o_lora_rank index_lora_rank",
    64: "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim moe_intermediate_size "
    "shared_expert_intermediate_size intermediate_size_mlp dense_intermediate_size mlp_dim expert_ffn_hidden_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size shared_experts_intermediate_size "
    "mamba_intermediate_size mamba_d_ssm",
    tiny.CONTEXT: "max_position_embeddings n_positions max_sequence_length n_ctx seq_length context_length max_seq_len",
    0.3: "initializer_range init_std",
    0: "pad_token_id",
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names.split()}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
_OPTIONAL = ("sliding_window", "n_shared_experts", "head_dim", "q_lora_rank")  # where the default is None, it stays so
# Defaults of old configurations that `generate` refuses.
_OF_GENERATION = ("forced_eos_token_id", "encoder_no_repeat_ngram_size", "suppress_tokens", "begin_suppress_tokens")
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_SPECIAL = {
    "bailing_hybrid": {"num_key_value_heads": 4, "layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "moshi": {"sliding_window": tiny.CONTEXT},  # its cache has a window, its attention none
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 50,
        "ple_embed_dim": 16,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 4,
        "local_num_chunks_after": 0,
    },
    "roc_bert": {"pronunciation_vocab_size": 20, "shape_vocab_size": 20},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {"n_mamba_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16, "adapter_rank": 4},
    "zaya": {"num_experts_per_tok": 1},
}
_MOST_PARAMETERS = 12e6

ARCHITECTURES = {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING if config is not PRTModelConfig}
# A model for every way to count positions and to remember; what it does with left padding.
SEES_PADDING = {
    "llama": True,
    "gpt2": True,
    "opt": True,
    "bloom": True,
    "falcon": True,
    "mistral": True,
    "mamba": True,
    "bamba": True,
    "roberta": True,
    "xlm-roberta": True,
    "recurrent_gemma": True,
    "deepseek_v32": True,
    "bart": False,
    "git": False,
    "rwkv": False,
    "reformer": False,
}
# Their steps do not limit time steps from below, as their passes over several tokens do.
TOLERANCES = {"nemotron_h": 5e-2, "zamba2": 1e-2}
NOT_GENERATING = {"reformer"}  # whose own `generate` fails on the positions that it is given


def small(config: dict) -> dict:
    """Arguments of a configuration for a model of few layers, one of each kind that the default has."""
    depth = next((config[name] for name in _DEPTHS if isinstance(config.get(name), int)), None)
    layers = {name: value for name, value in config.items() if isinstance(value, list) and len(value) == depth > 3}
    kinds = list(zip(*layers.values(), strict=True))
    chosen = sorted({kinds.index(kind) for kind in kinds})
    if len(chosen) == 1:
        chosen = [0, 1]
    made = {}
    for name, value in config.items():
        if isinstance(value, dict) and "model_type" in value:
            made[name] = small(value)
        elif name in layers:
            made[name] = [value[index] for index in chosen]
        elif name in _DEPTHS and kinds:
            made[name] = len(chosen)
        elif name in _SIZE_OF and not isinstance(value, bool):
            is_number = isinstance(value, int | float) or (value is None and name not in _OPTIONAL)
            made |= {name: _SIZE_OF[name]} if is_number else {}
        elif name.endswith("_token_id") and name.split("_")[0] in ("bos", "eos", "sep", "cls") and value is not None:
            made[name] = 1
        elif name == "is_decoder":
            made[name] = True
    if "kv_lora_rank" in config and "num_key_value_heads" in made:
        made["num_key_value_heads"] = made["num_attention_heads"]
    return made | _SPECIAL.get(config.get("model_type"), {})


def build(name):
    """A model with random weights, sharp enough that wrong positions change its logits; skips what cannot be small."""
    config_class = ARCHITECTURES[name]
    try:
        config = config_class(**small(config_class().to_dict()))
        for attribute in _OF_GENERATION:
            if getattr(config, attribute, None) is not None:
                vars(config)[attribute] = None
        with torch.device("meta"):
            parameters = sum(value.numel() for value in AutoModelForCausalLM.from_config(config).parameters())
        assert parameters <= _MOST_PARAMETERS, f"{parameters / 1e6:.0f} million parameters"
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        tiny.next_logits(model, tiny.prompts(1, 12))
    except Exception as error:
        pytest.skip(f"{name} cannot be made small: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return model


def check_logits(model, found, rows, mask=None):
    expected = tiny.next_logits(model, rows, mask)
    difference = (found - expected).abs().max() / expected.std()
    assert difference < TOLERANCES.get(model.config.model_type, 2e-3), f"{difference:.1e} of the spread of the logits"


def check_state(model) -> bool:
    """Steps, drafts taken back, several tokens at once, beams; returns whether padding is read, or refused."""
    text, beams = tiny.prompts(1, 24), tiny.prompts(4, 10, seed=1)
    drafts = torch.cat([text[:, :10], text[:, 15:20]], 1)
    state = RewardState(model)
    for rows in (
        *(text[:, :length] for length in (4, 5, 6, 20, 21, 22)),
        *(drafts[:, :11], drafts[:, :12], text[:, :6], text[:, :7], drafts),
        beams,
        torch.cat([beams[[2, 0, 0, 3, 2]], tiny.prompts(5, 1, seed=2)], 1),
        torch.cat([beams[[3, 0]], tiny.prompts(2, 1, seed=3)], 1),
    ):
        check_logits(model, state(rows), rows)
    rows, mask = padded(tiny.prompts(3, 14, seed=4))
    try:
        for length in (11, 12, 13, 14, 12, 13):
            check_logits(model, state(rows[:, :length], mask[:, :length]), rows[:, :length], mask[:, :length])
    except UnsupportedError as error:
        assert "does not tell padding from text" in str(error)
        return False
    return True


def padded(rows):
    mask = torch.ones_like(rows)
    mask[1, :3] = mask[2, :9] = 0
    return rows * mask, mask


def check_as_one_model(backbone, tokenizer) -> bool:
    """The cached steps of a PRT model whose networks are all of this kind; returns whether it reads padding."""
    torch.manual_seed(1)
    network = copy.deepcopy(backbone)
    for parameter in network.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model = PRTForCausalLM.from_parts(backbone, [RewardModel.from_base(network, tokenizer)], tokenizer=tokenizer)

    def check(rows, mask):
        settings = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
        output = model.generate(rows, attention_mask=mask, eos_token_id=None, **settings)
        for index, found in enumerate(output.scores):
            text = output.sequences[:, : rows.shape[1] + index]
            seen = torch.cat([mask, mask.new_ones(len(mask), index)], 1)
            logits = [tiny.next_logits(part, text, seen)[:, : tiny.VOCABULARY] for part in (backbone, network)]
            expected = (logits[0].log_softmax(-1) + logits[1]).log_softmax(-1)
            difference = (found - expected).abs().max() / expected.std()
            assert difference < 2 * TOLERANCES.get(backbone.config.model_type, 2e-3), f"{difference:.1e}"

    rows = tiny.prompts(3, 9, seed=5)
    check(rows, torch.ones_like(rows))
    try:
        check(*padded(tiny.prompts(3, 12, seed=6)))
    except UnsupportedError as error:
        assert "does not tell padding from text" in str(error)
        return False
    return True


def check_speculation(backbone, tokenizer) -> bool:
    """A drafter of another kind; returns whether the backbone verifies drafts, or refuses to."""
    reward = RewardModel.from_base(tiny.llama(2), tokenizer, LoraConfig(init_lora_weights=False))
    settings = {"logits_processor": [PRTLogitsProcessor(reward, tokenizer, strength=0.2)], "eos_token_id": None}
    settings |= {"max_new_tokens": 10, "do_sample": False}
    prompt = tiny.prompts(1, 9, seed=7)
    try:
        found = backbone.generate(prompt, custom_generate=speculative_decoding, **settings)
    except UnsupportedError:
        return False
    assert torch.equal(found, backbone.generate(prompt, **settings))
    return True


@pytest.mark.parametrize("name", SEES_PADDING)
def test_what_is_right_and_what_is_refused(name):
    assert check_state(build(name)) == SEES_PADDING[name]


@pytest.mark.parametrize("name", ["llama", "bamba", "xlm-roberta", "bart"])
def test_as_one_model(name, tokenizer):
    assert check_as_one_model(build(name), tokenizer) == SEES_PADDING[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name, tokenizer, record_property):
    model = build(name)
    record_property("reads padding", check_state(model))
    if name not in NOT_GENERATING:
        record_property("as one model, reads padding", check_as_one_model(model, tokenizer))
        record_property("verifies drafts", check_speculation(model, tokenizer))
