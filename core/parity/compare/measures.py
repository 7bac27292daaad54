"""Differences of two records' quantities, from sketches, norms, extremes and counts of non-finite values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from telechat_twins.core.parity.record.fold import folded
from telechat_twins.core.parity.record.format import Record
from telechat_twins.core.parity.record.sketch import SPREAD


@dataclass(frozen=True)
class Side:
    """Columns of n quantities of one record. ``sketch`` float64 [n, K]; the others float64 [n]."""

    sketch: np.ndarray
    norm: np.ndarray
    least: np.ndarray
    most: np.ndarray
    nonfinite: np.ndarray


@dataclass(frozen=True)
class Differences:
    """float64 [n] each, relative to the second side's norms, ``scale``.

    ``distance``: of the tensors, estimated; never below what norms and extremes prove. ``largest``: the largest bucket
    of the difference, which is the error of a single wrong element; ``others``: root mean square of the other buckets.
    ``smooth``: the distance without regard to a few outliers, from the median bucket.
    """

    distance: np.ndarray
    largest: np.ndarray
    others: np.ndarray
    smooth: np.ndarray

    @property
    def peak(self) -> np.ndarray:
        """The largest bucket over the others: inf where a single bucket differs, 0 where none does."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.largest > 0, self.largest / self.others, 0.0)


def side(record: Record, keys: Sequence[str], buckets: int) -> Side:
    """The columns of ``keys`` in a record, with sketches of ``buckets`` numbers."""
    held = [record.quantities[key] for key in keys]
    sketch = np.array([folded(q, buckets, record.header.seed).sketch for q in held], np.float64).reshape(
        len(held), buckets
    )
    return Side(
        sketch,
        np.array([q.norm for q in held], np.float64),
        np.array([q.min for q in held], np.float64),
        np.array([q.max for q in held], np.float64),
        np.array([q.nonfinite for q in held], np.float64),
    )


def differences(one: Side, other: Side, counts: np.ndarray, scale: np.ndarray) -> Differences:
    """Of two sides over the same quantities of ``counts`` elements, relative to ``scale`` [n]; where a scale is 0,
    an error is 0 or inf."""
    apart = np.abs(one.sketch - other.sketch)
    buckets = apart.shape[1]
    used = np.minimum(counts, buckets)
    squares = np.square(apart).sum(axis=1)
    largest, others = peaks(apart, used)
    proven = np.maximum.reduce(
        [np.abs(one.norm - other.norm), np.abs(one.least - other.least), np.abs(one.most - other.most)]
    )
    return Differences(
        _over(np.maximum(np.sqrt(squares), proven), scale),
        _over(largest, scale),
        _over(others, scale),
        _over(_median(apart, used) * np.sqrt(used) / 0.6745, scale),
    )


def own_peak(column: Side, counts: np.ndarray) -> np.ndarray:
    """float64 [n]: the largest bucket of the tensors themselves over the root mean square of their others; where single
    elements stand out of a tensor, so does their rounding."""
    sizes = np.abs(column.sketch)
    return own_peaks(sizes, np.minimum(counts, sizes.shape[1]))


def own_peaks(sizes: np.ndarray, used: np.ndarray) -> np.ndarray:
    """float64 [n]: the largest magnitude of each row [n, K] over the root mean square of its others, of ``used``."""
    largest, others = peaks(sizes, used)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(others > 0, largest / others, 0.0)


def peaks(sizes: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest bucket of each row, and the root mean square of its other ``used`` - 1."""
    largest = sizes.max(axis=1, initial=0.0)
    rest = np.maximum(np.square(sizes).sum(axis=1) - np.square(largest), 0.0)
    return largest, np.sqrt(rest / np.maximum(used - 1, 1))


def _median(apart: np.ndarray, used: np.ndarray) -> np.ndarray:
    """The median of each row's first ``used`` numbers."""
    inside = np.arange(apart.shape[1]) < used[:, None]
    ordered = np.sort(np.where(inside, apart, np.inf), axis=1)
    rows, middle = np.arange(len(apart)), used.astype(np.int64)
    return (ordered[rows, (middle - 1) // 2] + ordered[rows, middle // 2]) / 2


def _over(error: np.ndarray, scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0.0, 0.0, error / scale)


def error_bars(counts: np.ndarray, buckets: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 [n]: the least and the most of an estimated distance over the true one, in 99 % of choices of the signs;
    1 and 1 for tensors that were kept whole."""
    least, most = SPREAD[buckets]
    whole = counts <= buckets
    return np.where(whole, 1.0, least), np.where(whole, 1.0, most)
