"""Limits for the quantities of records: core.parity.bounds' rule, with the sketch's error bar, for every kind.

With a reference of higher precision: error <= w min(ceiling, factor max(floor, the other record's error)). ``w`` is
the most by which the estimate of a distance exceeds it (core.parity.record.sketch.SPREAD), and the other's error is
taken at the upper end of its error bar. Errors and limits are in units of u, the precision's unit roundoff.

Without a reference the two records are each other's benchmark: their distance must be below the sum of both ceilings
and below RATIO times the median distance of its kind (all gradients, all activations, ...), at least the floors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from telechat_twins.core.parity.bounds import FULL, UNIT_ROUNDOFF

# By kind: factor, floor, ceiling of the first recorded step, as in bounds.tolerances: activations as logits there,
# what is proportional to a gradient as a gradient, its square twice as much.
_FULL: dict[str, tuple[float, float, float]] = {
    "activation": (4, 4, 64),
    "activation_grad": (4, 8, 160),
    "gradient": (4, 8, 160),
    "moment1": (4, 8, 160),
    "moment2": (4, 16, 320),
    "weight_before": (4, 8, 160),
    "weight_after": (4, 8, 160),
}
_LOW: dict[str, tuple[float, float, float]] = {
    "activation": (2, 1, 16),
    "activation_grad": (4, 2, 64),
    "gradient": (4, 2, 64),
    "moment1": (4, 2, 64),
    "moment2": (4, 4, 128),
    "weight_before": (4, 2, 64),
    "weight_after": (4, 2, 64),
}
# After an update the records are at different weights: elements whose gradient is rounding move either way.
_LATER_FULL, _LATER_LOW, _LATER_FACTOR, _LATER_RATIO = 100.0, 4.0, 2.0, 4.0
RATIO_FULL, RATIO_LOW = 8.0, 4.0
# A single wrong element: the largest bucket of the difference over the others' root mean square. Among 256 normal
# numbers it is 4.5 at most once in 600 quantities. Twice the largest of these, of the other record's and of the
# tensor's own ratio is allowed, and the largest element's share of the distance's limit, which its own rounding can be.
# Rounding of probabilities (the gradient of the logits) and of squares is in a few large elements.
PEAKS = {"activation": 4.0, "activation_grad": 8.0, "gradient": 4.0, "moment1": 4.0, "moment2": 16.0}
PEAKS |= dict.fromkeys(("weight_before", "weight_after"), 8.0)
WHOLE_PEAK, PEAK_FACTOR = 8.0, 2.0
# The largest error of a block of a gradient over what its row and column let expect; and what a block may be off by of
# its own sum, in units of what rounding makes of the whole tensor.
BLOCK_PEAK, BLOCK_SHARE = 6.0, 4.0
PEAK_ELEMENTS = 32  # fewer have no distribution


@dataclass(frozen=True)
class Rule:
    """``floor`` and ``ceiling`` are relative errors, not in units of u."""

    factor: float
    floor: float
    ceiling: float
    unit: float
    ratio: float

    def source(self, precision: str) -> str:
        u = self.unit
        return (
            f"{self.factor:g} x the other record's error against the reference, at least "
            f"{self.factor * self.floor / u:.3g} u, at most {self.ceiling / u:.3g} u, u = {u:.3g} ({precision})"
        )


def rule(kind: str, precision: str, num_layers: int, step: int = 1) -> Rule:
    """The rule for a kind of quantity; ``step``: 1 for the first recorded step."""
    full = precision in FULL
    factor, floor, ceiling = (_FULL if full else _LOW)[kind]
    ratio = RATIO_FULL if full else RATIO_LOW
    if step > 1:
        factor, ceiling = factor * _LATER_FACTOR, ceiling * (_LATER_FULL if full else _LATER_LOW)
        ratio *= _LATER_RATIO
    unit, depth = UNIT_ROUNDOFF[precision], math.sqrt(max(num_layers, 4) / 4)
    return Rule(factor, floor * unit, ceiling * unit * depth, unit, ratio)


def pair_limit(one: Rule, other: Rule, median: float) -> float:
    """The limit of the distance of two records without a reference; ``median``: of the distances of this kind."""
    ratio = max(one.ratio, other.ratio) if one.unit == other.unit else (one if one.unit > other.unit else other).ratio
    return min(one.ceiling + other.ceiling, ratio * max(one.floor + other.floor, median))


def pair_source(one: Rule, other: Rule, precisions: str) -> str:
    ceiling, ratio = one.ceiling + other.ceiling, (one if one.unit >= other.unit else other).ratio
    return (
        f"without a reference: {ratio:g} x the median distance of its kind, at least "
        f"{ratio * (one.floor + other.floor):.3g}, at most both ceilings, {ceiling:.3g} ({precisions})"
    )
