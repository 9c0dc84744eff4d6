"""`PRTTrainer`: the HF Trainer with the objective of Portable Reward Tuning."""

from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from ..contract import IMAGE_CLASSIFICATION, TEXT_GENERATION, unwrap_tokenizer
from ..errors import PRTValueError, UnsupportedError
from ..functional import combine
from ..networks.anatomy import check_length, context_length, frozen_norms, pretrained_parameters
from ..networks.lm_head import Projection, last_hidden_state, projection, why_not_projected
from ..networks.pixels import PIXELS, split_inputs
from ..reward.backbones import Backbone, Batch, OwnBase
from ..reward.finetuned import teacher_of
from ..reward.model import RewardModel
from .collators import IMAGE, MASKS, PixelCollator, TokenCollator, check_not_empty, check_tokenized
from .config import PRTConfig
from .fused_loss import training_loss, training_statistics
from .metrics import RunningMeans
from .precomputing import PrecomputingTrainer
from .sharding import address, check_fsdp, is_sharding, is_zero3, name_blocks
from .sources import reward_and_backbones
from .stored import ROW

logger = logging.get_logger(__name__)


class PRTTrainer(PrecomputingTrainer):
    """Tunes a reward r_theta with the fine-tuning loss of softmax(log pi_pt + r_theta / kl_coef), pi_pt frozen (Eq. 7).

    Args:
        model (`str`, `PreTrainedModel`, `PeftModel` or [`RewardModel`]): what the reward starts from; a causal language
            model, sequence classifier or image classifier. With `peft_config`, a model in memory is left as it is and
            shares its weights with the reward adapter; without, it is tuned in place. A [`RewardModel`], or the folder
            or Hub id of one, is tuned on.
        args ([`PRTConfig`], *optional*): defaults to `PRTConfig("tmp_trainer")`, as the Trainer's.
        data_collator: for language models the default pads `input_ids` and makes `labels` of them where there are none.
            [`PixelCollator`] makes pixels of images; a backbone that wants others than the reward needs its own in
            every batch (`backbone_0_pixel_values` for the first, ...).
        train_dataset, eval_dataset, processing_class: as for the Trainer. Language models need their tokenizer.
        backbone (`str`, `PreTrainedModel`, or a list of them, *optional*): pi_pt, the source backbone in training, any
            backbone in evaluation. By default the weights that the reward started from: the same model with the adapter
            switched off, or a frozen copy under a full reward; of a reward that was tuned before, what it was tuned on.
            Of several, every step draws one, and evaluation is the mean over them; None stands for the default.
        distill_from (`str`, `Path`, `PeftModel` or `PreTrainedModel`, *optional*): a model that was fine-tuned from
            the source backbone, whole or as an adapter; folders and Hub ids of either are loaded. The reward is tuned
            to its distribution: KL(pi_ft || pi_theta) takes the place of the likelihood, at all positions that are
            supervised, and needs no labels but the text.
        peft_config (`PeftConfig`, *optional*): tunes a reward adapter, see [`default_peft_config`]; without, a full
            reward.
        trainer_kwargs: the Trainer's other arguments (`callbacks`, `compute_metrics`, `optimizers`, ...).
            `compute_metrics` gets the PRT model's log-probabilities, of several backbones those with the first.

    Raises:
        VocabularyMismatchError, LabelMismatchError: the backbone does not fit the reward.
        BaseModelMismatchError: `distill_from` was tuned from another model than the source backbone.
        PRTValueError: an empty data set, or arguments that exclude each other.
        BackboneCacheError, UnsupportedError: states of the backbone cannot be stored, or those that are stored are
            damaged; or, with the first batch, pixels of a backbone are missing.

    Besides `loss`, these are logged (those of [`~prt_hf.functional.prt_statistics`], in training for the step that is
    logged): `accuracy`, `reward_accuracy`, `reward_entropy`, `reward_abs`, `kl`. `eval_loss` is the mean over all
    supervised positions of the evaluation set, without the entropy term; where a reward is distilled, that of KL to the
    fine-tuned model.
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
        backbone: str | PreTrainedModel | list[str | PreTrainedModel | None] | None = None,
        distill_from: str | Path | PreTrainedModel | PeftModel | None = None,
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

        self.reward, self._sources = reward_and_backbones(model, backbone, processing_class, peft_config, args)
        if processing_class is not None:
            self.reward.processing_class = processing_class
            self.reward.check_processing_class()
        processing_class = self.reward.processing_class
        for index, source in enumerate(self._sources):
            source.index = index
        self._is_language_model = self.reward.config.task == TEXT_GENERATION
        if not args.precompute_backbone:
            for source in self._sources:
                source.load()
        elif distill_from is not None:
            raise UnsupportedError(
                "What a fine-tuned model gives is not stored, so it is distilled from with its backbone in memory.",
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
            raise UnsupportedError("A reward is not distilled on models in parts.", expected="no FSDP, or DDP")
        self.model_accepts_loss_kwargs = True  # so that `num_items_in_batch` is counted
        if isinstance(self.model, PeftModel) and args.gradient_checkpointing:
            self.model.enable_input_require_grads()
        self._frozen_norms = frozen_norms(self.model) if self.reward.config.is_adapter else []
        self._is_fused: bool | None = None  # the first batch decides
        self._means = RunningMeans(self.accelerator)
        self._limits = {context_length(self.model)}
        self.backbones = self._sources
        if args.precompute_backbone:
            if self.compute_metrics is not None:
                self._check_outputs_are_known()
            self._store_backbones()
        else:
            for source in (*self._sources, *self._teachers):
                self._place(source)

    @property
    def backbone(self) -> PreTrainedModel | None:
        """The first source backbone, where it is another network than the reward's own and in memory."""
        source = self._sources[0]
        return None if isinstance(source, OwnBase) else source.network

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the PRT loss (Eq. 7, 12); outputs are `{"logits": log pi_theta}` in the reward's order of columns."""
        batch = self._labelled_batch(inputs)
        if self._is_fused is None:
            self._start(model, batch)
        if return_outputs:
            self._check_outputs_are_known()
        drawn = [self._drawn_backbone()] if model.training else self.backbones
        is_fused = self._is_fused and not return_outputs
        others, reward = self._forward(model, batch, [*drawn, *self._teachers], is_fused)
        with self.accelerator.autocast():
            backbones = [_supervised(batch, each) for each in others]
            teacher = backbones.pop() if self._teachers else None
            arguments = _supervised(batch, reward), teacher, batch, model.training, num_items_in_batch
            losses = [self._loss(each, *arguments) for each in backbones]
        loss = sum(losses) / len(losses)
        if model.training and self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the gradients are averaged over processes
        if not return_outputs:
            return loss
        return loss, {"logits": combine(others[0], reward, 1 / self.args.kl_coef)}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if inputs.get("labels") is None:
                (of_backbone,), rewards = self._forward(model, self._batch(inputs), self.backbones[:1], is_fused=False)
                outputs = None if prediction_loss_only else combine(of_backbone, rewards, 1 / self.args.kl_coef)
                return None, outputs, None
            # Outputs only where they are wanted: logits of whole sequences are large.
            if prediction_loss_only:
                return self.compute_loss(model, inputs).detach(), None, None
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
            return loss.detach(), outputs["logits"], inputs["labels"]

    def _default_collator(self, train_dataset, eval_dataset) -> TokenCollator | None:
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        check_tokenized(train_dataset, *evaluated)
        return TokenCollator(unwrap_tokenizer(self.reward.processing_class).pad_token_id or 0)

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        self._means.clear("eval")
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        means = self._means.take("eval")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def log(self, logs, start_time=None):
        if "loss" in logs:
            means = self._means.take("train")
            means.pop("loss", None)  # the Trainer's, over all steps since it logged last
            logs.update(means)
        super().log(logs, start_time)

    def train(self, *args, **kwargs):
        backbones = [source.network for source in self._sources if source.network is not None]
        _check_trained(self.model, backbones, [teacher.network for teacher in self._teachers])
        self.reward.trained_with(
            *(source.reference for source in self.backbones),
            kl_coef=self.args.kl_coef,
            entropy_coef=self.args.entropy_coef,
            distilled_from=self._teachers[0].origin if self._teachers else None,
        )
        return super().train(*args, **kwargs)

    def _set_signature_columns_if_needed(self):
        super()._set_signature_columns_if_needed()
        collator = getattr(self.data_collator, "collator", self.data_collator)
        extra = [ROW]
        if isinstance(collator, TokenCollator):
            extra += MASKS
        elif self.reward.config.task == IMAGE_CLASSIFICATION:
            extra += [IMAGE] if isinstance(collator, PixelCollator) else []
            extra += [f"backbone_{source.index}_{PIXELS}" for source in self._sources]
        self._signature_columns = list(dict.fromkeys([*self._signature_columns, *extra]))

    def _batch(self, inputs) -> Batch:
        """
        Raises:
            ContextLengthError: a text is longer than one of the models can read.
        """
        inputs = dict(inputs)
        labels, rows = inputs.pop("labels", None), inputs.pop(ROW, None)
        if "input_ids" in inputs:
            length = inputs["input_ids"].shape[1]
            if inputs.get("position_ids") is not None:  # packed documents start anew
                length = int(inputs["position_ids"].max()) + 1
            for limit in self._limits:
                check_length(length, limit)
        if self._is_language_model:
            # Some models tell packed documents apart only where no cache is made.
            inputs["use_cache"] = False
            labels = None if labels is None else labels[:, 1:]
        of_backbones = ()
        if self.reward.config.task == IMAGE_CLASSIFICATION:
            inputs, of_backbones = split_inputs(inputs, "backbone", len(self._sources))
        return Batch(inputs, labels, rows, of_backbones)

    def _labelled_batch(self, inputs) -> Batch:
        batch = self._batch(inputs)
        if batch.labels is None:
            raise PRTValueError(
                "The batch has no labels.",
                expected="a column `labels` (or `label`), or a data collator that makes it",
                found=", ".join(batch.inputs),
            )
        return batch

    def _start(self, model, batch: Batch) -> None:
        """What the first batch decides: whether layers are shared, whether logits are left unmade.

        Raises:
            UnsupportedError: they cannot be, and `fused_loss="always"`.
        """
        with torch.no_grad(), self.accelerator.autocast():
            if self.args.n_gpu <= 1 and not self.args.neftune_noise_alpha:  # noise on embeddings is the reward's alone
                for source in self.backbones:
                    source.prepare(batch)
            network = self.accelerator.unwrap_model(model)
            others = [*self.backbones, *self._teachers]
            problem = _why_not_fused(self.args, is_zero3(self.accelerator), network, others, batch)
        self._is_fused = problem is None
        if problem is not None and self.args.fused_loss == "always":
            raise UnsupportedError("The loss cannot be fused.", expected="fused_loss='auto'", found=problem)
        if problem is not None and self.args.fused_loss == "auto" and self._is_language_model:
            logger.warning(f"Logits of whole sequences are made: {problem}.")

    def _forward(self, model, batch: Batch, backbones: list[Backbone], is_fused: bool):
        """Of every backbone and of the reward: a [`Projection`] at the supervised positions if `is_fused`, else logits
        of all. Of stored states of a language model there is only the former."""
        is_projected = is_fused or (self.args.precompute_backbone and self._is_language_model)
        with self.accelerator.autocast():
            of_backbones = [source.projection(batch) if is_projected else source.logits(batch) for source in backbones]
        for norm in self._frozen_norms:
            norm.eval()
        with ExitStack() as stack:
            for source in backbones:
                stack.enter_context(source.reused())
            if not is_fused:
                rewards = model(**batch.inputs).logits[..., self.reward.columns]
                return [each if is_projected else each.to(rewards.device) for each in of_backbones], rewards
            network = self.accelerator.unwrap_model(model)
            hidden = last_hidden_state(network, batch.inputs, model)
        with self.accelerator.autocast():
            return of_backbones, projection(network, batch.chosen(hidden), self.reward.columns)

    def _loss(self, backbone, reward, teacher, batch: Batch, is_training: bool, num_items_in_batch) -> torch.Tensor:
        """Return the objective in training, else the likelihood or the divergence from a teacher; add up the figures
        that are logged."""
        operands = backbone, reward, batch.supervised_labels
        settings = {"kl_coef": self.args.kl_coef, "teacher": teacher}
        if not is_training or self._is_step_logged():
            statistics = training_statistics(*operands, **settings)
            self._means.add("train" if is_training else "eval", statistics, batch)
        if not is_training:
            return statistics["loss"].sum() / max(1, len(batch.supervised_labels))
        return training_loss(
            *operands, **settings, entropy_coef=self.args.entropy_coef, num_items_in_batch=num_items_in_batch
        )

    def _drawn_backbone(self) -> Backbone:
        """One for each step: the same on all devices, and when training resumes."""
        if len(self.backbones) == 1:
            return self.backbones[0]
        generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        return self.backbones[int(torch.randint(len(self.backbones), (), generator=generator))]

    def _is_step_logged(self) -> bool:
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return self.args.logging_strategy == IntervalStrategy.EPOCH
        step = self.state.global_step + 1
        return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)


def _supervised(batch: Batch, term: Projection | torch.Tensor) -> Projection | torch.Tensor:
    """Return logits at the supervised positions; projections are of these alone."""
    return term if isinstance(term, Projection) else batch.chosen(term)


def _why_not_fused(
    args: PRTConfig, is_in_parts: bool, network: PreTrainedModel | PeftModel, others: list[Backbone], batch: Batch
) -> str | None:
    """Return why the loss needs the logits of whole sequences; None where it does not.

    Args:
        is_in_parts: by DeepSpeed ZeRO-3.
        others: the backbones, and the fine-tuned model that the reward is distilled from.
    """
    networks = [network, *(other.network for other in others if other.network is not None)]
    devices = sorted({str(value.device) for each in networks for value in each.parameters()})
    for problem, holds in {
        "fused_loss='never'": args.fused_loss == "never",
        "a classifier has few": others[0].task != TEXT_GENERATION,
        "the networks are compiled": args.torch_compile,
        "torch.nn.DataParallel runs copies of the network": args.n_gpu > 1,
        "ZeRO-3 keeps the heads in parts": is_in_parts,
        f"the models are on several devices: {devices}": len(devices) > 1,
    }.items():
        if holds:
            return problem
    problems = [why_not_projected(network, batch.inputs), *(each.why_not_projected(batch) for each in others)]
    return next((problem for problem in problems if problem), None)


def _check_trained(model, backbones: list[PreTrainedModel], teachers: list[PreTrainedModel]) -> None:
    """Raise unless something is trained, and nothing of a backbone or of what is distilled.

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
