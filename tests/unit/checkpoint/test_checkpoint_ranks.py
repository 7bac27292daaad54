"""One checkpoint by many ranks (threads here), in any pieces: whole or absent, read back in any other pieces."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from telechat_twins.core.checkpoint import notice as checkpoint_notice
from telechat_twins.core.checkpoint import save as checkpoint_save
from telechat_twins.core.checkpoint.pieces import tiling_fault
from telechat_twins.core.checkpoint.read import Contents, SaveRanks, TensorPiece, open_checkpoint, save_checkpoint
from telechat_twins.core.errors import UserError
from tests.support.numpy_stepper import Cluster, flat_boxes

RNG = np.random.default_rng(11)
TENSORS = {
    "embed.weight": RNG.standard_normal((13, 6)).astype(np.float32),
    "half.weight": RNG.standard_normal((8, 10)).astype(ml_dtypes.bfloat16),
    "norm.weight": RNG.standard_normal(7).astype(np.float32),
    "few": RNG.standard_normal(2).astype(np.float32),  # fewer elements than ranks
    "scalar": np.array(3.5, np.float32),
}


def share(name, array, rank, world):
    """A flat share of vectors and of the first matrix, columns of the second, a scalar for the last rank."""
    if array.ndim == 0:
        return [TensorPiece(name, array, (), ())] if rank == world - 1 else []
    if "half" in name:
        box = (slice(0, 8), slice(10 * rank // world, 10 * (rank + 1) // world))
        return [TensorPiece(name, array[box], (0, box[1].start), array.shape)]
    boxes = flat_boxes(array.shape, array.size * rank // world, array.size * (rank + 1) // world)
    return [TensorPiece(name, array[box], tuple(s.start for s in box), array.shape) for box in boxes]


def shares(rank, world, tensors=None):
    return [piece for name, array in (tensors or TENSORS).items() for piece in share(name, array, rank, world)]


def arguments(cluster, rank, step=3, weights=None, **more):
    """What rank ``rank`` gives to a save; the others' model and trainer do not count."""
    moments = {f"m.{name}": array for name, array in TENSORS.items()}
    given = {
        "model": {"config": {"from": rank}},
        "weights": shares(rank, cluster.world) if weights is None else weights,
        "optimizer": shares(rank, cluster.world, moments),
        "trainer": {"step": step, "from": rank},
        "ranks": SaveRanks(rank, cluster.world, lambda: cluster.agree(rank, [0.0], "max"), 20.0),
    }
    return {"contents": Contents(**given | more), "keep_last": 2}


def save(root, world=4, step=3, weights=lambda rank: None, **more):
    """All ranks save; their results or exceptions."""
    cluster = Cluster(world, timeout_s=20)
    return cluster.run(
        lambda rank: save_checkpoint(root, step, **arguments(cluster, rank, step, weights(rank), **more))
    )


def assert_complete(root, step=3):
    checkpoint = open_checkpoint(root)
    assert checkpoint.step == step and checkpoint.model["config"]["from"] == checkpoint.trainer["from"] == 0
    for kind, prefix in (("weights", ""), ("optimizer", "m.")):
        assert sorted(checkpoint.names(kind)) == sorted(prefix + name for name in TENSORS)
        for name, array in TENSORS.items():
            found = checkpoint.read(kind, prefix + name)
            assert (found.dtype, found.shape, found.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("world", [2, 3, 5])
def test_all_ranks_write_one_checkpoint(tmp_path, world):
    asset = tmp_path / "tokenizer.model"
    asset.write_bytes(b"pieces")
    results = save(tmp_path / "run", world, assets=[asset])
    assert results == [tmp_path / "run" / "step-00000003"] * world
    assert_complete(tmp_path / "run")
    assert names(tmp_path / "run") == ["latest", "step-00000003"]
    files = {f"{kind}-{rank:05d}-00001.safetensors" for kind in ("weights", "optimizer") for rank in range(world)}
    assert set(names(results[0])) == files | {"assets", "manifest.json", "model.json", "trainer.json"}


def test_one_rank_writes_what_it_always_wrote(tmp_path):
    save_checkpoint(
        tmp_path, 3, Contents({}, TENSORS.items()), keep_last=1
    )  # fmt: skip
    assert names(tmp_path / "step-00000003") == ["manifest.json", "model.json", "weights-00001.safetensors"]
    manifest = json.loads((tmp_path / "step-00000003" / "manifest.json").read_text())
    assert list(manifest) == ["format", "version", "step", "number", "files", "tensors", "digest"]


def test_ranks_may_own_nothing_or_everything(tmp_path):
    results = save(tmp_path, 3, weights=lambda rank: shares(0, 1) if rank == 1 else [])
    assert len(set(results)) == 1
    assert_complete(tmp_path)


def test_saving_again_replaces_and_prunes(tmp_path):
    for step in (1, 2, 3, 3):
        save(tmp_path, 3, step)
    assert names(tmp_path) == ["latest", "step-00000002", "step-00000003"]
    assert_complete(tmp_path)


def random_boxes(random, shape):
    """A tiling of ``shape`` by cutting boxes at random places, not all of them in one line."""
    boxes = [tuple(slice(0, n) for n in shape)]
    for _ in range(random.integers(0, 25)):
        box = boxes.pop(random.integers(len(boxes)))
        axis = random.integers(len(shape))
        at = int(random.integers(box[axis].start, box[axis].stop + 1))  # also at the border: an empty box
        for part in (slice(box[axis].start, at), slice(at, box[axis].stop)):
            boxes.append((*box[:axis], part, *box[axis + 1 :]))
    return boxes


@pytest.mark.parametrize("seed", range(12))
def test_any_split_reads_back_at_any_other_split(tmp_path, seed):
    """Written as flat shares or random boxes by ranks, read as whole, as random boxes and as flat shares of others."""
    random = np.random.default_rng(seed)
    world = int(random.integers(2, 5))
    tensors, pieces = {}, [[] for _ in range(world)]
    for number in range(4):
        shape = tuple(int(n) for n in random.integers(1, 30, random.integers(1, 4)))
        name, array = f"t{number}", random.integers(-(2**31), 2**31, shape, np.int32)
        tensors[name] = array
        if len(shape) < 3 and random.integers(2):
            cuts = np.sort(random.integers(0, array.size + 1, world - 1)).tolist()
            ranges = zip([0, *cuts], [*cuts, array.size], strict=True)
            owned = [(rank, box) for rank, r in enumerate(ranges) for box in flat_boxes(shape, *r)]
        else:
            owned = [(random.integers(world), box) for box in random_boxes(random, shape)]
        for rank, box in owned:
            pieces[rank].append(TensorPiece(name, array[box], tuple(s.start for s in box), shape))
    results = save(tmp_path, world, weights=lambda rank: pieces[rank])
    assert len(set(results)) == 1, results
    checkpoint = open_checkpoint(tmp_path)
    assert sorted(checkpoint.names("weights")) == sorted(tensors)
    for name, array in tensors.items():
        assert np.array_equal(checkpoint.read("weights", name), array)
        boxes = random_boxes(random, array.shape)
        if array.ndim < 3:
            boxes += flat_boxes(array.shape, *np.sort(random.integers(0, array.size + 1, 2)).tolist())
        for box in boxes:
            found = checkpoint.read("weights", name, box)
            assert found.shape == array[box].shape and np.array_equal(found, array[box]), (name, box)


@pytest.mark.parametrize("seed", range(40))
def test_a_wrong_tiling_is_seen(seed):
    random = np.random.default_rng(seed)
    shape = tuple(int(n) for n in random.integers(2, 12, random.integers(1, 4)))
    boxes = [([s.start for s in box], [s.stop - s.start for s in box]) for box in random_boxes(random, shape)]
    assert tiling_fault(shape, boxes) is None
    filled = [i for i, (_, extent) in enumerate(boxes) if 0 not in extent]
    offset, extent = boxes[random.choice(filled)]
    assert "and overlap" in tiling_fault(shape, [*boxes, (offset, extent)])
    assert "overlap" not in tiling_fault(shape, [box for box in boxes if box != (offset, extent)])
    axis = random.integers(len(shape))
    extent[axis] += 1  # over its neighbour, or over the border
    assert tiling_fault(shape, boxes) is not None
    extent[axis] -= 2
    assert "cover" in tiling_fault(shape, boxes)


def test_thousands_of_pieces_are_checked_and_read_quickly(tmp_path):
    """40,000 pieces: all pairs would be 800 million comparisons, and a box meets few of them."""
    width, parts = 1000, 20_000
    boxes = [b for i in range(parts) for b in flat_boxes((width * 50, width), i * 2503, (i + 1) * 2503)]
    whole = [([s.start for s in box], [s.stop - s.start for s in box]) for box in boxes]
    started = time.process_time()  # other processes of the machine do not count
    assert "and overlap" not in tiling_fault((width * 50, width), whole)
    assert "and overlap" in tiling_fault((width * 50, width), [*whole, ([40_000, 3], [1, 1])])
    transposed = [(offset[::-1], extent[::-1]) for offset, extent in whole]
    assert "and overlap" not in tiling_fault((width, width * 50), transposed)
    assert time.process_time() - started < 30  # 0.5 s; all pairs would take many minutes
    rows = np.arange(6000, dtype=np.int32).reshape(3000, 2)
    pieces = [TensorPiece("w", rows[i : i + 1], (i, 0), rows.shape) for i in range(3000)]
    save_checkpoint(tmp_path, 1, Contents({}, pieces), keep_last=1)
    checkpoint = open_checkpoint(tmp_path)
    entry = checkpoint._entries["weights"]["w"]
    places = checkpoint._places("weights", "w", entry)
    assert [p.offset for p in places.meeting((1500, 1), (2, 1))] == [(1500, 0), (1501, 0)]
    assert np.array_equal(checkpoint.read("weights", "w", (slice(1500, 1502), slice(1, 2))), rows[1500:1502, 1:])


def test_shares_of_a_verification_hash_every_file_once(tmp_path, monkeypatch):
    from telechat_twins.core.checkpoint import read as module

    save(tmp_path, 3)
    checkpoint, hashed = open_checkpoint(tmp_path, verify=False), []
    real = module.file_sha256
    monkeypatch.setattr(module, "file_sha256", lambda path, on=None: hashed.append(path) or real(path, on))
    for rank in range(4):
        checkpoint.verify(share=(rank, 4))
    assert sorted(hashed) == sorted(path for path in checkpoint.files if path.name != "manifest.json")
    victim = next(tmp_path.glob("step-*/weights-00001-*"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"\xff")
    refused = []
    for rank in range(4):
        try:
            open_checkpoint(tmp_path, verify=False).verify(share=(rank, 4))
        except UserError as error:
            refused.append(str(error))
    assert len(refused) == 1 and str(victim) in refused[0]


def failing(rank, world, error):
    yield from shares(rank, world)[:2]
    raise error


FAULTS = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "rank {rank}: the disk is full while saving; it needs"),
    "io": (OSError(errno.EIO, "Input/output error"), r"rank {rank}: cannot be written \(Input/output error\)"),
    "defect": (RuntimeError("device lost\nmore"), r"rank {rank} failed to save \(RuntimeError: device lost\)$"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_rank_that_fails_ends_all_with_its_line(tmp_path, culprit, fault):
    error, line = FAULTS[fault]
    save(tmp_path, 3, 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    started = time.monotonic()
    results = save(tmp_path, 3, 2, lambda rank: failing(rank, 3, error) if rank == culprit else None)
    assert time.monotonic() - started < 10
    for rank, result in enumerate(results):
        if rank == culprit and fault == "defect":
            assert result is error
            continue
        assert isinstance(result, UserError), results
        with pytest.raises(UserError, match=f"step-00000002: {line.format(rank=culprit)}"):
            raise result
        assert "\n" not in str(result) and ".tmp" not in str(result)
    visible = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and not p.name.startswith(".saving")}
    assert visible == before
    assert not [name for name in names(tmp_path) if name.startswith(".tmp")]
    # The next one finds nothing in its way, and takes away what the failed one left.
    assert len(set(save(tmp_path, 3, 2))) == 1
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_a_failure_stops_the_others_in_the_middle(tmp_path):
    """A rank with much to write does not go on for nothing."""
    taken = []

    def endless(rank):
        for number in range(10_000):
            time.sleep(0.01)
            taken.append(number)
            yield TensorPiece(f"w{number}", np.zeros(1, np.float32), (0,), (1,))

    def weights(rank):
        return failing(rank, 3, RuntimeError("lost")) if rank == 1 else endless(rank)

    results = save(tmp_path, 3, weights=weights)
    assert [type(r) for r in results] == [UserError, RuntimeError, UserError] and len(taken) < 2000


def test_rank_0_refuses_before_it_begins(tmp_path):
    def never(rank):
        yield pytest.fail("a tensor was asked for")

    results = save(tmp_path, 3, weights=never, trainer={"loss": float("nan")})
    assert [type(r) for r in results] == [ValueError, UserError, UserError]
    assert "rank 0 failed to save (ValueError" in str(results[2])


def test_pieces_that_leave_a_hole(tmp_path):
    results = save(tmp_path, 3, weights=lambda rank: shares(0 if rank == 1 else rank, 3))
    assert [type(r) for r in results] == [ValueError, UserError, UserError]
    assert "pieces of weights 'embed.weight' cover" in str(results[0])
    assert [n for n in names(tmp_path) if not n.startswith(".saving")] == []


def test_pieces_that_contradict_each_other(tmp_path):
    def weights(rank):
        return [TensorPiece("w", np.zeros(2, np.float32), (2 * rank,), (6 + rank // 2,))]

    results = save(tmp_path, 3, weights=weights)
    assert [type(r) for r in results] == [ValueError, UserError, UserError]
    assert "before it was F32 [6]" in str(results[0])


def test_a_rank_that_is_never_ready(tmp_path):
    """Its process hangs: the others give up after the time set, and name it."""
    cluster, hang = Cluster(3, timeout_s=20), threading.Event()

    def stuck():
        hang.wait(20)
        yield from shares(1, 3)

    def one(rank):
        ranks = SaveRanks(rank, 3, lambda: cluster.agree(rank, [0.0], "max"), 0.5)
        weights = stuck() if rank == 1 else None
        try:
            return save_checkpoint(tmp_path, 3, **arguments(cluster, rank, 3, weights, ranks=ranks))
        finally:
            if rank == 0:
                time.sleep(0.3)  # the others have seen the folder go when the late part comes
                hang.set()

    results = cluster.run(one)
    assert all(isinstance(r, UserError) for r in results), results
    assert "all ranks must be ready within 0.5 s of rank 0, rank 1 was not (1 of 3 ranks missing)" in str(results[0])
    assert str(results[2]) == str(results[1]) == str(results[0])
    assert [n for n in names(tmp_path) if not n.startswith(".saving")] == []


def test_a_folder_that_is_not_shared_is_named(tmp_path, monkeypatch):
    for module in (checkpoint_save, checkpoint_notice):
        monkeypatch.setattr(module, "VISIBILITY_S", 0.3)
    cluster = Cluster(2, timeout_s=20)

    def one(rank):
        ranks = SaveRanks(rank, 2, lambda: cluster.agree(rank, [0.0], "max"), 1.0)
        return save_checkpoint(tmp_path / f"node{rank}", 3, **arguments(cluster, rank, ranks=ranks))

    results = cluster.run(one)
    assert "rank 1 was not (1 of 2" in str(results[0])
    assert "all ranks must write to one shared file system" in str(results[1])


def test_what_a_dead_job_left_is_removed(tmp_path):
    """Its building folder, its notice, also those of the same step."""
    save(tmp_path, 2, 1)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    import socket

    stale = tmp_path / f".tmp-tele-step-00000002-{socket.gethostname()}-{dead.pid}"
    (stale / "rank-00001").mkdir(parents=True)
    (stale / "rank-00001" / "part.json").write_text("{}")
    for step in (2, 9):
        (tmp_path / f".saving-step-{step:08d}.json").write_text(json.dumps({"id": "old", "building": stale.name}))
    assert len(set(save(tmp_path, 2, 2))) == 1
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


KILLED = """
import os, signal, sys, threading, time
import numpy as np
from telechat_twins.core.checkpoint.read import Contents, SaveRanks, Saver, TensorPiece, open_checkpoint
root, how = sys.argv[1], sys.argv[2]
together = threading.Barrier(2)
def pieces(rank):
    for number in range(50):
        yield TensorPiece(f"w{number}", np.full(1000, rank, np.float32), (1000 * rank,), (2000,))
def dies(rank):
    yield from list(pieces(rank))[:30]
    os.kill(os.getpid(), signal.SIGKILL)
def one(rank):
    saver = Saver()
    def contents(pieces):
        return Contents({}, pieces, trainer={}, ranks=SaveRanks(rank, 2, together.wait))
    saver.save(root, 1, contents(pieces(rank)), keep_last=1, asynchronous=False)
    together.wait()
    if how == "writing":
        saver.save(root, 2, contents(dies(rank) if rank else pieces(rank)), keep_last=1, asynchronous=False)
    else:
        from telechat_twins.core.files.direct_io import DirectFile
        DirectFile.store = lambda self, data, place: time.sleep(60)
        saver.save(root, 2, contents(pieces(rank)), keep_last=1, asynchronous=True)
        together.wait()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.mark.parametrize("how", ["writing", "background"])
def test_killed_while_saving(tmp_path, how):
    root = Path(__file__).resolve().parents[3]
    ended = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), how], cwd=root, check=False)
    assert ended.returncode == -9
    assert [n for n in names(tmp_path) if not n.startswith(".")] == ["latest", "step-00000001"]
    assert any(n.startswith(".tmp-tele-step-00000002") for n in names(tmp_path))
    whole = open_checkpoint(tmp_path).read("weights", "w49")
    assert open_checkpoint(tmp_path).step == 1 and whole[:1000].sum() == 0 and whole[1000:].sum() == 1000
    assert len(set(save(tmp_path, 2, 3))) == 1
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000003"]
