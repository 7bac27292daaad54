"""Parts of tensors that are added to records time after time: what depends on their place alone is prepared once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias

import numpy as np

from telechat_twins.core.parity.record.blocks import Grid
from telechat_twins.core.parity.record.sketch import BUCKETS, Projection, Statistics, matrix_shape, mixed
from telechat_twins.core.parity.record.sums import Given, Prepared, Sums

Rows: TypeAlias = "range | np.ndarray"  # numbers of rows of a tensor's matrix; a range, of step 1, where they count on
_MOST, _MOST_TOGETHER = 4096, 64  # windows and lists of them that are kept
_ODD, _DOWN = np.uint64(1), np.uint64(0xD1B54A32D192ED03)


def numbers_of(rows: Rows) -> np.ndarray:
    """Rows as int64 [n]."""
    return np.arange(rows.start, rows.stop) if isinstance(rows, range) else rows


@dataclass(frozen=True)
class Window:
    """Rows ``rows`` and ``width`` columns, from ``column`` on, of the matrix of ``projection``'s tensor. ``checked``:
    with the checksum of its elements. ``grid``: with block sums. ``sums``: a backend's, in place of numpy."""

    projection: Projection
    rows: Rows
    column: int
    width: int
    checked: bool = False
    grid: Grid | None = None
    sums: Sums | None = None

    def add(self, array: np.ndarray, blocks: np.ndarray | None = None) -> tuple[Statistics, int]:
        """Statistics and checksum (0 unless ``checked``) of ``array`` [n, m], of any float dtype; its block sums are
        added to ``blocks`` [grid.blocks], float64 or ``sums_dtype``, the first time those of ``new_blocks``."""
        if self.compiled(array):
            assert self._prepared is not None
            made, checks = self._prepared([array], [self.own_blocks(blocks)])
            buckets = self.projection.buckets
            return self.taken(array, blocks, made[0, :buckets].copy(), made[0, buckets:].tolist()), int(checks[0])
        rows = numbers_of(self.rows)
        if blocks is not None and self.grid is not None:
            self.grid.add(blocks, array, rows, self.column)
        found = self.projection.slice(array, rows, self.column)
        return found, checksum(self.projection.name, array, rows, self.column) if self.checked else 0

    def compiled(self, array: np.ndarray) -> bool:
        """Whether compiled sums take ``array``."""
        return self.given is not None and self.sums is not None and self.sums.serves(array)

    def own_blocks(self, blocks: np.ndarray | None) -> np.ndarray | None:
        """The block sums that compiled sums add to."""
        return blocks if self._blocked else None

    def taken(
        self, array: np.ndarray, blocks: np.ndarray | None, sketch: np.ndarray, numbers: Sequence[float]
    ) -> Statistics:
        """The statistics of what compiled sums made; block sums that they leave to numpy are added."""
        if blocks is not None and self.grid is not None and not self._blocked:
            self.grid.add(blocks, array, numbers_of(self.rows), self.column)
        nonfinite, norm2, total, least, most = numbers
        return Statistics(sketch, array.size, int(nonfinite), norm2, total, least, most)

    @cached_property
    def sums_dtype(self) -> np.dtype:
        """What holds the block sums: float32, as a record does, where each is made at once of whole blocks of one row,
        and float64 where several parts are added."""
        return np.dtype(np.float32 if self._blocked and self.grid is not None and self.grid.height == 1 else np.float64)

    def new_blocks(self, array: np.ndarray) -> np.ndarray:
        """Room for a tensor's block sums, ``sums_dtype`` [grid.blocks]; ``array`` [n, m]: what is added first."""
        assert self.grid is not None
        written = self._all_blocks and self.compiled(array)
        return (np.empty if written else np.zeros)(self.grid.blocks, self.sums_dtype)

    @cached_property
    def _all_blocks(self) -> bool:
        """Whether compiled sums of float32 write every block sum of the tensor once, whatever was there."""
        whole = isinstance(self.rows, range) and (len(self.rows), self.width) == matrix_shape(self.projection.shape)
        return whole and self._blocked and self.grid is not None and self.grid.height == 1

    @cached_property
    def _blocked(self) -> bool:
        """Whether compiled sums add up the blocks, those of a row of blocks by one thread."""
        grid, rows = self.grid, self.rows
        rising = isinstance(rows, range) or bool((rows[1:] > rows[:-1]).all())
        return grid is not None and rising and grid.even(self.column, self.width)

    @cached_property
    def _prepared(self) -> Prepared | None:
        """The compiled sums of this window."""
        return None if self.given is None or self.sums is None else self.sums.prepare([self.given])

    @cached_property
    def given(self) -> Given | None:
        """What compiled sums need to know; None where numpy adds up."""
        if self.sums is None or self.projection.whole or not len(self.rows) or not self.width:
            return None
        rows = np.array([self.rows.start]) if isinstance(self.rows, range) else self.rows.astype(np.int64)
        key, across = _checksum_key(self.projection.name), np.zeros(0, np.uint64)
        if self.checked:
            across = _factors(key, np.arange(self.column, self.column + self.width))
        buckets, signs = self.projection.columns(self.column, self.width)
        block = (1, 1, 0, False)
        if self.grid is not None and self._blocked:
            block = (self.grid.height, self.grid.width, self.column // self.grid.width, self._all_blocks)
        runs, many = self.projection.runs(numbers_of(self.rows), self.width)
        return Given(
            rows=rows,
            runs=np.array(runs, np.int64),
            many=many,
            keys=np.append(self.projection.keys, key ^ _DOWN),
            buckets=buckets,
            signs=signs,
            width=self.projection.buckets,
            across=across,
            block=block,
        )


class Addend(NamedTuple):
    """What Window.add takes."""

    window: Window
    array: np.ndarray
    blocks: np.ndarray | None


@dataclass
class Windows:
    """Windows of the tensors of a run. ``buckets`` and ``seed``: of their sketches; ``grids``: of the block sums of
    gradients, by name; ``sums``: see Window."""

    buckets: int = BUCKETS
    seed: int = 0
    grids: Mapping[str, Grid] = field(default_factory=dict)
    sums: Sums | None = None
    _projections: dict[tuple[str, tuple[int, ...]], Projection] = field(default_factory=dict, repr=False)
    _held: dict[tuple[object, ...], Window] = field(default_factory=dict, repr=False)
    _together: dict[tuple[int, ...], Prepared] = field(default_factory=dict, repr=False)  # by the ids of windows

    def of(self, kind: str, name: str, shape: Sequence[int], rows: Rows, column: int, width: int) -> Window:
        """The window of a tensor of ``shape``: of its checksum for weights before a step, with block sums for gradients
        that have a grid."""
        whole, at = tuple(shape), rows if isinstance(rows, range) else rows.tobytes()
        key = (name, whole, at, column, width, kind if kind in ("weight_before", "gradient") else "")
        found = self._held.get(key)
        if found is None:
            if len(self._held) >= _MOST:
                self._held.clear()
                self._together.clear()
            projection = self._projections.get((name, whole))
            if projection is None:
                projection = self._projections[name, whole] = Projection(name, whole, self.buckets, self.seed)
            grid = self.grids.get(name) if kind == "gradient" else None
            found = Window(projection, rows, column, width, kind == "weight_before", grid, self.sums)
            self._held[key] = found
        return found

    def add(self, addends: Sequence[Addend]) -> list[tuple[Statistics, int]]:
        """As Window.add gives of each, compiled sums of all in one call, whose threads share all their rows. No two may
        have a block in common."""
        served = [a for a in addends if a.window.compiled(a.array)]
        if len(served) < 2:
            return [window.add(array, blocks) for window, array, blocks in addends]
        key = tuple(id(window) for window, _, _ in served)
        if (prepared := self._together.get(key)) is None:
            if len(self._together) >= _MOST_TOGETHER:
                self._together.clear()
            places = [given for window, _, _ in served if (given := window.given) is not None]
            assert self.sums is not None
            prepared = self._together[key] = self.sums.prepare(places)
        made, checks = prepared([array for _, array, _ in served], [w.own_blocks(blocks) for w, _, blocks in served])
        sketches, numbers = made[:, : self.buckets].copy(), made[:, self.buckets :].tolist()
        rows = zip(served, sketches, numbers, checks.tolist(), strict=True)
        found = {id(a): (a.window.taken(a.array, a.blocks, sketch, more), check) for a, sketch, more, check in rows}
        return [found.get(id(a)) or a.window.add(a.array, a.blocks) for a in addends]


def checksum(name: str, array: np.ndarray, rows: np.ndarray, column: int) -> int:
    """Sum, modulo 2^64, of the float32 bits of every element times odd hashes of its row and column: exact, and
    additive over disjoint boxes in any order."""
    key = _checksum_key(name)
    across = _factors(key, np.arange(column, column + array.shape[1]))
    total = np.uint64(0)
    with np.errstate(over="ignore"):
        for row, factor in _slabs(array, _factors(key ^ _DOWN, rows)):
            bits = np.ascontiguousarray(row, np.float32).view(np.uint32).astype(np.uint64) + _ODD
            bits *= across
            total += np.sum(bits.sum(axis=1, dtype=np.uint64) * factor, dtype=np.uint64)
    return int(total)


def _checksum_key(name: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.sha256(f"checksum/{name}".encode()).digest()[:8], "little"))


def _factors(key: np.uint64, numbers: np.ndarray) -> np.ndarray:
    """uint64: the odd hashes of rows or columns."""
    factors: np.ndarray = mixed(key, numbers) | _ODD
    return factors


def _slabs(array: np.ndarray, factors: np.ndarray) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """Rows of ``array`` with their factors, few enough at a time for a processor's cache."""
    height = max(1, (1 << 16) // max(1, array.shape[1]))
    for first in range(0, len(array), height):
        yield array[first : first + height], factors[first : first + height]
