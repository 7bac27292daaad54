"""Parts of tensors that are added to records time after time: what depends on their place alone is prepared once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

import numpy as np

from telechat_twins.core.parity.record.blocks import Grid
from telechat_twins.core.parity.record.sketch import BUCKETS, Projection, Statistics, matrix_shape, mixed
from telechat_twins.core.parity.record.sums import Given, Prepared, Sums

Rows: TypeAlias = "range | np.ndarray"  # numbers of rows of a tensor's matrix; a range, of step 1, where they count on
_MOST = 4096  # windows that are kept
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
        prepared = self._prepared
        if prepared is not None and self.sums is not None and self.sums.serves(array):
            blocked = blocks is not None and self._blocked
            made, check = prepared(array, blocks if blocked else None)
            if blocks is not None and self.grid is not None and not blocked:
                self.grid.add(blocks, array, numbers_of(self.rows), self.column)
            buckets = self.projection.buckets
            nonfinite, norm2, total, least, most = made[buckets:].tolist()
            return Statistics(made[:buckets].copy(), array.size, int(nonfinite), norm2, total, least, most), check
        rows = numbers_of(self.rows)
        if blocks is not None and self.grid is not None:
            self.grid.add(blocks, array, rows, self.column)
        found = self.projection.slice(array, rows, self.column)
        return found, checksum(self.projection.name, array, rows, self.column) if self.checked else 0

    @cached_property
    def sums_dtype(self) -> np.dtype:
        """What holds the block sums: float32, as a record does, where each is made at once of whole blocks of one row,
        and float64 where several parts are added."""
        return np.dtype(np.float32 if self._blocked and self.grid is not None and self.grid.height == 1 else np.float64)

    def new_blocks(self, array: np.ndarray) -> np.ndarray:
        """Room for a tensor's block sums, ``sums_dtype`` [grid.blocks]; ``array`` [n, m]: what is added first."""
        assert self.grid is not None
        written = self._all_blocks and self._prepared is not None and self.sums is not None and self.sums.serves(array)
        return (np.empty if written else np.zeros)(self.grid.blocks, self.sums_dtype)

    @cached_property
    def _all_blocks(self) -> bool:
        """Whether compiled sums of float32 write every block sum of the tensor once, whatever was there."""
        whole = isinstance(self.rows, range) and (len(self.rows), self.width) == matrix_shape(self.projection.shape)
        return whole and self._blocked and self.grid is not None and self.grid.height == 1

    @cached_property
    def _blocked(self) -> bool:
        """Whether compiled sums add up the blocks."""
        grid = self.grid
        return grid is not None and grid.even(self.column, self.width)

    @cached_property
    def _prepared(self) -> Prepared | None:
        """The compiled sums of this window."""
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
        return self.sums.prepare(
            Given(
                rows=rows,
                starts=np.array(self.projection.chunks(numbers_of(self.rows), self.width), np.int64),
                keys=np.append(self.projection.keys, key ^ _DOWN),
                buckets=buckets,
                signs=signs,
                width=self.projection.buckets,
                across=across,
                block=block,
            )
        )


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

    def of(self, kind: str, name: str, shape: Sequence[int], rows: Rows, column: int, width: int) -> Window:
        """The window of a tensor of ``shape``: of its checksum for weights before a step, with block sums for gradients
        that have a grid."""
        whole, at = tuple(shape), rows if isinstance(rows, range) else rows.tobytes()
        key = (name, whole, at, column, width, kind if kind in ("weight_before", "gradient") else "")
        found = self._held.get(key)
        if found is None:
            if len(self._held) >= _MOST:
                self._held.clear()
            projection = self._projections.get((name, whole))
            if projection is None:
                projection = self._projections[name, whole] = Projection(name, whole, self.buckets, self.seed)
            grid = self.grids.get(name) if kind == "gradient" else None
            found = Window(projection, rows, column, width, kind == "weight_before", grid, self.sums)
            self._held[key] = found
        return found


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
