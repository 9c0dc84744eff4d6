"""Train an ordinary LoRA of a backbone to have the distribution of a PRT model."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging
from trl import SFTConfig

from ..contract import TEXT_CLASSIFICATION, TEXT_GENERATION
from ..errors import PRTValueError
from ..functional import IGNORE_INDEX, prt_loss
from ..hub.card import render_baked_card
from ..hub.card_merge import read_card, write_card
from ..inference.prt_model import PRTPreTrainedModel
from ..networks.adapters import tie_parameters, wrap
from ..networks.anatomy import frozen_norms
from ..networks.identity import reference_to
from ..networks.lm_head import Projection, last_hidden_state, projection, why_not_projected
from ..reward.adapter import default_peft_config
from ..reward.batch import Batch
from ..training.collators import PixelCollator
from ..training.fused_loss import fused_prt_loss
from ..training.saving import checkpoint_to_resume
from ..training.sft import SFTData
from ..training.sharding import summed_over_processes
from ..vocabulary import unwrap_tokenizer
from .teacher import Teacher

logger = logging.get_logger(__name__)
LEARNING_RATE = 2e-4
_PEFT_TASKS = {TEXT_GENERATION: "CAUSAL_LM", TEXT_CLASSIFICATION: "SEQ_CLS"}


@dataclass
class BakeConfig(SFTConfig):
    """Arguments of [`bake`] for language models: those of [`~trl.SFTConfig`], at a learning rate for LoRA.

    Args:
        max_new_tokens (`int`, defaults to 128): the longest text that the student writes to a prompt, where the data
            have prompts alone.
    """

    learning_rate: float = field(default=LEARNING_RATE, metadata={"help": "Initial learning rate of AdamW."})
    max_new_tokens: int = field(
        default=128, metadata={"help": "Longest text that the student writes where the data have prompts alone."}
    )


class BakeTrainer(Trainer):
    """Trains a LoRA of a PRT model's backbone with KL(pi_theta || pi_student), from examples without labels.

    The student shares the backbone's weights with the teacher, so that the backbone is in memory once. This class
    is for classifiers; [`TextBakeTrainer`] for language models.

    Args:
        model ([`PRTPreTrainedModel`]): the teacher, which stays as it is.
        args (`TrainingArguments`): as for the Trainer.
        train_dataset: rows with the inputs of the PRT model; labels are not read.
        eval_dataset (*optional*): as for the Trainer; `eval_loss` is the divergence.
        peft_config (`LoraConfig`, *optional*): by default [`default_lora`].
        **trainer_kwargs: the Trainer's other arguments.
    """

    def __init__(
        self,
        model: PRTPreTrainedModel,
        args: TrainingArguments,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        peft_config: LoraConfig | None = None,
        **trainer_kwargs: Any,
    ):
        self.teacher = Teacher(model)
        student = student_of(model, peft_config)
        self._frozen_norms = frozen_norms(student)  # their statistics are the backbone's
        self._is_fused: bool | None = None  # the first batch decides
        if trainer_kwargs.get("processing_class") is None:
            trainer_kwargs["processing_class"] = model.processing_class
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **trainer_kwargs,
        )
        self.model_accepts_loss_kwargs = True  # so that `num_items_in_batch` is counted
        if getattr(model, "hf_device_map", None) is None:
            model.to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return KL(pi_theta || pi_student), nats per supervised position or per example.

        Outputs are `{"logits": log pi_student}`, of the supervised positions.
        """
        batch = self.batch(inputs)
        own = self.teacher.inputs_of_student(batch.inputs)
        network = self.accelerator.unwrap_model(model)
        for norm in self._frozen_norms:
            norm.eval()
        if self._is_fused is None:
            self._is_fused = self._can_fuse(network, batch, own)
        labels = batch.supervised_labels
        settings = {"num_items_in_batch": num_items_in_batch}
        with self.accelerator.autocast():
            if self._is_fused and not return_outputs:
                teacher = self.teacher.projection(batch)
                hidden = batch.chosen(last_hidden_state(network, own, model))
                student = projection(network, hidden, self.teacher.columns)
                loss = fused_prt_loss(_uniform(student), student, labels, teacher=teacher, **settings)
            else:
                teacher = self.teacher.log_probs(batch)
                student = batch.chosen(model(**own).logits)[..., self.teacher.columns]
                loss = prt_loss(torch.zeros_like(student), student, labels, teacher_logits=teacher, **settings)
        loss = summed_over_processes(self, model, loss, num_items_in_batch)
        return (loss, {"logits": student.log_softmax(-1)}) if return_outputs else loss

    def batch(self, inputs: dict[str, torch.Tensor]) -> Batch:
        """Return the inputs of a batch; every example counts, whatever its label is."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        return Batch(inputs, torch.zeros(len(next(iter(inputs.values()))), dtype=torch.long))

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        """Return the divergence alone."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card into `output_dir`: what was baked, and how it is used. What users wrote into it stays."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            earlier = read_card(folder) or ""
            is_ours = "<!-- prt_hf:" in earlier  # PEFT writes one as well
            write_card(folder, _card(self.teacher.model, folder.absolute().name), earlier if is_ours else None)

    def _can_fuse(self, network: PeftModel, batch: Batch, own: dict) -> bool:
        """Return whether full logits can be avoided, and warn where they cannot be."""
        problem = self.teacher.why_not_projected(batch)
        if self.teacher.model.task != TEXT_GENERATION:
            return False
        problem = problem or why_not_projected(network, own)
        if problem:
            logger.warning(f"Falling back to full logits: {problem}.")
        return problem is None


class TextBakeTrainer(BakeTrainer, SFTData):
    """[`BakeTrainer`] for language models, on the data sets that [`~trl.SFTTrainer`] takes.

    Every token of a text counts, and every token of a completion. Where the data have prompts alone, the student writes
    the completion, anew at each step, and the teacher scores it (on-policy).

    Args:
        args ([`BakeConfig`]): takes the place of `TrainingArguments`.
        **kwargs: [`BakeTrainer`]'s other arguments.
    """

    def __init__(self, model: PRTPreTrainedModel, args: BakeConfig, *, train_dataset: Dataset, **kwargs: Any):
        tokenizer = unwrap_tokenizer(kwargs.get("processing_class") or model.processing_class)
        self._writes = "prompt" in (columns := train_dataset.column_names or []) and "completion" not in columns
        if self._writes:
            prompts = _Prompts(tokenizer, getattr(args, "max_length", None))
            train_dataset = prompts.of(train_dataset)
            if kwargs.get("eval_dataset") is not None:
                kwargs["eval_dataset"] = prompts.of(kwargs["eval_dataset"])
        self._pad = tokenizer.pad_token_id or 0
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)

    def batch(self, inputs: dict[str, torch.Tensor]) -> Batch:
        """Return the inputs of a batch, and the positions of the tokens that count."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        if self._writes:
            inputs, labels = self._written(inputs)
        return Batch(inputs | {"use_cache": False}, labels[:, 1:])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return KL(pi_theta || pi_student), nats per supervised position, see [`BakeTrainer.compute_loss`]."""
        items = None if self._writes else num_items_in_batch  # the Trainer counts tokens of the prompts
        return BakeTrainer.compute_loss(self, model, inputs, return_outputs, items)

    @torch.no_grad()
    def _written(self, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.LongTensor]:
        """Return prompts with what the student writes to them now, and labels of what it wrote."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        ids, mask = _sorted_by(mask, ids, mask)  # generation wants padding on the left
        network = self.accelerator.unwrap_model(self.model)
        was_training = network.training
        network.eval()
        try:
            texts = network.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                max_new_tokens=self.args.max_new_tokens,
                pad_token_id=self._pad,
            )
        finally:
            network.train(was_training)
        ends = network.generation_config.eos_token_id
        written = texts[:, ids.shape[1] :]
        is_end = torch.isin(written, torch.as_tensor([] if ends is None else ends, device=written.device))
        is_text = (is_end.cumsum(1) - is_end.long()) == 0  # up to the first end, which counts
        mask = torch.cat([mask, is_text.long()], 1)
        labels = texts.masked_fill(mask == 0, IGNORE_INDEX)
        labels[:, : ids.shape[1]] = IGNORE_INDEX
        texts, labels, mask = _sorted_by(1 - mask, texts, labels, mask)  # and a forward pass on the right
        return {"input_ids": texts, "attention_mask": mask}, labels


class _Prompts:
    """Makes token rows of prompts: texts, or messages in the tokenizer's chat template."""

    def __init__(self, tokenizer: Any, length: int | None):
        self._tokenizer, self._length = tokenizer, length

    def of(self, rows: Dataset) -> Dataset:
        """Return rows with `input_ids` alone; what is longer than `max_length` is cut off on the left."""
        return rows.map(self._row, remove_columns=rows.column_names, desc="Tokenizing prompts")

    def _row(self, row: dict) -> dict[str, list[int]]:
        prompt, tokenizer = row["prompt"], self._tokenizer
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        return {"input_ids": ids[-self._length :] if self._length else ids}


def bake(
    model: PRTPreTrainedModel,
    train_dataset: Dataset,
    args: TrainingArguments | None = None,
    peft_config: LoraConfig | None = None,
    **trainer_kwargs: Any,
) -> PeftModel:
    """Return an ordinary LoRA of a PRT model's backbone that has the PRT model's distribution, and save it.

    One model is left at inference, which merges, quantises and converts like any other. Nothing needs labels: texts do,
    prompts alone (the student writes, the teacher scores), or images.

    ```python
    model = PRTForCausalLM.from_parts("Qwen/Qwen2.5-7B", rewards=["me/gsm8k-reward"])
    baked = bake(model, texts, BakeConfig("gsm8k-7b-lora"))
    baked.merge_and_unload()
    ```

    Args:
        model ([`PRTForCausalLM`] or a PRT classifier): the teacher, which stays as it is.
        train_dataset (`Dataset`): for language models what [`~trl.SFTTrainer`] takes, or a column `prompt` alone; for
            classifiers rows with `image`, or with the model's inputs.
        args ([`BakeConfig`], for classifiers `TrainingArguments`, *optional*): steps, learning rate, `output_dir`, ...
            `resume_from_checkpoint` goes on after an interruption.
        peft_config (`LoraConfig`, *optional*): by default [`default_lora`].
        **trainer_kwargs: for [`BakeTrainer`] or [`TextBakeTrainer`], such as `eval_dataset`.

    Raises:
        PRTValueError: no PRT model, no data, or a `peft_config` that is no LoRA.
        UnsupportedError: the model's strengths differ from row to row.
    """
    if not isinstance(model, PRTPreTrainedModel):
        raise PRTValueError(
            "Only a PRT model can be baked.",
            expected="a backbone with rewards",
            found=type(model).__name__,
            remedy='PRTForCausalLM.from_parts("backbone", rewards=["reward"])',
        )
    if not len(train_dataset):
        raise PRTValueError("There is nothing to bake on.", expected="at least one example", found="0 rows")
    if model.task == TEXT_GENERATION:
        trainer_class, args = TextBakeTrainer, args or BakeConfig("baked")
    else:
        args = args or TrainingArguments("baked", learning_rate=LEARNING_RATE, remove_unused_columns=False)
        trainer_class = BakeTrainer
        if "image" in train_dataset.column_names and "data_collator" not in trainer_kwargs:
            args.remove_unused_columns = False
            trainer_kwargs["data_collator"] = PixelCollator(model.processing_class)
    trainer = trainer_class(model, args, train_dataset=train_dataset, peft_config=peft_config, **trainer_kwargs)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir))
    trainer.save_model()
    trainer.create_model_card()
    return trainer.accelerator.unwrap_model(trainer.model).eval()


def default_lora(model: PRTPreTrainedModel) -> LoraConfig:
    """Return LoRA of rank 16, on every linear layer of a language model but the head, or on all of a classifier."""
    if model.task != TEXT_GENERATION:
        return default_peft_config(model.backbone)
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def student_of(model: PRTPreTrainedModel, peft_config: LoraConfig | None = None) -> PeftModel:
    """Return a new LoRA on the weights of a PRT model's backbone, which stays without it.

    Raises:
        PRTValueError: the configuration is no `LoraConfig`.
    """
    peft_config = default_lora(model) if peft_config is None else copy.deepcopy(peft_config)
    if not isinstance(peft_config, LoraConfig):
        raise PRTValueError("A PRT model is baked into a LoRA.", expected="LoraConfig", found=str(peft_config)[:80])
    peft_config.task_type = peft_config.task_type or _PEFT_TASKS.get(model.task)
    peft_config.base_model_name_or_path = model.backbone.name_or_path or None
    student = wrap(model.backbone, peft_config)
    tie_parameters(student, model.backbone)  # so that they move together
    return student


def _uniform(student: Projection) -> Projection:
    """Return logits of 0: the student's distribution is its own, and no backbone's times a reward."""
    return Projection((student.hidden[0][:, :0],), (student.weights[0][:, :0],))


def _sorted_by(keys: torch.Tensor, *rows: torch.Tensor) -> list[torch.Tensor]:
    """Return rows whose entries with a key of 0 come first; the others, and these, keep their order."""
    order = keys.argsort(dim=1, stable=True)
    return [each.gather(1, order) for each in rows]


def _card(model: PRTPreTrainedModel, name: str) -> str:
    """Return the card of a baked model; `name` is that of its folder."""
    places = [entry["id"] for entry in model.config.reward_references]
    rewards = [
        (place or f"a reward on {reward.config.reward_base}", strength)
        for place, reward, strength in zip(places, model.rewards, model.strengths, strict=True)
    ]
    return render_baked_card(name, model.task, reference_to(model.backbone), rewards)
