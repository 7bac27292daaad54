"""Safetensors files: reads slices of tensors, and writes a file one tensor at a time.

The safetensors library writes a whole dictionary at once and does not support bfloat16 in numpy. Here a slice is read
with only the bytes it needs, a file is written while its tensors are produced, and every number of a header is checked:
a hostile or damaged file gives a UserError that names it, never a wrong array.

Layout of a file: 8 bytes little-endian header length, JSON header (may be padded with spaces), tensor bytes without
gaps. Each header entry: ``name: {"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted from the header's
end; ``__metadata__`` holds text to text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

import ml_dtypes
import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import new_file
from telechat_twins.core.files.direct_io import BLOCK, DirectFile, Spool
from telechat_twins.core.files.foreign import MAX_JSON, open_regular, refuse_stand_in
from telechat_twins.core.files.foreign import load_json as load_json
from telechat_twins.core.files.foreign import parse_json as parse_json
from telechat_twins.core.shown import printable, shown
from telechat_twins.core.types import JsonObject

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# Known to the library and not read here: numbers of few bits, which mean nothing without the scales beside them.
_QUANTIZED = re.compile(r"(F8|F6|F4)(_\w+)?$")
_CODES = {dtype: code for code, dtype in DTYPES.items()}

MAX_HEADER = MAX_JSON  # a third of the library's limit of 100 MB: a parsed header takes up to 28 times its size
MAX_DIMENSIONS = 32  # supported by every version of numpy
MAX_SIZE = 1 << 63  # elements along an axis, and bytes of a file
_CHUNK = 16 << 20
_PART = 4 << 20  # bytes of a tensor that are worth a thread

Index = tuple[slice, ...]


def dtype_code(dtype: np.dtype | type) -> str:
    """Safetensors' name of a numpy dtype (``F32``, ``BF16``...); ValueError if it has none."""
    code = _CODES.get(np.dtype(dtype).newbyteorder("<"))
    if code is None:
        raise ValueError(f"safetensors has no name for dtype {np.dtype(dtype)}")
    return code


@dataclass(frozen=True)
class TensorInfo:
    """Dtype, shape and place of a tensor; ``begin`` and ``end`` are byte positions in the file."""

    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.code]

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class SafetensorsFile:
    """An opened file with a checked header; tensors are read on demand. ``tensors`` is in the order of their bytes."""

    def __init__(self, path: str | Path) -> None:
        """Read and check the header. UserError if the file is missing, truncated, or not what it claims to be."""
        self.path = Path(path)
        with open_regular(self.path) as file:
            try:
                size = os.fstat(file.fileno()).st_size
                self.tensors, self.metadata = _parse(file.read(8), file, size, self.path)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None

    def info(self, name: str) -> TensorInfo:
        """Shape, dtype and place of a tensor; UserError if the file has none of that name."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: has no tensor '{name}'")
        return self.tensors[name]

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """The tensor, or its box ``index`` (slices without step; trailing ones may be left out).

        Reads only the box's bytes. The result is a new array in the stored dtype.
        """
        info = self.info(name)
        starts, extents = box(info.shape, index)
        out = np.empty(extents, info.dtype)
        target = out.reshape(-1).view(np.uint8).data
        with open(self.path, "rb", buffering=0) as file:
            for place, begin, count in _runs(info, starts, extents):
                self._fill(file.fileno(), target[place : place + count], begin, name)
        return out

    def _fill(self, handle: int, target: memoryview, begin: int, name: str) -> None:
        """Read ``target`` from ``begin`` on, a long one in parts by as many threads as there are processors, at most
        four: a read from the page cache takes as long as the faults on new memory, which processors share."""
        count = min(4, len(os.sched_getaffinity(0)), len(target) // _PART)
        if count < 2:
            return self._fill_part(handle, target, begin, name)
        cuts = [len(target) * i // count for i in range(count + 1)]
        with ThreadPoolExecutor(count, "read-tensor") as pool:
            parts = [
                pool.submit(self._fill_part, handle, target[low:high], begin + low, name)
                for low, high in itertools.pairwise(cuts)
            ]
        for part in parts:
            part.result()

    def _fill_part(self, handle: int, target: memoryview, begin: int, name: str) -> None:
        done = 0
        while done < len(target):
            got = os.preadv(handle, [target[done : done + _CHUNK]], begin + done)
            if got == 0:
                raise UserError(f"{self.path}: ends inside tensor '{name}'; the file was cut after it was opened")
            done += got


class SafetensorsWriter:
    """Writer of a file whose tensors are not known in advance; the header is written last, into space kept for it.

    ``header_room``: bytes kept for the header. ``size``: the file's length so far. Use as a context manager; the file
    is valid only after a clean exit.
    """

    def __init__(self, path: str | Path, header_room: int, metadata: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self.header_room = header_room
        self.size = 8 + header_room
        self._entries: dict[str, JsonObject] = {"__metadata__": dict(metadata)} if metadata else {}
        self._header_used = len(_encode(self._entries))
        self._file = open(self.path, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._file.seek(self.size)

    def fits(self, name: str, array: np.ndarray) -> bool:
        """Whether the header has room for one more entry."""
        return self._header_used + len(_encode({name: self._entry(array)})) <= self.header_room

    def add(self, name: str, array: np.ndarray) -> None:
        """Append a tensor. ValueError if the name is taken."""
        if name in self._entries:
            raise ValueError(f"{self.path}: tensor '{name}' was given twice")
        self._entries[name] = self._entry(array)
        self._header_used += len(_encode({name: self._entries[name]}))
        array = np.ascontiguousarray(array, DTYPES[dtype_code(array.dtype)])
        data = array.reshape(-1).view(np.uint8).data
        for start in range(0, len(data), _CHUNK):
            self._write(data[start : start + _CHUNK])
        self.size += len(data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                header = _encode(self._entries)
                if len(header) > self.header_room:
                    raise ValueError(f"{self.path}: header of {len(header)} bytes in room for {self.header_room}")
                self._file.seek(0)
                self._write(memoryview(struct.pack("<Q", self.header_room) + header.ljust(self.header_room)))
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def _entry(self, array: np.ndarray) -> JsonObject:
        begin = self.size - 8 - self.header_room
        return {
            "dtype": dtype_code(array.dtype),
            "shape": list(array.shape),
            "data_offsets": [begin, begin + array.nbytes],
        }

    def _write(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]


class StreamedSafetensors:
    """Writer of a file whose tensors and their order are known in advance. The header is written first, so the hash is
    computed while writing and the page cache is not needed.

    ``specs``: name -> dtype code, shape; the data begins at a multiple of 4096 bytes. ``least_room``: bytes kept for
    the header at least. ``finish`` or ``abandon`` ends it.
    """

    def __init__(
        self, path: str | Path, specs: Mapping[str, tuple[str, tuple[int, ...]]], spool: Spool, least_room: int = 0
    ) -> None:
        self.path = Path(path)
        self._left = iter(specs.items())
        self._next = next(self._left, None)
        room = -(-(max(header_room(specs), least_room) + 8) // BLOCK) * BLOCK - 8
        self._file = DirectFile(self.path, spool)
        self._file.write(np.frombuffer(header_bytes(specs, room), np.uint8))

    @property
    def full(self) -> bool:
        """Whether every tensor has been added."""
        return self._next is None

    def add(self, name: str, array: np.ndarray) -> None:
        """Append a tensor. ValueError if it is not the next one."""
        code = dtype_code(array.dtype)
        if (name, (code, array.shape)) != self._next:
            raise ValueError(f"{self.path}: expected the tensor {self._next}, found '{name}', {code} {array.shape}")
        self._next = next(self._left, None)
        array = np.ascontiguousarray(array, DTYPES[code])
        self._file.write(array.reshape(-1).view(np.uint8))

    def finish(self) -> tuple[int, str]:
        """Complete the file on disk. Returns its size and SHA-256. ValueError if a tensor is missing."""
        if self._next is not None:
            self.abandon()
            raise ValueError(f"{self.path}: tensor {self._next} was not added")
        return self._file.size, self._file.finish()

    def abandon(self) -> None:
        """Close the file, incomplete."""
        self._file.abandon()


def header_room(specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> int:
    """Exact header length of a file that will hold ``specs`` (name -> dtype code, shape) in this order.

    A multiple of 8, as the library pads it, so that the same tensors in the same order give the same bytes.
    """
    return -(-len(_encode(_entries(specs, metadata))) // 8) * 8


def header_bytes(specs: Mapping[str, tuple[str, tuple[int, ...]]], room: int) -> bytes:
    """The beginning of a file of ``specs`` whose header takes ``room`` bytes, its length included."""
    return struct.pack("<Q", room) + _encode(_entries(specs)).ljust(room)


def _entries(specs: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> JsonObject:
    entries: JsonObject = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for name, (code, shape) in specs.items():
        end = begin + math.prod(shape) * DTYPES[code].itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    return entries


def file_sha256(path: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file in hexadecimal; ``on_bytes`` is called with the size of every block read."""
    digest = hashlib.sha256()
    block = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)  # read further ahead
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            if on_bytes:
                on_bytes(count)
    return digest.hexdigest()


def box(shape: tuple[int, ...], index: Index | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(starts, extents) of the box ``index`` of a tensor of ``shape``. ValueError for a step or too many slices."""
    index = tuple(index or ())
    if len(index) > len(shape):
        raise ValueError(f"{len(index)} slices for a tensor of {len(shape)} dimensions")
    starts, extents = [], []
    for size, part in zip(shape, index + (slice(None),) * (len(shape) - len(index)), strict=True):
        start, stop, step = part.indices(size)
        if step != 1:
            raise ValueError(f"slice {part} has a step")
        starts.append(start)
        extents.append(max(stop - start, 0))
    return tuple(starts), tuple(extents)


def _runs(info: TensorInfo, starts: tuple[int, ...], extents: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(byte position in the box, byte position in the file, byte count) of each contiguous run, in order."""
    if math.prod(extents) == 0:
        return
    item = info.dtype.itemsize
    strides = [item] * len(info.shape)
    for axis in reversed(range(len(info.shape) - 1)):
        strides[axis] = strides[axis + 1] * info.shape[axis + 1]
    # Trailing axes that are taken whole form one run together with the last axis that is cut.
    outer = len(info.shape)
    while outer > 0 and extents[outer - 1] == info.shape[outer - 1]:
        outer -= 1
    outer = max(outer - 1, 0)
    count = item * math.prod(extents[outer:])
    origin = info.begin + sum(start * stride for start, stride in zip(starts, strides, strict=True))
    for number, corner in enumerate(np.ndindex(*extents[:outer])):
        yield number * count, origin + sum(c * s for c, s in zip(corner, strides, strict=False)), count


def _encode(entries: Mapping[str, object]) -> bytes:
    return json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")


def _parse(prefix: bytes, file: BinaryIO, size: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    if len(prefix) < 8:
        raise UserError(f"{path}: truncated: a safetensors file has at least 8 bytes, found {size}")
    (length,) = struct.unpack("<Q", prefix)
    if MAX_HEADER < length <= size - 8:
        raise UserError(
            f"{path}: its header must have at most {MAX_HEADER} bytes, found {length}; write the tensors into several "
            "files"
        )
    if length > size - 8:
        refuse_stand_in(prefix + file.read(64), path)
        raise UserError(
            f"{path}: truncated, or not a safetensors file: it states a header of {length} bytes and has {size} in all"
        )
    try:
        header = parse_json(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise ValueError("__metadata__ does not map text to text")
        _refuse_quantized(header, path)
        infos = {name: _entry_info(name, entry, 8 + length) for name, entry in header.items()}
    except ValueError as error:
        raise UserError(f"{path}: damaged safetensors header ({error})") from None
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = 8 + length
    for name, info in ordered.items():
        if info.begin != position:
            word = "overlaps the one before it" if info.begin < position else "leaves a gap before it"
            raise UserError(f"{path}: damaged safetensors header (tensor '{name}' {word})")
        position = info.end
    if position != size:
        word = "truncated" if position > size else "damaged"
        raise UserError(f"{path}: {word}: the header describes {position} bytes, the file has {size}")
    return ordered, metadata


def _refuse_quantized(header: JsonObject, path: Path) -> None:
    """UserError for tensors of 8-bit floats and narrower ones: intact, but not read."""
    codes = ((name, entry.get("dtype")) for name, entry in header.items() if isinstance(entry, dict))
    few = [(name, code) for name, code in codes if isinstance(code, str) and _QUANTIZED.match(code)]
    if not few:
        return
    name, code = few[0]
    scale = next((f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in header), None)
    scales = f"'{printable(scale, 200)}'" if scale else "its scale (names in _scale_inv or _scale)"
    raise UserError(
        f"{path}: tensor '{printable(name, 200)}' holds numbers of {code[1]} bits ({code}), as {len(few)} of "
        f"{len(header)} tensors do, and these are not read; take the model's release in bfloat16, or multiply each by "
        f"{scales} and save it as bfloat16"
    )


def _entry_info(name: str, entry: object, base: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor '{name}' must have exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"tensor '{name}' has the unsupported dtype {shown(code)}; known: {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor '{name}' has the impossible shape {shown(shape)}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"tensor '{name}' has impossible data_offsets {shown(offsets)}")
    wanted = math.prod(shape) * DTYPES[code].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise ValueError(
            f"tensor '{name}' of shape {shape} {code} takes {wanted} bytes, its offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(code, tuple(shape), base + offsets[0], base + offsets[1])


def _naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < MAX_SIZE for value in values)


def write_atomically(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file and rename it to ``path``. After a UserError (full disk) a former file is unchanged."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        # ascontiguousarray alone would turn a scalar into a vector.
        whole = {name: np.ascontiguousarray(value).reshape(np.shape(value)) for name, value in tensors.items()}
        with new_file(path) as beside:
            save_file(whole, beside)
            # The library creates private files; give the result the permissions of any other new file.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(beside, 0o666 & ~umask)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out {path}: cannot be written ({error}); give another path or free some space") from None
