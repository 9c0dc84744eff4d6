"""The five ways to a tuned target, all judged by the same function of their log-probabilities."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from .. import RewardModel, VocabularyContract, combine
from ..contract import LabelContract
from ..networks.anatomy import unwrap_adapter

PRETRAINED, EFT, PRT, REWARD_ONLY, FINE_TUNED = METHODS = ("Pretrained", "EFT", "PRT", "reward only", "fine-tuned")
PLACES = ("source", "target")

# Of one model or another, at the target; EFT reads with the adapter on and off, be it in one pass of two rows.
FORWARDS = {PRETRAINED: 1, EFT: 3, PRT: 2, REWARD_ONLY: 1, FINE_TUNED: 1}

# log-probabilities (..., size), labels (...) -> one number for each label that is not -100
Measure = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Contenders:
    """An old and a new pretrained model, and what was tuned of them, all on the same data for the same number of steps.

    Attributes:
        source, target (`PreTrainedModel`): the frozen backbones.
        reward ([`RewardModel`]): tuned on the source backbone.
        finetuned_source, finetuned_target (`nn.Module`): tuned the usual way; EFT's, and the oracle.
    """

    source: PreTrainedModel
    target: PreTrainedModel
    reward: RewardModel
    finetuned_source: nn.Module
    finetuned_target: nn.Module

    def __post_init__(self):
        # A Trainer leaves its model on the accelerator, others may still share their weights with it on the CPU.
        self.device = PartialState().device
        for model in (self.source, self.target, self.reward, self.finetuned_source, self.finetuned_target):
            model.to(self.device)

    @property
    def models_held(self) -> dict[str, int]:
        """At the target, by weights in memory: an adapter counts as its base, which EFT's two old models then share."""
        old_models = 1 if isinstance(self.finetuned_source, PeftModel) else 2
        return {PRETRAINED: 1, EFT: 1 + old_models, PRT: 2, REWARD_ONLY: 1, FINE_TUNED: 1}

    def log_probs(self, method: str, place: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """log pi(. | x) by one method with the backbone of one place, in the reward's order of tokens or labels."""
        backbone = self.target if place == "target" else self.source
        if method == PRETRAINED:
            return self._of(backbone, inputs)
        if method == FINE_TUNED:
            return self._of(self.finetuned_target if place == "target" else self.finetuned_source, inputs)
        if method == EFT:
            shift = self._of(self.finetuned_source, inputs) - self._of(self.source, inputs)
            return combine(self._of(backbone, inputs), shift)
        reward = self.reward(**inputs).float()
        if method == REWARD_ONLY:
            return reward.log_softmax(-1)
        return combine(self._of(backbone, inputs), reward, self.reward.config.strength)

    @torch.no_grad()
    def scores(self, batches: Iterable[dict[str, torch.Tensor]], measure: Measure) -> dict[str, dict[str, float]]:
        """`{method: {"source": mean, "target": mean}}` of a measure over all supervised labels."""
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

    def _of(self, model: nn.Module, inputs) -> torch.Tensor:
        logits = model(**inputs).logits
        contract = self.reward.contract
        if isinstance(contract, VocabularyContract):
            columns = slice(contract.size)
        else:
            names = LabelContract.from_model_config(unwrap_adapter(model).config)
            columns = names.check(contract)  # the order that turns the model's labels into the reward's
        return logits[..., columns].float().log_softmax(-1)


def token_losses(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log pi(next token), nats, where the next label is not ignored.

    Args:
        log_probs (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`).
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the tokens themselves, -100 at padding.
    """
    log_probs, labels = log_probs[:, :-1], labels[:, 1:]
    kept = labels != -100
    return -log_probs[kept].gather(-1, labels[kept][:, None])[:, 0]


def hits(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """100 where the likeliest label `(batch_size,)` is the right one, else 0: their mean is the accuracy in %."""
    return 100.0 * (log_probs.argmax(-1) == labels)


def gain_recovered(scores: dict[str, dict[str, float]]) -> float | None:
    """(PRT - pretrained) / (fine-tuned - pretrained), at the target; None where fine-tuning changes nothing."""
    pretrained, prt, finetuned = (scores[method]["target"] for method in (PRETRAINED, PRT, FINE_TUNED))
    return (prt - pretrained) / (finetuned - pretrained) if finetuned != pretrained else None
