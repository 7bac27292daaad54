"""Single wrong elements of gradients, from their block sums.

A gradient is a sum of products of two vectors, and its rounding error is about as large as the product of a scale of
its row and one of its column. So the error of a block is measured by the root mean squares of the errors in its row
and in its column of blocks, without the largest of each: a wrong element does not excuse itself. It is expected to be
at least half of the smaller of the two.

The elements of small gradients, and blocks of vectors, have only each other. Where single channels are far larger than
the others, their roundings are too: without a third side, the largest may be as uneven as the gradient itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from telechat_twins.core.parity.compare.rules import BLOCK_PEAK, PEAK_FACTOR
from telechat_twins.core.parity.record.blocks import LARGE, LEAST_SIDE, joined
from telechat_twins.core.parity.record.format import Record

BlockSums = dict[str, np.ndarray]  # by side, of one gradient: float64 [rows, columns of blocks]
_STORED = 2.0**-23  # of a float32, in which records hold the sums


def block_sums(keys: Sequence[str], records: Mapping[str, Record]) -> dict[int, BlockSums]:
    """By the number of a key, the block sums that all records have of it, of the coarsest of their blocks."""
    found = {}
    for number, key in enumerate(keys):
        held = {name: sums for name, record in records.items() if (sums := record.quantities[key].blocks) is not None}
        if len(held) == len(records):
            rows, columns = (min(sums.shape[axis] for sums in held.values()) for axis in (0, 1))
            found[number] = {name: joined(sums.astype(np.float64), (rows, columns)) for name, sums in held.items()}
    return found


def worst_block(
    sums: BlockSums, one: str, judge: str, third: str | None, share: float, usual: bool = False
) -> tuple[float, float]:
    """(largest difference of ``one`` from ``judge`` in a block, for its limit; that limit), not relative.

    ``third``: the side whose errors may be as uneven. ``share``: of the sum of a block that may be its error;
    ``usual``: of what its row and column let expect, where that is more, as sides that are equal but for a few
    roundings need.
    """
    apart, size = np.abs(sums[one] - sums[judge]), np.abs(sums[judge])
    uneven = BLOCK_PEAK
    if third is not None:
        other = np.abs(sums[third] - sums[judge])
        uneven = max(uneven, float(_over(other, expected(other)).max()))
    elif size.size <= LARGE or min(size.shape) < LEAST_SIDE:
        uneven = max(uneven, float(size.max()) / (_of_others(size) or 1.0))
    scale = np.maximum(size, expected(size)) if usual else size
    limit = np.maximum(PEAK_FACTOR * uneven * expected(apart), max(share, _STORED) * scale)
    worst = int(_over(apart, limit).argmax())
    return float(apart.reshape(-1)[worst]), float(limit.reshape(-1)[worst])


def expected(apart: np.ndarray) -> np.ndarray:
    """The size of each error [R, C], of magnitude ``apart``, by the others of its row and column."""
    squares = np.square(apart)
    if min(apart.shape) < LEAST_SIDE:
        return np.broadcast_to(_of_others(apart), apart.shape)
    rows, columns = (
        np.sqrt((squares.sum(axis, keepdims=True) - squares.max(axis, keepdims=True)) / (squares.shape[axis] - 1))
        for axis in (1, 0)
    )
    whole = _of_others(apart)
    least = np.minimum(rows, columns) / 2
    return least if whole == 0 else np.maximum(rows * (columns / whole), least)


def _of_others(sizes: np.ndarray) -> float:
    """Root mean square of all but the largest."""
    squares = np.square(sizes)
    return float(np.sqrt((squares.sum() - squares.max()) / max(squares.size - 1, 1)))


def _over(error: np.ndarray, limit: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0.0, 0.0, error / limit)
