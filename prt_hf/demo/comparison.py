"""Compare five methods by the same function of their log-probabilities."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .. import RewardModel, VocabularyContract, combine
from ..contract import LabelContract
from ..networks.anatomy import unwrap_adapter
from .training import Steps, fine_tune, tune_reward

PRETRAINED, EFT, PRT, REWARD_ONLY, FINE_TUNED = METHODS = ("Pretrained", "EFT", "PRT", "reward only", "fine-tuned")
PLACES = ("source", "target")

# log-probabilities (..., size), labels (...) -> one number for each label that is not -100
Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Contenders:
    """An old and a new pretrained model, and models tuned from them, all on the same data for as many steps.

    `source` and `target` are the frozen backbones; `finetuned_source` is for EFT, `finetuned_target` is the oracle.
    """

    source: PreTrainedModel
    target: PreTrainedModel
    reward: RewardModel
    finetuned_source: nn.Module
    finetuned_target: nn.Module

    def __post_init__(self):
        # A Trainer leaves its model on the accelerator; models that share its weights may still be on the CPU.
        self.device = PartialState().device
        for model in (self.source, self.target, self.reward, self.finetuned_source, self.finetuned_target):
            model.to(self.device)

    @property
    def models_held(self) -> dict[str, int]:
        """The models in memory at the target, by method; a base and its adapters count as one."""
        old_models = 1 if isinstance(self.finetuned_source, PeftModel) else 2
        return {PRETRAINED: 1, EFT: 1 + old_models, PRT: 2, REWARD_ONLY: 1, FINE_TUNED: 1}

    def log_probs(self, method: str, place: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return log pi(. | x) of a method with the backbone at a place, in the reward's order of tokens or labels."""
        backbone = self.target if place == "target" else self.source
        if method == PRETRAINED:
            return self._log_probs(backbone, inputs)
        if method == FINE_TUNED:
            return self._log_probs(self.finetuned_target if place == "target" else self.finetuned_source, inputs)
        if method == EFT:
            shift = self._log_probs(self.finetuned_source, inputs) - self._log_probs(self.source, inputs)
            return combine(self._log_probs(backbone, inputs), shift)
        reward = self.reward(**inputs).float()
        if method == REWARD_ONLY:
            return reward.log_softmax(-1)
        return combine(self._log_probs(backbone, inputs), reward, self.reward.config.strength)

    @torch.no_grad()
    def scores(self, batches: Iterable[dict[str, torch.Tensor]], measure: Measure) -> dict[str, dict[str, float]]:
        """Return `{method: {"source": mean, "target": mean}}` of a measure over all supervised labels."""
        sums, count = defaultdict(float), 0
        for batch in batches:
            inputs = {name: value.to(self.device) for name, value in batch.items()}
            labels = inputs.pop("labels")
            for method in METHODS:
                for place in PLACES:
                    values = measure(self.log_probs(method, place, inputs), labels)
                    sums[method, place] += values.double().sum().item()
            count += len(values)
        return {method: {place: sums[method, place] / count for place in PLACES} for method in METHODS}

    def _log_probs(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits = model(**inputs).logits
        contract = self.reward.contract
        if isinstance(contract, VocabularyContract):
            columns = slice(contract.size)
        else:
            names = LabelContract.from_model_config(unwrap_adapter(model).config)
            columns = names.match(contract)  # the order that turns the model's labels into the reward's
        return logits[..., columns].float().log_softmax(-1)


def tune_all(
    task: Any,
    steps: Steps,
    seed: int,
    data_collator: Callable,
    stage: Callable[[str], str] = str,
    *,
    adapter: bool,
    processing_class: Any,
) -> Contenders:
    """Tune a reward, EFT's model and the oracle on the same data for as many steps.

    Args:
        task ([`TextTask`] or [`ImageTask`]): Models and data.
        steps: The length of each tuning.
        seed: Of each tuning.
        data_collator: Makes batches of rows.
        stage: Makes the description of a progress bar from a plain one.
        adapter: Whether LoRA adapters are tuned, or whole models.
        processing_class: Saved with the reward.
    """
    how = task.train, steps, seed
    text = stage(f"seed {seed}, tuning the reward on the old model")
    reward = tune_reward(task.source, *how, text, data_collator, adapter=adapter, processing_class=processing_class)
    finetuned = [
        fine_tune(model, *how, stage(f"seed {seed}, fine-tuning the {which}"), data_collator, adapter=adapter)
        for model, which in ((task.source, "old model (for EFT)"), (task.target, "new model (oracle)"))
    ]
    return Contenders(task.source, task.target, reward, *finetuned)


def token_losses(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return -log pi(next token), nats, for labels `(batch_size, sequence_length)` other than -100."""
    log_probs, labels = log_probs[:, :-1], labels[:, 1:]
    kept = labels != -100
    return -log_probs[kept].gather(-1, labels[kept][:, None])[:, 0]


def hits(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return 100 where the likeliest label is right, else 0, `(batch_size,)`; the mean is the accuracy in %."""
    return 100.0 * (log_probs.argmax(-1) == labels)
