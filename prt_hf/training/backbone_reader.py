"""The part of the trainer that makes batches and gives them to source backbones, in memory or as stored states."""

from collections.abc import Callable

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..contract import IMAGE_CLASSIFICATION, TEXT_GENERATION
from ..errors import PRTValueError, UnsupportedError
from ..networks.anatomy import check_length
from ..networks.pixels import PIXELS, split_inputs
from ..reward.backbones import Backbone
from ..reward.batch import BackboneLogits, Batch
from .collators import IMAGE, MASKS, TRUNCATE, PixelCollator, TokenCollator
from .saving import RewardSaver
from .sharding import is_sharding, sharded
from .stored import ROW, NumberedCollator, StoredBackbone, dataset_key, numbered, stored_states


class BackboneReader(RewardSaver):
    """The part of [`PRTTrainer`] that makes batches, and holds the backbones that read them.

    Attributes:
        backbones (`list[BackboneLogits]`): the source backbones that losses are computed with, or their stored states.
    """

    backbones: list[BackboneLogits]
    _sources: list[Backbone]  # the source backbones themselves
    _limits: set[int | None]  # tokens that the networks can read

    @property
    def backbone(self) -> PreTrainedModel | None:
        """The first source backbone, if it is in memory and not the reward's own network."""
        source = self._sources[0]
        return None if source.shares_reward_network else source.network

    def get_eval_dataloader(self, eval_dataset: str | Dataset | IterableDataset | None = None) -> DataLoader:
        """Return the Trainer's data loader, with rows that name their stored states."""
        if self.args.precompute_backbone and not isinstance(eval_dataset, str | None):
            eval_dataset = self._with_states(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset | IterableDataset) -> DataLoader:
        """Return the Trainer's data loader, with rows that name their stored states.

        Raises:
            UnsupportedError: outputs are asked for, which stored states of language models do not give.
        """
        if not self.args.prediction_loss_only:
            self._check_outputs_are_known()
        return super().get_test_dataloader(
            self._with_states(test_dataset) if self.args.precompute_backbone else test_dataset
        )

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

    def _batch(self, inputs: dict[str, torch.Tensor]) -> Batch:
        """Return the batch of the Trainer's inputs; `labels` is None where these have none.

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
                check_length(length, limit, TRUNCATE)
        if self.reward.config.task == TEXT_GENERATION:
            inputs["use_cache"] = False  # some models separate packed documents only without a cache
            labels = None if labels is None else labels[:, 1:]
        backbone_inputs = ()
        if self.reward.config.task == IMAGE_CLASSIFICATION:
            inputs, backbone_inputs = split_inputs(inputs, "backbone", len(self._sources))
        return Batch(inputs, labels, rows, backbone_inputs)

    def _labelled_batch(self, inputs: dict[str, torch.Tensor]) -> Batch:
        """Return the batch of the Trainer's inputs.

        Raises:
            ContextLengthError: a text is longer than one of the models can read.
            PRTValueError: the inputs have no labels.
        """
        batch = self._batch(inputs)
        if batch.labels is None:
            raise PRTValueError(
                "The batch has no labels.",
                expected="a column `labels` (or `label`), or a data collator that makes it",
                found=", ".join(batch.inputs),
            )
        return batch

    def _check_outputs_are_known(self) -> None:
        if self.args.precompute_backbone and self.reward.config.task == TEXT_GENERATION:
            raise UnsupportedError(
                "Stored states of a backbone cover supervised positions only.",
                expected="losses and the trainer's own figures",
                found="`predict()` or `compute_metrics`, which need the logits of all positions",
                remedy="precompute_backbone=False",
            )

    def _draw_backbone(self) -> BackboneLogits:
        """Return one backbone for each step: the same on all devices, and when training resumes."""
        if len(self.backbones) == 1:
            return self.backbones[0]
        generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        return self.backbones[int(torch.randint(len(self.backbones), (), generator=generator))]

    def _place(self, source: Backbone) -> None:
        """Load a backbone on the device that it runs on."""
        source.load()
        source.place(self._placed)
        self._limits.add(source.limit)

    def _placed(self, network: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
        if is_sharding(self.accelerator):
            return sharded(network, self.accelerator)
        return network if getattr(network, "hf_device_map", None) is not None else network.to(self.args.device)

    def _store_backbones(self) -> None:
        """Put stored states in the place of the source backbones, and number the rows of all data sets."""
        self.backbones = [StoredBackbone(self.reward, not is_sharding(self.accelerator)) for _ in self._sources]
        self.data_collator = NumberedCollator(self.data_collator)
        self._caches: dict[str, int] = {}  # key of a data set -> index of its cache in every stored backbone
        self.train_dataset = None if self.train_dataset is None else self._with_states(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._with_states(rows) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_states(self.eval_dataset)

    def _with_states(self, dataset: Dataset) -> Dataset:
        """Return the data set with the place of every row's states, after computing those that are missing."""
        if ROW in (getattr(dataset, "column_names", None) or ()):
            return dataset
        read = self._remove_unused_columns(dataset) if isinstance(dataset, Dataset) else dataset
        collator: Callable = self.data_collator.collator
        data = dataset_key(read, collator)

        def make_batch(rows: list[int], on_device: bool) -> Batch:
            inputs = collator([read[row] for row in rows])
            return self._labelled_batch(self._prepare_inputs(inputs) if on_device else inputs)

        if data not in self._caches:
            for source, stored in zip(self._sources, self.backbones, strict=True):
                states = stored_states(
                    source,
                    make_batch,
                    len(read),
                    data=data,
                    root=self.args.backbone_cache_dir,
                    accelerator=self.accelerator,
                    place=self._place,
                    batch_size=self.args.eval_batch_size,
                    disable_tqdm=self.args.disable_tqdm,
                )
                stored.add(states)
            self._caches[data] = len(self._caches)
        return numbered(dataset, self._caches[data])
