"""Budget of every quantity: how far rounding alone may take it from a float64 run, and who exceeds it.

The error of a side is |side - reference| / |reference|, estimated from the sketches. It is within budget up to a few
unit roundoffs of the side's precision, or up to a few times the better side's error (both scaled by their u): where the
model magnifies rounding it does so on both sides. Without a reference the two sides are held against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from telechat_twins.core.errors import UserError
from telechat_twins.core.parity.bounds import FULL, UNIT_ROUNDOFF
from telechat_twins.core.parity.record.fold import folded
from telechat_twins.core.parity.record.format import Quantity, Record, quantity_key
from telechat_twins.core.parity.record.sketch import distance

# In u, for models of up to four blocks; deeper ones sqrt(L / 4) as much (docs/locate.md has the measurements).
FLOORS = {"forward": 32.0, "backward": 64.0, "scalar": 16.0}
HALF_FLOORS = {"forward": 6.0, "backward": 10.0, "scalar": 1.0}
RATIO, HALF_RATIO = 6.0, 2.5
# Beyond this many times the floor a side is at fault even where the other is as far: both may share a fault.
CEILING = 64.0
BIAS_SHARE = 1e-3
LATER = 8  # floors grow with the step up to that one
# The weight itself is rounded to float32, which counts HELD times in its change.
HELD = 4.0


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
        """The quantity's errors and limits; None where a record lacks it. Of weights after a step, of their change."""
        key = quantity_key(kind, name, step)
        found = {side: _quantity(record, kind, name, step) for side, record in self.sides.items()}
        held = {side: quantity for side, quantity in found.items() if quantity is not None}
        if len(held) < 2:
            return None
        shapes = {quantity.shape for quantity in held.values()}
        if len(shapes) > 1:
            return Excess(key, dict.fromkeys(held, math.inf), dict.fromkeys(held, 0.0))
        nonfinite = {side: quantity.nonfinite for side, quantity in held.items()}
        factor = held["A"].norm / held["B"].norm if held["B"].norm else math.nan
        floors = {side: self._floor(quantity, self.sides[side]) for side, quantity in held.items()}
        judge = None if self.reference is None else _quantity(self.reference, kind, name, step)
        if judge is None or judge.shape not in shapes:
            error = self._error(held["A"], held["B"])
            return Excess(key, {"A-B": error}, {"A-B": RATIO * max(floors.values())}, nonfinite, factor)
        errors = {side: self._error(quantity, judge) for side, quantity in held.items()}
        return Excess(key, errors, self._limits(errors, floors), nonfinite, factor)

    def _limits(self, errors: dict[str, float], floors: dict[str, float]) -> dict[str, float]:
        """A few times the better side's error, each in its own unit roundoff."""
        u = {side: UNIT_ROUNDOFF[record.header.precision] for side, record in self.sides.items()}
        better = min((errors[side] / u[side] for side in errors if not math.isnan(errors[side])), default=0.0)
        limits = {}
        for side, record in self.sides.items():
            ratio = RATIO if record.header.precision in FULL else HALF_RATIO
            limits[side] = min(max(floors[side], ratio * better * u[side]), CEILING * floors[side])
        return limits

    def _floor(self, quantity: Quantity, record: Record) -> float:
        """Of a later step more: its weights have been rounded, and so have their updates."""
        precision = record.header.precision
        floors = FLOORS if precision in FULL else HALF_FLOORS
        if not quantity.shape:
            stage = "scalar"
        else:
            stage = "forward" if quantity.kind in ("activation", "weight_before") else "backward"
        floor = floors[stage] * UNIT_ROUNDOFF[precision] * self.depth * min(quantity.step, LATER)
        return floor if quantity.kind != "weight_after" else self._of_change(floor, quantity, record)

    def _of_change(self, gradient: float, quantity: Quantity, record: Record) -> float:
        """The floor of a weight's change, from its gradient's e. AdamW divides a gradient by its own size: a share of
        about e of the elements has an update of either sign, so that the norm of the difference is up to 2 sqrt(e) of
        the update's; in 16-bit precisions it may be one element of a short vector."""
        precision = record.header.precision
        floor = 2.0 * math.sqrt(gradient) + (0.0 if precision in FULL else 2.0 / math.sqrt(quantity.count))
        before = record.quantities.get(quantity_key("weight_before", quantity.name, quantity.step))
        if before is None or not quantity.norm2:
            return floor
        return floor + HELD * UNIT_ROUNDOFF["fp64" if precision == "fp64" else "fp32"] * before.norm / quantity.norm

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


def _quantity(record: Record, kind: str, name: str, step: int) -> Quantity | None:
    """A quantity of a record; of weights after a step the change that the step made, its norm estimated."""
    found = record.quantities.get(quantity_key(kind, name, step))
    before = record.quantities.get(quantity_key("weight_before", name, step))
    if kind != "weight_after" or found is None or before is None or before.shape != found.shape:
        return found
    change = found.sketch - before.sketch
    return replace(found, sketch=change, norm2=float(change @ change))
