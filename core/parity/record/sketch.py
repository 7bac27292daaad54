"""Linear sketches of tensors: signed sums over hashed buckets, from which the distance of two tensors is estimated.

A tensor is read as a matrix A [rows, columns] whose columns are its last axis. Its sketch s is K float64 numbers: each
element A[i, j] is added with a sign to one of them,

    s[(r(i) + c(j)) mod K] += p(i) * q(j) * A[i, j],

where r, c, p and q are counter-based hashes of (seed, tensor's name, global index). So a rank can sketch its own slice,
the sum over slices is the sketch of the whole, and the sketch of a difference is the difference of the sketches. Over
the random signs E|s|^2 = |A|^2 (count sketch of Charikar, Chen and Farach-Colton 2002; with the shifts r(i) + c(j) the
tensor sketch of Pham and Pagh 2013): |s(A) - s(B)| estimates the Frobenius norm |A - B|. A wrong element falls into
exactly one bucket, in full size. A tensor of at most K elements is kept whole in place of a sketch.

Four rows in a block of ROW_BLOCK have the same r, so that they are added before their columns are hashed: that is most
of the work. docs/records.md defines every bit of the hash.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np

BUCKETS = 256  # K of a record that is not too large for it
LEAST_BUCKETS = 32
ROW_BLOCK, ROWS_A_BUCKET = 128, 4
ROW_BUCKETS = ROW_BLOCK // ROWS_A_BUCKET
LARGEST = 1e150  # larger magnitudes count as non-finite: their squares must not overflow a float64
_TILE = 1 << 17  # elements converted to float64 at once: few enough for a processor's cache
_CHUNK = 1 << 19  # elements that one thread adds up; the sums of chunks are added in their order
_MOST_THREADS = 8
_LANES = 8  # float64 numbers of a processor's vector
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


class _Run(NamedTuple):
    """Rows of one block: their numbers, places in the block's permutation and signs, [n] each; the shifts of the
    block's buckets."""

    rows: np.ndarray
    places: np.ndarray
    signs: np.ndarray
    shifts: np.ndarray


@dataclass(frozen=True)
class Projection:
    """The sketch's hash for tensors of one name and shape, whatever they are (value, gradient, moment)."""

    name: str
    shape: tuple[int, ...]
    buckets: int = BUCKETS
    seed: int = 0
    _columns: tuple[np.ndarray, np.ndarray] = field(init=False, repr=False, compare=False)  # uint8, float32

    def __post_init__(self) -> None:
        if not 1 <= self.buckets <= BUCKETS or self.buckets & (self.buckets - 1):
            raise ValueError(f"buckets: must be a power of two of at most {BUCKETS}, found {self.buckets}")
        columns = 0 if self.whole else matrix_shape(self.shape)[1]
        hashed = mixed(self._key("columns"), np.arange(columns))
        object.__setattr__(
            self, "_columns", (_bucket(hashed, self.buckets).astype(np.uint8), _sign(hashed).astype(np.float32))
        )

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
        number ``column``. The order of the sums depends on the shape alone, not on the number of threads."""
        cuts, many = _cuts(rows), _many(array.shape[1])
        runs = list(zip(cuts, cuts[1:], strict=False))
        chunks = [runs[first : first + many] for first in range(0, len(runs), many)]
        if len(chunks) > 1 and threads() > 1:
            found = _pool().map(lambda chunk: self._chunk(array, rows, column, chunk), chunks)
        else:
            found = map(lambda chunk: self._chunk(array, rows, column, chunk), chunks)
        return merged(found, self.buckets)

    def runs(self, rows: np.ndarray, width: int) -> tuple[list[int], int]:
        """Where the runs of rows [n] of one block begin, and n; and how many, of ``width`` columns, are a chunk:
        the sums of chunks are added in their order."""
        return _cuts(rows), _many(width)

    def columns(self, column: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Buckets uint8 and signs float32 [width] of columns from ``column`` on."""
        buckets, signs = (values[column : column + width] for values in self._columns)
        return buckets, signs

    def _chunk(self, array: np.ndarray, rows: np.ndarray, column: int, runs: Sequence[tuple[int, int]]) -> Statistics:
        found, width = self.empty(), array.shape[1]
        blocks = np.array([rows[first] // ROW_BLOCK for first, _ in runs], np.int64)
        # Of each block a random affine permutation of its places, and a shift for each bucket of the permuted places.
        factors = mixed(self._key("blocks"), blocks)
        wanted = blocks[:, None] * ROW_BUCKETS + np.arange(ROW_BUCKETS)
        shifts = _bucket(mixed(self._key("shifts"), wanted), self.buckets)
        first, last = runs[0][0], runs[-1][1]
        signs = _sign(mixed(self._key("rows"), rows[first:last]))
        scratch = np.empty(_TILE)
        for number, (start, stop) in enumerate(runs):
            numbers = rows[start:stop]
            places = _permuted(numbers, int(factors[number]))
            run = _Run(numbers, places, signs[start - first : stop - first], shifts[number])
            for left in range(0, width, _TILE // ROW_BLOCK):
                part = array[start:stop, left : left + _TILE // ROW_BLOCK]
                if self.whole or len(part) <= ROW_BUCKETS:
                    values = part.astype(np.float64)
                    _count(found, part, values, 1)
                    self._add_rows(found.sketch, values, run, column + left)
                else:
                    self._add_block(found, part, run, column + left, scratch)
        return found

    def _add_block(self, found: Statistics, part: np.ndarray, run: _Run, column: int, scratch: np.ndarray) -> None:
        """Add ``part`` [n, m], rows of one block; rows of a bucket are added to one row first."""
        m = part.shape[1]
        block = scratch[: ROW_BLOCK * m].reshape(ROW_BLOCK, m)
        signs = np.zeros(ROW_BLOCK)
        if len(part) < ROW_BLOCK:
            block[...] = 0.0
        block[run.places], signs[run.places] = part, run.signs
        _count(found, part, block, ROWS_A_BUCKET)
        block *= signs[:, None]
        joined = block[0::ROWS_A_BUCKET]
        for row in range(1, ROWS_A_BUCKET):
            joined += block[row::ROWS_A_BUCKET]
        self._scatter(found.sketch, joined, run.shifts, column)

    def _add_rows(self, sketch: np.ndarray, values: np.ndarray, run: _Run, column: int) -> None:
        """Add ``values`` float64 [n, m], which are changed: row by row, or element by element where all are kept."""
        if self.whole:
            at = run.rows[:, None] * matrix_shape(self.shape)[1] + np.arange(column, column + values.shape[1])
            sketch[at.reshape(-1)] += values.reshape(-1)
            return
        values *= run.signs[:, None]
        self._scatter(sketch, values, run.shifts[run.places // ROWS_A_BUCKET], column)

    def _scatter(self, sketch: np.ndarray, values: np.ndarray, shifts: np.ndarray, column: int) -> None:
        """Add ``values`` [n, m], which are changed, to the buckets of their rows' ``shifts`` [n] and their columns."""
        buckets, signs = self.columns(column, values.shape[1])
        values *= signs
        at = shifts.astype(np.int16)[:, None] + buckets  # those from K on are the same buckets again
        made = np.bincount(at.reshape(-1), values.reshape(-1), 2 * self.buckets)
        sketch += made[: self.buckets] + made[self.buckets :]

    @cached_property
    def keys(self) -> np.ndarray:
        """uint64 [3]: of the hashes of blocks, shifts and rows."""
        return np.array([self._key(axis) for axis in ("blocks", "shifts", "rows")])

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
SPREAD = {32: (0.4, 1.85), 64: (0.45, 1.65), 128: (0.48, 1.6), 256: (0.5, 1.5)}


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


def in_turn(rows: np.ndarray) -> bool:
    """Whether numbers [n], of at least one row, count on by one."""
    return bool(int(rows[-1]) - int(rows[0]) == len(rows) - 1 and (rows[1:] > rows[:-1]).all())


def _cuts(rows: np.ndarray) -> list[int]:
    """Where the runs of rows of one block of the hash begin in the array, from 0, and its end."""
    if not len(rows):
        return [0]
    if in_turn(rows):
        return [0, *range(ROW_BLOCK - int(rows[0]) % ROW_BLOCK, len(rows), ROW_BLOCK), len(rows)]
    return [0, *(np.flatnonzero(np.diff(rows // ROW_BLOCK)) + 1).tolist(), len(rows)]


def _many(width: int) -> int:
    """Runs of rows, of ``width`` columns each, in one chunk."""
    return max(1, _CHUNK // max(1, ROW_BLOCK * width))


def threads() -> int:
    """Threads that add up a large tensor: as many as the process may use, by OMP_NUM_THREADS where that is set."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    own = int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))
    return min(own, _MOST_THREADS)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads(), thread_name_prefix="sketch")


def _count(found: Statistics, part: np.ndarray, values: np.ndarray, group: int) -> None:
    """Add the sums over ``part`` [n, m]. ``values``: it in float64, its rows in any order, perhaps with rows of zeros;
    what is not finite becomes 0 there. ``group``: see _total."""
    found.count += part.size
    with np.errstate(over="ignore", invalid="ignore"):
        norm2 = _total(values * values, group)
    if not norm2 < LARGEST:  # cheap to know of all others that each is finite, and its square too
        bad = ~(np.abs(values) < LARGEST)
        found.nonfinite += int(bad.sum())
        values[bad] = 0.0
        norm2 = _total(values * values, group)
        part = part[np.abs(part.astype(np.float64)) < LARGEST]
    found.norm2 += norm2
    found.sum += _total(values, group)
    if part.size:
        found.min, found.max = min(found.min, float(part.min())), max(found.max, float(part.max()))


def _total(values: np.ndarray, group: int) -> float:
    """Sum of ``values`` [n, m] in the order of a processor's vectors: of each of ``group`` rows and of every column
    modulo _LANES from the upper left, then of these sums."""
    whole = np.zeros((len(values), -(-values.shape[1] // _LANES) * _LANES))
    whole[:, : values.shape[1]] = values
    vectors = whole.reshape(len(values) // group, group, -1, _LANES).swapaxes(1, 2).reshape(-1, group * _LANES)
    return float(np.add.accumulate(np.add.reduce(vectors, axis=0))[-1])


def _permuted(rows: np.ndarray, factor: int) -> np.ndarray:
    """int64 [n]: place of each row in its block, 0 to ROW_BLOCK - 1, by the affine permutation of ``factor``."""
    return (rows * (factor & (ROW_BLOCK - 1) | 1) + (factor >> 32)) & (ROW_BLOCK - 1)


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
