"""`PRTTrainer`: the HF Trainer with the objective of Portable Reward Tuning."""

import copy
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .collator import MASKS, TokenCollator, check_not_empty, check_tokenized
from .config import PRTConfig
from .contract import PRT_CONFIG_NAME, unwrap_tokenizer
from .errors import PRTValueError
from .functional import IGNORE_INDEX, check_supervised, combine, prt_loss, prt_statistics
from .pretrained import (
    TEXT_GENERATION,
    check_bare,
    check_length,
    context_length,
    frozen_norms,
    load_pretrained,
    pretrained_parameters,
    reference_to,
    task_of,
    weights_fingerprint,
)
from .reward_model import RewardModel, load_processing_class

logger = logging.get_logger(__name__)


class PRTTrainer(Trainer):
    """Tunes a reward r_theta with the fine-tuning loss of softmax(log pi_pt + r_theta / kl_coef), pi_pt frozen (Eq. 7).

    Args:
        model (`str`, `PreTrainedModel`, `PeftModel` or [`RewardModel`]): what the reward starts from; a causal language
            model, sequence classifier or image classifier. With `peft_config`, a model in memory is left as it is and
            shares its weights with the reward adapter; without, it is tuned in place.
        args ([`PRTConfig`], *optional*): defaults to `PRTConfig("tmp_trainer")`, as the Trainer's.
        data_collator: for language models the default pads `input_ids` and makes `labels` of them where there are none.
        train_dataset, eval_dataset, processing_class: as for the Trainer. Language models need their tokenizer.
        backbone (`str` or `PreTrainedModel`, *optional*): pi_pt, the source backbone in training, any backbone in
            evaluation. By default the weights that the reward started from: the same model with the adapter switched
            off, or a frozen copy under a full reward.
        peft_config (`PeftConfig`, *optional*): tunes a reward adapter, see [`default_peft_config`]; without, a full
            reward.
        trainer_kwargs: the Trainer's other arguments (`callbacks`, `compute_metrics`, `optimizers`, ...).
            `compute_metrics` gets the PRT model's log-probabilities.

    Raises:
        VocabularyMismatchError, LabelMismatchError: the backbone does not fit the reward.
        PRTValueError: an empty data set, or arguments that exclude each other.

    Besides `loss`, these are logged (those of [`~prt_hf.functional.prt_statistics`], in training for the step that is
    logged): `accuracy`, `reward_accuracy`, `reward_entropy`, `reward_abs`, `kl`. `eval_loss` is the mean over all
    supervised positions of the evaluation set, without the entropy term.
    """

    # The loss is divided by `num_items_in_batch`, so accumulated micro-batches add up to the large batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | RewardModel,
        args: PRTConfig | None = None,
        data_collator=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *,
        backbone: str | PreTrainedModel | None = None,
        peft_config: PeftConfig | None = None,
        **trainer_kwargs,
    ):
        args = PRTConfig("tmp_trainer") if args is None else args
        if not isinstance(args, PRTConfig):
            raise PRTValueError("`args` is not for reward tuning.", expected="a PRTConfig", found=type(args).__name__)
        for name in ("model_init", "compute_loss_func"):
            if trainer_kwargs.get(name) is not None:
                raise PRTValueError(
                    f"`{name}` is not supported.",
                    expected="a model, and the PRT loss",
                    remedy="subclass PRTTrainer" if name == "compute_loss_func" else "make one PRTTrainer per trial",
                )
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            for split, rows in dataset.items() if isinstance(dataset, dict) else [("", dataset)]:
                check_not_empty(f"{name}[{split!r}]" if split else name, rows)

        self.reward, self.backbone = _reward_and_backbone(model, backbone, processing_class, peft_config, args)
        if processing_class is not None:
            self.reward.processing_class = processing_class
            self.reward.check_processing_class()
        processing_class = self.reward.processing_class
        self._backbone_columns = self._match_backbone(backbone)
        is_language_model = self.reward.config.task == TEXT_GENERATION
        if data_collator is None and is_language_model:
            evaluation = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
            check_tokenized(train_dataset, *evaluation)
            data_collator = TokenCollator(unwrap_tokenizer(processing_class).pad_token_id or 0)
        super().__init__(
            self.reward.network,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            **trainer_kwargs,
        )
        self.model_accepts_loss_kwargs = True  # so that `num_items_in_batch` is counted
        self._loss_shifts_labels = is_language_model
        if self.backbone is not None:
            self.backbone.eval()
            if getattr(self.backbone, "hf_device_map", None) is None:
                self.backbone.to(args.device)
        if isinstance(self.model, PeftModel) and args.gradient_checkpointing:
            self.model.enable_input_require_grads()
        self._frozen_norms = frozen_norms(self.model) if self.reward.config.is_adapter else []
        self._limits = [context_length(network) for network in (self.model, self.backbone) if network is not None]
        self._sums = {"train": defaultdict(float), "eval": defaultdict(float)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The PRT loss (Eq. 7, 12); outputs are `{"logits": log pi_theta}` in the reward's order of columns."""
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if labels is None:
            raise PRTValueError(
                "The batch has no labels.",
                expected="a column `labels` (or `label`), or a data collator that makes it",
                found=", ".join(inputs),
            )
        backbone_logits, rewards = self._forward(model, inputs)
        is_shifted = self._loss_shifts_labels
        at = (slice(None), slice(None, -1)) if is_shifted else ...
        wanted = labels[:, 1:] if is_shifted else labels
        is_training = model.training
        loss = prt_loss(
            backbone_logits[at],
            rewards[at],
            wanted,
            kl_coef=self.args.kl_coef,
            entropy_coef=self.args.entropy_coef if is_training else 0.0,
            num_items_in_batch=num_items_in_batch if is_training else max(1, int((wanted != IGNORE_INDEX).sum())),
        )
        if is_training and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the gradients are averaged over processes
        if not is_training or self._is_step_logged():
            statistics = prt_statistics(backbone_logits[at], rewards[at], wanted, kl_coef=self.args.kl_coef)
            self._add("train" if is_training else "eval", statistics)
        if not return_outputs:
            return loss
        return loss, {"logits": combine(backbone_logits, rewards, 1 / self.args.kl_coef)}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if inputs.get("labels") is None:
            with torch.no_grad(), self.compute_loss_context_manager():
                logits = self._forward(model, dict(self._prepare_inputs(inputs)))
                return None, None if prediction_loss_only else combine(*logits, 1 / self.args.kl_coef), None
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # The Trainer would ask for outputs as well, and logits of whole sequences are large.
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._sums["eval"].clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._means("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs, start_time=None):
        if "loss" in logs:
            means = self._means("train")
            means.pop("loss", None)  # the Trainer's, over all steps since it logged last
            logs.update(means)
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        self._check_what_is_trained()
        self.reward.trained_with(
            reference_to(self.model if self.backbone is None else self.backbone),
            kl_coef=self.args.kl_coef,
            entropy_coef=self.args.entropy_coef,
        )
        return super().train(*args, **kwargs)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        if isinstance(self.data_collator, TokenCollator):
            self._signature_columns = list(dict.fromkeys([*self._signature_columns, *MASKS]))

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        self.reward.save_pretrained(output_dir, state_dict=state_dict)
        torch.save(self.args, os.path.join(output_dir, TRAINING_ARGS_NAME))

    def _forward(self, model, inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Backbone logits and rewards of the whole batch, column by column alike."""
        if "input_ids" in inputs:
            length = inputs["input_ids"].shape[1]
            if inputs.get("position_ids") is not None:  # packed documents start anew
                length = int(inputs["position_ids"].max()) + 1
            for limit in self._limits:
                check_length(length, limit)
        if self.reward.config.task == TEXT_GENERATION:
            # Some models tell packed documents apart only where no cache is made.
            inputs["use_cache"] = False
        with torch.no_grad(), self._frozen_backbone(model) as backbone, self.accelerator.autocast():
            backbone_logits = backbone(**inputs).logits
        for norm in self._frozen_norms:
            norm.eval()
        rewards = model(**inputs).logits[..., self.reward.columns]
        return backbone_logits[..., self._backbone_columns].to(rewards.device), rewards

    @contextmanager
    def _frozen_backbone(self, model) -> Iterator[nn.Module]:
        """pi_pt as it was pretrained: evaluation mode, no adapter."""
        if self.backbone is not None:
            yield self.backbone
            return
        network = self.accelerator.unwrap_model(model)
        is_training, flags = network.training, [(value, value.requires_grad) for value in network.parameters()]
        network.eval()
        try:
            with network.disable_adapter():
                yield network
        finally:
            network.train(is_training)
            for value, flag in flags:  # PEFT makes the whole adapter trainable when it is switched on again
                value.requires_grad_(flag)

    def _match_backbone(self, given: str | PreTrainedModel | None):
        """The backbone's columns that belong to the reward's, in the reward's order."""
        if self.backbone is None:
            return self.reward.columns
        # A model in memory may have been separated from its tokenizer.
        order = self.reward.order_for(
            self.backbone, load_processing_class(given, self.reward.config.task) if isinstance(given, str) else None
        )
        if isinstance(order, slice):
            return order
        return sorted(range(len(order)), key=order.__getitem__)  # its inverse

    def _check_what_is_trained(self):
        """Something, and nothing of the backbone."""
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        if not trained:
            raise PRTValueError(
                "The reward has no trainable parameter.",
                expected="an adapter, or a network, that was loaded for training",
                found="all parameters frozen",
                remedy="PeftModel.from_pretrained(..., is_trainable=True)",
            )
        backbone = pretrained_parameters(self.model if self.backbone is None else self.backbone)
        frozen = {value.data_ptr() for value in backbone.values()}
        if trained := [name for name, value in trained.items() if value.data_ptr() in frozen]:
            raise PRTValueError(
                "The reward trains weights that belong to its backbone.",
                expected="an adapter that can be switched off",
                found=f"trainable: {trained[:3]}",
                remedy="freeze them (`bias='none'` in a LoraConfig), or pass `backbone=` another copy of the model",
            )

    def _is_step_logged(self) -> bool:
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return self.args.logging_strategy == IntervalStrategy.EPOCH
        step = self.state.global_step + 1
        return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    def _add(self, phase: str, statistics: dict[str, torch.Tensor]):
        rows = torch.stack([value.reshape(len(value), -1).sum(1) for value in statistics.values()], 1)
        if phase == "eval":
            rows = self.accelerator.gather_for_metrics(rows)  # without the rows that only fill up the last batch
        for name, value in zip(statistics, rows.double().sum(0), strict=True):
            self._sums[phase][name] += value

    def _means(self, phase: str) -> dict[str, float]:
        """Means over supervised positions since they were asked for last."""
        sums = self._sums[phase]
        if not sums:
            return {}
        totals = torch.stack(list(sums.values()))
        if phase == "train":
            totals = self.accelerator.reduce(totals, "sum")
        sums_of = dict(zip(sums, totals.tolist(), strict=True))
        sums.clear()
        check_supervised(sums_of["count"], "what was measured")
        means = {name: value / sums_of["count"] for name, value in sums_of.items()}
        means.pop("count")
        return means


def _reward_and_backbone(model, backbone, processing_class, peft_config, args):
    """The reward, and its backbone where that is another network than the reward's own with the adapter off."""
    if isinstance(model, RewardModel):
        if peft_config is not None:
            raise PRTValueError(
                "The reward exists already.", expected="no `peft_config` beside a RewardModel", found=repr(peft_config)
            )
        reward, frozen = model, None
        if reward.config.source_backbone is not None and reward.config.kl_coef != args.kl_coef:
            raise PRTValueError(
                "The reward was tuned at another scale.",
                expected=f"kl_coef={reward.config.kl_coef}, as in its {PRT_CONFIG_NAME}",
                found=f"kl_coef={args.kl_coef}",
                remedy=f"PRTConfig(kl_coef={reward.config.kl_coef}, ...)",
            )
        if args.reward_init != "pretrained" and args.reward_init != reward.config.reward_init:
            raise PRTValueError(
                "A RewardModel has started already.",
                expected=f"reward_init={reward.config.reward_init!r}",
                found=repr(args.reward_init),
                remedy="RewardModel.from_base(..., reward_init=...)",
            )
        if backbone is None and not reward.config.is_adapter:
            frozen = _source_of_full_reward(reward)
    else:
        if not isinstance(model, PreTrainedModel | PeftModel):
            # Optimiser steps vanish in half precision weights; frozen ones may stay as they are stored.
            name, model = model, load_pretrained(model, dtype="auto" if peft_config else torch.float32)
            processing_class = processing_class or load_processing_class(name, task_of(model))
        is_full = peft_config is None and not isinstance(model, PeftModel)
        frozen = copy.deepcopy(model) if backbone in (None, model) and is_full else None
        reward = RewardModel.from_base(model, processing_class, peft_config, reward_init=args.reward_init)
    if isinstance(backbone, str):
        frozen = load_pretrained(backbone)
    elif backbone is not None and backbone is not model:
        check_bare(backbone)
        frozen = backbone
    return reward, frozen


def _source_of_full_reward(reward: RewardModel) -> PreTrainedModel:
    """A full reward has no adapter to switch off: its source backbone is itself while untrained, else loaded again."""
    if weights_fingerprint(reward.network) == reward.config.reward_base.weights:
        return copy.deepcopy(reward.network)
    source = reward.config.source_backbone or reward.config.reward_base
    if source.id is None:
        raise PRTValueError(
            "The source backbone of this full reward is not known by an id.",
            expected="`backbone=` the model that it was tuned against",
            found=str(source),
        )
    return load_pretrained(source.id, revision=source.revision)
