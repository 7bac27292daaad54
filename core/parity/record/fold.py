"""Quantities as if they had been recorded with a smaller sketch, so that records of different sizes can meet."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from telechat_twins.core.parity.record.blocks import FINE_SHARE, blocks_bytes, coarser, fine_grid
from telechat_twins.core.parity.record.format import Quantity
from telechat_twins.core.parity.record.sketch import Projection, matrix_shape


def folded(quantity: Quantity, buckets: int, seed: int) -> Quantity:
    """A quantity with a smaller K, as if it had been sketched with that: buckets that a shorter hash makes one are
    added, and a tensor that was kept whole is sketched."""
    have = len(quantity.sketch)
    if have == buckets:
        return quantity
    if (size := math.prod(quantity.shape)) <= have:
        values = quantity.sketch[:size].reshape(quantity.shape)
        sketch = Projection(quantity.name, quantity.shape, buckets, seed).box(values, (0,) * values.ndim).sketch
    else:
        sketch = quantity.sketch.reshape(have // buckets, buckets).sum(axis=0)
    return dataclasses.replace(quantity, sketch=sketch)


def fitted(quantities: Sequence[Quantity], room: int) -> list[Quantity]:
    """Quantities whose blocks are joined, those of all large matrices alike, until their sums fit into ``room`` bytes;
    small ones and vectors lose theirs where these would take too much of it."""
    held = list(quantities)
    fine = {place for place, one in enumerate(held) if one.blocks is not None and fine_grid(matrix_shape(one.shape))}
    if _bytes(held[place] for place in fine) > FINE_SHARE * room:
        for place in fine:
            held[place] = dataclasses.replace(held[place], blocks=None)
    while _bytes(held) > room:
        for place, one in enumerate(held):
            if one.blocks is not None and place not in fine:
                held[place] = dataclasses.replace(one, blocks=coarser(one.blocks, matrix_shape(one.shape)))
    return held


def _bytes(quantities: Iterable[Quantity]) -> int:
    return sum(blocks_bytes(q.blocks.shape) for q in quantities if q.blocks is not None)
