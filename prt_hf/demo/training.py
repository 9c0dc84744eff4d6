"""Train models with one progress bar and no other output."""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from .. import PRTConfig, PRTTrainer, RewardModel
from ..networks.adapters import wrap
from ..reward.adapter import default_peft_config


@dataclass(frozen=True)
class Steps:
    """Steps, learning rate and batch size of AdamW with a cosine schedule and 5 % warm-up."""

    steps: int
    learning_rate: float
    batch_size: int = 16


class Stages:
    """Number the stages of a task in the descriptions of their progress bars: "stage 3 of 14: ..."."""

    def __init__(self, total: int):
        self._total, self._number = total, 0

    def __call__(self, description: str) -> str:
        """Return the description of the next stage."""
        self._number += 1
        return f"stage {self._number} of {self._total}: {description}"


def tuning_seeds(first: int, count: int) -> list[int]:
    """Return the seeds that follow the first one, within numpy's range."""
    return [(first + index) % 2**32 for index in range(count)]


class _Bar(TrainerCallback):
    def __init__(self, description: str):
        self._description = description

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = tqdm(total=state.max_steps, desc=self._description, unit="step")

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()


def fit(
    model: nn.Module, rows: Sequence[dict], steps: Steps, seed: int, description: str, data_collator: Callable
) -> nn.Module:
    """Train the parameters that are not frozen with the model's own loss; return the model in evaluation mode."""
    return _train(Trainer, TrainingArguments, model, rows, steps, seed, description, data_collator).model.eval()


def fine_tune(
    model: PreTrainedModel, rows: Sequence[dict], steps: Steps, seed: int, *how: Any, adapter: bool
) -> nn.Module:
    """Return a fine-tuned copy of a model, or the model with a LoRA on the layers that a reward adapts.

    The arguments are those of [`fit`].
    """
    set_seed(seed)
    # LoRA's usual scale: with that of a reward, EFT works worse at the target.
    network = wrap(model, default_peft_config(model, lora_alpha=32)) if adapter else copy.deepcopy(model)
    return fit(network, rows, steps, seed, *how)


def tune_reward(
    model: PreTrainedModel,
    rows: Sequence[dict],
    steps: Steps,
    seed: int,
    *how: Any,
    adapter: bool,
    processing_class: Any,
) -> RewardModel:
    """Return a reward tuned on a source backbone, which does not change; a reward adapter shares its weights.

    The arguments are those of [`fit`].
    """
    set_seed(seed)
    if adapter:
        network, kwargs = model, {"peft_config": default_peft_config(model)}
    else:
        network, kwargs = copy.deepcopy(model), {"backbone": model}
    kwargs["processing_class"] = processing_class
    trainer = _train(PRTTrainer, PRTConfig, network, rows, steps, seed, *how, **kwargs)
    trainer.reward.network.eval()
    return trainer.reward


def _train(trainer_class, args_class, model, rows, steps, seed, description, data_collator, **kwargs):
    with tempfile.TemporaryDirectory() as folder:
        args = args_class(
            folder,
            max_steps=steps.steps,
            learning_rate=steps.learning_rate,
            per_device_train_batch_size=steps.batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=round(0.05 * steps.steps),
            seed=seed,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        trainer = trainer_class(model, args, data_collator, rows, callbacks=[_Bar(description)], **kwargs)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    return trainer
