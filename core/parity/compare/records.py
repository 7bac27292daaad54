"""Comparison of two records, from the records only: every quantity's difference with its limit.

The judge is a reference record of higher precision. Where neither it nor a float64 record among the two is there, the
records are judged by their distance from each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.parity.bounds import UNIT_ROUNDOFF
from telechat_twins.core.parity.compare.parts import Part, parts
from telechat_twins.core.parity.compare.trials import Trial, measures_of
from telechat_twins.core.parity.record.format import Record
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

PARAMETER_KINDS = ("gradient", "weight_before", "weight_after", "moment1", "moment2")


@dataclass(frozen=True)
class Measured:
    """One quantity. ``errors`` and ``limits``: of the distance, by side ("a", "b") from the reference, or "apart", of
    the two from each other. ``value`` and ``limit``: of the worst broken measure, where all hold of the distance;
    ``measure`` of ``side`` is "distance", "norm", "single element", "smooth part", "along the update", "along the
    weights" or "non-finite values".
    ``source``: where the limit comes from. ``shares``: by measure, value over limit of the worse side."""

    key: str
    kind: str
    name: str
    step: int
    errors: dict[str, float]
    limits: dict[str, float]
    side: str
    measure: str
    value: float
    limit: float
    source: str
    shares: dict[str, float]

    @property
    def holds(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True)
class Comparison:
    """``reference``: which record judges: "reference", "a" or "b" (the float64 one), or None. ``missing``: by side,
    keys that only the other record has. ``shapes``: keys whose shapes differ. ``configs``: settings that differ."""

    quantities: list[Measured]
    reference: str | None
    missing: dict[str, list[str]]
    shapes: list[str]
    configs: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def first_broken(self) -> Measured | None:
        """The first in execution order."""
        return next((row for row in self.quantities if not row.holds), None)


def check_digests(sides: dict[str, Record]) -> None:
    """UserError naming the digest and the records where the weights before the first step or the batches of the
    recorded steps are not the same."""
    one, *others = sides.values()
    for other in others:
        pair = f"{one.path} and {other.path}"
        for what, meaning in (("weights", "the weights before the first step"), ("batch", "the recorded batches")):
            if one.header.digests[what] == other.header.digests[what]:
                continue
            way = "record both from the same ones"
            if what == "batch" and one.header.steps != other.header.steps:
                way = f"steps {_numbers(one)} and {_numbers(other)} were recorded; record the same steps of both (--at)"
            raise UserError(
                f"{pair}: digest of {what} must be equal, found {one.header.digests[what][:12]} and "
                f"{other.header.digests[what][:12]}: {meaning} differ, so that their results cannot be compared; {way}"
            )
        if one.header.seed != other.header.seed:
            raise UserError(
                f"{pair}: seed of the sketches must be equal, found {one.header.seed} and {other.header.seed}; record "
                "one of them again"
            )


def _numbers(record: Record) -> str:
    steps = record.header.steps
    return ", ".join(map(str, steps if len(steps) <= 4 else [*steps[:3], "..."]))


def choose_reference(a: Record, b: Record, reference: Record | None) -> str | None:
    """Which record judges; UserError when ``reference`` is not of higher precision than both."""
    precisions = [a.header.precision, b.header.precision]
    if reference is not None:
        judge = reference.header.precision
        coarser = [p for p in precisions if UNIT_ROUNDOFF[p] > 16 * UNIT_ROUNDOFF[judge]]
        if judge != "fp64" and len(coarser) < 2:
            raise UserError(
                f"--reference {reference.path}: must be of higher precision than both records, found {judge} for "
                f"{' and '.join(precisions)}; record it with --set train.precision=fp64"
            )
        return "reference"
    exact = [name for name, precision in zip("ab", precisions, strict=True) if precision == "fp64"]
    return exact[0] if len(exact) == 1 else None


def compare_records(a: Record, b: Record, reference: Record | None = None) -> Comparison:
    """Compare two records. UserError when they are not of the same weights and batch, or have nothing in common."""
    sides = {"a": a, "b": b} | ({} if reference is None else {"reference": reference})
    check_digests(sides)
    judge = choose_reference(a, b, reference)
    common: list[str] = []
    shapes: list[str] = []
    for key, quantity in a.quantities.items():
        held = [record.quantities.get(key) for record in sides.values()]
        if all(held):
            same = all(other is not None and other.shape == quantity.shape for other in held)
            (common if same else shapes).append(key)
    if not common and not shapes:
        raise UserError(f"{a.path} and {b.path}: must have quantities in common, found none")
    missing = {
        "a": [key for key in b.quantities if key not in a.quantities],
        "b": [key for key in a.quantities if key not in b.quantities],
    }
    notes = []
    if reference is not None:
        unjudged = [key for key in a.quantities if key in b.quantities and key not in reference.quantities]
        notes = [f"{len(unjudged)} quantities are not in the reference, first {unjudged[0]}"] if unjudged else []
    layers = 1 + max((int(m[1]) for key in common if (m := re.search(r":layers\.(\d{1,6})[.@]", key))), default=0)
    judged: dict[str, Measured] = {}
    first = min(a.quantities[key].step for key in common) if common else 1
    for part in parts(common, sides):
        for row in _rows(part, measures_of(part, sides, judge, layers, part.step > first)):
            judged[row.key] = row
    return Comparison([judged[key] for key in common], judge, missing, shapes, differing_settings(a, b), notes)


def _rows(part: Part, trials: Sequence[Trial]) -> Iterator[Measured]:
    """Every quantity of a part by its worst broken measure, or where all hold by its distance."""
    distances = [trial for trial in trials if trial.measure == "distance"]
    shares = np.array([trial.shares() for trial in trials])
    plain = np.array([trial.measure in ("distance", "smooth part") for trial in trials])
    worst = np.where(shares > 1.0, 2.0 + shares, np.where(plain[:, None], shares, -1.0)).argmax(axis=0)
    measures = list(dict.fromkeys(trial.measure for trial in trials))
    of_measure = [[n for n, trial in enumerate(trials) if trial.measure == measure] for measure in measures]
    largest = np.array([shares[rows].max(axis=0) for rows in of_measure])
    for index, key in enumerate(part.keys):
        trial = trials[worst[index]]
        kind, _, rest = key.partition(":")
        yield Measured(
            key=key,
            kind=kind,
            name=rest.rpartition("@")[0],
            step=part.step,
            errors={t.side: float(t.value[index]) for t in distances},
            limits={t.side: float(t.limit[index]) for t in distances},
            side=trial.side,
            measure=trial.measure,
            value=float(trial.value[index]),
            limit=float(trial.limit[index]),
            source=trial.source,
            shares={measure: float(largest[n, index]) for n, measure in enumerate(measures)},
        )


def differing_settings(a: Record, b: Record) -> list[str]:
    """Settings of the two runs that differ, "key: A -> B"; layout and precision, which may, are in the header."""
    one, other = (dict(_flat(record.header.config)) for record in (a, b))
    found = []
    for key in sorted(one.keys() | other.keys()):
        if key.startswith("parallel.") or key in ("train.precision", "data.sources", "checkpoint"):
            continue
        if (x := one.get(key)) != (y := other.get(key)):
            found.append(f"{key}: {shown(x)} -> {shown(y)}")
    return found


def _flat(tree: JsonObject, at: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value
