"""Budget of every quantity: how far rounding alone may take it from a float64 run, and who exceeds it.

The error of a side is |side - reference| / |reference|, estimated from the sketches. It is within budget up to a few
unit roundoffs of the side's precision, or up to a few times the other side's error (both scaled by their u): where the
model magnifies rounding it does so on both sides. Without a reference the two sides are held against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from telechat_twins.core.errors import UserError
from telechat_twins.core.parity.bounds import FULL, UNIT_ROUNDOFF
from telechat_twins.core.parity.record.format import Quantity, Record, quantity_key
from telechat_twins.core.parity.record.sketch import distance
from telechat_twins.core.parity.record.take import folded

# In u, for models of up to four blocks; deeper ones sqrt(L / 4) as much (docs/locate.md has the measurements).
FLOORS = {"forward": 32.0, "backward": 64.0, "update": 256.0}
HALF_FLOORS = {"forward": 6.0, "backward": 10.0, "update": 10.0}
RATIO, HALF_RATIO = 6.0, 2.5
# Beyond this many times the floor a side is at fault even where the other is as far: both may share a fault.
CEILING = 64.0
BIAS_SHARE = 1e-3
# AdamW divides a gradient by its own size: where that is rounding alone, the update may have either sign.
_STAGES = {"activation": "forward", "weight_before": "forward", "weight_after": "update"}


@dataclass(frozen=True)
class Excess:
    """A quantity beyond its budget. ``errors`` and ``limits`` by side (A, B; ``A-B`` without a reference);
    ``nonfinite`` elements by side; ``factor``: norm of A over that of B."""

    key: str
    errors: dict[str, float]
    limits: dict[str, float]
    nonfinite: dict[str, int] = field(default_factory=dict)
    factor: float = math.nan

    @property
    def sides(self) -> list[str]:
        """Those beyond their limit."""
        return [side for side, error in self.errors.items() if not error <= self.limits[side]]

    @property
    def margin(self) -> float:
        """The largest error over its limit; nan counts as infinite."""
        ratios = [self.errors[side] / self.limits[side] for side in self.errors]
        return math.inf if any(math.isnan(r) for r in ratios) else max(ratios)


class Budget:
    """Errors and limits of the quantities of two records, ``reference`` being a float64 one of the same batch."""

    def __init__(self, a: Record, b: Record, reference: Record | None, num_layers: int) -> None:
        self.sides, self.reference = {"A": a, "B": b}, reference
        self.depth = math.sqrt(max(num_layers, 4) / 4)
        records = [a, b, *([] if reference is None else [reference])]
        if len({record.header.seed for record in records}) > 1:
            raise UserError(
                f"{b.path}: the sketches of all records must have one seed, found "
                f"{', '.join(str(record.header.seed) for record in records)}; take the records again"
            )
        self.buckets, self.seed = min(record.header.buckets for record in records), a.header.seed

    def judge(self, kind: str, name: str, step: int) -> Excess | None:
        """The quantity's errors and limits; None where a record lacks it."""
        key = quantity_key(kind, name, step)
        found = {side: record.quantities.get(key) for side, record in self.sides.items()}
        held = {side: quantity for side, quantity in found.items() if quantity is not None}
        if len(held) < 2:
            return None
        shapes = {quantity.shape for quantity in held.values()}
        if len(shapes) > 1:
            return Excess(key, dict.fromkeys(held, math.inf), dict.fromkeys(held, 0.0))
        nonfinite = {side: quantity.nonfinite for side, quantity in held.items()}
        size_b = held["B"].norm
        factor = held["A"].norm / size_b if size_b else math.nan
        floors = {side: self._floor(kind, name, record.header.precision) for side, record in self.sides.items()}
        judge = None if self.reference is None else self.reference.quantities.get(key)
        if judge is None or judge.shape not in shapes:
            error = self._error(held["A"], held["B"])
            return Excess(key, {"A-B": error}, {"A-B": RATIO * max(floors.values())}, nonfinite, factor)
        errors = {side: self._error(quantity, judge) for side, quantity in held.items()}
        return Excess(key, errors, self._limits(errors, floors), nonfinite, factor)

    def _limits(self, errors: dict[str, float], floors: dict[str, float]) -> dict[str, float]:
        limits = {}
        for side, other in (("A", "B"), ("B", "A")):
            u, of_other = (UNIT_ROUNDOFF[self.sides[s].header.precision] for s in (side, other))
            ratio = RATIO if self.sides[side].header.precision in FULL else HALF_RATIO
            allowed = max(floors[side], ratio * errors[other] * u / of_other)
            limits[side] = min(allowed, CEILING * floors[side])
        return limits

    def _floor(self, kind: str, name: str, precision: str) -> float:
        floors = FLOORS if precision in FULL else HALF_FLOORS
        return floors[_STAGES.get(kind, "backward")] * UNIT_ROUNDOFF[precision] * self.depth

    def _error(self, quantity: Quantity, judge: Quantity) -> float:
        """Relative distance; inf where not the same number of elements is finite."""
        if quantity.nonfinite != judge.nonfinite:
            return math.inf
        one, other = (folded(q, self.buckets, self.seed) for q in (quantity, judge))
        apart = distance(one.sketch, other.sketch, judge.shape).value
        size = self._size(judge)
        if size == 0.0:
            return math.inf if apart else 0.0
        return apart / size

    def _size(self, judge: Quantity) -> float:
        """What the error is measured by: the norm. The gradient of a bias may cancel (that of the keys' bias does, as
        softmax does not see it); it is a sum over the gradient of its layer's output, and measured by that."""
        layer, _, kind = judge.name.rpartition(".")
        if judge.kind != "gradient" or kind != "bias":
            return judge.norm
        source = self.reference or self.sides["B"]
        output = source.quantities.get(quantity_key("activation_grad", layer, judge.step))
        return judge.norm if output is None else max(judge.norm, BIAS_SHARE * output.norm)
