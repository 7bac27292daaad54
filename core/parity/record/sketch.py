"""Linear sketches of tensors: signed sums over hashed buckets, from which the distance of two tensors is estimated.

A tensor is read as a matrix A [rows, columns] whose columns are its last axis. Its sketch s is K float64 numbers: each
element A[i, j] is added with a sign to one of them,

    s[(r(i) + c(j)) mod K] += p(i) * q(j) * A[i, j],

where r, c, p and q are counter-based hashes of (seed, tensor's name, global index). So a rank can sketch its own slice,
the sum over slices is the sketch of the whole, and the sketch of a difference is the difference of the sketches. Over
the random signs E|s|^2 = |A|^2 (count sketch of Charikar, Chen and Farach-Colton 2002; with the shifts r(i) + c(j) the
tensor sketch of Pham and Pagh 2013): |s(A) - s(B)| estimates the Frobenius norm |A - B|. A wrong element falls into
exactly one bucket, in full size. A tensor of at most K elements is kept whole in place of a sketch.

One row in ROW_BLOCK is hashed to one of ROW_BUCKETS shifts of its block, so that a block of rows is first reduced by a
matrix product; docs/records.md defines every bit of the hash.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

BUCKETS = 256  # K of a record that is not too large for it
LEAST_BUCKETS = 32
ROW_BLOCK, ROW_BUCKETS = 128, 16
LARGEST = 1e150  # larger magnitudes count as non-finite: their squares must not overflow a float64
_TILE = 1 << 17  # elements converted to float64 at once: few enough for a processor's cache
_SIGN, _BUCKET_BITS = np.uint64(63), np.uint64(32)


@dataclass
class Statistics:
    """Sums over elements of a tensor, additive over disjoint parts of it.

    ``count`` counts all elements, ``nonfinite`` those that are not finite or above LARGEST; everything else is over the
    others: ``norm2`` their sum of squares, ``sum``, ``min`` and ``max`` (inf and -inf without any), ``sketch`` float64
    [K].
    """

    sketch: np.ndarray
    count: int = 0
    nonfinite: int = 0
    norm2: float = 0.0
    sum: float = 0.0
    min: float = math.inf
    max: float = -math.inf

    def merge(self, other: Statistics) -> None:
        """Add the statistics of another part of the tensor."""
        self.sketch += other.sketch
        self.count += other.count
        self.nonfinite += other.nonfinite
        self.norm2 += other.norm2
        self.sum += other.sum
        self.min, self.max = min(self.min, other.min), max(self.max, other.max)


def merged(parts: Iterable[Statistics], buckets: int) -> Statistics:
    """The statistics of a tensor from those of its parts, added in the order given."""
    whole = Statistics(np.zeros(buckets))
    for part in parts:
        whole.merge(part)
    return whole


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor's matrix: the last axis is the columns; a scalar is one element."""
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)


@dataclass(frozen=True)
class Projection:
    """The sketch's hash for tensors of one name and shape, whatever they are (value, gradient, moment)."""

    name: str
    shape: tuple[int, ...]
    buckets: int = BUCKETS
    seed: int = 0
    _columns: tuple[np.ndarray, np.ndarray] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.buckets < 1 or self.buckets & (self.buckets - 1):
            raise ValueError(f"buckets: must be a power of two, found {self.buckets}")
        columns = 0 if self.whole else matrix_shape(self.shape)[1]
        hashed = mixed(self._key("columns"), np.arange(columns))
        object.__setattr__(self, "_columns", (_bucket(hashed, self.buckets), _sign(hashed)))

    @property
    def whole(self) -> bool:
        """Whether the sketch is the tensor itself, its elements in row-major order."""
        return math.prod(self.shape) <= self.buckets

    def empty(self) -> Statistics:
        """The statistics of no element."""
        return Statistics(np.zeros(self.buckets))

    def box(self, array: np.ndarray, offset: Sequence[int]) -> Statistics:
        """Statistics of the box ``array`` of the tensor that begins at ``offset``; any float dtype."""
        if array.ndim != len(self.shape) or len(offset) != array.ndim:
            raise ValueError(f"{self.name}: a box of {array.ndim} axes at {tuple(offset)} of shape {self.shape}")
        if any(start < 0 or start + n > size for start, n, size in zip(offset, array.shape, self.shape, strict=True)):
            raise ValueError(f"{self.name}: a box of {array.shape} at {tuple(offset)} is not inside {self.shape}")
        if not self.shape:
            return self.slice(array.reshape(1, 1), np.zeros(1, np.int64), 0)
        rows = np.zeros(1, np.int64)
        for start, n, size in zip(offset[:-1], array.shape[:-1], self.shape[:-1], strict=True):
            rows = (rows[:, None] * size + np.arange(start, start + n)).reshape(-1)
        return self.slice(array.reshape(len(rows), array.shape[-1]), rows, offset[-1])

    def slice(self, array: np.ndarray, rows: np.ndarray, column: int) -> Statistics:
        """Statistics of ``array`` [n, m]: its row i is row ``rows[i]`` of the tensor's matrix, its first column is
        number ``column``."""
        found, width = self.empty(), array.shape[1]
        # Rows of one block of the hash that lie together in the array; sums are over them in this order.
        cuts = [0, *(np.flatnonzero(np.diff(rows // ROW_BLOCK)) + 1).tolist(), len(rows)]
        for first, last in zip(cuts, cuts[1:], strict=False):
            step = max(1, _TILE // max(1, last - first))
            for start in range(0, width, step) if last > first else ():
                part = array[first:last, start : start + step]
                self._add(found, part, rows[first:last], column + start)
        return found

    def _add(self, found: Statistics, part: np.ndarray, rows: np.ndarray, column: int) -> None:
        """Add ``part`` [n, m], rows of one block of the hash."""
        values = np.ascontiguousarray(part, np.float64)
        flat = values.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            norm2 = float(flat @ flat)
        if not norm2 < LARGEST**2:
            bad = ~(np.abs(flat) < LARGEST)
            found.nonfinite += int(bad.sum())
            flat = np.where(bad, 0.0, flat)
            values, norm2 = flat.reshape(values.shape), float(flat @ flat)
            kept = flat[~bad]
        else:
            kept = part
        found.count += flat.size
        found.norm2 += norm2
        found.sum += float(flat.sum())
        if kept.size:
            found.min, found.max = min(found.min, float(kept.min())), max(found.max, float(kept.max()))
        self._project(found.sketch, values, rows, column)

    def _project(self, sketch: np.ndarray, values: np.ndarray, rows: np.ndarray, column: int) -> None:
        width = values.shape[1]
        if self.whole:
            places = rows[:, None] * matrix_shape(self.shape)[1] + np.arange(column, column + width)
            np.add.at(sketch, places.reshape(-1), values.reshape(-1))
            return
        hashed = mixed(self._key("rows"), rows)
        sign, bucket = _sign(hashed), _bucket(hashed, ROW_BUCKETS)
        shifts = self._shifts(int(rows[0]) // ROW_BLOCK)
        if len(rows) > ROW_BUCKETS:
            # [16, n] @ [n, m]: rows of one bucket, with their signs, become one row.
            reduce = np.zeros((ROW_BUCKETS, len(rows)))
            reduce[bucket, np.arange(len(rows))] = sign
            signed = reduce @ values
        else:
            signed, shifts = values * sign[:, None], shifts[bucket]
        shift, sign = (array[column : column + width] for array in self._columns)
        signed *= sign
        places = (shifts[:, None] + shift) & (self.buckets - 1)
        sketch += np.bincount(places.reshape(-1), signed.reshape(-1), self.buckets)

    def _shifts(self, block: int) -> np.ndarray:
        """int64 [ROW_BUCKETS]: how far each bucket of a block of rows is shifted."""
        counter = np.arange(block * ROW_BUCKETS, (block + 1) * ROW_BUCKETS)
        return _bucket(mixed(self._key("blocks"), counter), self.buckets)

    def _key(self, axis: str) -> np.uint64:
        digest = hashlib.sha256(f"record/{self.seed}/{self.name}/{axis}".encode()).digest()
        return np.uint64(int.from_bytes(digest[:8], "little"))


@dataclass(frozen=True)
class Distance:
    """Frobenius norm of the difference of two tensors: the estimate, and an interval that holds it in at least 99 % of
    all choices of the signs. Exact, with low == value == high, where tensors are kept whole."""

    value: float
    low: float
    high: float


# Of |s(A) - s(B)| over |A - B|: it lies between these in at least 99 % of trials, for full differences, differences of
# rank one, single rows and columns, and a few elements (measured, and held by tests).
SPREAD = {32: (0.45, 1.8), 64: (0.5, 1.7), 128: (0.55, 1.6), 256: (0.6, 1.5)}


def distance(a: np.ndarray, b: np.ndarray, shape: Sequence[int]) -> Distance:
    """The distance of two tensors of ``shape`` from their sketches, float64 [K] each, of equal name and seed.

    Raises ValueError when the sketches have different sizes.
    """
    if a.shape != b.shape:
        raise ValueError(f"sketches of {a.shape} and {b.shape} buckets cannot be compared")
    value = float(np.linalg.norm(a - b))
    if math.prod(shape) <= len(a):
        return Distance(value, value, value)
    least, most = SPREAD[len(a)]
    return Distance(value, value / most, value / least)


def mixed(key: np.uint64, counter: np.ndarray) -> np.ndarray:
    """uint64 of the shape of ``counter``: splitmix64 (Steele, Lea and Flood 2014) at key + counter."""
    z = counter.astype(np.uint64)
    with np.errstate(over="ignore"):
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _sign(hashed: np.ndarray) -> np.ndarray:
    """float64 +1 or -1, from the highest bit."""
    return 1.0 - 2.0 * (hashed >> _SIGN).astype(np.float64)


def _bucket(hashed: np.ndarray, buckets: int) -> np.ndarray:
    """int64 from 0 to ``buckets`` - 1, a power of two: from bits 32 and up."""
    return ((hashed >> _BUCKET_BITS) & np.uint64(buckets - 1)).astype(np.int64)
