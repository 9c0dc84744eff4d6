"""Rivals that are tuned for the comparison: the target with LoRA, on the data of the reward."""

import copy
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from ..contract import IMAGE_CLASSIFICATION, TEXT_GENERATION
from ..networks.adapters import wrap
from ..reward.adapter import default_peft_config
from ..reward.backbones import Backbone
from ..reward.model import RewardModel
from ..training.data import classified_images, classified_texts, pixel_makers
from ..vocabulary import unwrap_tokenizer
from .store import key_of

SAME_STEPS, SAME_COMPUTE = "lora_steps", "lora_compute"  # methods


@dataclass(frozen=True)
class Tuning:
    """How the reward was tuned, and its rivals are.

    Attributes:
        rows (`Dataset`): The data of the reward, with labels.
        steps (`int`): The number of steps of the reward.
        learning_rate (`float`): That of AdamW, for the rivals; it falls to zero along a cosine.
        batch_size (`int`): The number of rows of a step.
        length (`int`): The number of tokens at which texts are cut off.
    """

    rows: Dataset
    steps: int
    learning_rate: float = 2e-4
    batch_size: int = 8
    length: int = 1024

    def at_same_compute(self, reward: RewardModel, source: nn.Module, target: nn.Module) -> "Tuning":
        """Return the tuning whose steps on the target take as much compute as the reward's.

        A forward pass counts a network's weights once, and a backward pass once more for LoRA, twice for a network that
        is tuned whole. A step of the reward also takes a forward pass of the source.
        """
        passes = 2 if reward.config.is_adapter else 3
        rewards_step = passes * _count(reward.network) + _count(source)
        return replace(self, steps=max(1, round(self.steps * rewards_step / (2 * _count(target)))))


class TunedRival(Backbone):
    """The target with a LoRA that is tuned when it is loaded.

    Args:
        reward ([`RewardModel`]): The reward that it is compared with.
        target ([`~prt_hf.reward.backbones.Backbone`]): The target; a model in memory is left as it is.
        tuning ([`Tuning`]): The training.
    """

    def __init__(self, reward: RewardModel, target: Backbone, tuning: Tuning):
        super().__init__(reward, "the target with LoRA")
        self._target, self.tuning = target, tuning

    @cached_property
    def identity(self) -> dict[str, str]:
        """Key of the target, the data and the settings."""
        settings = vars(self.tuning) | {"rows": self.tuning.rows._fingerprint}
        return {"tuned": key_of({"target": self._target.identity} | settings)}

    def load(self) -> None:
        """Load the target, and tune a LoRA of rank 16 on it."""
        is_loaded = self._target.network is not None
        self._target.load()
        network, processing_class = self._target.network, self._target.processing_class
        if is_loaded:
            network = copy.deepcopy(network)  # training moves the statistics of norms
        with tempfile.TemporaryDirectory() as folder:
            device = self._reward.device.type
            tuned = _tuned(network, processing_class, self.task, self.tuning, folder, use_cpu=device == "cpu")
        self._take(tuned, processing_class)
        if not is_loaded:
            self._target.network = None


def _tuned(
    network: nn.Module, processing_class: Any, task: str, tuning: Tuning, folder: str, *, use_cpu: bool
) -> nn.Module:
    """Return a network with a LoRA that was tuned on the labels."""
    settings = {
        "max_steps": tuning.steps,
        "learning_rate": tuning.learning_rate,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": tuning.batch_size,
        "use_cpu": use_cpu,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "remove_unused_columns": task != IMAGE_CLASSIFICATION,  # images are read with them
    }
    set_seed(0)
    if task == TEXT_GENERATION:
        lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        args = SFTConfig(folder, **settings, bf16=False, gradient_checkpointing=False, max_length=tuning.length)
        tokenizer = unwrap_tokenizer(processing_class)
        trainer = SFTTrainer(wrap(network, lora), args, train_dataset=tuning.rows, processing_class=tokenizer)
    else:
        trainer = Trainer(
            wrap(network, default_peft_config(network)),
            TrainingArguments(folder, **settings),
            train_dataset=_classified(network, processing_class, task, tuning),
            processing_class=processing_class,
        )
    with redirect_stdout(sys.stderr):  # it prints its figures; stdout is the caller's
        trainer.train()
    return trainer.accelerator.unwrap_model(trainer.model)


def _classified(network: nn.Module, processing_class: Any, task: str, tuning: Tuning) -> Dataset:
    labels = {"label_column": "label", "id2label": network.config.id2label}
    if task == IMAGE_CLASSIFICATION:
        pixels = pixel_makers(processing_class, network.config, [])
        return classified_images(tuning.rows, "given", image_column="image", pixels=pixels, is_lazy=True, **labels)
    texts = {"text_column": "text", "tokenizer": processing_class, "length": tuning.length}
    return classified_texts(tuning.rows, "given", **texts, **labels)


def _count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
