"""States that are read are those that were computed, whatever happened in between."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from safetensors.torch import load_file

from prt_hf.errors import BackboneCacheError
from prt_hf.networks.identity import weights_digest_of_files, weights_digest_of_model
from prt_hf.training import state_cache
from prt_hf.training.collators import TokenCollator
from prt_hf.training.state_cache import BackboneCache, cache_folder, precompute
from prt_hf.training.stored import dataset_key

KEY = {"dataset": "a", "backbone": "b", "shape": (1, 2)}
ROWS, WIDTH, ROWS_PER_BLOCK = 11, 3, 2
BLOCKS = 6
LENGTHS = [4, 0, 2, 7, 1, 0, 0, 5, 3, 2, 6]  # supervised positions; none in rows 1, 5 and 6
HEAD = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3).T  # not contiguous


def labels_of(rows):
    return [torch.arange(LENGTHS[row]) + 10 * row for row in rows]


def states_of(rows, dtype=torch.bfloat16):
    """Any bits, infinities and NaN among them."""
    bits = [
        torch.randint(-(2**15), 2**15, (LENGTHS[row], WIDTH * dtype.itemsize // 2), generator=seeded(row))
        for row in rows
    ]
    return torch.cat(bits).to(torch.int16).view(dtype)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Backbone:
    """Counts its calls, and dies at one of them."""

    def __init__(self, dies_at=None, death=None, dtype=torch.bfloat16):
        self.calls, self.dies_at, self.death, self.dtype = [], dies_at, death, dtype

    def __call__(self, rows):
        if len(self.calls) == self.dies_at:
            (self.death or interrupt)()
        self.calls.append(rows)
        return states_of(rows, self.dtype)


def interrupt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def compute(folder, states=None, **changes):
    states = states or Backbone()
    arguments = {
        "num_rows": ROWS,
        "supervised": labels_of,
        "states": states,
        "width": WIDTH,
        "dtype": getattr(states, "dtype", torch.bfloat16),
        "tensors": {"head": HEAD},
        "facts": {"contract": "c"},
        "batch_size": ROWS_PER_BLOCK,
        "disable_tqdm": True,
    }
    return precompute(folder, **{"key": KEY} | arguments | changes)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The files of a cache that was computed in one go."""
    folder = tmp_path_factory.mktemp("whole")
    compute(folder)
    return files(folder)


def in_a_process(code):
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (root, root / "tests", Path(__file__).parent)))
    return subprocess.run(
        [sys.executable, "-c", f"import torch; torch.set_num_threads(1)\n{code}"],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )


# What is read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [list(range(ROWS)), [10, 3, 3, 0, 5, 8], [7], [1], [1, 5, 6]])
def test_read_gives_what_was_computed_bit_for_bit(tmp_path, dtype, rows):
    compute(tmp_path, Backbone(dtype=dtype))
    states = BackboneCache.open(tmp_path, KEY).read(torch.tensor(rows), torch.cat(labels_of(rows)))
    assert states.dtype == dtype and states.shape == (sum(LENGTHS[row] for row in rows), WIDTH)
    assert torch.equal(bits(states), bits(states_of(rows, dtype)))


def test_companions_and_sizes(tmp_path):
    compute(tmp_path)
    cache = BackboneCache.open(tmp_path, KEY)
    assert torch.equal(cache.tensors["head"], HEAD) and cache.facts == {"contract": "c"}
    assert (cache.num_rows, cache.dtype) == (ROWS, torch.bfloat16)
    shapes = [tuple(load_file(path)["states"].shape) for path in sorted(tmp_path.glob("states-*"))]
    assert shapes == [(4, WIDTH), (9, WIDTH), (1, WIDTH), (5, WIDTH), (5, WIDTH), (6, WIDTH)]


@pytest.mark.parametrize(("most", "rows"), [(6, [2] * 5 + [1]), (5, [4, 4, 3]), (2, [6, 5]), (1, [11])])
def test_large_data_sets_have_larger_blocks(tmp_path, monkeypatch, most, rows):
    """They are computed by batches of the same size."""
    monkeypatch.setattr(state_cache, "MAX_BLOCKS", most)
    backbone = Backbone()
    cache = compute(tmp_path, backbone)
    starts = [sum(rows[:block]) for block in range(len(rows))]
    lengths = [sum(LENGTHS[start : start + count]) for start, count in zip(starts, rows, strict=True)]
    blocks = [load_file(path)["states"] for path in sorted(tmp_path.glob("states-*"))]
    assert [len(states) for states in blocks] == lengths
    assert backbone.calls == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert torch.equal(bits(torch.cat(blocks)), bits(states_of(range(ROWS))))
    for row in (10, 3, 0, 7, 5):
        assert torch.equal(bits(cache.read(torch.tensor([row]), labels_of([row])[0])), bits(states_of([row])))


def test_a_classifier_has_one_state_a_row_and_no_head(tmp_path):
    logits = torch.randn(5, 4)
    cache = compute(
        tmp_path,
        lambda rows: logits[rows],
        num_rows=5,
        supervised=lambda rows: [torch.tensor([row % 4]) for row in rows],
        width=4,
        dtype=torch.float32,
        tensors={},
    )
    assert torch.equal(cache.read(torch.tensor([4, 1]), torch.tensor([0, 1])), logits[[4, 1]])
    assert cache.tensors == {}


def test_what_is_read_can_be_changed_without_changing_the_cache(tmp_path, whole):
    cache = compute(tmp_path)
    cache.read(torch.arange(ROWS), torch.cat(labels_of(range(ROWS)))).zero_()
    cache.read(torch.tensor([3]), labels_of([3])[0]).zero_()
    cache.tensors["head"].zero_()
    assert files(tmp_path) == whole
    assert torch.equal(bits(cache.read(torch.tensor([3]), labels_of([3])[0])), bits(states_of([3])))


def test_a_complete_cache_is_opened_without_its_backbone_and_data(tmp_path, whole):
    compute(tmp_path)
    cache = compute(tmp_path, Backbone(dies_at=0), supervised=None)
    assert torch.equal(bits(cache.read(torch.tensor([3]), labels_of([3])[0])), bits(states_of([3])))
    assert files(tmp_path) == whole


# What interrupts


@pytest.mark.parametrize("blocks", range(BLOCKS))
def test_an_interrupted_computation_is_continued(tmp_path, whole, blocks):
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, Backbone(dies_at=blocks))
    assert BackboneCache.open(tmp_path, KEY) is None
    backbone = Backbone()
    compute(tmp_path, backbone, supervised=None, batch_size=5)  # neither counted nor divided anew
    assert backbone.calls == [list(range(ROWS))[start : start + 2] for start in range(2 * blocks, ROWS, 2)]
    assert files(tmp_path) == whole


def test_a_killed_process_is_continued(tmp_path, whole):
    process = in_a_process(f"import test_backbone_cache as t; t.compute({str(tmp_path)!r}, t.Backbone(4, t.kill))")
    assert process.returncode == -signal.SIGKILL, process.stderr
    backbone = Backbone()
    compute(tmp_path, backbone)
    assert backbone.calls == [[8, 9], [10]]
    assert files(tmp_path) == whole


def test_a_process_may_die_at_any_write(tmp_path, whole, monkeypatch):
    """With half of a file on disk, or with all of it: the files become those of an undisturbed run."""
    written = ["labels", "companions", "plan", *(f"states-{block:05}" for block in range(BLOCKS))]
    write_bytes, seen = Path.write_bytes, []

    def die_at(number, share):
        def write(path, content):
            seen.append(path)
            if len(seen) == number + 1:
                write_bytes(path, content[: int(share * len(content))])
                raise KeyboardInterrupt
            write_bytes(path, content)

        return write

    for number, share in itertools.product(range(len(written)), (0, 0.5, 1)):
        seen.clear()
        folder = tmp_path / f"{number} {share}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", die_at(number, share))
            with pytest.raises(KeyboardInterrupt):
                compute(folder)
        assert BackboneCache.open(folder, KEY) is None
        compute(folder)
        assert files(folder) == whole, f"died at write {number}, of {seen[-1].name}"
        assert [path.name.partition(".")[0] for path in seen] == written[: number + 1]


def shared(folder, backbones):
    """One rank a backbone, each a thread. Returns what they raised."""
    barrier, raised = threading.Barrier(len(backbones), timeout=20), []

    def run(rank):
        try:
            compute(folder, backbones[rank], rank=rank, world_size=len(backbones), barrier=barrier.wait)
        except BaseException as error:
            raised.append(type(error))
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(len(backbones))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_share_the_blocks(tmp_path, whole, ranks):
    backbones = [Backbone() for _ in range(ranks)]
    assert not shared(tmp_path, backbones)
    assert [len(backbone.calls) for backbone in backbones] == [len(range(rank, BLOCKS, ranks)) for rank in range(ranks)]
    assert files(tmp_path) == whole


def test_a_rank_that_is_late_shares_the_same_blocks(tmp_path, whole, monkeypatch):
    """Were others at work already, it would take its share of what they have left."""
    missing_blocks = state_cache._missing_blocks

    def late(folder, plan):
        time.sleep(0.2 if threading.current_thread().name == "rank 1" else 0)
        return missing_blocks(folder, plan)

    monkeypatch.setattr(state_cache, "_missing_blocks", late)
    assert not shared(tmp_path, [Backbone(), Backbone()])
    assert files(tmp_path) == whole


def test_other_numbers_of_ranks_continue(tmp_path, whole):
    first = [Backbone(), Backbone(dies_at=1)]
    assert KeyboardInterrupt in shared(tmp_path, first)
    done = first[0].calls + first[1].calls
    second = [Backbone(), Backbone(), Backbone()]
    assert not shared(tmp_path, second)
    calls = sorted(done + [call for backbone in second for call in backbone.calls])
    assert calls == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert files(tmp_path) == whole


def test_ranks_that_do_not_wait_do_not_finish_the_cache(tmp_path):
    with pytest.raises(BackboneCacheError, match="Not all states were computed.*\n.*`barrier`\n.*3 blocks of rows"):
        compute(tmp_path, rank=0, world_size=2)
    assert BackboneCache.open(tmp_path, KEY) is None


def test_of_two_runs_one_computes_and_the_other_waits(tmp_path, whole, caplog):
    started, backbones = threading.Event(), [Backbone(), Backbone()]

    def slow(rows):
        started.set()
        waiting.wait(20)
        return backbones[0](rows)

    waiting = threading.Event()
    first = threading.Thread(target=compute, args=(tmp_path, slow))
    first.start()
    assert started.wait(20)
    second = threading.Thread(target=compute, args=(tmp_path, backbones[1]))
    second.start()
    second.join(0.3)
    assert second.is_alive()
    waiting.set()
    first.join()
    second.join()
    assert (len(backbones[0].calls), len(backbones[1].calls)) == (BLOCKS, 0)
    assert "Another run computes the states of the backbone" in caplog.text
    assert files(tmp_path) == whole


# What it takes


def test_the_size_is_told_before_anything_large_is_written(tmp_path, monkeypatch):
    before = []
    monkeypatch.setattr(state_cache.logger, "warning", lambda text: before.append((text, os.listdir(tmp_path))))
    compute(tmp_path)
    size = f"{30 * WIDTH * 2 / 1e9:.3g}"
    text = f"The states of the backbone at 30 supervised positions take {size} GB in {tmp_path}."
    assert before == [(text, ["lock"])]


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    backbone = Backbone()
    with pytest.raises(BackboneCacheError, match="The disk is too small(.|\n)*found: 1e-07 GB free"):
        compute(tmp_path, backbone)
    assert backbone.calls == [] and os.listdir(tmp_path) == ["lock"]


@pytest.mark.parametrize("free, fits", [(66, True), (65, False)])
def test_a_continued_cache_needs_space_for_what_is_missing(tmp_path, monkeypatch, whole, free, fits):
    with pytest.raises(KeyboardInterrupt):
        compute(tmp_path, Backbone(dies_at=4))
    missing = sum(LENGTHS[8:]) * WIDTH * 2
    assert missing == 66
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    if fits:
        compute(tmp_path)
        assert files(tmp_path) == whole
    else:
        with pytest.raises(BackboneCacheError, match="The disk is too small"):
            compute(tmp_path)


# What is refused


def test_nothing_supervised_is_refused(tmp_path):
    empty = torch.tensor([], dtype=torch.long)
    with pytest.raises(BackboneCacheError, match="every label is ignored(.|\n)*0 supervised positions in 11 rows"):
        compute(tmp_path, supervised=lambda rows: [empty for _ in rows])


@pytest.mark.parametrize(
    "states, found",
    [
        (lambda rows: states_of(rows)[1:], r"torch.bfloat16 of shape \(3, 3\)"),
        (lambda rows: states_of(rows)[:, :2], r"torch.bfloat16 of shape \(4, 2\)"),
        (lambda rows: states_of(rows).float(), r"torch.float32 of shape \(4, 3\)"),
    ],
)
def test_other_states_than_announced_are_refused(tmp_path, states, found):
    expected = (
        r"rows 0 \.\.\. 1.\n  expected: torch.bfloat16 of shape \(4, 3\): one state for every supervised position"
    )
    with pytest.raises(BackboneCacheError, match=f"{expected}\n  found: {found}"):
        compute(tmp_path, states)


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_foreign_folder_is_refused_and_left_as_it_is(tmp_path, is_complete):
    if is_complete:
        compute(tmp_path)
    else:
        with pytest.raises(KeyboardInterrupt):
            compute(tmp_path, Backbone(dies_at=2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = KEY | {"backbone": "another"}
    text = (
        "holds the states of another backbone or data set, or another format.\n  expected: {'backbone': 'another'}\n"
        "  found: {'backbone': 'b'}\n  remedy: choose another folder, or delete this one"
    )
    with pytest.raises(BackboneCacheError, match=text):
        BackboneCache.open(tmp_path, other)
    with pytest.raises(BackboneCacheError, match=text):
        compute(tmp_path, key=other)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_without_a_cache_opens_as_none(tmp_path):
    assert BackboneCache.open(tmp_path, KEY) is None
    assert BackboneCache.open(tmp_path / "absent", KEY) is None


def test_another_batch_than_the_cached_one_is_refused(tmp_path):
    cache = compute(tmp_path)
    labels = torch.cat(labels_of([3, 0]))
    assert len(cache.read(torch.tensor([3, 0]), labels)) == 11
    changed = labels.clone()
    changed[-1] += 1
    for rows, given, found in [
        ([3, 0], changed, "11: \\[30, 31, 32, 33, 34, 35, 36, 0\\] ..."),
        ([0, 3], labels, "11: \\[30"),
        ([3, 0], labels[:-1], "10: \\[30"),
        ([3], labels_of([4])[0], "1: \\[40\\]"),
    ]:
        with pytest.raises(BackboneCacheError, match=f"The batch is not what was cached.(.|\n)*found: {found}"):
            cache.read(torch.tensor(rows), given)
    nothing = torch.tensor([], dtype=torch.long)
    for row in (-1, ROWS):
        with pytest.raises(BackboneCacheError, match=rf"expected: rows 0 \.\.\. 10\n  found: rows \[{row}\]"):
            cache.read(torch.tensor([row]), nothing)


def test_a_block_that_was_deleted_is_computed_again(tmp_path, whole):
    compute(tmp_path)
    (tmp_path / "states-00003.safetensors").unlink()
    assert BackboneCache.open(tmp_path, KEY) is None
    backbone = Backbone()
    compute(tmp_path, backbone)
    assert backbone.calls == [[6, 7]]
    assert files(tmp_path) == whole


def test_a_disk_that_fills_up_is_reported_and_the_run_continued(tmp_path, whole, monkeypatch):
    """What is there is kept; once there is space, the rest is computed."""
    write_bytes = Path.write_bytes

    def fill_up(path, content):
        if path.name.startswith("states-00003"):
            write_bytes(path, content[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_bytes(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill_up)
        text = r"states-00003.safetensors cannot be written(.|\n)*No space left(.|\n)*free some space, and run again"
        with pytest.raises(BackboneCacheError, match=text):
            compute(tmp_path)
    assert len(files(tmp_path)) == 3 + 3, "half a file is left"
    backbone = Backbone()
    compute(tmp_path, backbone)
    assert backbone.calls == [[6, 7], [8, 9], [10]]
    assert files(tmp_path) == whole


@pytest.mark.parametrize("is_complete", [True, False])
def test_another_format_is_refused(tmp_path, monkeypatch, is_complete):
    with monkeypatch.context() as patch:
        patch.setattr(state_cache, "FORMAT", 3)
        with nullcontext() if is_complete else pytest.raises(KeyboardInterrupt):
            compute(tmp_path, Backbone(dies_at=None if is_complete else 2))
        place = cache_folder("root", KEY)
    assert cache_folder("root", KEY) != place
    text = "or another format.\n  expected: {'format': 2}\n  found: {'format': 3}\n  remedy: choose another folder"
    for refused in (lambda: BackboneCache.open(tmp_path, KEY), lambda: compute(tmp_path)):
        with pytest.raises(BackboneCacheError, match=text):
            refused()


# What it is found by


def rows_of(last=7):
    return [{"input_ids": [5, 6, last]}, {"input_ids": [8, 9]}, {"input_ids": [3]}]


def test_equal_data_have_the_same_key_in_another_process():
    code = (
        "import test_backbone_cache as t; from prt_hf.training.stored import dataset_key; "
        "print(dataset_key(t.Dataset.from_list(t.rows_of()).map(t.shifted), t.TokenCollator(0)))"
    )
    there = in_a_process(code)
    assert there.returncode == 0, there.stderr
    here = dataset_key(Dataset.from_list(rows_of()).map(shifted), TokenCollator(0))
    assert there.stdout.strip() == here


def shifted(row):
    return {"labels": [*row["input_ids"][1:], -100]}


def test_other_data_have_another_key():
    dataset = Dataset.from_list(rows_of())
    keys = [
        dataset_key(dataset, TokenCollator(0)),
        dataset_key(Dataset.from_list(rows_of(last=4)), TokenCollator(0)),
        dataset_key(dataset, TokenCollator(1)),
        dataset_key(dataset.select([1, 0, 2]), TokenCollator(0)),
        dataset_key(dataset.select([0, 1]), TokenCollator(0)),
        dataset_key(dataset.map(shifted), TokenCollator(0)),
    ]
    assert len(set(keys)) == len(keys)
    assert dataset_key(Dataset.from_list(rows_of()), TokenCollator(0)) == keys[0]


def test_a_map_that_draws_other_numbers_has_another_key():
    """Its fingerprint is the same."""
    source = Dataset.from_list(rows_of())

    def drawn(row):
        return {"input_ids": [int(token) for token in torch.randint(0, 10**6, (3,))]}

    first, second = (source.map(drawn, keep_in_memory=True, load_from_cache_file=False) for _ in range(2))
    assert first._fingerprint == second._fingerprint
    assert dataset_key(first, TokenCollator(0)) != dataset_key(second, TokenCollator(0))


class Augmenting(TokenCollator):
    def __call__(self, rows):
        batch = super().__call__(rows)
        return batch | {"input_ids": batch["input_ids"] + torch.randint(0, 10**6, batch["input_ids"].shape)}


class Unpicklable(TokenCollator):
    def __reduce__(self):
        raise TypeError("cannot pickle 'lock'")


@pytest.mark.parametrize(
    "make, collator, text",
    [
        (
            lambda data: data.to_iterable_dataset(),
            TokenCollator(0),
            "it has no rows to number.*\n.*\n.*IterableDataset",
        ),
        (
            lambda data: data.to_list(),
            TokenCollator(0),
            "it has no fingerprint.*\n.*\n.*list\n.*from_list",
        ),
        (lambda data: data.with_transform(dict), TokenCollator(0), "augmented differently in every epoch(.|\n)*map"),
        (lambda data: data, Augmenting(0), "collator gives another batch every time(.|\n)*found: Augmenting"),
        (lambda data: data, Unpicklable(0), r"no fingerprint \(cannot pickle 'lock'\)(.|\n)*found: Unpicklable"),
    ],
)
def test_data_that_cannot_be_recognised_are_refused(make, collator, text):
    with pytest.raises(BackboneCacheError, match=text):
        dataset_key(make(Dataset.from_list(rows_of())), collator)


def test_set_transform_is_refused():
    dataset = Dataset.from_list(rows_of())
    dataset.set_transform(dict)
    with pytest.raises(BackboneCacheError, match="augmented differently"):
        dataset_key(dataset, TokenCollator(0))


def test_the_folder_depends_on_the_whole_key_and_on_nothing_else(tmp_path):
    folder = cache_folder(tmp_path, {"a": 1, "b": [2]})
    assert folder.parent == tmp_path and len(folder.name) == 32
    assert cache_folder(tmp_path, {"b": (2,), "a": 1}) == folder
    assert cache_folder(tmp_path, {"a": 1, "b": [3]}) != folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_digest_of_model_files(tmp_path):
    tiny.llama(0).save_pretrained(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "README.md").write_text("another file")
    digest = weights_digest_of_files(tmp_path / "a")
    assert weights_digest_of_files(tmp_path / "b") == digest
    flip(tmp_path / "b" / "model.safetensors")
    assert weights_digest_of_files(tmp_path / "b") != digest
    tiny.llama(0, rms_norm_eps=1e-3).save_pretrained(tmp_path / "c")
    assert weights_digest_of_files(tmp_path / "c") != digest
    (tmp_path / "c" / "model.safetensors").rename(tmp_path / "c" / "pytorch_model.bin")
    with pytest.raises(BackboneCacheError, match="no weights(.|\n)*found: config.json, .*pytorch_model.bin"):
        weights_digest_of_files(tmp_path / "c")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_digest_of_a_model_in_memory(dtype, tmp_path):
    model = tiny.resnet(0).to(dtype)  # with batch statistics
    digest = weights_digest_of_model(model)
    model.save_pretrained(tmp_path)
    assert weights_digest_of_model(type(model).from_pretrained(tmp_path, dtype=dtype)) == digest
    for name in ("weight", "running_mean"):
        values = dict([*model.named_parameters(), *model.named_buffers()])
        value = next(value for key, value in values.items() if key.endswith(name)).data.view(-1)
        value[-1] += 1
        assert weights_digest_of_model(model) != digest
        value[-1] -= 1
    assert weights_digest_of_model(model.double()) != digest


def test_the_digest_of_a_model_depends_on_how_its_weights_are_used():
    digest = weights_digest_of_model(tiny.llama(0))
    assert weights_digest_of_model(tiny.llama(0, rms_norm_eps=1e-3)) != digest
    assert weights_digest_of_model(tiny.llama(0, use_cache=False)) == digest
    assert weights_digest_of_model(tiny.llama(1)) != digest
