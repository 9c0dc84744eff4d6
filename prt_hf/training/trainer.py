"""`PRTTrainer`: the Trainer of transformers with the objective of Portable Reward Tuning."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from transformers.utils import logging

from ..contract import TEXT_GENERATION
from ..errors import PRTValueError, UnsupportedError
from ..functional import combine
from ..networks.anatomy import (
    ProcessingClass,
    context_length,
    frozen_norms,
    pretrained_parameters,
    unwrap_adapter,
)
from ..networks.lm_head import Projection, last_hidden_state, projection
from ..reward.batch import BackboneLogits, Batch
from ..reward.finetuned import teacher_of
from ..reward.model import RewardModel
from ..vocabulary import unwrap_tokenizer
from .backbone_reader import BackboneReader
from .collators import EndWatch, TokenCollator, check_lengths, check_not_empty, check_tokenized
from .config import PRTConfig
from .data import holds_messages
from .fused_loss import training_loss, training_statistics, why_not_fused
from .metrics import RunningMeans, is_step_logged, tell_start
from .sharding import address, check_fsdp, is_sharding, is_zero3, name_blocks, summed_over_processes
from .sources import reward_and_backbones

logger = logging.get_logger(__name__)
Term = Projection | torch.Tensor  # logits


# Longer than 250 lines because of the description of its arguments.
class PRTTrainer(BackboneReader):
    """Tunes a reward r_theta with the fine-tuning loss of softmax(log pi_pt + r_theta / kl_coef), pi_pt frozen (Eq. 7).

    Args:
        model (`str`, `PreTrainedModel`, `PeftModel` or [`RewardModel`]): start of the reward; a causal language model,
            sequence classifier or image classifier. With `peft_config`, a model in memory is left unchanged and shares
            its weights with the reward adapter; without, it is tuned in place. A [`RewardModel`], or the folder or Hub
            id of one, is tuned further.
        args ([`PRTConfig`], *optional*): defaults to `PRTConfig("tmp_trainer")`, as in the Trainer.
        data_collator: for language models the default pads `input_ids`, and makes `labels` of them if there are none.
            [`PixelCollator`] makes pixels of images; a backbone that needs others than the reward reads its own from
            the batch (`backbone_0_pixel_values` for the first, ...).
        train_dataset: as for the Trainer.
        eval_dataset: as for the Trainer.
        processing_class: as for the Trainer. Language models need their tokenizer.
        backbone (`str`, `PreTrainedModel`, or a list of them, *optional*): pi_pt, the source backbone in training, any
            backbone in evaluation. By default the weights that the reward started from: the same model with the adapter
            switched off, or a frozen copy under a full reward. An existing reward keeps the backbones that it was tuned
            on. Each step draws one of several, and evaluation takes the mean over them; None stands for the default.
            A model in memory may be quantised; the reward then names its checkpoint, which it is tuned further on in
            full precision unless the quantised model is given again.
            Where its vocabulary is an update of the reward's, losses and figures are over the tokens that both have.
        distill_from (`str`, `Path`, `PeftModel` or `PreTrainedModel`, *optional*): a model that was fine-tuned from
            the source backbone, or an adapter of it; in memory, as a folder, or on the Hub. The reward is tuned to its
            distribution: KL(pi_ft || pi_theta) at all supervised positions takes the place of the likelihood, and
            labels are needed only to tell which positions these are.
        peft_config (`PeftConfig`, *optional*): tunes a reward adapter, see [`default_peft_config`]; without, a full
            reward is tuned.
        trainer_kwargs: the Trainer's other arguments (`callbacks`, `compute_metrics`, `optimizers`, ...).
            `compute_metrics` gets the PRT model's log-probabilities, with the first of several backbones.

    Raises:
        VocabularyMismatchError, LabelMismatchError: the backbone does not fit the reward.
        BaseModelMismatchError: `distill_from` was tuned from another model than the source backbone.
        PRTValueError: a data set is empty, or arguments exclude each other.
        ContextLengthError: a data set has a row that is longer than one of the models can read.
        BackboneCacheError, UnsupportedError: states of the backbone cannot be stored or read; or, with the first batch,
            pixels of a backbone are missing.

    Besides `loss`, the trainer logs `backbone_loss` (of the backbone by itself, what `loss` has to fall below),
    `accuracy`, `reward_accuracy`, `reward_entropy`, `reward_abs` and `kl`, see
    [`~prt_hf.functional.prt_statistics`]; in training they are those of the logged step. `eval_loss` is the mean over
    all supervised positions of the evaluation set, without the entropy term; when a reward is distilled, the mean of
    KL to the fine-tuned model.
    """

    config_class = PRTConfig
    # The loss is divided by `num_items_in_batch`, so accumulated micro-batches add up to the large batch.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel | RewardModel,
        args: PRTConfig | None = None,
        data_collator: Callable[[list[dict]], dict[str, torch.Tensor]] | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: ProcessingClass | None = None,
        *,
        backbone: str | PreTrainedModel | list[str | PreTrainedModel | None] | None = None,
        distill_from: str | Path | PreTrainedModel | PeftModel | None = None,
        peft_config: PeftConfig | None = None,
        **trainer_kwargs: Any,
    ):
        args = self.config_class("tmp_trainer") if args is None else args
        datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        _check_arguments(args, self.config_class, trainer_kwargs, **datasets)
        self.reward, self._sources = reward_and_backbones(model, backbone, processing_class, peft_config, args)
        if processing_class is not None:
            self.reward.processing_class = processing_class
            self.reward.check_processing_class()
        processing_class = self.reward.processing_class
        for index, source in enumerate(self._sources):
            source.index = index
        self._is_language_model = self.reward.config.task == TEXT_GENERATION
        self._is_chat = self._is_language_model and holds_messages(train_dataset)
        if not args.precompute_backbone:
            for source in self._sources:
                source.load()
        elif distill_from is not None:
            raise UnsupportedError(
                "Distillation needs the backbone in memory, because the fine-tuned model's logits are not stored.",
                expected="precompute_backbone=False, or no `distill_from`",
            )
        self._teachers = [] if distill_from is None else [teacher_of(self.reward, self._sources, distill_from)]
        if data_collator is None and self._is_language_model:
            data_collator = self._default_collator(train_dataset, eval_dataset)
        super().__init__(
            self.reward.network,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            **trainer_kwargs,
        )
        check_fsdp(args, self.accelerator)
        if self.accelerator.is_fsdp2:
            name_blocks(self.model, self.accelerator)
        if self._teachers and is_sharding(self.accelerator):
            raise UnsupportedError("Distillation does not support sharded models.", expected="no FSDP, or DDP")
        self.model_accepts_loss_kwargs = True  # so that `num_items_in_batch` is counted
        if isinstance(self.model, PeftModel) and args.gradient_checkpointing:
            self.model.enable_input_require_grads()
        self._frozen_norms = frozen_norms(self.model) if self.reward.config.is_adapter else []
        self._is_fused: bool | None = None  # the first batch decides
        self._means = RunningMeans(self.accelerator)
        self._is_start_told = False
        self._limits = {context_length(self.model)}
        self._end_watch = None
        if self._is_language_model:
            generation_config = getattr(unwrap_adapter(self.model), "generation_config", None)
            self._end_watch = EndWatch(unwrap_tokenizer(processing_class), generation_config)
        self._check_lengths()
        self.backbones = self._sources
        if args.precompute_backbone:
            if self.compute_metrics is not None:
                self._check_outputs_are_known()
            self._store_backbones()
        else:
            for source in (*self._sources, *self._teachers):
                self._place(source)

    def _check_lengths(self) -> None:
        """Raise `ContextLengthError` at the start of training, rather than when the first long row comes."""
        limits = [*self._limits, *(source.limit for source in self._sources if source.network is not None)]
        limit = min((each for each in limits if each is not None), default=None)
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        for rows in (self.train_dataset, *evaluated):
            check_lengths(rows, limit)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the PRT loss of a batch (Algorithm 1; Eq. 7, 12).

        Outputs are `{"logits": log pi_theta}`, in the reward's order of columns.
        """
        batch = self._labelled_batch(inputs)
        if self._is_fused is None:
            self._inspect(model, batch)
        if model.training and self._end_watch is not None:
            self._end_watch.see(batch.labels)
        if return_outputs:
            self._check_outputs_are_known()
        drawn = [self._draw_backbone()] if model.training else self.backbones
        is_fused = self._is_fused and not return_outputs
        backbones, teachers, reward = self._forward(model, batch, drawn, self._teachers, is_fused)

        with self.accelerator.autocast():
            terms = [_supervised(batch, term) for term in (reward, *teachers)]
            losses = [
                self._loss(model.training, batch, _supervised(batch, backbone), *terms, items=num_items_in_batch)
                for backbone in backbones
            ]
        loss = sum(losses) / len(losses)
        loss = summed_over_processes(self, model, loss, num_items_in_batch)
        if not return_outputs:
            return loss
        return loss, {"logits": combine(backbones[0], reward, 1 / self.args.kl_coef)}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Return loss, log pi_theta in the reward's order of columns, and labels, as the Trainer does."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if inputs.get("labels") is None:
                if prediction_loss_only:
                    return None, None, None
                batch = self._batch(inputs)
                (backbone,), _, reward = self._forward(model, batch, self.backbones[:1], [], is_fused=False)
                return None, combine(backbone, reward, 1 / self.args.kl_coef), None
            # Outputs only where they are asked for: logits of whole sequences are large.
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            return loss.detach(), outputs["logits"], inputs["labels"]

    def _default_collator(self, train_dataset, eval_dataset) -> TokenCollator | None:
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        check_tokenized(train_dataset, *evaluated)
        return TokenCollator(unwrap_tokenizer(self.reward.processing_class).pad_token_id or 0)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate as the Trainer does, and add the means of the statistics to the metrics."""
        self._means.clear("eval")
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._means.take("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does, with the means of the statistics."""
        if "loss" in logs:
            means = self._means.take("train")
            means.pop("loss", None)  # the Trainer logs the mean over all steps since its last log
            logs.update(means)
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as [`RewardSaver.train`] does, and write what the reward was tuned on into its configuration.

        Raises:
            PRTValueError: the reward has no trainable parameters, or some that belong to its backbone; or there is no
                checkpoint to resume from.
        """
        backbones = [source.network for source in self._sources if source.network is not None]
        _check_trained(self.model, backbones, [teacher.network for teacher in self._teachers])
        self.reward.trained_with(
            *(source.reference for source in self.backbones),
            kl_coef=self.args.kl_coef,
            entropy_coef=self.args.entropy_coef,
            distilled_from=self._teachers[0].origin if self._teachers else None,
            is_chat=self._is_chat,
        )
        return super().train(*args, **kwargs)

    def _inspect(self, model, batch: Batch) -> None:
        """Decide with the first batch whether layers are shared and whether full logits are avoided.

        Raises:
            UnsupportedError: the loss needs full logits, and `fused_loss="always"`.
        """
        with torch.no_grad(), self.accelerator.autocast():
            if self.args.n_gpu <= 1 and not self.args.neftune_noise_alpha:  # only the reward's embeddings get noise
                for source in self.backbones:
                    source.prepare(batch)
            network = self.accelerator.unwrap_model(model)
            others = [*self.backbones, *self._teachers]
            problem = why_not_fused(self.args, is_zero3(self.accelerator), network, others, batch)
        self._is_fused = problem is None
        if problem is not None and self.args.fused_loss == "always":
            raise UnsupportedError("The loss cannot be fused.", expected="fused_loss='auto'", found=problem)
        if problem is not None and self.args.fused_loss == "auto" and self._is_language_model:
            logger.warning(f"Falling back to full logits: {problem}.")

    def _forward(
        self,
        model: nn.Module,
        batch: Batch,
        backbones: list[BackboneLogits],
        teachers: list[BackboneLogits],
        is_fused: bool,
    ) -> tuple[list[Term], list[Term], Term]:
        """Return the terms of the backbones, of the teachers, and of the reward.

        A term is a [`Projection`] at the supervised positions if `is_fused`, else the logits of all positions. The
        stored states of a language model always give a projection.
        """
        frozen = [*backbones, *teachers]
        is_projected = is_fused or (self.args.precompute_backbone and self._is_language_model)
        with self.accelerator.autocast():
            terms = [source.projection(batch) if is_projected else source.logits(batch) for source in frozen]
        for norm in self._frozen_norms:
            norm.eval()
        with ExitStack() as stack:
            for source in frozen:
                stack.enter_context(source.reused())
            if is_fused:
                network = self.accelerator.unwrap_model(model)
                hidden = last_hidden_state(network, batch.inputs, model)
            else:
                reward = model(**batch.inputs).logits[..., self.reward.columns]
        if is_fused:
            with self.accelerator.autocast():
                reward = projection(network, batch.chosen(hidden), self.reward.columns)
        elif not is_projected:
            terms = [term.to(reward.device) for term in terms]
        return terms[: len(backbones)], terms[len(backbones) :], reward

    def _loss(self, is_training: bool, batch: Batch, backbone, reward, teacher=None, *, items) -> torch.Tensor:
        """Return the objective in training, else the likelihood or the divergence from a teacher; log statistics."""
        operands = backbone, reward, batch.supervised_labels
        settings = {"kl_coef": self.args.kl_coef, "teacher": teacher}
        is_first = is_training and not self._is_start_told
        is_logged = not is_training or is_step_logged(self.args, self.state)
        if is_logged or is_first:
            statistics = training_statistics(*operands, **settings)
        if is_logged:
            self._means.add("train" if is_training else "eval", statistics, batch)
        if is_first:
            self._is_start_told = True
            if self.state.global_step == 0 and self.is_world_process_zero():
                tell_start(statistics)
        if not is_training:
            return statistics["loss"].sum() / max(1, len(batch.supervised_labels))
        return training_loss(*operands, **settings, entropy_coef=self.args.entropy_coef, num_items_in_batch=items)


def _check_arguments(args: PRTConfig, config_class: type[PRTConfig], trainer_kwargs: dict, **datasets) -> None:
    """Raise for arguments that a reward cannot be tuned with.

    Raises:
        PRTValueError: names the argument.
    """
    if not isinstance(args, config_class):
        raise PRTValueError(
            "`args` are those of another trainer.", expected=f"a {config_class.__name__}", found=type(args).__name__
        )
    for name in ("model_init", "compute_loss_func"):
        if trainer_kwargs.get(name) is not None:
            raise PRTValueError(
                f"`{name}` is not supported.",
                expected="a model, and the PRT loss",
                remedy="subclass PRTTrainer" if name == "compute_loss_func" else "make one PRTTrainer per trial",
            )
    for name, dataset in datasets.items():
        for split, rows in dataset.items() if isinstance(dataset, dict) else [("", dataset)]:
            check_not_empty(f"{name}[{split!r}]" if split else name, rows)


def _supervised(batch: Batch, term: Term) -> Term:
    """Return logits at the supervised positions; projections are of these alone."""
    return term if isinstance(term, Projection) else batch.chosen(term)


def _check_trained(model, backbones: list[PreTrainedModel], teachers: list[PreTrainedModel]) -> None:
    """Raise unless the reward has trainable parameters, and none of them belongs to a backbone or a teacher.

    Raises:
        PRTValueError: names the first of the parameters.
    """
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not trained:
        raise PRTValueError(
            "The reward has no trainable parameter.",
            expected="an adapter, or a network, that was loaded for training",
            found="all parameters frozen",
            remedy="PeftModel.from_pretrained(..., is_trainable=True)",
        )
    frozen = {address(value) for network in backbones for value in pretrained_parameters(network).values()}
    frozen |= {address(value) for teacher in teachers for value in teacher.parameters()}
    if trained := [name for name, value in trained.items() if address(value) in frozen - {None}]:
        raise PRTValueError(
            "The reward trains weights that belong to its backbone, or to what it is distilled from.",
            expected="an adapter that can be switched off",
            found=f"trainable: {trained[:3]}",
            remedy="freeze them (`bias='none'` in a LoraConfig), or pass `backbone=` another copy of the model",
        )
