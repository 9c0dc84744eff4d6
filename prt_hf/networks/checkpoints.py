"""Load networks from files safely: with all of their weights, and without code or kernels that the files name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..contract import MOST_BYTES
from ..errors import PRTError, PRTValueError, RewardFileError

# Limits on parts that configurations and networks create in memory before any weights are read.
_MOST = {"label": 2**20, "layer": 2**13, "expert": 2**13, "block": 2**20, "depth": 2**13}
# transformers takes other names for repositories, and downloads and runs their kernels.
_ATTENTION = {"eager", "sdpa", "flex_attention", *(f"flash_attention_{version}" for version in (2, 3, 4))}
_ATTENTION |= {f"paged|{name}" for name in _ATTENTION}
_CHOICES = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def load_whole(
    auto_class: type,
    place: str | Path,
    *,
    kind: type[PRTError] = PRTValueError,
    exactly: bool = False,
    **load_kwargs: Any,
) -> PreTrainedModel:
    """Load a network, and refuse one with missing weights, which would be random.

    Args:
        auto_class: the Auto class that loads it.
        place: folder or Hub id.
        kind: class of the error.
        exactly: also refuse weights that the network has no place for. Pretrained checkpoints often have some, of heads
            for other tasks or encoders of other inputs, and transformers leaves them out.
        load_kwargs: for `from_pretrained`.

    Raises:
        PRTError: names the weights.
    """
    reported = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the check below refuses them
    model, info = auto_class.from_pretrained(place, **load_kwargs | reported)
    wrong = {
        "missing": info["missing_keys"],
        "of another shape": {name for name, *_ in info["mismatched_keys"]},
        "left over": info["unexpected_keys"] if exactly else (),
    }
    if any(wrong.values()):
        raise kind(
            f"The weights in {place} are not those of the {type(model).__name__} that its configuration describes.",
            expected="a value for each weight, as the rest would be random",
            found="; ".join(
                f"{len(names)} {how}: {', '.join(sorted(names)[:3])}" for how, names in wrong.items() if names
            ),
            remedy="download or save the model again, or name a checkpoint of this architecture with its head",
        )
    return model


def check_attention(config: PreTrainedConfig | dict, place: str | Path, kind: type[PRTError] = PRTValueError) -> None:
    """Raise `kind` if a downloaded configuration names, at any depth, kernels that would be downloaded."""
    entries = config if isinstance(config, dict) else _entries(config)
    for name, value in walk(entries):
        named = (value.values() if isinstance(value, dict) else [value]) if name in _CHOICES else ()
        if foreign := [str(each)[:200] for each in named if each is not None and each not in _ATTENTION]:
            raise kind(
                f"The configuration in {place} asks for kernels from elsewhere.",
                expected=f"an `attn_implementation` of transformers' own ({', '.join(sorted(_ATTENTION)[:4])}, ...)",
                found=foreign[0],
                remedy="name the one that you want: attn_implementation='sdpa'",
            )


def check_counts(entries: dict[str, Any], place: str | Path, kind: type[PRTError] = PRTValueError) -> None:
    """Raise `kind` if a downloaded configuration has more layers or labels than any network, which take all memory."""
    for name, value in walk(entries):
        most = min((most for part, most in _MOST.items() if part in str(name)), default=None)
        if most is not None and isinstance(value, int) and value > most:
            raise kind(
                f"The configuration in {place} describes no network.",
                expected=f"{name} of {most} at the most",
                found=str(value)[:40],
            )


def read_entries(path: Path) -> dict[str, Any]:
    """Read a downloaded JSON file.

    Raises:
        ValueError, RecursionError: it is too large, not a JSON object, or contains NaN or an entry twice.
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path.stat().st_size} bytes")
    entries = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    if not isinstance(entries, dict):
        raise ValueError(f"a {type(entries).__name__}, no object")
    if nan := [name for name, value in walk(entries) if value != value or (name, value) == ("__float__", "NaN")]:
        raise ValueError(f"{nan[0]} = NaN")
    return entries


def walk(entries: dict | list, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value of nested dictionaries and lists, with the name of its entry."""
    for key, value in entries.items() if isinstance(entries, dict) else ((name, each) for each in entries):
        if isinstance(value, dict | list):
            yield from walk(value, key)
        yield key, value


def unreadable(path: Path, error: BaseException) -> RewardFileError:
    """Return the error for a file of a reward that a library cannot read."""
    return RewardFileError.unreadable(
        path, error, expected="the files of a reward, as they were saved", remedy="download or save the reward again"
    )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse duplicate entries: some readers take the first, others the last."""
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError("an entry that is there twice")
    return entries


def _entries(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the choices of kernels, which `to_dict` leaves out, also those of nested configurations."""
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return {name: getattr(config, name, None) for name in _CHOICES} | {
        str(index): _entries(value) for index, value in enumerate(inner)
    }
