"""The states of a frozen backbone at every supervised position of a data set, computed once and kept on disk.

A language model's state is its last hidden state, a classifier's its logits. Later epochs and runs read them and never
run the backbone. One folder holds the states of one data set:

| file | content |
|---|---|
| `states.bin` | `width` numbers a position |
| `labels.bin` | int64 a position: its label, never -100 |
| `offsets.bin` | int64 a row: its first position; then the number of positions |
| `checksums.bin` | uint32 a row: CRC-32 of its states |
| `done.bin` | a byte a block of rows: 1 once its states are safe on disk |
| `tensors.safetensors` | what belongs to the states, such as the backbone's head |
| `plan.json` | key, sizes and facts, written before any state is computed |
| `meta.json` | the same and the digest of the checksums, written after the last state: the cache is complete |
"""

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers.utils import logging

from ..errors import BackboneCacheError
from ..hub.folder import file_digest
from ..networks.identity import as_bytes

logger = logging.get_logger(__name__)

FORMAT_VERSION = 1
STATES, LABELS, OFFSETS, CHECKSUMS = "states.bin", "labels.bin", "offsets.bin", "checksums.bin"
DONE, TENSORS, PLAN, META, LOCK = "done.bin", "tensors.safetensors", "plan.json", "meta.json", "lock"


class BackboneCache:
    """The states of one data set, memory-mapped and read-only.

    Attributes:
        num_rows, num_positions, width (`int`): examples, supervised positions, numbers a position.
        dtype (`torch.dtype`): of the states.
        num_bytes (`int`): on disk, all files together.
        tensors (`dict[str, torch.Tensor]`), facts (`dict`): what was given to [`precompute`] with the states.
    """

    def __init__(self, folder: Path, meta: dict):
        self.folder = folder
        self.num_rows, self.num_positions, self.width = meta["num_rows"], meta["num_positions"], meta["width"]
        self.dtype, self.facts = getattr(torch, meta["dtype"]), meta["facts"]
        self.num_bytes = sum(meta["sizes"].values())
        self.tensors = safetensors.torch.load_file(folder / TENSORS)
        self._states = np.memmap(folder / STATES, np.uint8, "r").reshape(self.num_positions, -1)
        self._labels = np.memmap(folder / LABELS, np.int64, "r")
        self._offsets = np.memmap(folder / OFFSETS, np.int64, "r")
        self._checksums = np.memmap(folder / CHECKSUMS, np.uint32, "r")

    @classmethod
    def open(cls, folder: str | Path, key: dict) -> "BackboneCache | None":
        """The cache in `folder`; None where there is none, or an unfinished one.

        Raises:
            BackboneCacheError: it has another key or a newer format, or a file is damaged. The states themselves are
                checked when they are read.
        """
        folder = Path(folder)
        meta = _read_entries(folder / META, key)
        if meta is None:
            _read_entries(folder / PLAN, key)  # raises where it is another's
            return None
        _check_files(folder, meta)
        return cls(folder, meta)

    def read(self, rows: torch.LongTensor, labels: torch.LongTensor) -> torch.Tensor:
        """The states of these rows, one row after another.

        Args:
            rows (`torch.LongTensor` of shape `(batch_size,)`): positions in the data set, in any order.
            labels (`torch.LongTensor` of shape `(num_positions,)`): the supervised labels of the same rows as the batch
                has them now, without the -100.

        Returns:
            `torch.Tensor` of shape `(num_positions, width)`: a copy, on the CPU.

        Raises:
            BackboneCacheError: the batch has other labels than when the states were computed, or the states changed
                on disk.
        """
        rows, found = rows.tolist(), labels.cpu().numpy()
        if not all(0 <= row < self.num_rows for row in rows):
            raise BackboneCacheError(
                "The batch is not what was cached.", expected=f"rows 0 ... {self.num_rows - 1}", found=f"rows {rows}"
            )
        spans = [slice(*self._offsets[row : row + 2]) for row in rows]
        expected = np.concatenate([self._labels[span] for span in spans])
        if not np.array_equal(expected, found):
            raise BackboneCacheError(
                "The batch is not what was cached.",
                expected=f"{len(expected)} supervised labels in rows {rows}: {_shortened(expected)}",
                found=f"{len(found)}: {_shortened(found)}",
                remedy="train without stored states if the data set or its collator gives other labels every time",
            )
        states = torch.empty(len(expected), self.width, dtype=self.dtype)
        data = as_bytes(states)  # the same memory
        np.concatenate([self._states[span] for span in spans], out=data)
        bounds = np.cumsum([0, *(span.stop - span.start for span in spans)])
        for row, (start, stop) in zip(rows, pairwise(bounds), strict=True):
            if zlib.crc32(data[start:stop]) != self._checksums[row]:
                raise _damaged(self.folder / STATES, f"row {row} has another checksum than when it was written")
        return states


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
    rows_per_block: int = 32,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], None] = lambda: None,
    disable_tqdm: bool = False,
) -> BackboneCache:
    """Compute the states that `folder` lacks, and open it. A complete cache is opened at once; one that was left
    unfinished, by however many processes, is continued with the blocks of rows that are missing.

    Args:
        key (`dict`): all that the states depend on, as JSON.
        supervised: the supervised labels of each of these rows, without the -100. Called for all rows before `states`,
            by one process, so that the size is known and told before anything large is written.
        states: the backbone's states at the supervised positions of these rows, of shape `(num_positions, width)` and
            of `dtype`, one row after another.
        tensors, facts: kept with the states; `facts` as JSON.
        rows_per_block (`int`): rows that `states` is given at a time, and that a killed process loses at most.
        rank, world_size, barrier: of the processes that share the work; `barrier` returns when all have called it.

    Raises:
        BackboneCacheError: the folder belongs to another key or is damaged, the disk is too small, no position is
            supervised, or `states` gives another shape or dtype.
    """
    folder = Path(folder)
    if (cache := BackboneCache.open(folder, key)) is not None:
        return cache
    folder.mkdir(parents=True, exist_ok=True)
    with _one_run_at_a_time(folder) if rank == 0 else nullcontext():
        if rank == 0:
            if (plan := _read_entries(folder / PLAN, key)) is not None:
                _check_continued(folder, plan)
            else:
                plan = {
                    "format_version": FORMAT_VERSION,
                    "key": key,
                    "num_rows": num_rows,
                    "width": width,
                    "dtype": str(dtype).removeprefix("torch."),
                    "rows_per_block": rows_per_block,
                    "facts": facts,
                }
                _make_files(folder, plan, supervised, tensors, disable_tqdm)
        barrier()  # the plan is there
        plan = _read_entries(folder / PLAN, key)
        missing = _missing_blocks(folder)
        barrier()  # all processes have seen the same blocks missing
        for block in tqdm(missing[rank::world_size], "States of the backbone", disable=disable_tqdm or rank != 0):
            _compute_block(folder, plan, int(block), states)
        barrier()  # all blocks are done
        if rank == 0:
            if len(missing := _missing_blocks(folder)):
                raise BackboneCacheError(
                    "Not all states were computed.",
                    expected=f"{world_size} processes that wait for each other at `barrier`",
                    found=f"{len(missing)} blocks of rows missing",
                )
            digests = plan["digests"] | {CHECKSUMS: file_digest(folder / CHECKSUMS)}
            _write_entries(folder / META, plan | {"digests": digests})
        barrier()  # the cache is complete
    return BackboneCache.open(folder, key)


def cache_folder(root: str | Path, key: dict) -> Path:
    """Where under `root` the cache of `key` lies."""
    return Path(root) / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def _one_run_at_a_time(folder: Path) -> Iterator[None]:
    """Of several runs that start with the same data and backbone, one computes while the others wait for it."""
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


def _make_files(folder: Path, plan: dict, supervised, tensors, disable_tqdm) -> None:
    """Count the supervised positions, tell the size, and make all files, the plan as the last."""
    num_rows = plan["num_rows"]
    blocks = range(len(range(0, num_rows, plan["rows_per_block"])))
    labels = [
        of_row
        for block in tqdm(blocks, "Supervised positions", disable=disable_tqdm)
        for of_row in supervised(list(_rows(plan, block)))
    ]
    offsets = np.cumsum([0, *map(len, labels)], dtype=np.int64)
    num_positions = int(offsets[-1])
    if not num_positions:
        raise BackboneCacheError(
            "No position of the data set is supervised: every label is ignored.",
            expected="at least one label other than -100",
            found=f"0 supervised positions in {num_rows} rows",
            remedy="check that truncation keeps the completions, and that the data collator does not mask them",
        )
    contents = {
        LABELS: torch.cat(labels).to("cpu", torch.int64).numpy().tobytes(),
        OFFSETS: offsets.tobytes(),
        TENSORS: safetensors.torch.save({name: value.cpu().contiguous() for name, value in tensors.items()}),
    }
    bytes_of_states = num_positions * plan["width"] * getattr(torch, plan["dtype"]).itemsize
    filled_later = {STATES: bytes_of_states, CHECKSUMS: 4 * num_rows, DONE: len(blocks)}
    sizes = {name: len(content) for name, content in contents.items()} | filled_later
    _announce(folder, num_positions, sum(sizes.values()), sum(sizes.values()))
    for name, content in contents.items():
        _replace(folder / name, content)
    for name, size in filled_later.items():
        with open(folder / name, "wb") as file:
            file.truncate(size)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    _write_entries(folder / PLAN, plan | {"num_positions": num_positions, "sizes": sizes, "digests": digests})


def _check_continued(folder: Path, plan: dict) -> None:
    """An unfinished cache can be continued: its files are whole, and the rest fits on the disk."""
    _check_files(folder, plan)
    offsets = np.fromfile(folder / OFFSETS, np.int64)
    positions = np.diff(offsets[[*range(0, plan["num_rows"], plan["rows_per_block"]), -1]])  # of every block
    missing = int(positions[_missing_blocks(folder)].sum())
    bytes_of_states = missing * plan["sizes"][STATES] // plan["num_positions"]
    _announce(folder, plan["num_positions"], sum(plan["sizes"].values()), bytes_of_states)


def _announce(folder: Path, num_positions: int, total: int, missing: int) -> None:
    logger.warning(
        f"The states of the backbone at {num_positions:,} supervised positions take {total / 1e9:.3g} GB in {folder}."
    )
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise BackboneCacheError(
            "The disk is too small for the states of the backbone.",
            expected=f"{missing / 1e9:.3g} GB in {folder}",
            found=f"{free / 1e9:.3g} GB free",
            remedy="free some space, choose a folder on another disk, or train without stored states",
        )


def _compute_block(folder: Path, plan: dict, block: int, states) -> None:
    rows = _rows(plan, block)
    bounds = np.fromfile(folder / OFFSETS, np.int64, count=len(rows) + 1, offset=8 * rows.start)
    values = states(list(rows))
    shape, dtype = (int(bounds[-1] - bounds[0]), plan["width"]), getattr(torch, plan["dtype"])
    if tuple(values.shape) != shape or values.dtype != dtype:
        raise BackboneCacheError(
            f"The backbone gave other states than expected for rows {rows.start} ... {rows.stop - 1}.",
            expected=f"{dtype} of shape {shape}: one state for every supervised position",
            found=f"{values.dtype} of shape {tuple(values.shape)}",
        )
    data = as_bytes(values)
    checksums = [zlib.crc32(data[start:stop]) for start, stop in pairwise(bounds - bounds[0])]
    # Written rather than mapped: a full disk is then an OSError, not a SIGBUS. The byte that says that the block is
    # done reaches the disk after the block.
    _write_at(folder / STATES, int(bounds[0]) * plan["width"] * dtype.itemsize, data)
    _write_at(folder / CHECKSUMS, 4 * rows.start, np.array(checksums, np.uint32))
    _write_at(folder / DONE, block, b"\1")


def _rows(plan: dict, block: int) -> range:
    start = block * plan["rows_per_block"]
    return range(start, min(start + plan["rows_per_block"], plan["num_rows"]))


def _missing_blocks(folder: Path) -> np.ndarray:
    return np.flatnonzero(np.fromfile(folder / DONE, np.uint8) == 0)


def _write_at(path: Path, offset: int, content) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is there as a whole or not at all."""
    temporary = path.with_name(f"{path.name}.writing")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_entries(path: Path, entries: dict) -> None:
    digest = hashlib.sha256(json.dumps(entries).encode()).hexdigest()
    _replace(path, json.dumps(entries | {"sha256": digest}, indent=2).encode())


def _read_entries(path: Path, key: dict) -> dict | None:
    """`plan.json` or `meta.json`; None where there is no such file.

    Raises:
        BackboneCacheError: damaged, of a newer format, or with another key.
    """
    if not path.is_file():
        return None
    try:
        entries = json.loads(path.read_bytes())
        digest, version = entries.pop("sha256"), entries["format_version"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    if version != FORMAT_VERSION:
        raise BackboneCacheError(
            f"The states in {path.parent} were stored by another version of prt_hf.",
            expected=f"format version {FORMAT_VERSION}",
            found=str(version),
            remedy="pip install --upgrade prt_hf, or delete the folder",
        )
    if hashlib.sha256(json.dumps(entries).encode()).hexdigest() != digest:
        raise _damaged(path, "other entries than were written")
    key = json.loads(json.dumps(key))  # as it comes out of a file: tuples as lists
    if entries["key"] != key:
        stored = entries["key"]
        differing = sorted(name for name in {*key, *stored} if key.get(name) != stored.get(name))
        raise BackboneCacheError(
            f"{path.parent} holds the states of another backbone or data set.",
            expected=str({name: key.get(name) for name in differing}),
            found=str({name: stored.get(name) for name in differing}),
            remedy="choose another folder, or delete this one",
        )
    return entries


def _check_files(folder: Path, entries: dict) -> None:
    """Raises:
    BackboneCacheError: a file is missing or has another size, or a small one has another content.
    """
    for name in {**entries["sizes"], **entries["digests"]}:
        if name != Path(name).name:
            raise _damaged(folder / name, "a file elsewhere")
    for name, size in entries["sizes"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else 0
        if found != size:
            raise _damaged(folder / name, f"{found} bytes instead of {size}")
    for name, digest in entries["digests"].items():
        if file_digest(folder / name) != digest:
            raise _damaged(folder / name, "another content than was written")


def _damaged(path: Path, found: str) -> BackboneCacheError:
    return BackboneCacheError(
        f"Stored states of the backbone are damaged: {path}.",
        expected="the files as `precompute` left them",
        found=found,
        remedy=f"delete {path.parent}, and they are computed again",
    )


def _shortened(labels: np.ndarray) -> str:
    return f"{labels[:8].tolist()}{' ...' if len(labels) > 8 else ''}"
