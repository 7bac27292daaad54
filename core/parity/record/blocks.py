"""Block sums of gradients, beside the sketch: few elements each, so that a single wrong one stands out.

The matrix of a gradient [rows, columns] is cut into blocks of ``height`` x ``width`` elements, whose sums are kept. How
small the blocks are is decided by the bytes that a record may have, alike for all large gradients of a run but for a
factor of two: a model of ten million elements has blocks of SMALLEST, one of a hundred billion has blocks of many
thousands. Small gradients
have blocks of one element, and longer vectors of SMALLEST: biases and gains, which need few bytes in any model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from telechat_twins.core.parity.record.sketch import LARGEST, in_turn

SMALLEST = 4  # elements of a block; blocks of up to WIDEST are parts of one row
WIDEST = 16
LEAST_SIDE = 8  # rows and columns of blocks, so that each has a distribution
LARGE = 4096  # elements; tensors of up to so many are kept whole
FINE_SHARE = 0.5  # of the room for blocks that small tensors and vectors may take, all of them or none
HIGHEST = 128  # rows of a block
_NUMBER = 4  # bytes
_TILE = 1 << 16  # elements converted to float64 at once
_WIDEST_COMPILED = 1024  # columns that kernels/cpu/sums.cc reads at once


@dataclass(frozen=True)
class Grid:
    """Height and width of the blocks of a matrix, powers of two, and its own ``shape``, rows and columns."""

    height: int
    width: int
    shape: tuple[int, int]

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows and columns of blocks."""
        return -(-self.shape[0] // self.height), -(-self.shape[1] // self.width)

    def even(self, column: int, width: int) -> bool:
        """Whether ``width`` columns from ``column`` on are whole blocks, of rows few enough for compiled sums."""
        return column % self.width == 0 and width % self.width == 0 and self.width <= _WIDEST_COMPILED

    def add(self, sums: np.ndarray, array: np.ndarray, rows: np.ndarray, column: int) -> None:
        """Add ``array`` [n, m] of any float dtype, rows ``rows`` of the matrix from ``column`` on, to ``sums`` float64
        [blocks]; elements that the sketch leaves out are left out. Whole blocks of a row are added in pairs, these in
        pairs and so on."""
        places = np.arange(column, column + array.shape[1]) // self.width
        starts = np.flatnonzero(np.diff(places, prepend=-1))
        even = column % self.width == 0 and array.shape[1] % self.width == 0
        height = max(1, _TILE // array.shape[1])
        for first in range(0, len(array), height):
            across = _finite(array[first : first + height])
            if even:
                while across.shape[1] > len(starts):
                    across = across[:, 0::2] + across[:, 1::2]
            else:
                across = np.add.reduceat(across, starts, axis=1)
            at = rows[first : first + height] // self.height
            mine = sums[:, places[0] : places[0] + len(starts)]
            if self.height == 1 and in_turn(at):
                mine[at[0] : at[0] + len(at)] += across
            elif self.height == 1 and (at[1:] > at[:-1]).all():
                mine[at] += across
            else:
                np.add.at(mine, at, across)


def _finite(array: np.ndarray) -> np.ndarray:
    """In float64, with 0 for what the sketch leaves out."""
    values = array.astype(np.float64)
    with np.errstate(invalid="ignore"):
        if not np.abs(values).max(initial=0.0) < LARGEST:
            values[~(np.abs(values) < LARGEST)] = 0.0
    return values


def grid_of(shape: tuple[int, int], size: int) -> Grid | None:
    """Blocks of ``size`` elements, a power of two, of a large matrix; None for those of too few of them."""
    width = min(size, WIDEST)
    height = 1
    while height * width < size:
        if height >= HIGHEST or width <= height:
            width *= 2
        else:
            height *= 2
    grid = Grid(height, width, shape)
    return grid if fine_grid(shape) is None and min(grid.blocks) >= LEAST_SIDE else None


def grid_with(shape: tuple[int, int], blocks: Sequence[int]) -> Grid | None:
    """The grid of so many rows and columns of blocks; None where none has."""
    sides = []
    for size, number in zip(shape, blocks, strict=True):
        side = 1
        while -(-size // side) > number:
            side *= 2
        sides.append(side)
    found = Grid(sides[0], sides[1], shape)
    return found if found.blocks == tuple(blocks) else None


def fine_grid(shape: tuple[int, int]) -> Grid | None:
    """Blocks of a small tensor or a vector, alike in all models; None for large matrices."""
    if math.prod(shape) <= LARGE:
        return Grid(1, 1, shape)
    return Grid(1, SMALLEST, shape) if shape[0] < LEAST_SIDE <= shape[1] else None


def fitting_grids(shapes: Mapping[str, tuple[int, int]], room: int) -> dict[str, Grid]:
    """Grids by name, of the smallest blocks with which all fit into ``room`` bytes, and of half of these as many as
    still do, from the smallest gradient on: so more tensors have them, and those of the vocabulary have them last."""
    fine = {name: grid for name, shape in shapes.items() if (grid := fine_grid(shape)) is not None}
    taken = sum(blocks_bytes(grid.blocks) for grid in fine.values())
    large = {name: shape for name, shape in shapes.items() if name not in fine}
    if taken > FINE_SHARE * room:
        fine, taken = {}, 0
    both = fine | _fitting(large, room - taken)
    return {name: both[name] for name in shapes if name in both}


def _fitting(shapes: Mapping[str, tuple[int, int]], room: int) -> dict[str, Grid]:
    size = SMALLEST
    while True:
        found = {name: grid for name, shape in shapes.items() if (grid := grid_of(shape, size)) is not None}
        left = room - sum(blocks_bytes(grid.blocks) for grid in found.values())
        if left >= 0:
            break
        size *= 2
    for name in sorted(found, key=lambda n: math.prod(shapes[n])) if size > SMALLEST else ():
        half, grid = grid_of(shapes[name], size // 2), found[name]
        more = 0 if half is None else blocks_bytes(half.blocks) - blocks_bytes(grid.blocks)
        if half is not None and more <= left:
            found[name], left = half, left - more
    return found


def blocks_bytes(blocks: tuple[int, ...]) -> int:
    """Bytes of the block sums of a tensor in a record."""
    return math.prod(blocks) * _NUMBER


def coarser(sums: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """The sums of a large matrix in blocks of twice the size, those that ``grid_of`` would give; None where these are
    too few."""
    grid = grid_with(shape, sums.shape)
    assert grid is not None
    larger = grid_of(shape, 2 * grid.height * grid.width)
    return None if larger is None else joined(sums, larger.blocks)


def joined(sums: np.ndarray, wanted: tuple[int, int]) -> np.ndarray:
    """Neighbouring blocks added until there are ``wanted`` rows and columns of them."""
    for axis in (0, 1):
        while sums.shape[axis] > wanted[axis]:
            sums = np.add.reduceat(sums, np.arange(0, sums.shape[axis], 2), axis)
    return sums
