"""Fine-tuned models: they are compared with a reward, shift a target in EFT, or teach a reward."""

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..contract import PRT_CONFIG_NAME, ModelReference
from ..errors import BaseModelMismatchError, PRTValueError, RewardFileError, UnsupportedError
from ..hub.client import has_file, local_file
from ..hub.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, file_digest
from ..networks.adapter_config import changes_base, check_is_of_layers
from ..networks.adapters import bare_base
from ..networks.auto import load_pretrained
from ..networks.identity import origin_of, reference_to
from .backbones import Backbone
from .loading import load_saved_processing_class, on_base, read_ordinary_adapter
from .model import RewardModel


class TunedModel(Backbone):
    """A model that was tuned in the usual way: whole, or as an adapter on its base.

    Args:
        reward ([`RewardModel`]): a reward with the same tokens or labels.
        network (`PreTrainedModel`, `PeftModel`, `str` or `Path`): the model, or its id or folder, which is not loaded
            before [`load`].
        **load_kwargs: for `from_pretrained` of an id.

    Raises:
        PRTValueError: the id is a reward's.
        RewardFileError: an adapter cannot be read, its weights are not in safetensors, or it does not name its base.
    """

    def __init__(self, reward: RewardModel, network: PreTrainedModel | PeftModel | str | Path, **load_kwargs):
        network = str(network) if isinstance(network, Path) else network
        is_adapted = isinstance(network, PeftModel)
        super().__init__(reward, None if is_adapted else network, **load_kwargs)
        self._adapter, self._is_adapted = None, is_adapted
        if is_adapted:
            self._take(network)
        elif isinstance(network, str):
            self._adapter = self._adapter_at(network)

    @property
    def base(self) -> str | None:
        """The place of an adapter's base, or of the model itself; None for a model in memory."""
        return self._named if self._adapter is None else self._adapter.base_model_name_or_path

    @cached_property
    def identity(self) -> dict[str, str]:
        """Key of the weights, an adapter's together with its base's."""
        if self._adapter is None:
            return super().identity
        return {"adapter": file_digest(*self._files)} | Backbone(self._reward, self.base, **self._base_kwargs).identity

    def load(self) -> None:
        """Load the model, unless it is in memory, and check that it fits the reward, and an adapter its base."""
        if self.network is not None or self._adapter is None:
            return super().load()
        base = self._base_in_memory() or load_pretrained(self.base, **self._base_kwargs)
        reference = reference_to(base)  # before the adapter changes it, as some do
        network = on_base(base, self._adapter, self._files[0].parent)
        self._take(network, load_saved_processing_class(self._files[0].parent, self.task))
        self.reference = reference

    @property
    def origin(self) -> ModelReference:
        """The model that was tuned, not the base that it was tuned from."""
        if self._adapter is None:
            return ModelReference(architecture=self.reference.architecture) if self._is_adapted else self.reference
        return origin_of(self._named, self._files[0].parent)

    def check_base(self, source: Backbone) -> None:
        """Check that this model was tuned from the source backbone, once both are loaded.

        Only then log pi_ft - log pi_pt is the tuning alone.

        Raises:
            BaseModelMismatchError: an adapter sits on another model.
        """
        ours, theirs = self.reference.weights, source.reference.weights
        if isinstance(self.network, PeftModel) and ours and theirs and ours != theirs:
            raise BaseModelMismatchError(
                "The adapter was tuned from another model than the reward's source backbone.",
                expected=str(source.reference),
                found=str(self.reference),
                remedy="that model as the source backbone, or an adapter of the present one",
            )

    def _take(self, network: PreTrainedModel | PeftModel, processing_class: Any = None) -> None:
        if isinstance(network, PeftModel):
            check_is_of_layers(network.active_peft_config)
        super()._take(network, processing_class)
        if isinstance(network, PeftModel) and changes_base(network.active_peft_config):
            self.reference = replace(self.reference, weights=None)  # those of the base are gone

    def _base_in_memory(self) -> PreTrainedModel | None:
        """Return the base of the reward adapter, on the very same weights, if this adapter names it."""
        config, network = self._reward.config, self._reward.network
        if not isinstance(network, PeftModel):
            return None
        if changes_base(network.peft_config["default"]) or changes_base(self._adapter):
            return None
        names = {
            os.path.abspath(name) if Path(name).is_dir() else name
            for name in (self.base, config.reward_base.id)
            if name
        }
        is_same = (
            len(names) == 1 and config.reward_base.id and self._adapter.revision in (None, config.reward_base.revision)
        )
        return bare_base(network) if is_same else None

    @cached_property
    def _files(self) -> list[Path]:
        """The adapter's files on this machine, in one folder."""
        return [local_file(self._named, name, self._token) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]

    @property
    def _base_kwargs(self) -> dict:
        return self._load_kwargs | ({"revision": self._adapter.revision} if self._adapter.revision else {})

    @property
    def _token(self) -> str | bool | None:
        return self._load_kwargs.get("token")

    def _adapter_at(self, place: str) -> PeftConfig | None:
        """Read the configuration of an adapter that names its base; None for a whole model."""
        if not has_file(place, ADAPTER_CONFIG, self._token) and not has_file(place, PRT_CONFIG_NAME, self._token):
            return None
        adapter = read_ordinary_adapter(place, self._token, beside_base=False)
        if not adapter.base_model_name_or_path:
            raise RewardFileError(
                f"The adapter {place} does not name its base.",
                expected=f"`base_model_name_or_path` in {ADAPTER_CONFIG}",
                found="none, as of a base made in memory",
                remedy="write the base's id or folder there, or give the PeftModel itself",
            )
        return adapter


def teacher_of(
    reward: RewardModel, sources: list[Backbone], network: PreTrainedModel | PeftModel | str | Path
) -> TunedModel:
    """Return the loaded model that a reward is distilled from.

    Its base must be the source backbone, so that log pi_pt + r can be its distribution.

    Raises:
        PRTValueError: several source backbones, or a reward.
        BaseModelMismatchError: it was tuned from another model.
        VocabularyMismatchError, LabelMismatchError: it does not fit the reward.
    """
    if len(sources) != 1:
        raise PRTValueError(
            "A reward is distilled on one backbone.",
            expected="the base of the fine-tuned model",
            found=f"{len(sources)} backbones",
        )
    teacher = TunedModel(reward, network)
    teacher.load()
    teacher.check_base(sources[0])
    return teacher


def check_finetuned(network: PeftModel | PreTrainedModel) -> None:
    """Raise `UnsupportedError` for an adapter of prompts, or one that depends on the text."""
    for peft_config in network.peft_config.values() if isinstance(network, PeftModel) else ():
        check_is_of_layers(peft_config)


def pretrained_of(network: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Return the model that a fine-tuned one was tuned from: the base of its adapter, on the very same weights.

    Raises:
        PRTValueError: it is no `PeftModel`.
        UnsupportedError: the adapter has changed its base.
    """
    if not isinstance(network, PeftModel):
        raise PRTValueError(
            "EFT needs the old model before and after fine-tuning.",
            expected="`pretrained=`, or a PeftModel whose adapter can be switched off",
            found=type(network).__name__,
        )
    for peft_config in network.peft_config.values():
        if changes_base(peft_config):
            raise UnsupportedError(
                "The adapter has changed its base, which is not the old model any more without it.",
                expected="`pretrained=`, or an adapter beside its base (LoRA with bias='none')",
                found=", ".join(
                    f"{name}={getattr(peft_config, name, None)!r}"
                    for name in ("bias", "init_lora_weights", "layer_replication")
                ),
                remedy="pretrained=AutoModelForCausalLM.from_pretrained(...)",
            )
    return bare_base(network)
