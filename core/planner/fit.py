"""Efficiencies of a family of chips, fitted to the published runs that are marked for it; the others test them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from telechat_twins.core.planner.machine import Machine, load_machine
from telechat_twins.core.planner.published import Forecast, Run, forecast, published_runs


@dataclass(frozen=True)
class Family:
    """Machines with the same chip, which share its efficiencies. ``fitted``: those that its runs can tell apart, each
    with its range; the machine files give the others' sources."""

    machines: tuple[str, ...]
    fitted: Mapping[str, tuple[float, float]]


FAMILIES = {
    "910b": Family(("atlas-800t-a2",), {"matmul": (0.3, 1.0), "attention": (0.1, 1.0)}),
    "ampere": Family(("a800-80g-sxm", "a100-80g-sxm"), {"matmul": (0.3, 1.0)}),
    "hopper": Family(("h100-sxm", "h200-sxm"), {"matmul": (0.3, 1.0)}),
}


@dataclass(frozen=True)
class Fit:
    """Fitted ``values`` of a family, and the errors of the runs of both kinds with them."""

    family: str
    values: Mapping[str, float]
    fitted: Sequence[Forecast]
    held_out: Sequence[Forecast]

    @property
    def interval(self) -> tuple[float, float]:
        """Shares by which held-out runs were at most faster and slower than predicted: at least 5 % each, and 15 %
        where fewer than three tested the fit."""
        errors = [one.error for one in self.held_out]
        least = 0.05 if len(errors) >= 3 else 0.15
        return max(least, -min(errors)), max(least, max(errors))


def fit(family: str) -> Fit:
    """Least squares of log throughput over the runs marked ``fit`` of ``family``."""
    about = FAMILIES[family]
    runs = [run for run in published_runs() if run.machine in about.machines]
    mine, held = ([run for run in runs if run.use == use] for use in ("fit", "held-out"))
    machines = {name: load_machine(name) for name in about.machines}

    def forecasts(values: Mapping[str, float], which: Sequence[Run]) -> list[Forecast]:
        return [forecast(run, with_efficiency(machines[run.machine], values)) for run in which]

    def loss(values: Mapping[str, float]) -> float:
        return sum(math.log(one.predicted / one.measured) ** 2 for one in forecasts(values, mine))

    values = {name: round(value, 3) for name, value in _fitted(list(about.fitted.items()), {}, loss).items()}
    return Fit(family, values, forecasts(values, mine), forecasts(values, held))


def with_efficiency(machine: Machine, values: Mapping[str, float]) -> Machine:
    """``machine`` with other efficiencies."""
    return dataclasses.replace(machine, efficiency=dataclasses.replace(machine.efficiency, **dict[str, Any](values)))


def _fitted(
    ranges: list[tuple[str, tuple[float, float]]],
    given: Mapping[str, float],
    loss: Callable[[Mapping[str, float]], float],
) -> dict[str, float]:
    """Values in ``ranges`` with the smallest loss beside ``given``: a search in the first parameter, each of whose
    points is the best of a search in the others."""
    if not ranges:
        return {}
    (name, limits), *rest = ranges

    def best(value: float) -> float:
        here = {**given, name: value}
        return loss({**here, **_fitted(rest, here, loss)})

    value = _smallest(best, *limits)
    return {name: value, **_fitted(rest, {**given, name: value}, loss)}


def _smallest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum between ``low`` and ``high`` is smallest: golden-section search on a
    logarithmic scale, to 0.01 %."""
    ratio, low, high = (math.sqrt(5.0) - 1.0) / 2.0, math.log(low), math.log(high)
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(math.exp(a)), function(math.exp(b))
    for _ in range(20):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(math.exp(a))
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(math.exp(b))
    return math.exp((low + high) / 2.0)
