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
from .fingerprints import file_digest

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS, MODEL_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_MODEL_FILES = (MODEL_CONFIG, "generation_config.json", "model*.safetensors*")
NETWORK_FILES = (*_ADAPTER_FILES, *_MODEL_FILES)  # patterns, of adapters and full rewards
_STAGING, _JOURNAL = ".saving-", "journal.json"  # the former is followed by the process id
_PICKLED = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")


@contextmanager
def replacing_files(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder to write a reward into; on success its files replace those of `folder`, on failure `folder`
    stays as it was. After a process that was killed half-way, [`recover`] puts the earlier files back.

    Other files of `folder` (cards, checkpoints) are kept. Network files of an earlier reward that the new one does not
    have (shards, an adapter where there is now a full network) go.

    Raises:
        RewardFileError: `folder` is a file, or holds a model that is not a reward.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise RewardFileError(f"{folder} is a file.", expected="a folder to save the reward to")
    folder.mkdir(parents=True, exist_ok=True)
    recover(folder)
    staging = Path(tempfile.mkdtemp(prefix=f"{_STAGING}{os.getpid()}-", dir=folder))
    try:
        new_files, old_files = staging / "new", staging / "old"
        new_files.mkdir()
        old_files.mkdir()
        yield new_files
        new = sorted(path.name for path in new_files.iterdir())
        if MODEL_CONFIG in new and (folder / MODEL_CONFIG).exists() and not (folder / PRT_CONFIG_NAME).exists():
            raise RewardFileError(
                f"{folder} holds a model that is not a reward; saving would overwrite it.",
                expected="an empty folder, or one with an earlier reward",
                found=f"{MODEL_CONFIG} without {PRT_CONFIG_NAME}",
                remedy="choose another folder",
            )
        stale = [name for name in _network_files(folder) if name not in new]
        for name in [*new, *stale]:
            if (folder / name).exists():
                link_or_copy(folder / name, old_files / name)
        # From here to the end of the swap, a reader would find files of two rewards.
        (staging / _JOURNAL).write_text(json.dumps(new))
        try:
            for name in new:
                os.replace(new_files / name, folder / name)
            for name in stale:
                (folder / name).unlink()
        except BaseException:
            _restore(folder, staging)
            raise
        (staging / _JOURNAL).unlink()
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undo what a killed process left half-saved in `folder`; savers that are still at work are left alone."""
    for staging in folder.glob(f"{_STAGING}*"):
        process = staging.name.removeprefix(_STAGING).partition("-")[0]
        if process.isdigit() and _is_alive(int(process)):
            continue
        if (staging / _JOURNAL).exists():
            _restore(folder, staging)
        shutil.rmtree(staging, ignore_errors=True)


def check_files(folder: Path, config: RewardConfig) -> None:
    """Check that all weights are there, whole, and in safetensors.

    Raises:
        RewardFileError: names the file.
    """
    required = (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if config.is_adapter else (MODEL_CONFIG,)
    weights = weight_files(folder, config)
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
        read_shapes(folder / name)


def link_or_copy(file: str | Path, copy: str | Path) -> None:
    """The same file under a second name, which stays when the first is replaced or removed."""
    try:
        os.link(file, copy)
    except OSError:  # a file system without hard links
        shutil.copy2(file, copy)


def weight_files(folder: Path, config: RewardConfig) -> list[str]:
    """Names of the files that hold the weights.

    Raises:
        RewardFileError: the index of a full reward's shards cannot be read, or names files elsewhere.
    """
    if config.is_adapter:
        return [ADAPTER_WEIGHTS]
    index = folder / MODEL_INDEX
    if not index.exists():
        return [MODEL_WEIGHTS]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        is_right = names and all(name == Path(name).name and name.endswith(".safetensors") for name in names)
    except (ValueError, TypeError, KeyError, AttributeError):
        is_right = False
    if not is_right:
        raise RewardFileError(
            f"{index} cannot be used.",
            expected="a `weight_map` to safetensors files beside it",
            found=index.read_bytes()[:200].decode(errors="replace"),
            remedy="download or save the reward again",
        )
    return names


def weights_digest(folder: Path, config: RewardConfig) -> str:
    """SHA-256 over the files of the weights."""
    return file_digest(*(folder / name for name in weight_files(folder, config)))


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        RewardFileError: truncated, or no safetensors file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of its tensors, after a check of the file's extent, as of [`read_weights`]."""
    with _opened(path) as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
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
    return [path.name for pattern in (_ADAPTER_FILES if is_adapter else _MODEL_FILES) for path in folder.glob(pattern)]


def _restore(folder: Path, staging: Path) -> None:
    """The earlier files back in place; new ones that replaced none away."""
    old = {path.name for path in (staging / "old").iterdir()}
    for name in json.loads((staging / _JOURNAL).read_text()):
        if name not in old:
            (folder / name).unlink(missing_ok=True)
    for name in old:
        os.replace(staging / "old" / name, folder / name)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
