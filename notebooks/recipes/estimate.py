"""Time and memory of the recipes, worked out from the models' configurations: `python estimate.py` prints the tables of
README.md. Nothing here was timed; what the figures rest on stands at the top.
"""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModelWithProjection

# Peak bfloat16 FLOP/s (dense), bytes/s of memory; the share of the peak that training reaches.
GPUS = {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12)}
UTILISATION = 0.35

# Tulu v2: rows and bytes as its card tells; bytes a token as usual for English and code. Long chats are cut off, so
# that this is an upper bound.
ROWS, BYTES, BYTES_PER_TOKEN, EPOCHS = 326_154, 1_239_293_363, 4.5, 2
TOKENS = BYTES / BYTES_PER_TOKEN
SUPERVISED = 0.6  # share of the tokens that assistants write: a guess
MICRO_BATCH, LENGTH, RANK = 8, 2048, 16  # of the YAML files
CONTEXT = 4096  # of the cache at inference
# Bytes for each parameter of what is tuned: float32 weight, gradient, two moments of Adam, autocast's bfloat16 copy.
TUNED, FROZEN_FULL, FROZEN = 18, 4, 2

# hidden_size, num_hidden_layers, intermediate_size, attention heads, key-value heads, vocab_size, tied embeddings
QWEN = {
    "Qwen2.5-0.5B": (896, 24, 4864, 14, 2, 151_936, True),
    "Qwen2.5-1.5B": (1536, 28, 8960, 12, 2, 151_936, True),
    "Qwen2.5-3B": (2048, 36, 11_008, 16, 2, 151_936, True),
    "Qwen2.5-7B": (3584, 28, 18_944, 28, 4, 152_064, False),
    "Qwen2.5-14B": (5120, 48, 13_824, 40, 8, 152_064, False),
}
SOURCE = "Qwen2.5-0.5B"
# hidden_size, num_hidden_layers, intermediate_size, attention heads, patch_size, projection_dim
CLIP = {"ViT-B/16": (768, 12, 3072, 12, 16, 512), "ViT-L/14": (1024, 24, 4096, 16, 14, 768)}
# Paper, Table 1: milliseconds a step of 128 images and GB, ViT-B/16, fine-tuning and PRT. Table 3: milliseconds a
# token, Llama 3.2 1B's reward on Llama 3 8B.
PAPER_STEP, PAPER_GB, PAPER_TOKEN = (116.10, 151.13), (20.17, 20.58), 22.7
STEPS, BATCH = 2000, 128
# lm-evaluation-harness: questions and the longest answers, in tokens.
QUESTIONS = {"gsm8k": (1319, 256), "ifeval": (541, 1280)}
EVALUATION_BATCH = 16


def qwen(name: str) -> nn.Module:
    """Without memory for its weights."""
    hidden, layers, intermediate, heads, kv_heads, vocabulary, is_tied = QWEN[name]
    config = AutoConfig.for_model(
        "qwen2",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=is_tied,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def clip(name: str) -> nn.Module:
    hidden, layers, intermediate, heads, patch, projection = CLIP[name]
    config = CLIPVisionConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        patch_size=patch,
        projection_dim=projection,
        image_size=224,
    )
    with torch.device("meta"):
        return CLIPVisionModelWithProjection(config)


def multiplied(model: nn.Module) -> int:
    """Parameters that every token is multiplied with (N): linear layers with the head, not the table of embeddings."""
    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def adapter(model: nn.Module) -> int:
    """Parameters of LoRA on every linear layer and the head."""
    return sum(RANK * sum(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear))


def activations(config) -> float:
    """GB that the backward pass needs of a micro-batch, without checkpointing: in bfloat16 the inputs of every product,
    what attention and SwiGLU keep, in float32 what the norms keep; no logits, with the fused loss."""
    query = config.hidden_size
    key_value = config.num_key_value_heads * query // config.num_attention_heads
    in_layer = 2 * (6 * query + 4 * key_value + 4 * config.intermediate_size) + 4 * 4 * query
    return config.num_hidden_layers * MICRO_BATCH * LENGTH * in_layer / 1e9


def kv_cache(config) -> float:
    """GB of keys and values of one text, bfloat16."""
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return CONTEXT * 2 * config.num_hidden_layers * width * 2 / 1e9


def tuning() -> str:
    """FLOP a token: 2 N forward, 2 N for the gradients of activations, 2 N for those of weights, which LoRA has not."""
    source, tokens = qwen(SOURCE), TOKENS * EPOCHS
    size, tuned = source.num_parameters(), adapter(source)
    kept = activations(source.config)
    of_lora = (FROZEN * size + TUNED * tuned) / 1e9 + kept
    of_full = TUNED * size / 1e9 + kept
    rows = [
        ("fine-tuning (for EFT)", 6, of_full),
        ("reward, whole model", 6 + 2, of_full + FROZEN_FULL * size / 1e9),
        ("the same, states stored", 6 + 2 / EPOCHS, of_full + FROZEN_FULL * size / 1e9),
        ("LoRA fine-tuning", 4, of_lora),
        ("LoRA reward, own base", 4 + 2, of_lora),
        ("the same, states stored", 4 + 2 / EPOCHS, of_lora),
    ]
    lines = [
        "| Qwen2.5-0.5B on Tulu v2 | FLOP / N D | FLOP | GPU hours, A100 | H100 | GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, units, memory in rows:
        lines.append(f"| {name} | {units:g} | {_time(units * multiplied(source) * tokens)} | {memory:.0f} |")
    for name in ("Qwen2.5-7B", "Qwen2.5-14B"):
        model = qwen(name)
        weights = TUNED * model.num_parameters() / 1e9
        lines.append(
            f"| fine-tuning {name} (oracle), layers computed twice | 8 | {_time(8 * multiplied(model) * tokens)} "
            f"| {weights:.0f} + activations |"
        )
    stored = 2 * source.config.hidden_size * TOKENS * SUPERVISED / 1e9
    lines.append(
        f"\nD = {tokens / 1e6:.0f} M tokens ({EPOCHS} epochs of {TOKENS / 1e6:.0f} M); "
        f"N = {multiplied(source) / 1e6:.0f} M; the adapter has {tuned / 1e6:.1f} M; activations {kept:.0f} GB; "
        f"stored states {stored:.0f} GB on disk."
    )
    return "\n".join(lines)


def decoding() -> str:
    """One text at a time every weight is read once for each token, so time goes with the bytes moved."""
    reward = qwen(SOURCE)
    read = 2 * multiplied(reward)
    lines = _head(
        "target", "weights, GB", "with reward", "KV cache, GB", "c", "PRT / bare", "EFT / bare", "ms a token, H100"
    )
    for name in QWEN:
        model = qwen(name)
        weights, own = (2 * each.num_parameters() / 1e9 for each in (model, reward))
        moved = 2 * multiplied(model)
        c, bandwidth = read / moved, GPUS["H100"][1]
        cache = kv_cache(model.config) + kv_cache(reward.config)
        lines.append(
            f"| {name} | {weights:.1f} | {weights + own:.1f} | {cache:.2f} | {c:.2f} | {1 / (1 + c):.2f} "
            f"| {1 / (1 + 2 * c):.2f} | {1e3 * moved / bandwidth:.1f} -> {1e3 * (moved + read) / bandwidth:.1f} |"
        )
    answers = sum(count * longest for count, longest in QUESTIONS.values())
    minutes = answers / EVALUATION_BATCH * PAPER_TOKEN / 60e3
    lines.append(
        f"\nGSM8K and IFEval are at most {answers / 1e6:.2f} M tokens: at the {PAPER_TOKEN} ms that the paper measured "
        f"for 1B + 8B, in batches of {EVALUATION_BATCH}, up to {minutes:.0f} minutes for each model."
    )
    return "\n".join(lines)


def images() -> str:
    """FLOP an image: 2 N for every patch, and attention's 4 T^2 d in every layer."""
    flop = {}
    for name, (hidden, layers, _, _, patch, _) in CLIP.items():
        patches = (224 // patch) ** 2 + 1
        flop[name] = 2 * multiplied(clip(name)) * patches + 4 * patches**2 * hidden * layers
    source = flop["ViT-B/16"]
    lines = _head(
        f"ViT-B/16, {STEPS} steps of {BATCH} images",
        "FLOP / forward",
        "FLOP",
        "minutes, A100",
        "H100",
        "paper: minutes, GB",
    )
    for name, units, milliseconds, memory in zip(("fine-tuning", "reward"), (3, 4), PAPER_STEP, PAPER_GB, strict=True):
        measured = f"{STEPS * milliseconds / 60e3:.1f}, {memory}"
        lines.append(f"| {name} | {units} | {_time(units * source * STEPS * BATCH, 60)} | {measured} |")
    lines += ["", *_head("target", "GFLOP an image", "PRT / bare", "EFT / bare")]
    for name, own in flop.items():
        lines.append(f"| {name} | {own / 1e9:.0f} | {own / (own + source):.2f} | {own / (own + 2 * source):.2f} |")
    return "\n".join(lines)


def _head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _time(flop: float, unit: int = 3600) -> str:
    times = (flop / (UTILISATION * peak) / unit for peak, _ in GPUS.values())
    return " | ".join([f"{flop:.1e}", *(f"{each:.1f}" for each in times)])


if __name__ == "__main__":
    print("\n\n".join((tuning(), decoding(), images())))
