"""MindSpore's .ckpt files: every one that MindSpore writes is read, its CRC is checked, other files are named."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from telechat_twins.convert.file_kind import kind_of
from telechat_twins.convert.mindformers.ckpt import CkptFile, save_ckpt
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.safetensors import DTYPES

CRC = 17  # bytes behind the message


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def value(name: str, kind: str, dims: list[int], content: bytes) -> bytes:
    """One value as MindSpore's schema has it (mindspore.train.checkpoint_pb2)."""
    tensor = b"".join(field(1, size) for size in dims) + field(2, kind.encode()) + field(3, content)
    return field(1, field(1, name.encode()) + field(2, tensor))


def with_crc(body: bytes) -> bytes:
    return body + b"crc_num" + zlib.crc32(body).to_bytes(10, "big")


ONE = value("a.weight", "Float32", [2, 3], np.arange(6, dtype=np.float32).tobytes())
TWO = ONE + value("b", "Int32", [0], bytes(4))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "f32": random.standard_normal((3, 5)).astype(np.float32),
        "f16": random.standard_normal((2, 2, 2)).astype(np.float16),
        "f64": random.standard_normal(4),
        "bf16": random.standard_normal((4, 3)).astype(DTYPES["BF16"]),
        "long": random.standard_normal(1000).astype(np.float32),
        "scalar": np.float32(1.5).reshape(()),
        "名字": np.ones((1, 1), np.float32),
    }


def assert_holds(file: CkptFile, wanted: Mapping[str, np.ndarray]) -> None:
    for name, array in wanted.items():
        found = file.read(name)
        assert (found.dtype, found.shape) == (array.dtype, array.shape) and found.tobytes() == array.tobytes(), name


def test_what_mindspore_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its CRC and without, in one part a tensor and in many, beside counters and texts."""
    ms = pytest.importorskip("mindspore")
    from mindspore.train import serialization

    wanted = arrays()
    values = [{"name": n, "data": ms.Tensor(a)} for n, a in wanted.items()]
    values += [{"name": "epoch", "data": ms.Tensor(3, ms.int32)}, {"name": "flag", "data": ms.Tensor(True)}]
    for crc in (False, True):
        path = tmp_path / f"crc-{crc}.ckpt"
        ms.save_checkpoint(values, str(path), crc_check=crc, append_dict={"note": "a text", "lr": 0.5})
        assert (path.read_bytes()[-CRC:-10] == b"crc_num") is crc
        file = CkptFile(path)
        assert_holds(file, wanted)
        assert set(file.tensors) == {*wanted, "epoch", "flag", "note", "lr"} == set(ms.load_checkpoint(str(path)))
    monkeypatch.setattr(serialization, "SLICE_SIZE", 1)  # KB; else 512 MB
    ms.save_checkpoint(values, str(tmp_path / "parts.ckpt"), crc_check=True)
    assert (tmp_path / "parts.ckpt").read_bytes().count(b"long") == 4
    assert_holds(CkptFile(tmp_path / "parts.ckpt"), wanted)
    monkeypatch.undo()
    save_ckpt(tmp_path / "ours.ckpt", wanted)
    assert_holds(CkptFile(tmp_path / "ours.ckpt"), wanted)
    theirs = ms.load_checkpoint(str(tmp_path / "ours.ckpt"), crc_check=True)
    assert theirs["f32"].asnumpy().tobytes() == wanted["f32"].tobytes()


def test_packed_dimensions_and_empty_tensors(tmp_path: Path) -> None:
    """Forms that the schema allows and MindSpore does not write today."""
    tensor = field(1, varint(2) + varint(300)) + field(2, b"Float32") + field(3, bytes(2400))
    path = written(
        tmp_path / "a.ckpt", field(1, field(1, b"x") + field(2, tensor)) + value("y", "Float16", [3, 0], b"")
    )
    assert CkptFile(path).tensors["x"].shape == (2, 300)
    assert CkptFile(path).read("y").shape == (3, 0)


def test_every_flipped_byte_is_seen_where_there_is_a_crc(tmp_path: Path) -> None:
    whole = with_crc(TWO)
    assert CkptFile(written(tmp_path / "a.ckpt", whole)).read("a.weight").tolist() == [[0, 1, 2], [3, 4, 5]]
    for place in range(len(whole)):
        for flip in (1, 128):
            damaged = bytearray(whole)
            damaged[place] ^= flip
            with pytest.raises(UserError, match=r"a\.ckpt: is (damaged|truncated|not a MindSpore)") as caught:
                CkptFile(written(tmp_path / "a.ckpt", bytes(damaged)))
            assert "\n" not in str(caught.value)


def test_without_a_crc_a_flipped_byte_makes_no_traceback(tmp_path: Path) -> None:
    """A weight's bits can change unseen there; nothing else can but names and sizes that still fit each other."""
    seen = 0
    for place in range(len(TWO)):
        for bit in range(8):
            damaged = bytearray(TWO)
            damaged[place] ^= 1 << bit
            try:
                CkptFile(written(tmp_path / "a.ckpt", bytes(damaged)))
            except UserError as error:
                seen += 1
                assert "a.ckpt: is " in str(error) and "\n" not in str(error)
    assert seen > 8 * (len(TWO) - 24 - 4 - len("a.weight") - 1) * 0.7


@pytest.mark.parametrize("crc", [False, True])
def test_a_truncated_file_is_refused(tmp_path: Path, crc: bool) -> None:
    """But for a cut between two tensors without a CRC, which the model's table of tensors sees."""
    whole = with_crc(TWO) if crc else TWO
    for size in range(len(whole)):
        path = written(tmp_path / "a.ckpt", whole[:size])
        if size == len(ONE) or (crc and size == len(TWO)):
            assert len(CkptFile(path).tensors) == (1 if size == len(ONE) else 2)
            continue
        with pytest.raises(UserError, match=r"a\.ckpt: is (truncated or damaged|not a MindSpore checkpoint)"):
            CkptFile(path)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (ONE + ONE.replace(b"a.weight", b"b.weight") + ONE, "'a.weight' is there twice"),
        (value("a", "Float32", [2], bytes(4)), r"'a' has 4 bytes for F32 \[2\]"),
        (value("a", "Float32", [2**63], bytes(4)), "'a' has 4 bytes for F32"),
        (value("a", "Float31", [1], bytes(4)), "'a' is of type 'Float31'"),
        (value("a", "Float32", [2], bytes(4)) + value("a", "Float16", [2], bytes(4)), "parts of 'a' differ"),
        (field(1, field(2, b"")), "a value without a name"),
        (ONE + field(2, 7), "field 2 where a value should be"),
    ],
)
def test_contents_that_contradict_each_other_are_refused(tmp_path: Path, body: bytes, says: str) -> None:
    for content in (body, with_crc(body)):
        with pytest.raises(UserError, match=says):
            CkptFile(written(tmp_path / "a.ckpt", content))


def archive() -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("weights"))
    return made.getvalue()


def numpys() -> bytes:
    made = io.BytesIO()
    np.save(made, np.ones(3))
    return made.getvalue()


KINDS = {
    "a zip archive, which is what torch.save writes": b"PK\x03\x04" + bytes(40),
    "a pickle (pickled weights": b"\x80\x04]\x94K\x01a.",
    "a safetensors file; name it .safetensors": save({"a": np.ones(3, np.float32)}),
    "an array of numpy's": numpys(),
    "a gzip archive": gzip.compress(TWO),
    "a tar archive": archive(),
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n",
    "a web page": b"\n<!DOCTYPE html><html></html>",
    'text ("{\\"model\\": 1}"...)': b'{"model": 1}',
    'text ("\\u6743\\u91cd"...)': "权重".encode(),
    "nothing but zeros": bytes(1000),
    "an empty file": b"",
    "of no kind known here": bytes(range(200, 256)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_named(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path / "a.ckpt", KINDS[kind])
    assert kind_of(path).startswith(kind)
    with pytest.raises(UserError) as caught:
        CkptFile(path)
    assert f"a.ckpt: is not a MindSpore checkpoint; it looks like {kind}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    (tmp_path / "folder.ckpt").mkdir()
    for path in (tmp_path / "folder.ckpt", tmp_path / "gone.ckpt"):
        with pytest.raises(UserError, match=f"{path.name}: cannot be read"):
            CkptFile(path)
