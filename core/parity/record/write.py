"""Files of a record, hashed while they are written, without a copy of what they hold."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from telechat_twins.core.files.safetensors import dtype_code, header_bytes, header_room
from telechat_twins.core.types import JsonObject


class Parts(NamedTuple):
    """A tensor of ``shape`` as arrays of ``dtype`` whose elements follow one another."""

    dtype: np.dtype
    shape: tuple[int, ...]
    arrays: Sequence[np.ndarray]


def write_bytes(path: Path, pieces: Iterable[bytes | memoryview]) -> JsonObject:
    """Write a file; returns its ``bytes`` and ``sha256``, as a record's header has them. OSError as of open."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
            size += len(piece)
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray | Parts]) -> JsonObject:
    """As ``write_bytes``, a safetensors file of ``tensors``, those of the widest elements first, as readers that map
    files want them. ValueError for parts that are not of their tensor's dtype or do not fill it."""
    whole = {n: t if isinstance(t, Parts) else Parts(t.dtype, t.shape, [t]) for n, t in tensors.items()}
    whole = dict(sorted(whole.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    for name, tensor in whole.items():
        if any(a.dtype != tensor.dtype for a in tensor.arrays) or math.prod(tensor.shape) != sum(
            a.size for a in tensor.arrays
        ):
            raise ValueError(f"{path}: the parts of '{name}' do not make {tensor.dtype} {tensor.shape}")
    specs = {name: (dtype_code(tensor.dtype), tensor.shape) for name, tensor in whole.items()}
    arrays = (array for tensor in whole.values() for array in tensor.arrays)
    return write_bytes(path, [header_bytes(specs, header_room(specs)), *map(_bytes, arrays)])


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
