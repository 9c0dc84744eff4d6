"""The folder of a saved reward or recipe: replaced as a whole or not at all, and read only where it is complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from .contract import PRT_CONFIG_NAME, RewardConfig
from .errors import RewardFileError
from .fingerprints import file_digest

REWARD, RECIPE = "a reward", "a recipe"
RECIPE_TYPE = "prt"  # `model_type` of a recipe's config.json
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS, MODEL_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_MODEL_FILES = (MODEL_CONFIG, "generation_config.json", "model*.safetensors*")
NETWORK_FILES = (*_ADAPTER_FILES, *_MODEL_FILES)  # patterns, of adapters and full rewards
_STAGING, _LOCK, _JOURNAL = ".saving-", "lock", "journal.json"
_SWAP_SECONDS = 10  # a saver at work needs less
_PICKLED = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")


@contextmanager
def replacing_files(folder: str | Path, earlier: Callable[[Path], Iterable[str]]) -> Iterator[Path]:
    """Yield an empty folder to write a reward or recipe into; on success what it holds replaces what has the same names
    in `folder`, on failure `folder` stays as it was. After a process that was killed half-way, [`recover`] puts the
    earlier files back.

    Args:
        earlier: gives the names of what an earlier save wrote to `folder`, of which goes what the new one has not;
            raises where nothing may be saved. Everything else in `folder` (checkpoints, notes) is kept.
    """
    folder = Path(folder)
    if folder.is_dir():
        recover(folder)
    earlier_names = earlier(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _staging(folder) as staging:
        new_files, old_files = staging / "new", staging / "old"
        new_files.mkdir()
        old_files.mkdir()
        yield new_files
        # A recipe's `config.json` last: until then, others read the earlier one.
        new = sorted((path.name for path in new_files.iterdir()), key=lambda name: (name == MODEL_CONFIG, name))
        stale = [name for name in earlier_names if name not in new and (folder / name).exists()]
        for name in [*new, *stale]:
            if (folder / name).is_file():
                link_or_copy(folder / name, old_files / name)
        # From here to the end of the swap, a reader would find files of two saves.
        (staging / _JOURNAL).write_text(json.dumps([name for name in new if not (folder / name).exists()]))
        try:
            for name in [*new, *stale]:
                if (folder / name).is_dir():
                    os.replace(folder / name, old_files / name)
                if name in new:
                    os.replace(new_files / name, folder / name)
                elif (folder / name).exists():
                    (folder / name).unlink()
        except BaseException:
            _restore(folder, staging)
            raise
        (staging / _JOURNAL).unlink()


def recover(folder: Path) -> bool:
    """Undo what a killed process left half-saved in `folder`; savers that are still at work are left alone.

    Returns:
        Whether earlier files were put back.

    Raises:
        RewardFileError: files of two saves lie there, and `folder` cannot be written, or the saver is stuck.
    """
    is_restored = False
    for staging in folder.glob(f"{_STAGING}*"):
        is_swapping = (staging / _JOURNAL).exists()
        lock = FileLock(staging / _LOCK)
        try:
            lock.acquire(timeout=_SWAP_SECONDS if is_swapping else 0)
            try:
                if (staging / _JOURNAL).exists():
                    _restore(folder, staging)
                    is_restored = True
                shutil.rmtree(staging, ignore_errors=True)
            finally:
                lock.release()
        except OSError as error:  # Timeout is one: a saver at work
            if (staging / _JOURNAL).exists():
                raise RewardFileError(
                    f"{folder} was being saved to, and holds files of two saves.",
                    expected="a whole reward or recipe, or a folder where the earlier one can be put back",
                    found=f"{staging.name}/{_JOURNAL}, and {error}",
                    remedy="load it once where the folder can be written, or save again",
                ) from error
    return is_restored


def what_lies_in(names: Container[str], read: Callable[[str], str]) -> str | None:
    """`REWARD`, `RECIPE`, what else a save or push would spoil, or None; of a folder or repository with these files."""
    if PRT_CONFIG_NAME in names:
        return REWARD
    if MODEL_CONFIG in names:
        try:
            model_type = json.loads(read(MODEL_CONFIG)).get("model_type")
        except (ValueError, AttributeError):
            model_type = None
        return RECIPE if model_type == RECIPE_TYPE else f"a model of another kind ({model_type})"
    if ADAPTER_CONFIG in names:
        return "an adapter that is no reward"
    return None


def check_place(folder: Path, kind: str) -> None:
    """
    Raises:
        RewardFileError: `folder` is a file, or saving a reward or recipe (`kind`) there would spoil what it holds.
    """
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        found = what_lies_in(names, lambda name: (folder / name).read_text(encoding="utf-8", errors="replace"))
    else:
        found = "a file" if folder.exists() else None
    if found not in (None, kind):
        raise RewardFileError(
            f"{folder} {'holds' if folder.is_dir() else 'is'} {found}; saving {kind} there would spoil it.",
            expected=f"an empty folder, or one with {kind} that was saved earlier",
            found=found,
            remedy="choose another folder",
        )


def files_of_reward(folder: Path) -> list[str]:
    """Files of the network that an earlier save of a reward wrote.

    Raises:
        RewardFileError: something else lies there.
    """
    check_place(folder, REWARD)
    if not (folder / PRT_CONFIG_NAME).is_file():
        return []
    is_adapter = RewardConfig.from_json_file(folder / PRT_CONFIG_NAME).is_adapter
    return [path.name for pattern in (_ADAPTER_FILES if is_adapter else _MODEL_FILES) for path in folder.glob(pattern)]


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


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder to stage files in. Its lock tells a saver at work from a dead one, whatever machine it runs on."""
    while True:
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=folder))
        lock = FileLock(staging / _LOCK)
        try:
            with suppress(Timeout, FileNotFoundError):
                lock.acquire(timeout=0)
            if lock.is_locked and (staging / _LOCK).exists():  # else another process has taken it for a dead saver's
                yield staging
                return
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            lock.release()


def _restore(folder: Path, staging: Path) -> None:
    """The earlier files back in place; new ones that replaced none away. Can be done again if it was cut off."""
    for name in json.loads((staging / _JOURNAL).read_text()):
        _remove(folder / name)
    for path in (staging / "old").iterdir():
        if path.is_dir():
            _remove(folder / path.name)
        os.replace(path, folder / path.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
