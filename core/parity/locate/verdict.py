"""Verdict on one replayed operator: its error against float64, and the limit that rounding sets.

The limit of every output and gradient is what float32 costs the definition itself on the same numbers, times a factor
for another order of summation, scaled to the precision's unit roundoff u, and never below a few u. It therefore rises
on inputs that cancel, so that shrinking a failing input cannot end in one on which a right operator fails as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.parity.bounds import UNIT_ROUNDOFF
from telechat_twins.core.parity.locate.case import Arrays, Case, Replayed

FACTOR = 6.0
FLOOR = 8.0  # u
# MindSpore's own CPU kernels take exp from a polynomial: 12 u in the norm over softmax and silu inputs.
EXPONENTIAL_FLOOR = 24.0
_EXPONENTIAL = ("attention", "swiglu", "gelu", "cross_entropy")
# A gradient that cancels to less than this share of what came in (attention over one key has none) is a difference of
# equal numbers, and is held against a tenth of what came in.
CANCELLED = 1e-3
HALF_FLOOR = 4.0  # u, in 16-bit precisions: a few roundings of operands, output and gradients

Replay = Callable[[Case], Replayed]
Define = Callable[[Case, type], Replayed]


@dataclass(frozen=True)
class Measured:
    """One output, or the gradient ``d x`` of input x: relative Frobenius error against float64, and its limit."""

    name: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit  # false for nan

    @property
    def share(self) -> float:
        """Error over limit; infinite where the error is not a number."""
        return math.inf if math.isnan(self.error) else self.error / self.limit

    @property
    def fails(self) -> bool:
        """The definition has a value, and the operator is not at it."""
        return math.isfinite(self.limit) and not self.holds


@dataclass(frozen=True)
class Verdict:
    """One operator alone in one backend, against its float64 definition."""

    case: Case
    backend: str
    rows: list[Measured]

    @property
    def holds(self) -> bool:
        return all(row.holds for row in self.rows)

    @property
    def worst(self) -> Measured:
        """The row with the largest error for its limit; nan before all."""
        return max(self.rows, key=lambda row: row.share)

    def text(self) -> str:
        """The verdict in one line."""
        row = self.worst
        what = "right" if self.holds else "WRONG"
        return (
            f"{self.case.site or self.case.operator}: {self.case.operator} in {backends.TITLES[self.backend]} "
            f"({self.case.precision}) is {what}: {row.name} {row.error:.2g} from float64, limit {row.limit:.2g}"
        )


def judge(case: Case, backend: str) -> Verdict:
    """Run the case's operator in a backend, and measure it. UserError where the backend is not installed."""
    twin = backends.load(backend, "replay")
    return Verdict(case, backend, measure(case, twin.replay, twin.define))


def measure(case: Case, replay: Replay, define: Define) -> list[Measured]:
    """Error and limit of every output and gradient of a replay."""
    with np.errstate(all="ignore"):  # a faulty operator's numbers may overflow
        got = replay(case).all()
    return compare(case, got, define)


def compare(case: Case, got: Arrays, define: Define) -> list[Measured]:
    """Error and limit of each of ``got``: outputs by name, the gradient of input x as ``d x``."""
    with np.errstate(all="ignore"):
        exact, rough = define(case, np.float64).all(), define(case, np.float32).all()
    came_in = math.sqrt(sum(float(np.square(g, dtype=np.float64).sum()) for g in case.grads.values()))
    rows = []
    for name in (n for n in exact if n in got):
        size = float(np.linalg.norm(exact[name].ravel()))
        if name.startswith("d ") and size < CANCELLED * came_in:
            size = 0.1 * came_in
        error, rounding = (_error(array, exact[name], size) for array in (got[name], rough[name]))
        rows.append(Measured(name, error, _limit(case, rounding)))
    return rows


def floor(operator: str, precision: str) -> float:
    """The least limit of an operator's error, relative."""
    u = unit(operator, precision)
    if u > UNIT_ROUNDOFF["fp32"]:
        return HALF_FLOOR * u
    return (EXPONENTIAL_FLOOR if operator in _EXPONENTIAL else FLOOR) * u


def unit(operator: str, precision: str) -> float:
    """The unit roundoff that an operator computes with: masters and moments are float32 or wider."""
    return UNIT_ROUNDOFF["fp32" if operator == "adamw" and precision != "fp64" else precision]


def _limit(case: Case, rounding: float) -> float:
    """``rounding``: the error of the definition in float32; nan where it has no value."""
    scale = unit(case.operator, case.precision) / UNIT_ROUNDOFF["fp32"]
    return math.nan if math.isnan(rounding) else max(floor(case.operator, case.precision), FACTOR * scale * rounding)


def _error(actual: np.ndarray, exact: np.ndarray, size: float) -> float:
    """||actual - exact|| / size; 0 where both are zero."""
    if actual.shape != exact.shape:
        return math.inf
    apart = float(np.linalg.norm(np.asarray(actual, np.float64).ravel() - exact.ravel()))
    if size == 0.0:
        return math.inf if apart else 0.0
    return apart / size
