"""Run the text task with the user's own models and texts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    set_seed,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .. import VocabularyContract
from ..errors import PRTValueError
from ..training.data import require_column
from .comparison import PRETRAINED, PRT, token_losses, tune_all
from .data import load, load_splits
from .report import Measure, Result, Sample
from .training import Steps


@dataclass(frozen=True)
class TextSettings:
    """The steps of each tuning, and lengths in tokens."""

    tuning: Steps
    length: int = 128
    new_tokens: int = 80


@dataclass
class TextTask:
    """Two backbones with the same vocabulary, and rows of `input_ids` for tuning and evaluation."""

    source: nn.Module
    target: nn.Module
    tokenizer: PreTrainedTokenizerBase
    train: list[dict[str, list[int]]]
    test: list[dict[str, list[int]]]
    prompt: str = ""


def own_text(source: str, target: str, dataset: str, settings: TextSettings, seed: int) -> TextTask:
    """Return the user's models and rows of the column `text` of the user's data."""
    tokenizer, other = (load(AutoTokenizer, place) for place in (source, target))
    VocabularyContract.from_tokenizer(tokenizer).check(VocabularyContract.from_tokenizer(other))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    parts = load_splits(dataset, seed)
    require_column(parts[0], "text", dataset)
    texts = [list(part["text"]) for part in parts]
    train, test = (_rows(part, tokenizer, settings.length) for part in texts)
    models = (load(AutoModelForCausalLM, place, dtype=torch.float32) for place in (source, target))
    return TextTask(*models, tokenizer, train, test, " ".join(texts[1][0].split()[:4]))


def run_own_text(
    task: TextTask, folder: Path, settings: TextSettings, seed: int, stage: Callable[[str], str]
) -> Result:
    """Tune and save a reward, tune its competitors, judge them all by their losses, and write a sample."""
    collator = collator_of(task.tokenizer)
    contenders = tune_all(task, settings.tuning, seed, collator, stage, adapter=True, processing_class=task.tokenizer)
    contenders.reward.save_pretrained(folder / "text-reward")
    batches = [collator(task.test[start : start + 16]) for start in range(0, len(task.test), 16)]
    scores = contenders.scores(tqdm(batches, desc=stage("judging all on held-out text"), unit="batch"), token_losses)
    inputs = task.tokenizer(task.prompt, return_tensors="pt").to(contenders.device)
    processors = {PRETRAINED: [], PRT: [contenders.reward.processor(task.target)]}
    texts = {}
    for method, processor in processors.items():
        output = task.target.generate(
            **inputs, logits_processor=processor, max_new_tokens=settings.new_tokens, do_sample=False
        )
        texts[f"{method}, target"] = task.tokenizer.decode(output[0], skip_special_tokens=True)
    measures = [Measure.from_runs("nats/token (less is better)", [scores], digits=3)]
    title = f"{len(task.test)} texts, after tuning with {len(task.train)} others"
    return Result("text", title, measures, contenders.models_held, [Sample(task.prompt, texts)])


def usage(folder: Path, target: str | Path, prompt: str) -> str:
    """Return lines of Python that use the saved reward."""
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer
from prt_hf import RewardModel

reward = RewardModel.from_pretrained({str(folder / "text-reward")!r})
target = AutoModelForCausalLM.from_pretrained({str(target)!r})
tokenizer = AutoTokenizer.from_pretrained({str(target)!r})
inputs = tokenizer({prompt!r}, return_tensors="pt")
output = target.generate(**inputs, logits_processor=[reward.processor(target)], max_new_tokens=60)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


def llama(tokenizer: PreTrainedTokenizerBase, size: dict[str, int], seed: int) -> LlamaForCausalLM:
    """Return a Llama with random weights for the tokenizer's vocabulary."""
    set_seed(seed)
    hidden_size = size["hidden_size"]
    config = {
        "intermediate_size": 8 * hidden_size // 3,
        "num_attention_heads": max(1, hidden_size // 32),
        "num_key_value_heads": max(1, hidden_size // 32),
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    } | size
    special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **config, **special))


def collator_of(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForLanguageModeling:
    """Return a collator that pads with the tokenizer's token."""
    return DataCollatorForLanguageModeling(tokenizer.pad_token_id)


def _rows(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, list[int]]]:
    ids = [[*tokens, tokenizer.eos_token_id][:length] for tokens in tokenizer(texts)["input_ids"]]
    rows = [{"input_ids": tokens} for tokens in ids if len(tokens) > 1]
    if not rows:
        raise PRTValueError("There is no text to tune or test on.", expected="texts of a few words", found="none")
    return rows
