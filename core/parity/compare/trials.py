"""The measures of a part of the quantities, each with its limits: distance, single element, smooth part, non-finite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from telechat_twins.core.parity.bounds import FULL
from telechat_twins.core.parity.compare import rules
from telechat_twins.core.parity.compare.blocks import worst_block
from telechat_twins.core.parity.compare.measures import Differences, differences, error_bars, own_peak
from telechat_twins.core.parity.compare.parts import Part
from telechat_twins.core.parity.compare.rules import (
    BLOCK_PEAK,
    BLOCK_SHARE,
    PEAK_ELEMENTS,
    PEAK_FACTOR,
    PEAKS,
    WHOLE_PEAK,
    Rule,
)
from telechat_twins.core.parity.compare.updates import CHANCE, Updates, parts_along
from telechat_twins.core.parity.record.format import Record

# Of normally distributed gradients with relative error e, the share within their own error of zero is about 0.8 e:
# AdamW's first update of such an element, lr * sign(g), may have either sign.
SIGNS, FEW = 0.8, 0.5
# Without a reference: norms of equal tensors differ by at most 0.6 of their distance (measured), and distances by 3.
PAIR_NORM = 2.0
MAGNIFIED = "x up to {:.3g}, by which updates of small elements magnify the gradient's rounding"
BLOCKS = f"{PEAK_FACTOR * BLOCK_PEAK:g} x what the other blocks of the row and the column let expect"


@dataclass(frozen=True)
class Trial:
    """One measure of every quantity of a part: ``value`` and ``limit`` float64 [n]. ``side``: whose error it is."""

    measure: str
    side: str
    value: np.ndarray
    limit: np.ndarray
    source: str

    def shares(self) -> np.ndarray:
        """Value over limit; inf for a broken limit of 0, and for nan."""
        with np.errstate(divide="ignore", invalid="ignore"):
            share = np.where(self.value == 0.0, 0.0, self.value / self.limit)
        return np.where(np.isnan(share), np.inf, share)


def measures_of(part: Part, records: Mapping[str, Record], judge: str | None, layers: int, later: bool) -> list[Trial]:
    """All measures of a part. ``judge``: the side that the errors are taken against; None: of the two from each other.
    ``later``: after the first recorded step."""
    rule_of = {
        name: rules.rule(part.kind, records[name].header.precision, layers, 2 if later else 1) for name in ("a", "b")
    }
    made = _Between(part, records, rule_of, later)
    return list((_Against(part, records, rule_of, later, judge) if judge is not None else made).trials())


class _Measures(ABC):
    """What both ways of judging share."""

    def __init__(self, part: Part, records: Mapping[str, Record], rule_of: Mapping[str, Rule], later: bool) -> None:
        self.part, self.rule_of, self.later = part, rule_of, later
        self.buckets = next(iter(part.sides.values())).sketch.shape[1]
        self.least, self.most = error_bars(part.counts, self.buckets)
        self.precision = {name: records[name].header.precision for name in ("a", "b")}

    @abstractmethod
    def trials(self) -> Iterator[Trial]:
        """Every measured value with its limit."""

    def apart(self, one: str, other: str) -> Differences:
        """The differences of two sides, relative to the second, or where that is 0 to the first."""
        a, b = self.part.sides[one], self.part.sides[other]
        scale = np.where(b.norm > 0, b.norm, a.norm if other != "reference" else 0.0)
        return differences(a, b, self.part.counts, scale)

    def gradients_apart(self, made: Updates, one: str, other: str) -> np.ndarray:
        """float64 [n]: the relative errors, at the upper end of their error bars, of the gradients that made a change;
        inf where they were not recorded."""
        if made.gradients is None:
            return np.full(len(self.part.keys), np.inf)
        a, b = made.gradients[one], made.gradients[other]
        return differences(a, b, self.part.counts, b.norm).distance / self.least

    def along(
        self, one: str, other: str, made: Updates, floor: float, extra: np.ndarray, label: str
    ) -> Iterator[Trial]:
        """The parts of the difference of two changes along the change and along the weights, relative to the change:
        factors of the update and of the decay. ``extra``: what storage rounds, which may have a direction: a weight
        that does not decay is moved by one of two numbers, and rounded alike for all elements of an exponent."""
        change = self.part.sides[other]
        apart, least = self.part.sides[one].sketch - change.sketch, floor + extra
        for measure, direction in (("along the update", change), ("along the weights", made.start[other])):
            value, chance = parts_along(apart, direction.sketch, self.part.counts)
            with np.errstate(divide="ignore", invalid="ignore"):
                value, chance = (np.where(x == 0.0, 0.0, x / change.norm) for x in (value, chance))
            limit = np.where(self.judged_alone(), np.maximum(least, chance), np.inf)
            text = (
                f"{CHANCE:g} deviations of what is left has by chance, at least {floor / self.rule_of[one].unit:.3g} u"
            )
            yield Trial(measure, label, value, limit, f"part of the change: {text} and what storage rounds")

    def nonfinite(self, one: str, other: str, label: str) -> Trial:
        a, b = self.part.sides[one].nonfinite, self.part.sides[other].nonfinite
        return Trial("non-finite values", label, np.abs(a - b), np.zeros(len(a)), "as many as in the other")

    def judged_alone(self) -> np.ndarray:
        """bool [n]: tensors of which single elements and norms are judged. After an update a weight whose gradient is
        rounding may differ by twice the update, alone among all."""
        return (self.part.counts >= PEAK_ELEMENTS) & (not self.later)

    def peaks(
        self, found: Differences, other_peak: np.ndarray | float, judge: str, whole: np.ndarray, label: str
    ) -> Trial:
        """One wrong element stands out of the rounding of all others, unless it is of the size of its own rounding.

        ``judge``: the side whose tensors say how large their elements are; the largest may have its share of the
        distance's limit, ``whole``.
        """
        kind = self.part.kind
        # Elements of a tensor that is kept whole differ in size; buckets are sums of many and nearly normal.
        least = np.where(self.part.counts <= self.buckets, max(WHOLE_PEAK, PEAKS[kind]), PEAKS[kind])
        peak = np.maximum(own_peak(self.part.sides[judge], self.part.counts), least)
        ratio = PEAK_FACTOR * np.maximum(peak, np.where(np.isfinite(other_peak), other_peak, 0.0))
        limit = np.maximum(whole * self.largest(judge), ratio * found.others)
        limit = np.where(self.judged_alone(), limit, np.inf)
        source = (
            f"{PEAK_FACTOR:g} x the largest of {PEAKS[kind]:g} (tensors kept whole: {WHOLE_PEAK:g}) and the same ratio "
            "of the other record and of the tensor itself x the root mean square of the other buckets, at least "
            "the largest element's share of the distance's limit"
        )
        return Trial("single element", label, found.largest, limit, source)

    def in_blocks(
        self,
        whole: Trial,
        limits: np.ndarray,
        found: Differences,
        one: str,
        judge: str,
        third: str | None,
        usual: bool = False,
    ) -> Trial:
        """The single elements of gradients that have block sums by these; ``limits``: of the distances; ``usual``: see
        worst_block."""
        if not self.part.blocks or self.later:
            return whole
        value, limit = whole.value.copy(), whole.limit.copy()
        shares = np.minimum(limits, BLOCK_SHARE * np.maximum(found.smooth, self.rule_of[one].floor))
        for number, sums in self.part.blocks.items():
            norm = self.part.sides[judge].norm[number] or self.part.sides[one].norm[number]
            error, allowed = worst_block(sums, one, judge, third, float(shares[number]), usual)
            value[number], limit[number] = (error / norm, allowed / norm) if norm else (0.0, 0.0)
        return Trial(whole.measure, whole.side, value, limit, f"{whole.source}; where there are block sums, {BLOCKS}")

    def norms(self, one: str, other: str) -> np.ndarray:
        """Relative differences of the norms, which are exact: a factor shows in them long before the distance."""
        a, b = self.part.sides[one].norm, self.part.sides[other].norm
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(a == b, 0.0, np.abs(a - b) / b)

    def largest(self, name: str) -> np.ndarray:
        """The largest element of each tensor over its norm."""
        column = self.part.sides[name]
        size = np.maximum(np.abs(column.least), np.abs(column.most))
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(column.norm > 0, size / column.norm, 0.0)

    def storage(self, name: str) -> np.ndarray:
        """What rounding the weights to their type does to their change: 2 u |w| / |change|."""
        assert self.part.size is not None
        with np.errstate(divide="ignore", invalid="ignore"):
            share = 2 * self.part.stored[name] * self.part.size[name] / self.part.sides[name].norm
        return np.where(self.part.sides[name].norm > 0, share, 0.0)

    def signs(self, ceiling: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """(most of a change's relative distance when updates of elements with a gradient of rounding size take the
        other sign, whether these are so many that they are in every bucket).

        ``ceiling``: of the gradient's relative error. The number of such elements is that expected, 4 standard
        deviations and 3 more; each is off by twice the update.
        """
        counts = self.part.counts.astype(np.float64)
        expected = np.minimum(SIGNS * ceiling, 1.0) * counts
        elements = np.minimum(expected + 4 * np.sqrt(expected) + 3, counts)
        return 2 * np.sqrt(elements / counts), elements > np.minimum(counts, 256) / 8


class _Against(_Measures):
    """Errors of each record against a third, or of one against the float64 one."""

    def __init__(
        self, part: Part, records: Mapping[str, Record], rule_of: Mapping[str, Rule], later: bool, judge: str
    ) -> None:
        super().__init__(part, records, rule_of, later)
        self.judge = judge
        self.names = [name for name in ("a", "b") if name != judge]
        self.found = {name: self.apart(name, judge) for name in self.names}

    def trials(self) -> Iterator[Trial]:
        for name in self.names:
            other = next((n for n in self.names if n != name), None)
            if self.part.kind == "weight_before" and self.part.updates is None:
                yield self.rounded_weights(name)
            elif self.part.updates is not None:
                yield from self.changes(name, other, self.part.updates)
            else:
                distance = self.distances(name, other)
                yield distance
                peak = self.found[other].peak if other else 0.0
                single = self.peaks(self.found[name], peak, self.judge, distance.limit, name)
                yield self.in_blocks(single, distance.limit, self.found[name], name, self.judge, other)
                if other:
                    yield self.factors(name, other)
            yield self.nonfinite(name, self.judge, name)
        if self.part.blocks and len(self.names) == 2 and len(set(self.precision.values())) == 1:
            yield self.between()

    def between(self) -> Trial:
        """Single elements of gradients by which two sides of one precision differ: backends that sum in the same order
        make the same rounding, beside which an error is seen that the reference's is too far away for."""
        found = self.apart("a", "b")
        one, other = self.rule_of["a"], self.rule_of["b"]
        limits = self.most * rules.pair_limit(one, other, _median(found.distance))
        nothing = np.zeros(len(limits))
        whole = Trial("single element", "apart", nothing, nothing + np.inf, "of gradients with block sums")
        return self.in_blocks(whole, limits, found, "a", "b", None, usual=True)

    def rounded_weights(self, name: str) -> Trial:
        """Equal weights before the first step differ by the rounding of what they are stored in."""
        limit = self.most * np.maximum(self.part.stored[name], self.part.stored[self.judge])
        return Trial("distance", name, self.found[name].distance, limit, "equal weights, rounded to their type")

    def distances(self, name: str, other: str | None) -> Trial:
        rule = self.rule_of[name]
        limit = self.limit(name, self.found[other].distance if other else None, rule.ceiling, rule.floor)
        return Trial("distance", name, self.found[name].distance, limit, self.source(name))

    def limit(
        self, name: str, values: np.ndarray | None, ceiling: np.ndarray | float, floor: np.ndarray | float
    ) -> np.ndarray:
        """The rule of every quantity. ``values``: the other record's errors, None where that is the judge."""
        rule = self.rule_of[name]
        if values is None:
            return self.most * ceiling
        other = self.rule_of["b" if name == "a" else "a"]
        high = values / self.least * (rule.unit / other.unit)
        return self.most * np.minimum(ceiling, rule.factor * np.maximum(floor, high))

    def factors(self, name: str, other: str) -> Trial:
        """The norm's error: that of rounding is a part of the distance, so the other's distance bounds it."""
        rule = self.rule_of[name]
        scale = rule.unit / self.rule_of[other].unit
        high, norms = self.found[other].distance / self.least * scale, self.norms(other, self.judge) * scale
        high = 2 * high if self.part.kind == "moment2" else high  # a few large elements make its norm
        limit = np.minimum(rule.ceiling, np.maximum.reduce([rule.factor * norms, high, np.full(len(high), rule.floor)]))
        limit = np.where(self.judged_alone(), limit, np.inf)
        source = f"the other's distance, {rule.factor:g} x its norm's error, at least {rule.floor / rule.unit:g} u"
        return Trial("norm", name, self.norms(name, self.judge), limit, source)

    def source(self, name: str) -> str:
        text = self.rule_of[name].source(self.precision[name])
        if len(self.names) == 1:
            text = f"at most {self.rule_of[name].ceiling:.3g} from the float64 record ({self.precision[name]})"
        return f"{text}; up to x {self.most.max():g} for the sketch's error bar"

    def changes(self, name: str, other: str | None, made: Updates) -> Iterator[Trial]:
        found, rule, extra = self.found[name], self.rule_of[name], self.storage(name)
        wide = np.hypot(self.signs(rule.ceiling)[0], rule.ceiling + extra)
        text = f"of the change, at most 2 sqrt(share of elements whose gradient is rounding), {wide.max():.2g}"
        if self.precision[name] not in FULL:  # so many signs differ that their share is the same in both
            few = 2 * np.sqrt(FEW / self.part.counts)  # but in a small tensor their number is chance
            values = self.found[other].distance if other else None
            limit = self.limit(name, values, wide, np.hypot(few, rule.floor + extra))
            yield Trial("distance", name, found.distance, limit, f"{text}; {self.source(name)}")
            return
        yield Trial("distance", name, found.distance, self.most * wide, text)
        gain, error = made.gain[self.judge], self.gradients_apart(made, name, self.judge)
        explained = np.minimum(rule.ceiling, rule.factor * np.maximum(rule.floor, error))
        values = self.found[other].smooth if other else None
        limit = self.limit(name, values, gain * explained + extra, gain * rule.floor + extra)
        everywhere = self.signs(explained)[1]
        limit = np.where(everywhere | (self.part.counts < PEAK_ELEMENTS), np.inf, limit)
        text = f"of the change, without outliers: {self.source(name)}, and {rule.factor:g} x the gradient's error"
        yield Trial("smooth part", name, found.smooth, limit, f"{text}; {MAGNIFIED.format(gain.max())}")
        yield from self.along(name, self.judge, made, rule.floor, extra, name)


class _Between(_Measures):
    """The distance of the two records from each other."""

    def trials(self) -> Iterator[Trial]:
        found = self.apart("a", "b")
        one, other = self.rule_of["a"], self.rule_of["b"]
        names = " and ".join(dict.fromkeys(self.precision.values()))
        if self.part.kind == "weight_before" and self.part.updates is None:
            limit = self.most * np.maximum(self.part.stored["a"], self.part.stored["b"])
            yield Trial("distance", "apart", found.distance, limit, "equal weights, rounded to their type")
        elif self.part.updates is not None:
            yield from self.changes(found, names, self.part.updates)
        else:
            limit = self.most * rules.pair_limit(one, other, _median(found.distance))
            text = f"{rules.pair_source(one, other, names)}; up to x {self.most.max():g} for the sketch's error bar"
            yield Trial("distance", "apart", found.distance, limit, text)
            yield self.in_blocks(self.peaks(found, 0.0, "b", limit, "apart"), limit, found, "a", "b", None)
            limit = PAIR_NORM * np.maximum(one.floor + other.floor, np.full(len(limit), _median(found.distance)))
            limit = np.where(self.judged_alone(), limit, np.inf)
            text = (
                f"{PAIR_NORM:g} x the median distance of its kind, at least {PAIR_NORM * (one.floor + other.floor):.3g}"
            )
            yield Trial("norm", "apart", self.norms("a", "b"), limit, text)
        yield self.nonfinite("a", "b", "apart")

    def changes(self, found: Differences, names: str, made: Updates) -> Iterator[Trial]:
        one, other = self.rule_of["a"], self.rule_of["b"]
        extra = self.storage("a") + self.storage("b")
        most = one.ceiling + other.ceiling
        wide = self.most * np.hypot(self.signs(most)[0], most + extra)
        text = "of the change: 2 sqrt(share of elements whose gradient is rounding)"
        yield Trial("distance", "apart", found.distance, wide, text)
        # Twice the median: gradients of some biases are small differences, and their updates as uncertain.
        gain = np.maximum(made.gain["a"], made.gain["b"])
        limit = self.most * (gain * rules.pair_limit(one, other, 2 * _median(found.smooth / gain)) + extra)
        everywhere = self.signs(np.minimum(most, self.gradients_apart(made, "a", "b")))[1]
        limit = np.where(everywhere | (self.part.counts < PEAK_ELEMENTS), np.inf, limit)
        text = f"of the change, without outliers: {rules.pair_source(one, other, names)}"
        yield Trial("smooth part", "apart", found.smooth, limit, f"{text}; {MAGNIFIED.format(gain.max())}")
        if all(precision in FULL for precision in self.precision.values()):
            yield from self.along("a", "b", made, max(one.floor, other.floor), extra, "apart")


def _median(values: np.ndarray) -> float:
    return float(np.median(values)) if len(values) else 0.0
