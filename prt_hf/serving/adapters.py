"""Reward adapters that single requests name: LoRAs of the engine, on one base that runs beside the backbone."""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from math import nan
from pathlib import Path

import torch
from torch import nn
from vllm.config import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models import supports_lora
from vllm.model_executor.models.utils import WeightsMapper
from vllm.model_executor.utils import get_packed_modules_mapping

from ..errors import UnsupportedError
from .parts import ADAPTERS, ServedParts, strength_of_adapter


class RequestAdapters:
    """The LoRAs of an engine as rewards: their layers, their checks, and the strengths of their rows.

    Raises:
        UnsupportedError: vLLM puts no LoRAs on this architecture.
    """

    def __init__(self, model: nn.Module, lora_config: LoRAConfig):
        network = getattr(model, ADAPTERS)
        if not supports_lora(network):
            raise UnsupportedError(
                f"vLLM puts no LoRAs on a {type(network).__name__}.",
                remedy="name the rewards in `prt_rewards`",
            )
        check_loaded_adapters()
        lora_config.target_modules = [
            name
            for name, module in network.named_modules(prefix=ADAPTERS)
            if isinstance(module, LinearBase | ParallelLMHead)
        ]
        model.packed_modules_mapping = get_packed_modules_mapping(network)
        names = getattr(network, "hf_to_vllm_mapper", None) or WeightsMapper()
        model.hf_to_vllm_mapper = names | WeightsMapper(orig_to_new_prefix={"": f"{ADAPTERS}."})
        self._model = model
        self._strengths: dict[int, float] = {}
        self._slots: tuple[float | None, ...] = ()
        self._slot_strengths: torch.Tensor | None = None

    @property
    def _manager(self) -> LoRAModelManager:
        """The engine's manager of LoRAs."""
        return self._model.lora_manager  # which the engine sets once the weights are loaded

    def strengths_of_rows(self) -> torch.Tensor:
        """Return 1 / lambda of the reward that each row of the step names, NaN for none: `(num_rows,)`, float32."""
        (mapping,) = self._manager.punica_wrapper_mapping.values()
        slots = tuple(self._strengths.get(adapter) for adapter in self._manager.lora_index_to_id)
        if slots != self._slots:  # else nothing goes to the device
            self._slots = slots
            # None is what the engine warms up with. The slot of a row that names none is -1.
            slot_strengths = [nan if each is None else each for each in (*slots, None)]
            self._slot_strengths = torch.tensor(slot_strengths, dtype=torch.float32, device=mapping.device)
        return self._slot_strengths[mapping.sampler_indices]

    def load(self, request: LoRARequest, load_lora: Callable[[LoRARequest], LoRAModel]) -> LoRAModel:
        """Check a request's reward, load it, and remember its strength.

        Args:
            request: names the reward.
            load_lora: loads it as a LoRA of the engine.

        Raises:
            RewardFileError, UnsupportedError, BaseModelMismatchError, VocabularyMismatchError: as raised by
                [`~prt_hf.serving.parts.strength_of_adapter`].
        """
        parts: ServedParts = self._model.parts
        folder = Path(get_adapter_absolute_path(request.lora_path))
        strength = strength_of_adapter(folder, parts) if folder.is_dir() else None  # else the engine says so
        lora = load_lora(request)
        if unknown := lora.loras.keys() - self._known_layers():
            raise UnsupportedError(
                "The reward changes layers that vLLM puts no LoRA on.", found=", ".join(sorted(unknown)[:3])
            )
        self._strengths[request.lora_int_id] = strength
        return lora

    def _known_layers(self) -> set[str]:
        """Return the names of layers that take LoRAs, also as they are named in adapters."""
        known = set(self._manager.modules)
        for name in self._manager.modules:
            parent, _, last = name.rpartition(".")
            known |= {f"{parent}.{part}" for part in self._manager.packed_modules_mapping.get(last, ())}
        return known


def check_loaded_adapters() -> None:
    """Patch the engine's load of a LoRA, once: it offers no hook for a check, and any LoRA would pass for a reward.

    Raises:
        UnsupportedError: this vLLM loads LoRAs in another way.
    """
    load_adapter = WorkerLoRAManager._load_adapter
    if hasattr(load_adapter, "__wrapped__"):
        return
    if (found := list(signature(load_adapter).parameters)) != ["self", "lora_request"]:
        raise UnsupportedError(
            "Rewards that requests name cannot be checked in this vLLM.",
            expected="WorkerLoRAManager._load_adapter(self, lora_request)",
            found=f"parameters {', '.join(found)}",
            remedy="name the rewards in `prt_rewards`",
        )

    @wraps(load_adapter)
    def checked(self, lora_request: LoRARequest) -> LoRAModel:
        adapters = getattr(self._adapter_manager.model, "request_adapters", None)
        if not isinstance(adapters, RequestAdapters):
            return load_adapter(self, lora_request)
        return adapters.load(lora_request, lambda request: load_adapter(self, request))

    WorkerLoRAManager._load_adapter = checked
