"""Load a full reward from an untrusted folder, after checking its sizes against the weights that are there."""

from math import prod
from pathlib import Path

import torch
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ..contract import RewardConfig
from ..errors import RewardFileError
from ..hub.folder import ADAPTER_CONFIG, MODEL_CONFIG, read_shapes, weight_files
from ..networks.anatomy import AUTO_CLASSES
from ..networks.checkpoints import check_attention, load_whole, read_entries, unreadable, walk

# They name other weights, change modules, or need libraries that rewards do not use; no save of a reward writes them.
_NOT_IN_A_REWARD = ("quantization_config", "transformers_weights", "fusion_config", "distributed_config")
_MOST = 2**48
_MOST_UNITS = 2**16  # that a configuration may speak of, even if no dimension of the weights is as large
_MOST_CALLS = 100  # of torch for each tensor, while the network is laid out; some 5 are needed
_MOST_VALUES = 2**28  # of buffers that are in no file: masks, tables of positions
# Entries that count, and size nothing that another check does not see.
_ONLY_NUMBERS = ("theta", "position", "token", "length", "window", "seed", "step", "scale", "factor", "ctx")


def load_full(
    folder: Path, config: RewardConfig, base_model: PreTrainedModel | None, load_kwargs: dict
) -> PreTrainedModel:
    """Load a full reward that [`check_full`] accepts, of the class of `base_model` if given; run none of its code."""
    check_full(folder, config, base_model)
    kwargs = load_kwargs | {"trust_remote_code": False, "use_safetensors": True}
    return load_whole(_class_of(config, base_model), folder, kind=RewardFileError, exactly=True, **kwargs)


def check_full(folder: Path, config: RewardConfig, base_model: PreTrainedModel | None = None) -> None:
    """Raise `RewardFileError` unless the configuration describes one network that is no larger than the weights."""
    weights, path = weight_files(folder, config), folder / MODEL_CONFIG
    for kind, pattern in (("an adapter", ADAPTER_CONFIG), ("other weights", "*.safetensors")):
        # Which transformers would load on top of the weights, or in their place.
        if strangers := {found.name for found in folder.glob(pattern)}.difference(weights):
            raise RewardFileError(
                f"{folder} holds a full reward and {kind}.",
                expected="a full reward by itself",
                found=", ".join(sorted(strangers)[:3]),
                remedy="download or save the reward again",
            )
    shapes = [shape for name in weights for shape in read_shapes(folder / name).values()]
    try:
        entries = read_entries(path)
        if (folder / GENERATION_CONFIG_NAME).exists():
            GenerationConfig.from_dict(read_entries(folder / GENERATION_CONFIG_NAME))
    except Exception as error:
        raise unreadable(path, error) from error
    if found := [name for name in _NOT_IN_A_REWARD if entries.get(name)]:
        raise RewardFileError(
            f"{path} describes more than a network.",
            expected="no " + ", ".join(_NOT_IN_A_REWARD),
            found=f"{found[0]}: {str(entries[found[0]])[:80]}",
            remedy="save the reward as it was tuned; load it with `quantization_config=` to quantise it",
        )
    check_attention(entries, path, RewardFileError)
    largest = max((max(shape, default=1) for shape in shapes), default=0)
    for name, value in walk(entries):
        bound = _MOST if any(part in name for part in _ONLY_NUMBERS) else max(largest, _MOST_UNITS)
        if isinstance(value, int) and abs(value) > bound:
            raise _too_large(path, f"{name} = {str(value)[:40]}", f"{bound} at the most")
    try:
        model = _laid_out(folder, config, base_model, len(shapes))
    except Exception as error:  # the classes of configurations and networks raise errors of many kinds
        raise RewardFileError(
            f"{path} cannot be used: the full reward is a {config.reward_base.architecture}, "
            f"which {_class_of(config, base_model).__name__} cannot load.",
            expected="a configuration as it was saved, of a registered class, or `base_model=` a model of that class",
            found=f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}",
        ) from error
    integers = sum(not value.is_floating_point() for value in model.state_dict().values())
    if (found := sum(_integers_in(folder / name) for name in weights)) > integers:
        raise RewardFileError(
            f"{folder} holds integers where the network has weights.",
            expected=f"{integers} tensors of integers",
            found=str(found),
            remedy="download or save the reward again",
        )
    stored = sum(map(prod, shapes))
    asked = sum(value.numel() for value in model.state_dict().values())
    if asked > 2 * stored:  # once more for a head that is tied to the embeddings
        raise _too_large(path, f"{asked} values", f"about {stored} values, as in the weights")
    if (buffers := sum(value.numel() for value in model.buffers())) > max(stored, _MOST_VALUES):
        raise _too_large(path, f"buffers of {buffers} values", f"{_MOST_VALUES} values at the most")


def _class_of(config: RewardConfig, base_model: PreTrainedModel | None) -> type:
    """Return the class that loads the reward."""
    return AUTO_CLASSES[config.task] if base_model is None else type(base_model)


def _laid_out(folder: Path, config: RewardConfig, base_model: PreTrainedModel | None, tensors: int) -> PreTrainedModel:
    """Construct the network on the meta device."""
    model_class = _class_of(config, base_model)
    with torch.device("meta"), _Patience(_MOST_CALLS * (tensors + 10)):
        if base_model is not None:
            return model_class(type(base_model.config).from_pretrained(folder))
        return model_class.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def _integers_in(file: Path) -> int:
    """Count the tensors of integers, which transformers would cast to weights."""
    with safe_open(file, framework="pt") as opened:
        return sum(not opened.get_slice(name).get_dtype().startswith(("F", "BF")) for name in opened.keys())  # noqa: SIM118


def _too_large(path: Path, found: str, expected: str) -> RewardFileError:
    return RewardFileError(
        f"{path} describes a larger network than there are weights for.",
        expected=expected,
        found=found,
        remedy="download or save the reward again",
    )


class _Patience(TorchFunctionMode):
    """Raise when a constructor makes far more layers than there are weights."""

    def __init__(self, calls: int):
        super().__init__()
        self._left = calls

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self._left -= 1
        if self._left < 0:
            raise ValueError("more layers than there are weights for")
        return func(*args, **kwargs or {})
