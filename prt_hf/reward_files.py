"""The folder of a saved reward: replaced as a whole or not at all, and read only where it is complete and safe."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from .contract import PRT_CONFIG_NAME, RewardConfig
from .errors import RewardFileError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS, MODEL_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_NETWORK_FILES = {
    True: (ADAPTER_CONFIG, ADAPTER_WEIGHTS),
    False: (MODEL_CONFIG, "generation_config.json", "model*.safetensors*"),
}
_STAGED = ".saving-"
_PICKLED = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder to write a reward into; on success its files replace those of `folder`, on failure `folder`
    stays as it was.

    Other files of `folder` (cards, checkpoints) are kept. Network files of an earlier reward that the new one does not
    have (shards, an adapter where there is now a full network) go.

    Raises:
        RewardFileError: `folder` is a file, or holds a model that is not a reward.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise RewardFileError(f"{folder} is a file.", expected="a folder to save the reward to")
    folder.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=folder))
    try:
        yield staged
        new = sorted(path.name for path in staged.iterdir())
        if MODEL_CONFIG in new and (folder / MODEL_CONFIG).exists() and not (folder / PRT_CONFIG_NAME).exists():
            raise RewardFileError(
                f"{folder} holds a model that is not a reward; saving would overwrite it.",
                expected="an empty folder, or one with an earlier reward",
                found=f"{MODEL_CONFIG} without {PRT_CONFIG_NAME}",
                remedy="choose another folder",
            )
        _swap(staged, folder, new, stale=[name for name in _network_files(folder) if name not in new])
        for killed in folder.glob(f"{_STAGED}*"):
            shutil.rmtree(killed, ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def check_files(folder: Path, config: RewardConfig) -> None:
    """Check that all weights are there, whole, and in safetensors.

    Raises:
        RewardFileError: names the file.
    """
    required = (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if config.is_adapter else (MODEL_CONFIG,)
    weights = [ADAPTER_WEIGHTS] if config.is_adapter else [MODEL_WEIGHTS]
    if not config.is_adapter and (folder / MODEL_INDEX).exists():
        weights = sorted(set(json.loads((folder / MODEL_INDEX).read_text())["weight_map"].values()))
    for name in dict.fromkeys([*required, *weights]):
        if not (folder / name).is_file():
            pickled = [name for name in _PICKLED if (folder / name).exists()]
            raise RewardFileError(
                f"{folder} is incomplete: {name} is missing.",
                expected=", ".join(dict.fromkeys([*required, *weights])),
                found=f"{pickled[0]}: pickled weights can run code and are not loaded" if pickled else "no such file",
                remedy="convert the weights to safetensors" if pickled else "download or save the reward again",
            )
    for name in weights:
        read_weights(folder / name, values=False)


def read_weights(path: Path, values: bool = True) -> dict[str, torch.Tensor | None]:
    """The tensors of a safetensors file, or with `values=False` their names after a check of the file's extent.

    Raises:
        RewardFileError: truncated, or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) if values else None for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise RewardFileError(
            f"{path} is damaged: {error}",
            expected="a complete safetensors file",
            found=f"{path.stat().st_size} bytes",
            remedy="download or save the reward again",
        ) from error


def _network_files(folder: Path) -> list[str]:
    """Files of the reward that `folder` holds, none where it holds no reward."""
    if not (folder / PRT_CONFIG_NAME).is_file():
        return []
    is_adapter = RewardConfig.from_json_file(folder / PRT_CONFIG_NAME).is_adapter
    return [path.name for pattern in _NETWORK_FILES[is_adapter] for path in folder.glob(pattern)]


def _swap(staged: Path, folder: Path, new: list[str], stale: list[str]) -> None:
    """Move the new files in; put the old ones back if that fails half-way."""
    old = staged / ".old"
    old.mkdir()
    touched = [*new, *stale]
    try:
        for name in touched:
            if (folder / name).exists():
                os.replace(folder / name, old / name)
            if name in new:
                os.replace(staged / name, folder / name)
    except BaseException:
        for name in touched:
            if (old / name).exists():
                os.replace(old / name, folder / name)
            elif name in new and not (staged / name).exists():
                (folder / name).unlink(missing_ok=True)
        raise
