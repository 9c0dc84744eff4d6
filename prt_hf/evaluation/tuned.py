"""Fine-tuned models: what EFT shifts a target by, and the oracle that a ported reward is held against."""

from functools import cached_property

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from ..backbones import Backbone
from ..contract import PRT_CONFIG_NAME
from ..errors import BaseModelMismatchError, PRTValueError, RewardFileError
from ..fingerprints import file_digest
from ..hub import has_file, local_file
from ..loading import load_processing_class
from ..pretrained import load_pretrained
from ..reward_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ..reward_model import RewardModel


class TunedModel(Backbone):
    """A model that was tuned the usual way: whole, or as an adapter on its base.

    Args:
        reward ([`RewardModel`]): whose tokens or labels it has.
        network (`PreTrainedModel`, `PeftModel` or `str`): or the id or folder of either, not loaded before [`load`].
        load_kwargs: for `from_pretrained` of an id.

    Raises:
        PRTValueError: the id is a reward's.
        RewardFileError: an adapter's weights are not in safetensors, or it does not name its base.
    """

    def __init__(self, reward: RewardModel, network: PreTrainedModel | PeftModel | str, **load_kwargs):
        is_adapted = isinstance(network, PeftModel)
        super().__init__(reward, None if is_adapted else network, **load_kwargs)
        self._adapter = None
        if is_adapted:
            self._take(network)
        elif isinstance(network, str):
            self._adapter = self._adapter_at(network)

    @property
    def base(self) -> str | None:
        """Where the base of an adapter lies, or the model itself; None of one in memory."""
        return self._named if self._adapter is None else self._adapter.base_model_name_or_path

    @cached_property
    def identity(self) -> dict[str, str]:
        if self._adapter is None:
            return super().identity
        files = [local_file(self._named, name, self._token) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        return {"adapter": file_digest(*files)} | Backbone(self._reward, self.base, **self._base_kwargs).identity

    def load(self) -> None:
        """
        Raises:
            VocabularyMismatchError, LabelMismatchError: it does not fit the reward.
        """
        if self.network is not None or self._adapter is None:
            return super().load()
        base = load_pretrained(self.base, **self._base_kwargs)
        network = PeftModel.from_pretrained(base, self._named, token=self._token)
        self._take(network, load_processing_class(self._named, self.task, token=self._token))

    def check_base(self, source: Backbone) -> None:
        """Of EFT, once both are loaded: log pi_ft - log pi_pt is the tuning alone where pi_ft was tuned from pi_pt.

        Raises:
            BaseModelMismatchError: an adapter sits on another model.
        """
        ours, theirs = self.reference.weights, source.reference.weights
        if isinstance(self.network, PeftModel) and ours and theirs and ours != theirs:
            raise BaseModelMismatchError(
                "The adapter for EFT was tuned from another model than the reward.",
                expected=str(source.reference),
                found=str(self.reference),
                remedy="`source=` that model, or an adapter of the reward's source backbone",
            )

    @property
    def _base_kwargs(self) -> dict:
        return self._load_kwargs | ({"revision": self._adapter.revision} if self._adapter.revision else {})

    @property
    def _token(self) -> str | bool | None:
        return self._load_kwargs.get("token")

    def _adapter_at(self, place: str) -> PeftConfig | None:
        if has_file(place, PRT_CONFIG_NAME):
            raise PRTValueError(
                f"{place} is a reward, which is no model by itself.",
                expected="a fine-tuned model, or an adapter that makes one of its base",
                found=PRT_CONFIG_NAME,
            )
        if not has_file(place, ADAPTER_CONFIG):
            return None
        if not has_file(place, ADAPTER_WEIGHTS):
            raise RewardFileError(
                f"The adapter {place} has no weights that can be loaded.",
                expected=ADAPTER_WEIGHTS,
                found="no such file; pickled weights can run code and are not loaded",
                remedy="convert the weights to safetensors",
            )
        adapter = PeftConfig.from_pretrained(place, token=self._token)
        if not adapter.base_model_name_or_path:
            raise RewardFileError(
                f"The adapter {place} does not name its base.",
                expected=f"`base_model_name_or_path` in {ADAPTER_CONFIG}",
                found="none, as of a base made in memory",
                remedy="write the base's id or folder there, or give the PeftModel itself",
            )
        return adapter
