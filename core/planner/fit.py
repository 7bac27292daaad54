"""Efficiencies of a family of chips, fitted to the published runs that are marked for it; the others test them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
    def error(self) -> float:
        """The interval's half-width: the largest error of a held-out run, at least 5 %."""
        return max(0.05, *(abs(one.measured / one.predicted - 1.0) for one in self.held_out))


def fit(family: str) -> Fit:
    """Least squares of log throughput over the runs marked ``fit`` of ``family``, one parameter after the other."""
    about = FAMILIES[family]
    runs = [run for run in published_runs() if run.machine in about.machines]
    mine, held = ([run for run in runs if run.use == use] for use in ("fit", "held-out"))
    machines = {name: load_machine(name) for name in about.machines}

    def forecasts(values: Mapping[str, float], which: Sequence[Run]) -> list[Forecast]:
        return [forecast(run, with_efficiency(machines[run.machine], values)) for run in which]

    def loss(values: Mapping[str, float]) -> float:
        return sum(math.log(one.predicted / one.measured) ** 2 for one in forecasts(values, mine))

    values = {name: sum(limits) / 2.0 for name, limits in about.fitted.items()}
    for _ in range(1 if len(values) == 1 else 8):
        for name, limits in about.fitted.items():
            values[name] = _smallest(lambda x, name=name: loss({**values, name: x}), *limits)
    values = {name: round(value, 3) for name, value in values.items()}
    return Fit(family, values, forecasts(values, mine), forecasts(values, held))


def with_efficiency(machine: Machine, values: Mapping[str, float]) -> Machine:
    """``machine`` with other efficiencies."""
    return dataclasses.replace(machine, efficiency=dataclasses.replace(machine.efficiency, **values))


def typical_error(forecasts: Sequence[Forecast]) -> float:
    """Median of the absolute errors."""
    return statistics.median(abs(one.error) for one in forecasts)


def _smallest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum between ``low`` and ``high`` is smallest: golden-section search to 0.0005."""
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    while high - low > 5e-4:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return (low + high) / 2.0
