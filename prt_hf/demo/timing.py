"""Make models to time decoding with: trained in seconds, at sizes that would take minutes.

The speed of speculation depends on how often the old model with the reward agrees with the new one, so both have to be
trained; the speed of a model does not depend on its weights. So the old and the new model learn a small language, and
the new one is then enlarged without changing its function.
"""

import copy
import random
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ..reward.model import RewardModel
from .text import collator_of, llama
from .training import Steps, fit, tune_reward

_CHOICES = (
    ("keeper", "sailor", "baker", "teacher", "painter", "farmer", "doctor", "weaver"),
    ("found", "carried", "opened", "watched", "mended", "washed", "counted", "sold"),
    ("a", "the", "his", "her", "one", "every", "another", "no"),
    ("lamp", "gate", "boat", "basket", "letter", "kettle", "ladder", "clock"),
    ("near", "behind", "under", "beside", "above", "inside", "beyond", "below"),
    ("harbour", "market", "river", "tower", "garden", "bridge", "mill", "forest"),
)
_SIGNS = ("<pad>", "<s>", "</s>", "then", ".", "*", ":")
_SENTENCES = 8


@dataclass(frozen=True)
class TimingSettings:
    """Sizes and steps; the new model is trained small and then enlarged."""

    old: dict[str, int] = field(default_factory=lambda: {"hidden_size": 64, "num_hidden_layers": 2})
    new: dict[str, int] = field(default_factory=lambda: {"hidden_size": 64, "num_hidden_layers": 3})
    grown: dict[str, int] = field(default_factory=lambda: {"hidden_size": 512, "num_hidden_layers": 8})
    old_pretraining: Steps = Steps(120, 4e-3, batch_size=16)
    new_pretraining: Steps = Steps(400, 4e-3, batch_size=16)
    tuning: Steps = Steps(100, 3e-3, batch_size=16)
    texts: int = 2000
    prompts: int = 3


@dataclass
class TimingTask:
    """Models, reward and prompts to time decoding with."""

    backbone: LlamaForCausalLM
    source: LlamaForCausalLM
    reward: RewardModel
    tokenizer: PreTrainedTokenizerFast
    prompts: list[torch.LongTensor]


def timing_task(settings: TimingSettings, seed: int) -> TimingTask:
    """Pretrain on running text, tune the reward on the same text as lists, enlarge the new model."""
    words = [*_SIGNS, *(word for words in _CHOICES for word in words)]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    generator = random.Random(seed)
    running, lists, held_out = (
        [{"input_ids": tokenizer(_text(generator, is_list))["input_ids"]} for _ in range(count)]
        for is_list, count in ((False, settings.texts), (True, settings.texts), (True, settings.prompts))
    )
    collator = collator_of(tokenizer)
    source, target = (
        fit(llama(tokenizer, size, seed), running, steps, seed, f"pretraining the {age} model", collator)
        for age, size, steps in (
            ("old", settings.old, settings.old_pretraining),
            ("new", settings.new, settings.new_pretraining),
        )
    )
    how = lists, settings.tuning, seed, "tuning the reward on the old model", collator
    reward = tune_reward(source, *how, adapter=True, processing_class=tokenizer)
    prompts = [torch.tensor([row["input_ids"][:12]]) for row in held_out]
    for model in (source, target):
        model.config.use_cache = True
    return TimingTask(grow(target, **settings.grown), source, reward, tokenizer, prompts)


@torch.no_grad()
def grow(model: LlamaForCausalLM, hidden_size: int, num_hidden_layers: int) -> LlamaForCausalLM:
    """Return a wider and deeper Llama with the same logits, up to rounding.

    New channels of the residual stream stay zero, because nothing writes to them; new heads and units of the MLP write
    nothing, and neither do new layers. All other new weights are random.
    """
    old = model.config
    config = copy.deepcopy(old)
    factor = hidden_size // old.hidden_size
    config.hidden_size, config.num_hidden_layers = factor * old.hidden_size, num_hidden_layers
    config.intermediate_size = factor * old.intermediate_size
    config.num_attention_heads = factor * old.num_attention_heads
    config.num_key_value_heads = factor * old.num_key_value_heads
    config.layer_types = None
    # The mean square is taken over more channels, of which the new ones are zero.
    config.rms_norm_eps = old.rms_norm_eps / factor
    grown = LlamaForCausalLM(config)
    grown.generation_config = copy.deepcopy(model.generation_config)
    for name, module in grown.named_modules():
        if name.endswith(("o_proj", "down_proj", "embed_tokens")):
            nn.init.zeros_(module.weight)
    small = dict(model.named_parameters())
    for name, parameter in grown.named_parameters():
        if name in small:
            scale = factor**-0.5 if parameter.ndim == 1 else 1.0
            parameter[tuple(map(slice, small[name].shape))] = scale * small[name]
    return grown.eval()


def _text(generator: random.Random, is_list: bool) -> str:
    """Return sentences in which each word depends on the one before it; the likeliest follows half of the time."""
    sentences = []
    last = 0
    for _ in range(_SENTENCES):
        sentence = []
        for words in _CHOICES:
            rank = min(len(words) - 1, int(generator.expovariate(1)))
            last = (3 * last + rank) % len(words)
            sentence.append(words[last])
        sentences.append(sentence)
    if is_list:
        return " ".join(f"* {who} : {' '.join(rest)} ." for who, *rest in sentences) + " </s>"
    return "<s> " + " then ".join(" ".join(sentence) for sentence in sentences) + " . </s>"
