"""The canonical checkpoint: what is written is read back, by slices, from any pieces; a save is whole or absent."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from telechat_twins.core.checkpoint.read import (
    Contents,
    PieceWriter,
    TensorPiece,
    check_shapes,
    manifest_digest,
    open_checkpoint,
    save_checkpoint,
    whole,
    write_manifest,
)
from telechat_twins.core.errors import UserError
from telechat_twins.core.files import safetensors as safetensors_io
from telechat_twins.core.model.params import ParamSpec

RNG = np.random.default_rng(5)
WEIGHTS = {
    "embed.weight": RNG.standard_normal((11, 6)).astype(np.float32),
    "layers.0.attn.k.weight": RNG.standard_normal((4, 6)).astype(ml_dtypes.bfloat16),
    "norm.weight": RNG.standard_normal(6).astype(np.float16),
    "scalar": np.float64(3.5).reshape(()),
}
OPTIMIZER = {f"{k}.{name}": np.asarray(a, np.float32) * 2 for name, a in WEIGHTS.items() for k in "mv"}
MODEL = {"config": {"family": "telechat2", "名": "字"}}
TRAINER = {"step": 7, "position": 123456789012345}


def save(root, step=7, keep_last=2, weights=None, **more):
    weights = WEIGHTS if weights is None else weights
    weights = weights.items() if isinstance(weights, dict) else weights
    return save_checkpoint(
        root, step, Contents(MODEL, weights, OPTIMIZER.items(), TRAINER, **more), keep_last=keep_last
    )  # fmt: skip


def assert_equal(checkpoint, kind, tensors):
    assert checkpoint.names(kind) == list(tensors)
    for name, array in tensors.items():
        found = checkpoint.read(kind, name)
        assert found.dtype == array.dtype and found.shape == array.shape == checkpoint.shape(kind, name)
        assert found.tobytes() == array.tobytes(), name


@pytest.mark.parametrize("max_file_bytes", [4 << 30, (64 << 10) + 300, 1])
def test_everything_comes_back(tmp_path, max_file_bytes):
    asset = tmp_path / "tokenizer.model"
    asset.write_bytes(b"pieces")
    folder = save(tmp_path / "run", max_file_bytes=max_file_bytes, assets=[asset])
    assert folder == tmp_path / "run" / "step-00000007"
    for path in (folder, tmp_path / "run"):
        checkpoint = open_checkpoint(path)
        assert (checkpoint.path, checkpoint.step) == (folder, 7)
        assert checkpoint.model == MODEL and checkpoint.trainer == TRAINER
        assert_equal(checkpoint, "weights", WEIGHTS)
        assert_equal(checkpoint, "optimizer", OPTIMIZER)
        assert [p.read_bytes() for p in checkpoint.assets] == [b"pieces"]
    files = len(list(folder.glob("weights-*.safetensors")))
    assert files == {4 << 30: 1, (64 << 10) + 300: 2, 1: len(WEIGHTS)}[max_file_bytes]
    # Nothing but JSON, safetensors and the assets, and every file is one the library reads.
    kinds = {p.suffix for p in folder.rglob("*") if p.is_file() and p.parent.name != "assets"}
    assert kinds == {".json", ".safetensors"}
    for file in folder.glob("optimizer-*.safetensors"):
        for name, array in safetensors.numpy.load_file(file).items():
            assert array.tobytes() == OPTIMIZER[name].tobytes()


def test_more_tensors_than_one_header_holds(tmp_path):
    many = {f"layers.{i}.a.rather.long.name.of.a.parameter.weight": np.full(2, i, np.float32) for i in range(1000)}
    folder = save(tmp_path, weights=many)
    assert len(list(folder.glob("weights-*.safetensors"))) > 1
    assert_equal(open_checkpoint(folder), "weights", many)


def write_pieces(folder: Path, tensor: np.ndarray) -> None:
    """A checkpoint whose one tensor lies in four pieces, two of them in another file."""
    folder.mkdir()
    (folder / "model.json").write_text("{}")
    with PieceWriter(folder, max_file_bytes=(64 << 10) + 2 * 4 * 7) as writer:
        for rows in (slice(0, 2), slice(2, 8)):
            for columns in (slice(0, 3), slice(3, 7)):
                box = TensorPiece("w", tensor[rows, columns], (rows.start, columns.start), tensor.shape)
                writer.add("weights", box)
        writer.add("optimizer", whole("m.w", tensor))
    write_manifest(folder, 3, [writer.part()])


def test_a_tensor_in_pieces_reads_like_one_whole(tmp_path):
    whole = np.arange(56, dtype=np.float32).reshape(8, 7)
    write_pieces(tmp_path / "c", whole)
    checkpoint = open_checkpoint(tmp_path / "c")
    assert len(list((tmp_path / "c").glob("weights-*"))) == 3
    assert np.array_equal(checkpoint.read("weights", "w"), whole)
    for a in range(8):
        for b in range(a, 9):
            for c, d in ((0, 3), (0, 7), (2, 4), (3, 7), (5, 5)):
                index = (slice(a, b), slice(c, d))
                assert np.array_equal(checkpoint.read("weights", "w", index), whole[index])
    assert np.array_equal(checkpoint.read("weights", "w", (slice(1, 5),)), whole[1:5])


def test_pieces_that_disagree_are_refused_when_written(tmp_path):
    rows = np.zeros((2, 2), np.float32)
    writer = PieceWriter(tmp_path)
    writer.add("weights", TensorPiece("w", rows, (0, 0), (4, 2)))
    with pytest.raises(ValueError, match="before it was F32"):
        writer.add("weights", TensorPiece("w", rows, (2, 0), (5, 2)))
    with pytest.raises(ValueError, match="before it was F32"):
        writer.add("weights", TensorPiece("w", rows.astype(np.float16), (2, 0), (4, 2)))
    writer.add("weights", whole("x", rows))
    with pytest.raises(ValueError, match="given twice"):
        writer.add("weights", whole("x", rows))


def test_pieces_that_leave_a_hole_are_refused_when_written(tmp_path):
    rows = np.zeros((2, 2), np.float32)
    for offset, fault in ((3, "cover 8 of 10 elements"), (1, "cover 8 of 10 elements and overlap")):
        pieces = [TensorPiece("w", rows, (at, 0), (5, 2)) for at in (0, offset)]
        with pytest.raises(ValueError, match=f"the 2 pieces of weights 'w' {fault}$"):
            save(tmp_path, weights=pieces)
    assert list(tmp_path.iterdir()) == []


def test_a_slice_needs_no_other_byte_of_the_file(tmp_path):
    whole = np.arange(100_000, dtype=np.float32).reshape(1000, 100)
    folder = save(tmp_path, weights={"w": whole})
    file = folder / "weights-00001.safetensors"
    with open(file, "r+b") as handle:  # ruin every row from 20 on
        handle.seek((64 << 10) + 20 * 400)
        handle.write(b"\xff" * (980 * 400))
    checkpoint = open_checkpoint(folder, verify=False)
    assert np.array_equal(checkpoint.read("weights", "w", (slice(5, 20),)), whole[5:20])
    with pytest.raises(UserError, match="SHA-256"):
        open_checkpoint(folder)


def test_bytes_read_for_a_column_slice(tmp_path, monkeypatch):
    folder = save(tmp_path, weights={"w": np.zeros((64, 32), np.float32)})
    checkpoint = open_checkpoint(folder)
    counts = []
    real = safetensors_io.os.preadv
    monkeypatch.setattr(safetensors_io.os, "preadv", lambda *a: counts.append(real(*a)) or counts[-1])
    checkpoint.read("weights", "w", (slice(None), slice(8, 16)))
    assert sum(counts) == 64 * 8 * 4


def test_tensors_are_taken_one_at_a_time(tmp_path):
    """The next tensor is asked for only when nobody holds the one before."""
    import weakref

    alive: list[weakref.ref] = []

    def stream():
        for i in range(5):
            assert all(ref() is None for ref in alive), f"tensor {i} is asked for while an earlier one is held"
            array = np.full(1000, i, np.float32)
            alive.append(weakref.ref(array))
            yield f"w{i}", array
            del array

    save_checkpoint(tmp_path, 1, Contents({}, stream()), keep_last=1)
    assert len(alive) == 5 and open_checkpoint(tmp_path).trainer is None


def test_keep_last_and_latest(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep_last=2)
        assert (tmp_path / "latest").read_text() == f"step-{step:08d}\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000030", "step-00000040"]
    # A run that went back to an older step keeps what it just saved, not the larger number.
    save(tmp_path, 15, keep_last=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000015"]


def test_pruning_leaves_what_is_not_ours(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    save(tmp_path, 2, keep_last=1)
    assert (tmp_path / "step-00000001" / "notes.txt").read_text() == "mine"


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path)
    other = {"w": np.ones(3, np.float32)}
    folder = save(tmp_path, weights=other)
    assert_equal(open_checkpoint(folder), "weights", other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000007"]


def test_crash_between_the_two_renames_of_a_replacement(tmp_path):
    """The old version is still found under the same name, and comes back with the next save."""
    folder = save(tmp_path)
    folder.rename(tmp_path / f".old-tele-{folder.name}")
    assert_equal(open_checkpoint(tmp_path), "weights", WEIGHTS)
    assert_equal(open_checkpoint(folder), "weights", WEIGHTS)
    save(tmp_path, 8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000007", "step-00000008"]


def number_of(folder):
    return json.loads((folder / "manifest.json").read_text()).get("number")


def without_number(folder):
    """As checkpoints were before saves were counted."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["number"], manifest["digest"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": manifest_digest(manifest)}))


@pytest.mark.parametrize("clock", [-1, 0, 1])
def test_pruning_goes_by_the_order_of_saves_and_not_by_a_clock(tmp_path, clock):
    """A clock that was set back, one that stands, one that goes on; the run went back to step 2 on the way."""
    for turn, step in enumerate((1, 9, 2, 3)):
        folder = save(tmp_path, step, keep_last=3)
        os.utime(folder / "manifest.json", (1e9 + clock * turn, 1e9 + clock * turn))
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["latest", "step-00000002", "step-00000003", "step-00000009"]
    assert [number_of(tmp_path / name) for name in left[1:]] == [3, 4, 2]
    save(tmp_path, 4, keep_last=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000002", "step-00000003", "step-00000004"]
    save(tmp_path, 3, keep_last=2)  # again: now the newest but this one is step 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]
    assert number_of(tmp_path / "step-00000003") == 6


def test_checkpoints_from_before_saves_were_counted(tmp_path):
    """They are older than any that was counted, and among themselves go by time."""
    for turn, step in enumerate((7, 5, 6)):
        folder = save(tmp_path, step, keep_last=9)
        without_number(folder)
        os.utime(folder / "manifest.json", (2e9 + turn, 2e9 + turn))
    assert open_checkpoint(tmp_path).step == 6
    save(tmp_path, 3, keep_last=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000005", "step-00000006"]
    assert number_of(tmp_path / "step-00000003") == 1
    save(tmp_path, 4, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_a_manifest_in_another_hand_still_has_its_number(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest, sort_keys=True))
    assert number_of(save(tmp_path, 2)) == 2
    (folder / "manifest.json").write_text("{")
    assert number_of(save(tmp_path, 3)) == 3


def test_leftovers_of_killed_saves_go_with_the_next(tmp_path):
    gone = [".latest-999999999", "..saving-step-00000001.json-999999999", ".saving-step-00000001.json"]
    host = socket.gethostname()
    gone += [f".tmp-tele-latest-{host}-999999999.5", f".tmp-tele-.saving-step-00000001.json-{host}-999999999"]
    kept = [f".latest-{os.getppid()}", f".tmp-tele-latest-{host}-{os.getppid()}", ".latest-copy", ".hidden"]
    for name in gone + kept:
        (tmp_path / name).touch()
    for name in (".gone-tele-0123", ".gone-tele-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights-00001.safetensors").touch()
    save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*kept, "latest", "step-00000007"])


def test_failure_while_saving_leaves_the_previous_one(tmp_path):
    save(tmp_path, 1)

    def breaking():
        yield from WEIGHTS.items()
        raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        save_checkpoint(tmp_path, 2, Contents({}, breaking(), trainer={}), keep_last=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001"]
    assert_equal(open_checkpoint(tmp_path), "weights", WEIGHTS)


def test_values_that_are_no_json_fail_before_any_tensor_is_taken(tmp_path):
    def never():
        yield "w", pytest.fail("a tensor was asked for")

    for model in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            save_checkpoint(tmp_path, 2, Contents(model, never(), trainer={}), keep_last=1)
    assert list(tmp_path.iterdir()) == []


def test_killed_while_saving(tmp_path):
    """A killed process leaves the previous checkpoint, nothing under a readable name; the next save cleans up."""
    program = (
        "import sys, os, signal, numpy as np\n"
        "from telechat_twins.core.checkpoint.read import Contents, save_checkpoint\n"
        "def tensors():\n"
        "    yield 'a', np.zeros(1000, np.float32)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "save_checkpoint(sys.argv[1], 2, Contents({}, tensors(), trainer={}), keep_last=1)\n"
    )
    save(tmp_path, 1)
    root = Path(__file__).resolve().parents[3]
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, check=False)
    assert ended.returncode == -9
    visible = sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("."))
    hidden = [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]
    assert visible == ["latest", "step-00000001"] and len(hidden) == 1
    assert open_checkpoint(tmp_path).step == 1
    save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-00000001", "step-00000003"]


def test_a_living_writers_folder_is_left_alone(tmp_path):
    living = tmp_path / f".tmp-tele-step-00000009-{socket.gethostname()}-{os.getppid()}"
    foreign = tmp_path / ".tmp-tele-step-00000009-elsewhere-1"
    stale = tmp_path / ".tmp-tele-step-00000008-elsewhere-1"
    for folder in (living, foreign, stale, tmp_path / ".tmp-unrelated-1"):
        folder.mkdir()
    os.utime(stale, (1, 1))
    save(tmp_path)
    assert living.is_dir() and foreign.is_dir() and (tmp_path / ".tmp-unrelated-1").is_dir() and not stale.exists()


FULL_DISK = """
import resource, sys, numpy as np
from telechat_twins.core.checkpoint.read import Contents, open_checkpoint, save_checkpoint
from telechat_twins.core.errors import UserError
root, how = sys.argv[1], sys.argv[2]
def tensors(n, size):
    return ((f"w{i}", np.full(size, i, np.float32)) for i in range(n))
def save(step, n):
    w, o = tensors(n, 25_000), tensors(n, 25_000)
    save_checkpoint(root, step, Contents({}, w, o, {}), keep_last=1)
save(1, 1)
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    save(2, 20)
except UserError as error:
    print(error)
checkpoint = open_checkpoint(root)
assert checkpoint.step == 1 and checkpoint.read("weights", "w0").sum() == 0
"""


def run_full_disk(root: Path, how: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(root), how],
        cwd=Path(__file__).resolve().parents[3], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000001"]
    return ended.stdout


def test_full_disk_keeps_the_previous_checkpoint(tmp_path):
    """On a real file system of 1 MB where the machine lets us mount one."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs; the file-size limit and the injected error are tested below")
    try:
        line = run_full_disk(tmp_path, "disk")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    # 20 weights and 20 optimizer tensors of 100,000 bytes: the room it takes is said although the iterator was cut.
    assert f"{tmp_path}/step-00000002: the disk is full while saving; it needs 4.0 MB" in line


def test_file_size_limit_keeps_the_previous_checkpoint(tmp_path):
    line = run_full_disk(tmp_path, "limit")
    assert f"{tmp_path}/step-00000002: a file-size limit was exceeded while saving; it needs 4.0 MB" in line


def test_full_disk_injected(tmp_path, monkeypatch):
    import errno

    save(tmp_path, 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_io.SafetensorsWriter, "_write", full)
    tensors = sum(a.nbytes for a in (*WEIGHTS.values(), *OPTIMIZER.values()))
    texts = sum(len((tmp_path / "step-00000001" / name).read_text()) for name in ("model.json", "trainer.json"))
    needed = f"{(tensors + texts) / 1000:.1f} kB"
    with pytest.raises(UserError, match=f"step-00000001: the disk is full while saving; it needs {needed}"):
        save(tmp_path, 1)
    monkeypatch.undo()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        save(tmp_path / "file" / "run")


def test_reading_what_is_not_there(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path))
    with pytest.raises(UserError, match="has no weights tensor 'head.weight'"):
        checkpoint.read("weights", "head.weight")
    with pytest.raises(ValueError, match="3 slices for a tensor of 2 dimensions"):
        checkpoint.read("weights", "embed.weight", (slice(0, 1),) * 3)
    with pytest.raises(ValueError, match="has a step"):
        checkpoint.read("weights", "embed.weight", (slice(0, 4, 2),))


def test_check_shapes_names_what_differs():
    table = {f"layers.{i}.w": ParamSpec((4, 6), "matrix") for i in range(6)}
    fits = dict.fromkeys(table, (4, 6))
    check_shapes(table, fits)
    with pytest.raises(UserError, match=r"^x.safetensors: tensor 'layers.2.w': expected \[4, 6\] .* found \[4, 5\]$"):
        check_shapes(table, {**fits, "layers.2.w": (4, 5)}, "x.safetensors")
    with pytest.raises(UserError, match="missing 'layers.0.w', .* and 2 more; unexpected 'other'"):
        check_shapes(table, {"other": (1,)})
