"""Folders that hold the states of a frozen backbone at every supervised position of a data set.

A language model's state is its last hidden state, a classifier's its logits. They are computed once; later epochs and
runs read them and never run the backbone. Every file is written whole or not at all:

| file | content |
|---|---|
| `labels.safetensors` | `labels`: of every supervised position, never -100; `offsets`: of every row's first position |
| `companions.safetensors` | tensors that are needed beside the states, such as the backbone's head |
| `plan.json` | key, sizes and facts; written after the files above and before any state |
| `states-00000.safetensors`, ... | `states`, `(positions, width)`, of a block of rows |
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save
from tqdm.auto import tqdm
from transformers.utils import logging

from ..errors import BackboneCacheError
from ..hub.folder import replace_file

logger = logging.get_logger(__name__)

FORMAT = 2
LABELS, COMPANIONS, PLAN, LOCK = "labels.safetensors", "companions.safetensors", "plan.json", "lock"
MAX_BLOCKS = 1024  # all can be mapped into memory at once, and a killed process loses a thousandth of the work


class BackboneCache:
    """The states of one data set, memory-mapped.

    Attributes:
        num_rows (`int`): rows of the data set.
        dtype (`torch.dtype`): of the states.
        tensors (`dict[str, torch.Tensor]`), facts (`dict`): stored with the states by [`precompute`].
    """

    def __init__(self, folder: Path, plan: dict):
        self._folder, self._rows_per_block = folder, plan["rows_per_block"]
        self.num_rows, self.dtype, self.facts = plan["num_rows"], getattr(torch, plan["dtype"]), plan["facts"]
        self.tensors = load_file(folder / COMPANIONS)
        self._labels, self._offsets = _read_labels(folder)
        self._blocks: dict[int, torch.Tensor] = {}

    @classmethod
    def open(cls, folder: str | Path, key: dict) -> "BackboneCache | None":
        """Open the cache in `folder`; return None if there is none, or an unfinished one.

        Raises:
            BackboneCacheError: the folder holds the states of another backbone or data set, or another format.
        """
        folder = Path(folder)
        plan = _read_plan(folder, key)
        return None if plan is None or _missing_blocks(folder, plan) else cls(folder, plan)

    def read(self, rows: torch.LongTensor, labels: torch.LongTensor) -> torch.Tensor:
        """Return a copy of the states of some rows, one row after another: `(num_positions, width)`, on the CPU.

        Args:
            rows (`torch.LongTensor` of shape `(batch_size,)`): positions in the data set, in any order.
            labels (`torch.LongTensor` of shape `(num_positions,)`): the supervised labels of these rows in the batch;
                others than when the states were computed are refused.
        """
        rows, found = rows.tolist(), labels.cpu().numpy()
        problem = "The batch is not what was cached."
        if not all(0 <= row < self.num_rows for row in rows):
            raise BackboneCacheError(problem, expected=f"rows 0 ... {self.num_rows - 1}", found=f"rows {rows}")
        expected = np.concatenate([self._labels[self._offsets[row] : self._offsets[row + 1]] for row in rows])
        if not np.array_equal(expected, found):
            raise BackboneCacheError(
                problem,
                expected=f"{len(expected)} supervised labels in rows {rows}: {_shortened(expected)}",
                found=f"{len(found)}: {_shortened(found)}",
                remedy="train without stored states if the data set or its collator gives other labels every time",
            )
        return torch.cat([self._states(row) for row in rows])

    def _states(self, row: int) -> torch.Tensor:
        block = row // self._rows_per_block
        if block not in self._blocks:
            self._blocks[block] = load_file(_block_file(self._folder, block))["states"]
        start, stop = self._offsets[[row, row + 1]] - self._offsets[block * self._rows_per_block]
        return self._blocks[block][start:stop]


def precompute(
    folder: str | Path,
    key: dict,
    *,
    num_rows: int,
    supervised: Callable[[list[int]], list[torch.LongTensor]],
    states: Callable[[list[int]], torch.Tensor],
    width: int,
    dtype: torch.dtype,
    tensors: dict[str, torch.Tensor],
    facts: dict,
    batch_size: int = 32,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    disable_tqdm: bool = False,
) -> BackboneCache:
    """Compute the states that `folder` lacks, and open it.

    A complete cache is opened at once; one that any number of processes left unfinished is completed.

    Args:
        folder: the cache's own.
        key: all that the states depend on, as JSON.
        num_rows: rows of the data set.
        supervised: returns the supervised labels of each of the given rows, without the -100. One process calls it for
            all rows before `states`, so that the size is known and reported before anything large is written.
        states: returns the backbone's states at the supervised positions of the given rows, of shape
            `(num_positions, width)` and of `dtype`, one row after another.
        width: numbers in a state.
        dtype: of the states.
        tensors: stored with the states.
        facts: stored with the states, as JSON.
        batch_size: rows that `states` is given at a time.
        rank: of this process among the `world_size` that share the work.
        world_size: number of these processes.
        barrier: returns when all of them have called it.
        disable_tqdm: shows no progress.
    """
    folder = Path(folder)
    if (cache := BackboneCache.open(folder, key)) is not None:
        return cache
    folder.mkdir(parents=True, exist_ok=True)
    with _one_run_at_a_time(folder) if rank == 0 else nullcontext():
        if rank == 0:
            if (plan := _read_plan(folder, key)) is not None:
                _check_space(folder, plan, _read_labels(folder)[1])
            else:
                plan = {
                    "key": _as_stored(key),
                    "num_rows": num_rows,
                    "rows_per_block": batch_size * -(-num_rows // (batch_size * MAX_BLOCKS)),
                    "width": width,
                    "dtype": str(dtype).removeprefix("torch."),
                    "facts": facts,
                }
                _start(folder, plan, supervised, tensors, batch_size, disable_tqdm)
        barrier()  # the plan is there
        plan = _read_plan(folder, key)
        missing = _missing_blocks(folder, plan)
        barrier()  # all processes have found the same blocks missing
        for block in tqdm(missing[rank::world_size], "States of the backbone", disable=disable_tqdm or rank != 0):
            _compute_block(folder, plan, block, states, batch_size)
        barrier()  # all blocks are done
        if (cache := BackboneCache.open(folder, key)) is None:
            raise BackboneCacheError(
                "Not all states were computed.",
                expected=f"{world_size} processes that wait for each other at `barrier`",
                found=f"{len(_missing_blocks(folder, plan))} blocks of rows missing",
            )
    return cache


def cache_folder(root: str | Path, key: dict) -> Path:
    """Return the folder under `root` for the cache of `key`."""
    return Path(root) / hashlib.sha256(json.dumps(_as_stored(key), sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _one_run_at_a_time(folder: Path) -> Iterator[None]:
    """Let only one of several concurrent runs compute; the others wait."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning(f"Another run computes the states of the backbone in {folder}: waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _start(folder: Path, plan: dict, supervised, tensors, batch_size: int, disable_tqdm: bool) -> None:
    """Find the supervised labels, check that the states fit, and write all files but these; the plan last."""
    num_rows = plan["num_rows"]
    labels = [
        row_labels
        for batch in tqdm(_batches(range(num_rows), batch_size), "Supervised positions", disable=disable_tqdm)
        for row_labels in supervised(batch)
    ]
    offsets = np.cumsum([0, *map(len, labels)], dtype=np.int64)
    if not offsets[-1]:
        raise BackboneCacheError(
            "No position of the data set is supervised: every label is ignored.",
            expected="at least one label other than -100",
            found=f"0 supervised positions in {num_rows} rows",
            remedy="check that truncation keeps the completions, and that the data collator does not mask them",
        )
    _check_space(folder, plan, offsets)
    positions = {"labels": torch.cat(labels).to("cpu", torch.int64), "offsets": torch.from_numpy(offsets)}
    _write(folder / LABELS, save(positions))
    _write(folder / COMPANIONS, save({name: value.cpu().contiguous() for name, value in tensors.items()}))
    _write(folder / PLAN, json.dumps(plan, indent=2).encode())


def _check_space(folder: Path, plan: dict, offsets: np.ndarray) -> None:
    """Report the size of the states; raise `BackboneCacheError` if the disk has no space for those that are missing."""
    size = plan["width"] * getattr(torch, plan["dtype"]).itemsize
    blocks = [_block_rows(plan, block) for block in _missing_blocks(folder, plan)]
    missing = size * int(sum(offsets[rows.stop] - offsets[rows.start] for rows in blocks))
    logger.warning(
        f"The states of the backbone at {offsets[-1]:,} supervised positions take {size * offsets[-1] / 1e9:.3g} GB in "
        f"{folder}."
    )
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise BackboneCacheError(
            "The disk is too small for the states of the backbone.",
            expected=f"{missing / 1e9:.3g} GB in {folder}",
            found=f"{free / 1e9:.3g} GB free",
            remedy="free some space, choose a folder on another disk, or train without stored states",
        )


def _compute_block(folder: Path, plan: dict, block: int, states, batch_size: int) -> None:
    _, offsets = _read_labels(folder)
    dtype = getattr(torch, plan["dtype"])
    parts = []
    for rows in _batches(_block_rows(plan, block), batch_size):
        values, shape = states(rows), (int(offsets[rows[-1] + 1] - offsets[rows[0]]), plan["width"])
        if tuple(values.shape) != shape or values.dtype != dtype:
            raise BackboneCacheError(
                f"The backbone gave other states than expected for rows {rows[0]} ... {rows[-1]}.",
                expected=f"{dtype} of shape {shape}: one state for every supervised position",
                found=f"{values.dtype} of shape {tuple(values.shape)}",
            )
        parts.append(values.cpu())
    _write(_block_file(folder, block), save({"states": torch.cat(parts)}))


def _block_file(folder: Path, block: int) -> Path:
    return folder / f"states-{block:05}.safetensors"


def _block_rows(plan: dict, block: int) -> range:
    return range(plan["num_rows"])[block * plan["rows_per_block"] :][: plan["rows_per_block"]]


def _batches(rows: range, batch_size: int) -> list[list[int]]:
    return [list(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _missing_blocks(folder: Path, plan: dict) -> list[int]:
    blocks = -(-plan["num_rows"] // plan["rows_per_block"])
    return [block for block in range(blocks) if not _block_file(folder, block).exists()]


def _read_labels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    rows = load_file(folder / LABELS)
    return rows["labels"].numpy(), rows["offsets"].numpy()


def _write(path: Path, content: bytes) -> None:
    """Write a whole file or none."""
    try:
        replace_file(path, content, f"{path.name}.unfinished")
    except OSError as error:
        raise BackboneCacheError(
            f"{path} cannot be written.",
            expected=f"{len(content) / 1e9:.3g} GB of space in a folder of your own",
            found=str(error),
            remedy="free some space, and run again: the states that are stored already are used",
        ) from error


def _read_plan(folder: Path, key: dict) -> dict | None:
    """Return `plan.json`, None if there is none; raise `BackboneCacheError` if it has another key."""
    if not (folder / PLAN).is_file():
        return None
    plan = json.loads((folder / PLAN).read_bytes())
    key, stored = _as_stored(key), plan["key"]
    if stored != key:
        differing = sorted(name for name in {*key, *stored} if key.get(name) != stored.get(name))
        raise BackboneCacheError(
            f"{folder} holds the states of another backbone or data set, or another format.",
            expected=str({name: key.get(name) for name in differing}),
            found=str({name: stored.get(name) for name in differing}),
            remedy="choose another folder, or delete this one",
        )
    return plan


def _as_stored(key: dict) -> dict:
    """Return the key with the format, as it is read from a file: tuples as lists."""
    return json.loads(json.dumps(key | {"format": FORMAT}))


def _shortened(labels: np.ndarray) -> str:
    return f"{labels[:8].tolist()}{' ...' if len(labels) > 8 else ''}"
