"""Measure step time and memory of tuning, beside plain LoRA fine-tuning by TRL's `SFTTrainer`, whose loss is fused too.

A step is forward, backward and optimiser on one batch of the trainer's data loader.
"""

import gc
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

from ..evaluation.machine import time_in_turn
from ..functional import IGNORE_INDEX
from ..networks.lm_head import Projection, last_hidden_state, projection
from ..reward.adapter import default_peft_config
from ..training.sft import PRTSFTConfig, PRTSFTTrainer

PLAIN = "plain LoRA (TRL)"
PLAIN_CHUNKED = "plain LoRA, with PRT's chunked loss"
OTHER_BASE = "PRT, another backbone of the same size"
SAME_BASE = "PRT, the reward's own base"
CACHED = "PRT, own base, states stored"
CACHED_OTHER = "PRT, another backbone, states stored"
PLAIN_TOP = "plain LoRA (TRL), top quarter of the layers"
SHARED_TRUNK = "PRT, own base, top quarter of the layers"
NAIVE = "PRT, another backbone, whole logits"
ROWS = (PLAIN, PLAIN_CHUNKED, OTHER_BASE, SAME_BASE, CACHED, CACHED_OTHER, PLAIN_TOP, SHARED_TRUNK, NAIVE)
BASELINES = {SHARED_TRUNK: PLAIN_TOP}  # all others: PLAIN


class _ChunkedTrainer(PRTSFTTrainer):
    """Plain fine-tuning with the fused PRT loss and a uniform backbone, to show what tuning costs beyond the loss."""

    def _forward(self, model, batch, backbones, teachers, is_fused):
        network = self.accelerator.unwrap_model(model)
        hidden = batch.aligned(last_hidden_state(network, batch.inputs, model))[batch.supervised]
        with self.accelerator.autocast():
            logits = projection(network, hidden)
        nothing = Projection((hidden.new_zeros(len(hidden), 0),), (logits.weights[0].new_zeros(logits.shape[1], 0),))
        return [nothing], [], logits


@dataclass(frozen=True)
class TrainSettings:
    """The shape of the models (random Llamas, which take as long as trained ones) and of the batch."""

    hidden_size: int = 512
    num_hidden_layers: int = 8
    vocab_size: int = 50_000
    batch_size: int = 2
    length: int = 256
    dtype: str = "bfloat16"
    device: str = "cpu"
    seed: int = 0


@dataclass
class TrainTimings:
    """Seconds and memory of a step.

    Attributes:
        settings: The shapes.
        rows: Row -> seconds of each round.
        memory: Row -> bytes that a step takes at its peak, in addition to what was allocated before it.
    """

    settings: TrainSettings
    rows: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ROWS})
    memory: dict[str, int] = field(default_factory=dict)

    def seconds(self, row: str) -> float:
        """Return the seconds of the fastest round."""
        return min(self.rows[row])

    def ratio(self, row: str) -> float:
        """Return the step time of a row over that of its baseline."""
        return self.seconds(row) / self.seconds(BASELINES.get(row, PLAIN))

    def memory_ratio(self, row: str) -> float:
        """Return the memory of a row over that of its baseline."""
        return self.memory[row] / self.memory[BASELINES.get(row, PLAIN)]

    @property
    def figures(self) -> dict[str, float]:
        """The ratios that are reported."""
        figures = {
            "step_other_base": self.ratio(OTHER_BASE),
            "step_same_base": self.ratio(SAME_BASE),
            "step_shared_trunk": self.ratio(SHARED_TRUNK),
            "step_cached_second_epoch": self.ratio(CACHED),
        }
        if self.memory:
            figures["memory_vs_plain"] = self.memory_ratio(OTHER_BASE)
        return figures


def time_training(
    settings: TrainSettings, *, rounds: int = 5, progress: Callable[[Iterable], Iterable] = iter
) -> TrainTimings:
    """Time a step of every row; `progress` wraps the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: _trainer(name, settings, Path(folder)) for name in ROWS}
        steps = {name: _step(trainer) for name, trainer in trainers.items()}
        return TrainTimings(settings, time_in_turn(steps, rounds, trainers[PLAIN].model, progress))


def peak_memory(row: str, settings: TrainSettings) -> int:
    """Return the peak memory of a step in bytes, measured in a new process, which reuses no other row's memory.

    Works on Linux, or on a GPU.
    """
    # Return freed blocks of any size to the system, so that they count once.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_measured_memory, (row, asdict(settings), torch.get_num_threads()))
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _measured_memory(row: str, settings: dict, threads: int) -> int:
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(row, TrainSettings(**settings), Path(folder))
        step = _step(trainer)
        step()
        gc.collect()
        if settings["device"].startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            return torch.cuda.max_memory_allocated() - before
        before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        step()
        return _resident("VmHWM") - before


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def _step(trainer: Trainer) -> Callable[[], None]:
    """Return a function that makes one step."""
    batch = next(iter(trainer.get_train_dataloader()))
    items = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model.train(), trainer.optimizer)

    def step() -> None:
        trainer.training_step(model, dict(batch), items)
        optimizer.step()
        model.zero_grad()

    return step


def _trainer(row: str, settings: TrainSettings, folder: Path) -> Trainer:
    base = _model(settings, settings.seed)
    quarter = max(1, settings.num_hidden_layers // 4)
    top_layers = quarter if row in (PLAIN_TOP, SHARED_TRUNK) else None
    lora = default_peft_config(base, top_layers=top_layers)
    tokenizer = _tokenizer(settings.vocab_size)
    generator = torch.Generator().manual_seed(settings.seed)
    ids = torch.randint(3, settings.vocab_size, (settings.batch_size, settings.length), generator=generator).tolist()
    arguments = {
        "max_length": None,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_checkpointing": False,
        "bf16": settings.dtype == "bfloat16",
        "fp16": settings.dtype == "float16",
        "use_cpu": settings.device == "cpu",
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    data = {"train_dataset": Dataset.from_dict({"input_ids": ids, "labels": ids}), "processing_class": tokenizer}
    if row in (PLAIN, PLAIN_TOP):
        lora.target_modules = {name for name in lora.target_modules if name != "lm_head"}  # TRL refuses it
        return SFTTrainer(base, SFTConfig(str(folder), **arguments), peft_config=lora, **data)
    config = PRTSFTConfig(
        str(folder),
        fused_loss="never" if row == NAIVE else "always",
        precompute_backbone=row in (CACHED, CACHED_OTHER),
        backbone_cache_dir=str(folder / "states"),
        **arguments,
    )
    is_other = row in (OTHER_BASE, CACHED_OTHER, NAIVE)
    backbone = _model(settings, settings.seed + 1) if is_other else None
    trainer_class = _ChunkedTrainer if row == PLAIN_CHUNKED else PRTSFTTrainer
    return trainer_class(base, config, peft_config=lora, backbone=backbone, **data)


def _model(settings: TrainSettings, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=settings.num_hidden_layers,
        num_attention_heads=max(1, settings.hidden_size // 64),
        num_key_value_heads=max(1, settings.hidden_size // 256),
        max_position_embeddings=settings.length,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(getattr(torch, settings.dtype))


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with as many words as the head has rows."""
    words = ["<pad>", "<s>", "</s>", *map(str, range(3, size))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
