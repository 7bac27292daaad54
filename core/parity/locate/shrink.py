"""Reduction of a failing case: fewer rows, positions, heads and channels, by delta debugging along an operator's axes.

Delta debugging (Zeller and Hildebrandt, IEEE TSE 28(2), 2002): of an axis with n indices keep one of c chunks, or all
but one, as long as the case still fails; with no success double c, until single indices are tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from telechat_twins.core.parity.locate.case import Case
from telechat_twins.core.parity.locate.operators import BLOCK, HALVES, OPERATORS, Axis, Place

MOST_RUNS = 400  # replays of one reduction
Fails = Callable[[Case], bool]


def shrink(case: Case, fails: Fails, most_runs: int = MOST_RUNS) -> Case:
    """A smaller case that still ``fails``; no index of an axis can be left out of it, unless ``most_runs`` replays came
    before. ``case`` itself must fail (ValueError)."""
    if not fails(case):
        raise ValueError("the case to shrink does not fail")
    left = [most_runs]

    def still(candidate: Case | None) -> bool:
        if candidate is None or left[0] <= 0:
            return False
        left[0] -= 1
        return fails(candidate)

    while True:
        before = case.size
        axes = [axis for axis in OPERATORS[case.operator].axes if _may_shrink(case, axis)]
        for axis in sorted(axes, key=lambda axis: -axis_size(case, axis)):
            case = _along(case, axis, still)
        if case.size == before or left[0] <= 0:
            return case


def axis_size(case: Case, axis: Axis) -> int:
    """Number of indices of an axis; 0 where the case has none of its tensors."""
    for place in axis.places:
        array = case.tensor(place.tensor)
        if array is not None:
            return int(array.shape[place.axis])
    return 0


def take(case: Case, axis: Axis, keep: np.ndarray) -> Case | None:
    """The case with the indices ``keep`` of an axis alone; None where an id or a target would lose its entry."""
    n = axis_size(case, axis)
    inputs, grads = dict(case.inputs), dict(case.grads)
    for place in axis.places:
        array = case.tensor(place.tensor)
        # A table that all rows share has one row, and stays as it is.
        if array is None or (array.shape[place.axis] == 1 and n > 1):
            continue
        cut = np.take(array, _spread(place, keep, n, array.shape[place.axis]), place.axis)
        if place.tensor.startswith("grad:"):
            grads[place.tensor[5:]] = cut
        else:
            inputs[place.tensor] = cut
    if axis.relabel is not None:
        labels = inputs[axis.relabel]
        numbers = np.full(n, -1, np.int32)
        numbers[keep] = np.arange(len(keep), dtype=np.int32)
        new = np.where(labels < 0, labels, numbers[np.maximum(labels, 0)]).astype(np.int32)
        if ((new < 0) & (labels >= 0)).any():
            return None
        inputs[axis.relabel] = new
    return replace(case, inputs=inputs, grads=grads)


def _spread(place: Place, keep: np.ndarray, n: int, length: int) -> np.ndarray:
    """Indices of one place for the indices ``keep`` of an axis of n."""
    times = length // n
    if place.spread == BLOCK:
        return (keep[:, None] * times + np.arange(times)).reshape(-1)
    if place.spread == HALVES:
        return (np.arange(times)[:, None] * n + keep).reshape(-1)
    return keep


def _may_shrink(case: Case, axis: Axis) -> bool:
    # A layer norm that counts its first channels has no smaller form with the same meaning.
    return axis_size(case, axis) > 1 and not (axis.name == "channels" and case.settings.get("counted") is not None)


def _along(case: Case, axis: Axis, still: Callable[[Case | None], bool]) -> Case:
    """The case with as few indices of one axis as it still fails with."""
    chunks = 2
    while (n := axis_size(case, axis)) > 1:
        parts = np.array_split(np.arange(n), min(chunks, n))
        rest = [np.concatenate(parts[:i] + parts[i + 1 :]) for i in range(len(parts))]
        for keep in (*parts, *(rest if len(parts) > 2 else ())):
            smaller = take(case, axis, keep)
            if still(smaller):
                assert smaller is not None
                case, chunks = smaller, max(2, chunks - 1 if len(keep) > n // 2 else 2)
                break
        else:
            if chunks >= n:
                break
            chunks *= 2
    return case
