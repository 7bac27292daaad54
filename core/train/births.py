"""Age of every parameter entry of a grown model: the number of optimizer updates made before it was added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from telechat_twins.core.model.growth import Growth, axis_maps
from telechat_twins.core.model.params import parameter_axes
from telechat_twins.core.parallel.sharding import FlatPiece


def born(history: Sequence[Growth], name: str, box: tuple[slice, ...]) -> np.ndarray | None:
    """After how many optimizer updates each entry of a box of a parameter came to be: int64 of the box's shape.

    None when all of the box was there from the start. An entry is as young as the youngest of its row, its column and
    its block.
    """
    if not history:
        return None
    axes, layer = parameter_axes(name), _layer(name)
    at = [np.zeros(s.stop - s.start, np.int64) for s in box]
    index = [np.arange(s.start, s.stop) for s in box]
    # Followed back from the newest growth; an index that has ended (-1) keeps the growth in which it began.
    for growth in reversed(history):
        maps = axis_maps(growth.before, growth.after)
        if layer is not None and layer >= 0:
            if layer in growth.new_layers:
                at[0] = np.maximum(at[0], growth.optimizer_steps)
                layer = -1
            else:
                layer = growth.source_layer(layer)
        for i, axis in enumerate(axes):
            alive = index[i] >= 0
            older = np.where(alive, maps[axis][index[i]], -1)
            at[i] = np.maximum(at[i], np.where(alive & (older < 0), growth.optimizer_steps, 0))
            index[i] = older
    if not any(part.any() for part in at):
        return None
    return at[0] if len(at) == 1 else np.maximum(at[0][:, None], at[1][None])


def birth_classes(
    history: Sequence[Growth], pieces: Iterable[FlatPiece], size: int
) -> tuple[np.ndarray, list[int]] | None:
    """When the entries of a flat vector came to be, for vectors of which ``pieces`` say what their elements are.

    Returns the class of each element, uint8 [size], and for each class the number of updates made before it; class 0
    was there from the start. None when nothing is newer.
    """
    births = sorted({0, *(growth.optimizer_steps for growth in history)})
    index = np.zeros(size, np.uint8)
    for piece in pieces:
        found = born(history, piece.name, piece.box)
        if found is not None:
            index[piece.first : piece.last] = np.searchsorted(births, found).reshape(-1)
    return (index, births) if index.any() else None


def _layer(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("layers.") else None
