"""The part of the trainer that replaces source backbones by what they gave once, kept on disk."""

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from ..contract import TEXT_GENERATION
from ..errors import UnsupportedError
from ..reward.backbones import Backbone, Batch
from .saving import RewardSaver
from .sharding import is_sharding, sharded
from .stored import ROW, NumberedCollator, StoredBackbone, dataset_key, numbered, stored_states


class PrecomputingTrainer(RewardSaver):
    """The part of [`PRTTrainer`] that keeps its source backbones in memory, or their states on disk.

    Attributes:
        backbones (`list[Backbone]`): that losses are computed with; `_sources`, or what is stored of them.
    """

    backbones: list[Backbone]
    _sources: list[Backbone]

    def get_eval_dataloader(self, eval_dataset=None):
        if self.args.precompute_backbone and not isinstance(eval_dataset, str | None):
            eval_dataset = self._with_states(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        if not self.args.prediction_loss_only:
            self._check_outputs_are_known()
        return super().get_test_dataloader(
            self._with_states(test_dataset) if self.args.precompute_backbone else test_dataset
        )

    def _check_outputs_are_known(self) -> None:
        if self.args.precompute_backbone and self.reward.config.task == TEXT_GENERATION:
            raise UnsupportedError(
                "Stored states of a backbone cover supervised positions only.",
                expected="losses and the trainer's own figures",
                found="`predict()` or `compute_metrics`, which need the logits of all positions",
                remedy="precompute_backbone=False",
            )

    def _place(self, source: Backbone) -> None:
        """Load a backbone where it is computed."""
        source.load()
        source.place(self._placed)
        self._limits.add(source.limit)

    def _placed(self, network: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
        if is_sharding(self.accelerator):
            return sharded(network, self.accelerator)
        return network if getattr(network, "hf_device_map", None) is not None else network.to(self.args.device)

    def _store_backbones(self) -> None:
        self.backbones = [StoredBackbone(self.reward, not is_sharding(self.accelerator)) for _ in self._sources]
        self.data_collator = NumberedCollator(self.data_collator)
        self._caches: dict[str, int] = {}  # key of a data set -> place among the caches of a stored backbone
        self.train_dataset = None if self.train_dataset is None else self._with_states(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._with_states(rows) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_states(self.eval_dataset)

    def _with_states(self, dataset: Dataset) -> Dataset:
        """Return the data set with the place of every row's stored states, which are computed where there are none."""
        if ROW in (getattr(dataset, "column_names", None) or ()):
            return dataset
        read = self._remove_unused_columns(dataset) if isinstance(dataset, Dataset) else dataset
        collator = self.data_collator.collator
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
                    rows_per_block=self.args.eval_batch_size,
                    disable_tqdm=self.args.disable_tqdm,
                )
                stored.add(states)
            self._caches[data] = len(self._caches)
        return numbered(dataset, self._caches[data])
