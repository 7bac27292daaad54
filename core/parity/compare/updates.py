"""Rounding in AdamW's update of a weight: how much it magnifies that of the gradient, and faults that it cannot make.

The first update of an element is lr U(g), U(g) = g / (|g| + eps), in units of the tensor's root mean square r = eps /
rms(g). An error of e in g becomes U'(g) e = e r / (|g| + r)^2 in U, which is about 1: nothing where |g| is large, but
1 / r times the error where |g| is below r. (Rows of an embedding that are met for the first time and entries of a grown
model have such updates at any step.) With n elements in a bucket of a sketch and the density p of g / rms(g) at 0,
p0 = 0.4 for normal ones:

- tail: where n p r < 1, a bucket has seldom an element below r. Larger errors than t have the elements below
  sqrt(e r / t), a share 2 p sqrt(e r / t) E|z|^(1/2): the sum of n of them is symmetric stable of index 1/2, its scale
  (p / p0)^2 0.68 n^2 e r, its median 1.285 scales. ``Differences.smooth`` divides the median by 0.6745 sqrt(n):

      1.295 (p / p0)^2 n^(3/2) r e

- cap: where buckets have many, their sums are normal, of variance n e^2 2 p integral (r / (x + r)^2)^2 dx:

      sqrt(2 p / (3 r)) e

So the smooth part of an update's error is at most about sqrt(1 + min(tail, cap)^2) times the gradient's error. r and p
are those of the judge's moments: v-hat has the mean square of g, and its kurtosis k bounds p, for normal gradients
times scales that are log-normal over rows and columns: p / p0 = (k / 3)^(3/8).

A wrong learning rate, bias correction or weight decay makes differences along the update or along the weights;
roundings have no direction. Their part along a known tensor is 1 / sqrt(K) of their norm, by which such faults show far
below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from telechat_twins.core.parity.compare.measures import Side, side
from telechat_twins.core.parity.record.format import Record, quantity_key

NORMAL_DENSITY, NORMAL_KURTOSIS = 0.4, 3.0
TAIL = 1.295
# An element whose gradient is rounding may be off by twice the update: buckets beyond so many deviations are left out.
OUTLIER = 6.0
# Of a part along a direction over that which roundings have by chance.
CHANCE = 8.0


@dataclass(frozen=True)
class Updates:
    """Of the n changed weights of a part, by side. ``start``: the weights before. ``gradients``: those that made the
    change, or None where a record lacks some. ``gain``: float64 [n], by which the gradient's error is magnified in the
    smooth part of the update's, from this side's moments."""

    start: dict[str, Side]
    gradients: dict[str, Side] | None
    gain: dict[str, np.ndarray]


def updates(keys: Sequence[str], base: Sequence[str], records: Mapping[str, Record], buckets: int) -> Updates:
    """Of weights ``keys`` that were ``base`` before the first recorded step."""
    some = next(iter(records.values())).quantities
    made = [quantity_key("gradient", some[key].name, some[key].step) for key in keys]
    whole = all(key in record.quantities for record in records.values() for key in made)
    return Updates(
        start={name: side(record, base, buckets) for name, record in records.items()},
        gradients={name: side(record, made, buckets) for name, record in records.items()} if whole else None,
        gain={name: np.array([_gain(record, key, buckets) for key in keys]) for name, record in records.items()},
    )


def _gain(record: Record, key: str, buckets: int) -> float:
    weight = record.quantities[key]
    moment = record.quantities.get(quantity_key("moment2", weight.name, weight.step))
    settings = record.header.config.get("optim")
    eps, beta2 = (_number(settings, name) for name in ("eps", "beta2"))
    if moment is None or not moment.sum > 0.0 or not eps > 0.0 or not 0.0 <= beta2 < 1.0:
        return 1.0
    size = math.sqrt(moment.sum / (1.0 - beta2**moment.step)) / math.sqrt(moment.count)
    # Not squared: a record may hold numbers whose squares are beyond a float.
    kurtosis = min(moment.norm2 / moment.sum / moment.sum * moment.count, moment.count)
    return gain(eps / size, kurtosis, max(1.0, weight.count / buckets))


def _number(settings: object, name: str) -> float:
    value = settings.get(name) if isinstance(settings, dict) else None
    return float(value) if isinstance(value, int | float) and abs(value) <= 1.0 else math.nan


def gain(ratio: float, kurtosis: float, elements: float) -> float:
    """The smooth part of an update's relative error over the relative error of its gradient. ``ratio``: eps over the
    gradient's root mean square. ``elements``: in a bucket."""
    dense = (max(kurtosis, NORMAL_KURTOSIS) / NORMAL_KURTOSIS) ** 0.375
    tail = TAIL * dense**2 * elements**1.5 * ratio
    return math.sqrt(1.0 + min(tail * tail, 2 * NORMAL_DENSITY * dense / (3 * ratio)))


def parts_along(apart: np.ndarray, direction: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(norm of each difference's part along a tensor, norm that roundings would have there), float64 [n] each.

    ``apart``, ``direction``: float64 [n, K], sketches of the difference and of the tensor. Buckets with outliers are
    left out of both. The second is CHANCE deviations of the coefficient of a fit by least squares, whose residual tells
    how large the roundings are.
    """
    used = np.minimum(counts, apart.shape[1])
    inside = np.arange(apart.shape[1]) < used[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # A fault along the direction is in every bucket, and in the median too.
        middle = np.nanmedian(np.where(inside, np.abs(apart), np.nan), axis=1, keepdims=True)
        kept = inside & (np.abs(apart) <= OUTLIER / 0.6745 * middle)
        x, y = np.where(kept, direction, 0.0), np.where(kept, apart, 0.0)
        squares = np.square(x).sum(1)
        factor = np.where(squares > 0, (x * y).sum(1) / squares, 0.0)
        rest = np.where(kept, y - factor[:, None] * x, 0.0)
        spread = np.sqrt(np.square(rest).sum(1) / np.maximum(kept.sum(1) - 2, 1) / squares)
        size = np.linalg.norm(np.where(inside, direction, 0.0), axis=1)
    return np.abs(factor) * size, CHANCE * np.where(squares > 0, spread, 0.0) * size
