"""The safetensors reader and writer against the safetensors library, and against hostile files."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.errors import UserError
from telechat_twins.core.files import safetensors as safetensors_io
from telechat_twins.core.files.safetensors import DTYPES, SafetensorsFile, SafetensorsWriter, header_room


def sample(code: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random bytes seen as ``code``: nan and infinity included, so equality is of bytes."""
    count = int(np.prod(shape, dtype=int)) * DTYPES[code].itemsize
    data = np.random.default_rng(seed).integers(0, 2 if code == "BOOL" else 256, count, dtype=np.uint8)
    return data.view(DTYPES[code]).reshape(shape)


def write(path, tensors, room=4096, metadata=None):
    with SafetensorsWriter(path, room, metadata) as writer:
        for name, array in tensors.items():
            writer.add(name, array)


def test_the_library_reads_what_we_write(tmp_path):
    tensors = {code: sample(code, (3, 5), i) for i, code in enumerate(DTYPES) if code != "BF16"}
    tensors |= {"scalar": sample("F32", ()), "empty": sample("F32", (0, 4)), "name with é": sample("I64", (2,))}
    write(tmp_path / "a.safetensors", tensors, metadata={"format": "pt"})
    found = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert set(found) == set(tensors)
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name
    with safetensors.safe_open(tmp_path / "a.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_bfloat16_crosses_to_the_library_both_ways(tmp_path):
    """The library's numpy side has no bfloat16; its core, asked directly, has."""
    array = sample("BF16", (4, 6))
    write(tmp_path / "ours.safetensors", {"a": array})
    [(name, view)] = safetensors.deserialize((tmp_path / "ours.safetensors").read_bytes())
    assert (name, view["dtype"], view["shape"], bytes(view["data"])) == ("a", "BF16", [4, 6], array.tobytes())
    safetensors.numpy.save_file({"a": array}, tmp_path / "theirs.safetensors")
    theirs = SafetensorsFile(tmp_path / "theirs.safetensors").read("a")
    assert theirs.dtype == ml_dtypes.bfloat16 and theirs.tobytes() == array.tobytes()


def test_we_read_what_the_library_writes_and_write_the_same_bytes(tmp_path):
    tensors = {"b": sample("F32", (7, 3)), "a": sample("F32", (2,)), "half": sample("F16", (5,))}
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "theirs.safetensors")
    assert {name: file.read(name).tobytes() for name in file.tensors} == {n: a.tobytes() for n, a in tensors.items()}
    specs = {name: (info.code, info.shape) for name, info in file.tensors.items()}
    in_order = {name: file.read(name) for name in file.tensors}
    write(tmp_path / "ours.safetensors", in_order, header_room(specs, file.metadata), file.metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_slice_equals_numpys(tmp_path_factory, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=4)))
    code = data.draw(st.sampled_from(["F32", "BF16", "I8"]))
    part = st.one_of(st.none(), st.integers(-6, 6))
    index = tuple(slice(data.draw(part), data.draw(part)) for _ in range(data.draw(st.integers(0, len(shape)))))
    array = sample(code, shape)
    path = tmp_path_factory.mktemp("slices") / "a.safetensors"
    write(path, {"before": sample("F32", (3,)), "a": array, "after": sample("F32", (3,))})
    found = SafetensorsFile(path).read("a", index)
    assert found.shape == array[index].shape and found.tobytes() == array[index].tobytes()


def test_a_slice_reads_only_its_own_bytes(tmp_path, monkeypatch):
    write(tmp_path / "a.safetensors", {"a": sample("F32", (1000, 10)), "b": sample("F32", (1000, 10))})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    read = []
    real = safetensors_io.os.preadv
    monkeypatch.setattr(safetensors_io.os, "preadv", lambda *a: read.append(real(*a)) or read[-1])
    file.read("a", (slice(10, 13),))
    assert read == [3 * 10 * 4]  # rows lie together: one read
    read.clear()
    file.read("a", (slice(10, 13), slice(2, 5)))
    assert read == [3 * 4] * 3
    read.clear()
    file.read("a")
    assert read == [1000 * 10 * 4]


def test_arrays_in_other_memory_orders_are_written_right(tmp_path):
    array = sample("I32", (4, 6))
    write(tmp_path / "a.safetensors", {"t": array.T, "step": array[:, ::2], "big": array.astype(">i4")})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert np.array_equal(file.read("t"), array.T)
    assert np.array_equal(file.read("step"), array[:, ::2])
    assert np.array_equal(file.read("big"), array)


def test_writer_refuses_a_name_twice_and_a_header_too_long(tmp_path):
    one = np.zeros(1, np.float32)
    with pytest.raises(ValueError, match="'a' was given twice"), SafetensorsWriter(tmp_path / "a", 4096) as writer:
        writer.add("a", one)
        writer.add("a", one)
    with pytest.raises(ValueError, match="room for 16"), SafetensorsWriter(tmp_path / "b", 16) as writer:
        assert not writer.fits("a", one)
        writer.add("a", one)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "tensor 'b' overlaps"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "gap before"),
    "past the end": ({"a": entry(shape=(4,), offsets=(0, 16))}, 8, "truncated"),
    "data nobody owns": ({"a": entry()}, 12, "describes"),
    "backwards": ({"a": entry(offsets=(8, 0))}, 8, "impossible data_offsets"),
    "negative": ({"a": entry(offsets=(-8, 0))}, 8, "impossible data_offsets"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, 8, "impossible data_offsets"),
    "shape and size differ": ({"a": entry(shape=(3,))}, 8, "takes 12 bytes, its offsets span 8"),
    "dtype and size differ": ({"a": entry(dtype="F64")}, 8, "takes 16 bytes"),
    "negative shape": ({"a": entry(shape=(-2,))}, 8, "impossible shape"),
    "true as a size": ({"a": entry(shape=(True, 2))}, 8, "impossible shape"),
    "float as a size": ({"a": entry(shape=(2.0,))}, 8, "impossible shape"),
    "huge shape": ({"a": entry(shape=(2**62, 2**62))}, 8, "its offsets span 8"),
    "unknown dtype": ({"a": entry(dtype="F3")}, 8, "unsupported dtype 'F3'"),
    "dtype a list": ({"a": entry(dtype=["F32"])}, 8, "unsupported dtype"),
    "entry a list": ({"a": [1]}, 8, "exactly dtype, shape and data_offsets"),
    "more keys": ({"a": {**entry(), "x": 1}}, 8, "exactly dtype, shape and data_offsets"),
    "metadata not text": ({"__metadata__": {"a": 1}, "a": entry()}, 8, "text to text"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused(tmp_path, case):
    header, size, message = HOSTILE[case]
    expect_refused(tmp_path, json.dumps(header).encode(), bytes(size), message)


@pytest.mark.parametrize("code", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F4"])
def test_numbers_of_few_bits_are_named_with_the_way_out(tmp_path, code):
    """The file is intact, so nothing says that it is damaged."""
    header = {"up.weight": entry(dtype=code), "up.weight_scale_inv": entry(offsets=(8, 16))}
    data = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + bytes(16))
    with pytest.raises(UserError) as error:
        SafetensorsFile(tmp_path / "a.safetensors")
    message = str(error.value)
    assert f"numbers of {code[1]} bits ({code}), as 1 of 2 tensors do" in message and "damaged" not in message
    assert "multiply each by 'up.weight_scale_inv' and save it as bfloat16" in message


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":1,"a":2}', "key 'a' appears twice"),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}}', "key 'dtype' appears twice"),
        (b"[1]", "expected a JSON object"),
        (b"\xff\xfe", "damaged safetensors header"),
        (b'{"a"', "damaged safetensors header"),
        (b"[" * 200_000, "damaged safetensors header"),
        (b'{"a":' + b"9" * 10_000 + b"}", "damaged safetensors header"),
    ],
)
def test_hostile_json_is_refused(tmp_path, header, message):
    expect_refused(tmp_path, header, bytes(8), message)


@pytest.mark.parametrize("length", [9, 100_000_001, 2**63, 2**64 - 1])
def test_announced_header_longer_than_the_file_is_refused(tmp_path, length):
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", length) + b"{}      ")
    with pytest.raises(UserError, match=f"a.safetensors: truncated, .* states a header of {length} bytes"):
        SafetensorsFile(tmp_path / "a.safetensors")


def test_missing_empty_and_folder_are_named(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    for name, message in (("none", "no such file"), ("empty", "truncated"), (".", "cannot be read")):
        with pytest.raises(UserError, match=message):
            SafetensorsFile(tmp_path / name)


def test_file_cut_while_open_is_an_error_not_zeros(tmp_path):
    write(tmp_path / "a.safetensors", {"a": np.ones(1000, np.float32)})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    with open(tmp_path / "a.safetensors", "r+b") as handle:
        handle.truncate(5000)
    with pytest.raises(UserError, match="ends inside tensor 'a'"):
        file.read("a")


def expect_refused(tmp_path, header: bytes, data: bytes, message: str) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    with pytest.raises(UserError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
