"""Small models made in memory, and the brute-force references that the package is held against."""

import os
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 97
CONTEXT = 256


def tokenizer(size=VOCABULARY, changed=None, **roles):
    """Words w3 ... w{size - 1} after three special tokens; `changed` maps words to what they are called instead."""
    words = ["<pad>", "<bos>", "<eos>", *(f"w{index}" for index in range(3, size))]
    vocabulary = {(changed or {}).get(word, word): index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    defaults = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "padding_side": "left"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **defaults | roles)


CHAT_TEMPLATE = (  # of w3 ... by the user, w4 ... by the model, w8 ... by the system, and w9 before a reply
    "{% for m in messages %}{{ {'user': 'w3', 'assistant': 'w4', 'system': 'w8'}[m['role']] }} {{ m['content'] }} "
    "{% endfor %}{% if add_generation_prompt %}w9{% endif %}"
)


# Large initial weights make predictions sharp, so that a wrong cache changes the text.
_TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


_ATTENTION = _TEXT | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.4,
}


def llama(seed=0, **config):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**_ATTENTION | config)).eval()


def gpt2(seed=0, **config):
    torch.manual_seed(seed)
    config = (
        _TEXT | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.3} | config
    )
    return GPT2LMHeadModel(GPT2Config(**config)).eval()


def sliding_window(seed=0, window=6, **config):
    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(**_ATTENTION | {"sliding_window": window} | config)).eval()


def mamba(seed=0, **config):
    torch.manual_seed(seed)
    config = _TEXT | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "initializer_range": 0.4} | config
    return MambaForCausalLM(MambaConfig(**config)).eval()


LANGUAGE_MODELS = {"llama": llama, "gpt2": gpt2, "sliding-window": sliding_window, "state-space": mamba}

COLOURS = ["red", "green", "blue", "grey"]


def labels(names=COLOURS):
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def vit(seed=0, names=COLOURS, **config):
    torch.manual_seed(seed)
    config = (
        labels(names)
        | {
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": 0.2,
        }
        | config
    )
    return ViTForImageClassification(ViTConfig(**config)).eval()


def resnet(seed=0, names=COLOURS, **config):
    torch.manual_seed(seed)
    config = (
        labels(names)
        | {
            "num_channels": 1,
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
        }
        | config
    )
    return ResNetForImageClassification(ResNetConfig(**config)).eval()


def convnext(seed=0, names=COLOURS):
    """Depthwise convolutions, which take no LoRA of any rank."""
    torch.manual_seed(seed)
    sizes = {"num_channels": 1, "patch_size": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    return ConvNextForImageClassification(ConvNextConfig(**labels(names), **sizes)).eval()


_ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT_ENCODER = _ENCODER | {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE_ENCODER = _ENCODER | {"image_size": 8, "patch_size": 4, "num_channels": 1}


def two_encoders(model_class, config_class, seed=0, text=None, **config):
    """A CLIP-like model whose weights are large enough to tell texts and images apart."""
    torch.manual_seed(seed)
    config = config_class(text_config=TEXT_ENCODER | (text or {}), vision_config=IMAGE_ENCODER, **config)
    model = model_class(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def clip(seed=0):
    return two_encoders(CLIPModel, CLIPConfig, seed, projection_dim=24)


def siglip(seed=0):
    return two_encoders(SiglipModel, SiglipConfig, seed)


def bert(seed=0, names=COLOURS, **config):
    torch.manual_seed(seed)
    config = (
        labels(names)
        | {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
        }
        | config
    )
    return BertForSequenceClassification(BertConfig(**config)).eval()


def texts(rows=12, seed=0, supervised=True):
    """Token rows of uneven length; with labels that leave uneven prompts out."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(rows):
        ids = torch.randint(3, VOCABULARY, (6 + 3 * (index % 5),), generator=generator).tolist()
        prompt = 1 + index % 4
        examples.append({"input_ids": ids} | ({"labels": [-100] * prompt + ids[prompt:]} if supervised else {}))
    return Dataset.from_list(examples)


def images(rows=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Dataset.from_dict(
        {
            "pixel_values": torch.randn(rows, 1, 8, 8, generator=generator).tolist(),
            "label": torch.randint(0, 4, (rows,), generator=generator).tolist(),
        }
    ).with_format("torch")


# Of trainers: one process, every step logged, nothing written by the way.
TUNING = {
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "lr_scheduler_type": "constant",
}


def greedy(model, prompt: list[int], tokens: int) -> list[int]:
    """What `generate` adds to one prompt."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def prompts(rows=2, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


@torch.no_grad()
def next_logits(model, input_ids, attention_mask=None):
    """Row by row, without padding and without cache: what any cached or batched computation has to equal."""
    rows = []
    for index, row in enumerate(input_ids):
        if attention_mask is not None:
            row = row[attention_mask[index].bool()]
        rows.append(model(input_ids=row[None], use_cache=False).logits[0, -1])
    return torch.stack(rows)


class BruteForce(LogitsProcessor):
    """log_softmax(log_softmax(scores) + strength * r) in float64, r recomputed from all tokens at every call."""

    def __init__(self, model, attention_mask=None, strength=1.0, size=VOCABULARY):
        self.model, self.mask, self.strength, self.size = model, attention_mask, strength, size

    def __call__(self, input_ids, scores):
        mask = None
        if self.mask is not None:
            mask = self.mask.repeat_interleave(len(input_ids) // len(self.mask), 0)
            mask = torch.cat([mask, mask.new_ones(len(mask), input_ids.shape[1] - mask.shape[1])], 1)
        strength = torch.as_tensor(self.strength, dtype=torch.float64).reshape(-1)
        strength = strength.repeat_interleave(len(input_ids) // len(strength))[:, None]
        reward = next_logits(self.model, input_ids, mask)[:, : self.size].double()
        output = torch.full_like(scores, -torch.inf, dtype=torch.float64)
        output[:, : self.size] = scores[:, : self.size].double().log_softmax(-1) + strength * reward
        return output.log_softmax(-1).float()


def killed_after(steps, action):
    """Run `action` in a process of its own that is killed before its file operation number `steps`; whether it was."""
    child = os.fork()
    if child == 0:
        calls = []

        def count(event, _):
            if event in ("os.rename", "os.remove", "os.rmdir", "os.link", "os.mkdir"):
                calls.append(event)
                if len(calls) > steps:
                    os._exit(9)

        status = 1
        try:
            sys.addaudithook(count)
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9
