"""Files written past the file cache: their bytes and hash, file systems that cannot do it, and full disks."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core.checkpoint.pieces import PieceSpec, Planned, TensorPiece
from telechat_twins.core.checkpoint.read import open_checkpoint
from telechat_twins.core.checkpoint.save import write_checkpoint
from telechat_twins.core.files import direct_io
from telechat_twins.core.files.direct_io import BLOCK, DirectFile, Spool
from telechat_twins.core.files.safetensors import SafetensorsFile, StreamedSafetensors

SMALL = 4 * BLOCK
SIZES = (0, 1, BLOCK - 1, BLOCK, SMALL - 1, SMALL, SMALL + 1, 3 * SMALL, 9 * SMALL + 77)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_io, "BUFFER_BYTES", SMALL)


def numbers(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, count, np.uint8)


def written(path: Path, data: np.ndarray, step: int) -> str:
    with Spool() as spool:
        file = DirectFile(path, spool)
        for begin in range(0, data.size, step):
            file.write(data[begin : begin + step])
        assert file.size == data.size
        return file.finish()


@pytest.mark.parametrize("size", SIZES)
def test_bytes_and_hash(tmp_path: Path, size: int) -> None:
    data = numbers(size)
    for step in (777, SMALL, 10 * SMALL):
        digest = written(tmp_path / "file", data, step)
        assert (tmp_path / "file").read_bytes() == data.tobytes()
        assert digest == hashlib.sha256(data).hexdigest()


def test_files_side_by_side_share_buffers(tmp_path: Path) -> None:
    data = [numbers(5 * SMALL + n) for n in range(2)]
    with Spool() as spool:
        files = [DirectFile(tmp_path / str(n), spool) for n in range(2)]
        for begin in range(0, 6 * SMALL, 1000):
            for file, part in zip(files, data, strict=True):
                file.write(part[begin : begin + 1000])
        for file, part in zip(files, data, strict=True):
            assert file.finish() == hashlib.sha256(part).hexdigest()
            assert file.path.read_bytes() == part.tobytes()


@pytest.mark.parametrize("where", ["open", "write"])
def test_where_it_cannot_be_the_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("this system writes through its cache only")
    real_open, real_write, refused = os.open, os.pwrite, []

    def opened(path: str, flags: int, *rest: int) -> int:
        if where == "open" and flags & os.O_DIRECT:
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    def write(handle: int, *rest: int) -> int:
        if where == "write" and not refused:
            refused.append(handle)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(handle, *rest)

    monkeypatch.setattr(direct_io.os, "open", opened)
    monkeypatch.setattr(direct_io.os, "pwrite", write)
    data = numbers(5 * SMALL + 5)
    assert written(tmp_path / "file", data, 999) == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "file").read_bytes() == data.tobytes() and refused


def test_a_full_disk_is_said_and_its_buffers_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Spool() as spool:
        for _ in range(3):
            file = DirectFile(tmp_path / "file", spool)
            with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
                patch.setattr(direct_io.os, "pwrite", full)
                file.write(numbers(9 * SMALL))
                file.finish()
            file.abandon()
        again = DirectFile(tmp_path / "again", spool)
        again.write(numbers(9 * SMALL))
        assert again.finish() == hashlib.sha256(numbers(9 * SMALL)).hexdigest()
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(("hash", "write"))]
    assert left == []


def test_tensors_come_as_they_were_announced(tmp_path: Path) -> None:
    first, second = np.ones((3, 5), np.float32), np.arange(7, dtype=np.int64)
    specs: dict[str, tuple[str, tuple[int, ...]]] = {"first": ("F32", (3, 5)), "second": ("I64", (7,))}
    with Spool() as spool:
        file = StreamedSafetensors(tmp_path / "file", specs, spool)
        with pytest.raises(ValueError, match=r"expected the tensor \('first'.* found 'second', I64 \(7,\)"):
            file.add("second", second)
        with pytest.raises(ValueError, match=r"found 'first', F32 \(5, 3\)"):
            file.add("first", first.T)
        file.add("first", first)
        with pytest.raises(ValueError, match=r"\('second', \('I64', \(7,\)\)\) was not added"):
            file.finish()
        file = StreamedSafetensors(tmp_path / "file", specs, spool)
        file.add("first", first)
        assert not file.full
        file.add("second", second)
        assert file.full
        size, digest = file.finish()
    raw = (tmp_path / "file").read_bytes()
    assert (size, digest) == (len(raw), hashlib.sha256(raw).hexdigest())
    read = SafetensorsFile(tmp_path / "file")
    assert read.info("first").begin == BLOCK
    np.testing.assert_array_equal(read.read("first"), first)
    np.testing.assert_array_equal(read.read("second"), second)


def test_a_planned_checkpoint_is_the_same_one(tmp_path: Path) -> None:
    """Three weights and six tensors of state, in bands of two rows and in small files; both kinds in turns."""
    order: list[str] = []

    def tensors(*names: str) -> dict[str, np.ndarray]:
        return {name: numbers(60 * (n + 1)).view(np.float32).reshape(-1, 5) for n, name in enumerate(names)}

    def pieces(these: dict[str, np.ndarray]) -> Iterator[TensorPiece]:
        for name, array in these.items():
            for row in range(0, len(array), 2):
                order.append(name[0])
                yield TensorPiece(name, array[row : row + 2], (row, 0), array.shape)

    def plan(these: dict[str, np.ndarray]) -> Planned:
        specs = (PieceSpec(p.name, p.array.dtype, p.offset, p.array.shape, p.shape) for p in pieces(these))
        return Planned(specs, sum(array.nbytes for array in these.values()))

    weights, state = tensors("wa", "wb", "wc"), tensors("ma", "mb", "mc")
    kinds = {"weights": weights, "optimizer": state}
    for folder, planned in (("plain", None), ("planned", {kind: plan(these) for kind, these in kinds.items()})):
        order.clear()
        arguments = {"model": {}, "trainer": None, "max_file_bytes": 100, "planned": planned}
        write_checkpoint(tmp_path / folder, 1, weights=pieces(weights), optimizer=pieces(state), **arguments)
        made = "".join(order)
        assert (made.rindex("w") < made.index("m")) == (planned is None)
        checkpoint = open_checkpoint(tmp_path / folder)
        for kind, these in kinds.items():
            assert checkpoint.names(kind) == list(these)
            for name, array in these.items():
                assert checkpoint.read(kind, name).tobytes() == array.tobytes()
    assert len(list((tmp_path / "planned").glob("weights-*"))) > 3
    short = {"weights": plan({"wa": weights["wa"]}), "optimizer": plan(state)}
    with pytest.raises(ValueError, match="expected the tensor None"):
        write_checkpoint(
            tmp_path / "short", 1, model={}, weights=pieces(weights), optimizer=pieces(state), planned=short
        )
    assert not (tmp_path / "short").exists()
