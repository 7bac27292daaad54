"""MindSpore's .ckpt files: read here, tensor by tensor; written by MindSpore's own function.

A .ckpt is a protobuf message, ``repeated Value value = 1`` with
``Value {tag = 1, tensor = 2 {dims = 1, tensor_type = 2, tensor_content = 3}}``. A large tensor comes as several
values of one tag, one after the other, whose contents are joined.
``save_checkpoint(..., crc_check=True)`` appends "crc_num" and the CRC-32 of all before it, in ten bytes, big-endian.
MindSpore's ``load_checkpoint`` looks at that sum only when asked to, and at no length; here both are always checked.
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from telechat_twins.convert.file_kind import UNKNOWN, kind_of
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.protobuf import fields, varints
from telechat_twins.core.files.safetensors import DTYPES, Index, TensorInfo

# MindSpore's names -> safetensors' and bytes an element. None: text, or packed; its length is not checked.
_CODES = {"Float64": "F64", "Float32": "F32", "Float16": "F16", "BFloat16": "BF16"}
_SIZES: dict[str, int | None] = {
    **{"Float64": 8, "Float32": 4, "Float16": 2, "BFloat16": 2, "Bool": 1, "str": None, "Int4": None},
    **{f"{sign}Int{bits}": bits // 8 for sign in ("", "U") for bits in (8, 16, 32, 64)},
}
_CRC, _CRC_SIZE = b"crc_num", 10
_CHUNK = 1 << 24


class CkptFile:
    """An opened .ckpt. ``tensors``: name -> shape and dtype, like SafetensorsFile's. Values are read when asked for."""

    def __init__(self, path: str | Path) -> None:
        """UserError for what is not a checkpoint of MindSpore's (naming what it looks like), truncated, or damaged."""
        self.path = Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        self._parts: dict[str, list[memoryview]] = {}
        try:
            with open(self.path, "rb") as file:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # of length 0
            raise self._not_one() from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        # A value, at once followed by its tag; other kinds of files do not begin so.
        if data[:1] != b"\x0a":
            raise self._not_one()
        self._data = memoryview(data)
        body = self._checked()
        try:
            self._read_values(body)
        except ValueError as error:  # UnicodeDecodeError is one
            if kind_of(self.path) != UNKNOWN:  # text that begins with a new line, say
                raise self._not_one() from None
            raise UserError(
                f"{self.path}: is truncated or damaged, or not a MindSpore checkpoint ({error}); copy it again"
            ) from None

    def _not_one(self) -> UserError:
        return UserError(
            f"{self.path}: is not a MindSpore checkpoint; it looks like {kind_of(self.path)}; if it holds pickled "
            "weights, convert them to safetensors with the tools that wrote it"
        )

    def _checked(self) -> memoryview:
        """The message without the sum behind it, which must be right where there is one."""
        end = len(self._data) - len(_CRC) - _CRC_SIZE
        if end < 0 or bytes(self._data[end : end + len(_CRC)]) != _CRC:
            return self._data
        body, found = self._data[:end], 0
        for first in range(0, end, _CHUNK):
            found = zlib.crc32(body[first : first + _CHUNK], found)
        written = int.from_bytes(self._data[end + len(_CRC) :], "big")
        if found != written:
            raise UserError(
                f"{self.path}: is damaged: its CRC-32 is {found:08x}, {written:08x} was written with it; copy it again"
            )
        return body

    def _read_values(self, body: memoryview) -> None:
        """ValueError for what MindSpore does not write."""
        last = None
        for number, value in fields(body):
            if number != 1 or isinstance(value, int):
                raise ValueError(f"field {number} where a value should be")
            inside = dict(fields(value))
            tag, tensor = inside.get(1), inside.get(2)
            if not isinstance(tag, memoryview):
                raise ValueError("a value without a name")
            name = bytes(tag).decode()
            if not isinstance(tensor, memoryview):
                continue  # a MapParameter: hash tables, which no model here has
            dims, kind, content = _tensor(tensor)
            if kind not in _SIZES:
                raise ValueError(f"'{name}' is of type '{kind}', which MindSpore does not know")
            info = TensorInfo(_CODES.get(kind, kind), dims, 0, len(content))
            if name == last:
                before = self.tensors[name]
                if (before.code, before.shape) != (info.code, info.shape):
                    raise ValueError(f"the parts of '{name}' differ in type or shape")
            elif name in self.tensors:
                raise ValueError(f"'{name}' is there twice")
            else:
                self._end(last)
            self.tensors[name], last = info, name
            self._parts.setdefault(name, []).append(content)
        self._end(last)

    def _end(self, name: str | None) -> None:
        """All parts of ``name`` have been seen: they must make up its shape."""
        if name is None:
            return
        info, size = self.tensors[name], sum(map(len, self._parts[name]))
        width = _SIZES[{code: kind for kind, code in _CODES.items()}.get(info.code, info.code)]
        if width is not None and size != math.prod(info.shape) * width:
            raise ValueError(f"'{name}' has {size} bytes for {info.code} {list(info.shape)}")

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """A tensor, or the box ``index`` of it, in its stored dtype, in memory of its own."""
        info = self.tensors[name]
        out, place = np.empty(info.shape, DTYPES[info.code]), 0
        target = out.reshape(-1).view(np.uint8)
        for part in self._parts[name]:
            target[place : place + len(part)] = part
            place += len(part)
        return out if index is None else out[index]


def _tensor(message: memoryview) -> tuple[tuple[int, ...], str, memoryview]:
    dims: list[int] = []
    kind, content = "", memoryview(b"")
    for number, value in fields(message):
        if number == 1:
            dims += [value] if isinstance(value, int) else varints(value)
        elif number == 2 and not isinstance(value, int):
            kind = bytes(value).decode()
        elif number == 3 and not isinstance(value, int):
            content = value
    return () if dims == [0] else tuple(dims), kind, content  # [0] is how MindSpore writes a scalar


def save_ckpt(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a .ckpt with MindSpore, with its CRC; UserError if there is none."""
    ms = _mindspore(path)
    values = [{"name": name, "data": ms.Tensor(array)} for name, array in tensors.items()]
    ms.save_checkpoint(values, str(path), crc_check=True)


def _mindspore(path: Path) -> ModuleType:
    try:
        import mindspore
    except ImportError as error:
        raise UserError(
            f"{path.name}: a .ckpt is written by MindSpore, which cannot be imported here ({error}); install the "
            "extra 'ms', or use safetensors"
        ) from None
    return mindspore
