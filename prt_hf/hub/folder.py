"""Read and replace the folder of a saved reward or recipe, as a whole or not at all."""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..contract import PRT_CONFIG_NAME, RewardConfig
from ..errors import PRTError, PRTValueError, RewardFileError

REWARD, RECIPE = "a reward", "a recipe"
RECIPE_TYPE = "prt"  # `model_type` of a recipe's config.json
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODEL_CONFIG, MODEL_WEIGHTS, MODEL_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
_MODEL_FILES = (MODEL_CONFIG, "generation_config.json", "model*.safetensors*")
NETWORK_FILES = (*_ADAPTER_FILES, *_MODEL_FILES)  # patterns, of adapters and full rewards
CARD_NAME = "README.md"
# The files of all tokenizers and image processors of transformers.
_PROCESSING_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("preprocessor_config.json", "processor_config.json", "vocab*.json", "vocab*.txt", "merges.txt", "*.model"),
    *("*.tiktoken", "bpe.codes", "tekken.json", "dict.txt", "normalizer.json", "emoji.json", "byte_maps.json"),
    *("entity_vocab.json", "word_shape.json", "word_pronunciation.json", "prophetnet.tokenizer"),
)
_CHAT_TEMPLATES = "additional_chat_templates"  # a folder
_KNOWN_FILES = (PRT_CONFIG_NAME, CARD_NAME, *NETWORK_FILES, *_PROCESSING_FILES)  # patterns
_PICKLED = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")
# A save is written into the first folder. Once it is complete, the folder is renamed to the second, which is read from
# then on. Then its files are linked into their places, and it is removed. At any moment one complete save can be read.
_STAGING, SAVED = ".saving", ".saved"
_SAVING = threading.RLock()  # one save at a time; reentrant, as recipes save rewards


def folder_to_read(folder: Path) -> Path:
    """Return the folder with the files of the last complete save.

    This is `folder`, or a folder in it if the save was killed before the files were put in place. Nothing is written;
    the next save puts them in place.
    """
    whole = folder / SAVED
    return whole if whole.is_dir() and not whole.is_symlink() else folder


@contextmanager
def replacing_files(folder: str | Path, kind: str, subfolders: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder to write a reward or recipe (`kind`) into.

    On success, its files replace the earlier save in `folder`; everything else there (checkpoints, notes) is kept. If
    the process is killed at any moment, the earlier or the new save is complete, see [`folder_to_read`]. Threads save
    one after another; several processes must not save to the same folder at the same time.

    If `folder`, or one of the `subfolders` that a recipe is about to write, holds something else, or the disk is full,
    `RewardFileError` is raised.
    """
    folder = Path(folder)
    with _SAVING:
        _put_in_place(folder)
        check_kind(folder, kind_of(folder), kind)
        named = reward_folders(_text(folder / MODEL_CONFIG)) if subfolders else set()
        check_unclaimed(folder, {name for name in subfolders if (folder / name).exists()} - named)
        staging = folder / _STAGING
        _remove(staging)  # of a saver that was killed
        staging.mkdir(parents=True)
        try:
            yield staging
            written = {path.name for path in staging.iterdir()}
            os.replace(staging, folder / SAVED)
            _put_in_place(folder, written)
        except PRTError:
            raise
        except (OSError, SafetensorError) as error:
            raise RewardFileError(
                f"{folder} could not be saved: {error}",
                expected="a folder that can be written, with enough space",
                found=type(error).__name__,
                remedy="save again once there is space; the earlier save is not lost",
            ) from error
        finally:
            _remove(staging)


def known_files(folder: Path) -> list[str]:
    """Return the sorted names of the files that belong to a reward or recipe, without those of a recipe's rewards."""
    names = [path.name for path in folder.iterdir() if any(fnmatch(path.name, known) for known in _KNOWN_FILES)]
    return sorted([*names, *(f"{_CHAT_TEMPLATES}/{path.name}" for path in folder.glob(f"{_CHAT_TEMPLATES}/*.jinja"))])


def _put_in_place(folder: Path, written: set[str] | None = None) -> None:
    """Move the files of a complete save to their places. This can be interrupted anywhere and repeated.

    Args:
        folder: The folder that was saved to.
        written (*optional*): The names of the files and folders. By default, as after a killed save, those that belong
            to a reward or recipe, because others may have been put there by someone else.
    """
    whole = folder_to_read(folder)
    if whole == folder:
        return
    staging = folder / _STAGING
    _remove(staging)
    staging.mkdir()
    new = written or {name.partition("/")[0] for name in known_files(whole)} | {
        path.name for path in whole.iterdir() if is_reward_folder(path.name)
    }
    for name in _saved_earlier(folder) - new:
        _remove(folder / name)
    # Last the file that names what was saved earlier.
    for name in sorted(new, key=lambda name: (name in (PRT_CONFIG_NAME, MODEL_CONFIG), name)):
        if (whole / name).is_dir():
            shutil.copytree(whole / name, staging / name, symlinks=True, copy_function=link_or_copy)
            _remove(folder / name)
        else:
            link_or_copy(whole / name, staging / name)
        os.replace(staging / name, folder / name)
    _remove(staging)
    os.replace(whole, staging)  # atomically: a part of it would be read as a complete save
    _remove(staging)


def _saved_earlier(folder: Path) -> set[str]:
    """Return the names of files and folders of an earlier save that a later one may not replace."""
    if (folder / PRT_CONFIG_NAME).is_file():
        is_adapter = RewardConfig.from_json_file(folder / PRT_CONFIG_NAME).is_adapter
        patterns = _ADAPTER_FILES if is_adapter else _MODEL_FILES
        return {path.name for pattern in patterns for path in folder.glob(pattern)}
    return {name for name in reward_folders(_text(folder / MODEL_CONFIG)) if (folder / name).is_dir()}


def reward_folders(recipe: str | None) -> set[str]:
    """Return the reward folders that the text of a recipe's `config.json` names; none if it is not a recipe's."""
    try:
        names = [entry["folder"] for entry in json.loads(recipe or "{}")["reward_references"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return set()
    return {name for name in names if is_reward_folder(name)}


def is_reward_folder(name: object) -> bool:
    """Return whether a recipe may name this folder: only `reward-0`, `reward-1`, ... are allowed."""
    return isinstance(name, str) and re.fullmatch("reward-[0-9]{1,6}", name) is not None


def check_unclaimed(place: str | Path, taken: Collection[str]) -> None:
    """Raise `RewardFileError` if a recipe would overwrite folders (`taken`) that belong to something else."""
    if taken:
        raise RewardFileError(
            f"{place} holds {min(taken)}, which the recipe would overwrite.",
            expected="no folder of that name, or one that belongs to the recipe there",
            found=", ".join(sorted(taken)),
            remedy="choose another place, or rename that folder",
        )


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def what_lies_in(names: Container[str], read: Callable[[str], str]) -> str | None:
    """Return what a folder or repository holds: `REWARD`, `RECIPE`, something that a save would spoil, or None.

    `names` are those of its files; `read` returns the text of one.
    """
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


def kind_of(folder: Path) -> str | None:
    """Return [`what_lies_in`] a folder; `"a file"` if it is one."""
    if not folder.is_dir():
        return "a file" if folder.exists() else None
    return what_lies_in({path.name for path in folder.iterdir()}, lambda name: _text(folder / name) or "")


def check_kind(place: str | Path, found: str | None, kind: str) -> None:
    """Raise `RewardFileError` if saving a reward or recipe (`kind`) would spoil what is found at a place."""
    if found not in (None, kind):
        raise RewardFileError(
            f"{place} {'is' if found == 'a file' else 'holds'} {found}; saving {kind} there would spoil it.",
            expected=f"an empty folder or new repository, or one that holds {kind}",
            found=found,
            remedy="choose another place",
        )


def check_files(folder: Path, config: RewardConfig) -> None:
    """Raise `RewardFileError` unless all weights are present, complete and in safetensors files."""
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
    """Give a file a second name, which stays if the first is replaced or removed."""
    try:
        os.link(file, copy)
    except OSError:  # a file system without hard links
        shutil.copy2(file, copy)


def weight_files(folder: Path, config: RewardConfig) -> list[str]:
    """Return the names of the files that hold the weights.

    Raises:
        RewardFileError: The index of a full reward's shards cannot be read, or names files elsewhere.
    """
    if config.is_adapter:
        return [ADAPTER_WEIGHTS]
    index = folder / MODEL_INDEX
    if not index.exists():
        return [MODEL_WEIGHTS]
    if (folder / MODEL_WEIGHTS).exists():  # transformers would load it instead of the shards
        raise RewardFileError(
            f"{folder} holds weights twice.",
            expected=f"{MODEL_WEIGHTS}, or {MODEL_INDEX} and its shards",
            found="both",
            remedy="download or save the reward again",
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        is_right = names and all(re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) for name in names)
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


def reward_digest(folder: Path, config: RewardConfig) -> str:
    """Return the SHA-256 of everything that determines a saved reward's output, by name and content.

    This is its weights, the configuration of its network (scale, depth, ...) and `prt_config.json`.
    """
    network = ADAPTER_CONFIG if config.is_adapter else MODEL_CONFIG
    names = sorted({*weight_files(folder, config), network, PRT_CONFIG_NAME})
    return hashlib.sha256(json.dumps({name: file_digest(folder / name) for name in names}).encode()).hexdigest()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file; raise `RewardFileError` if it is damaged."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors of a safetensors file without reading them, see [`read_weights`]."""
    with _opened(path) as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def mapped_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the model in a folder, mapped into memory, so that only what is used is read.

    Raises:
        RewardFileError: a file is damaged.
    """
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with _opened(path) as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


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


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_writable(folder: str | Path) -> None:
    """Raise `PRTValueError` unless files can be written into a folder, which need not exist yet; create nothing."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise PRTValueError(
            f"Nothing can be written into {folder}.",
            expected="a folder that can be written or created",
            found=f"{there} is {'not writable' if there.is_dir() else 'a file'}",
        )


def replace_file(path: Path, content: str | bytes | Callable[[Path], object], staged_name: str | None = None) -> None:
    """Write a file atomically; missing folders are created.

    Args:
        path: The file.
        content: Text (written as UTF-8), bytes, or a function that writes the file to the path that it gets.
        staged_name: The name of the unfinished file, which the next run takes as well if this one is killed. By
            default each process has its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(staged_name or f".{os.getpid()}.{path.name}")
    try:
        if callable(content):
            content(staged)
        else:
            staged.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def file_digest(*paths: Path) -> str:
    """Return the SHA-256 of the content of files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()
