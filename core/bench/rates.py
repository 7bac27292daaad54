"""The fit of a calibration: rates of products, attention and memory, and the host's time beside wide operators, to the
phases of small models."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np

from telechat_twins.core.bench.probes import small_models
from telechat_twins.core.bench.worker import bench_config
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.planner.fit import with_efficiency
from telechat_twins.core.planner.machine import Machine
from telechat_twins.core.planner.time.operators import Rates, Shape, block_passes, ends_passes
from telechat_twins.core.planner.time.work import OURS, Work, work_of
from telechat_twins.core.types import JsonObject

RANGES = {"matmul": (0.01, 10.0), "memory": (0.01, 10.0), "attention": (0.002, 10.0), "tile": (0.5, 200.0)}
# What the host takes beside operators that have something to do, over what it takes in the narrow model: more, where
# they push its data out of the caches; less, where a framework's threads prepare the next operators meanwhile. A
# factor of e counts as an error of HOST_WEIGHT in a phase.
HOST_RANGES = {"forward": (0.3, 3.0), "backward": (0.3, 3.0)}
HOST_WEIGHT = 0.15
_ROUNDS = 60
Pair = tuple[float, float]  # seconds of a forward, and of a forward with its backward, of a whole step


def pairs(
    machine: Machine, options: JsonObject, measured: Mapping[str, Pair], world: int, wasted: Pair
) -> list[tuple[float, float]]:
    """(forecast, measured) seconds of forwards, and of forwards with backwards, where ``world`` processes share the
    cores."""
    found = []
    for (model, work), seconds in zip(works(json.dumps(options), tuple(measured)), measured.values(), strict=True):
        for forecast, true, beside in zip(_forecast(machine, model, work, world), seconds, wasted, strict=True):
            found.append((forecast + beside, true))
    return found


@cache
def works(options: str, names: Sequence[str]) -> list[tuple[ModelConfig, Work]]:
    """Model and work of the small models ``names``."""
    models = small_models(json.loads(options))
    configs = [bench_config(models[name]) for name in names]
    return [(config.model, work_of(config)) for config in configs]


def _forecast(machine: Machine, model: ModelConfig, work: Work, world: int) -> Pair:
    """Seconds of all micro-batches of a step in one process, forward and with the backward."""
    layout = Layout()
    rates, shape = Rates.of(machine, work.precision, world), Shape.of(model, layout, work, OURS)
    block = block_passes(model, layout, work, rates, OURS, shape)
    ends = ends_passes(model, layout, rates, OURS, shape).values()
    n, m = model.num_layers, work.micro_batches
    forward = m * (n * block.forward.seconds + sum(end.forward.seconds for end in ends))
    return forward, forward + m * (n * block.backward.seconds + sum(end.backward.seconds for end in ends))


def with_host(machine: Machine, factors: Mapping[str, float]) -> Machine:
    """``machine`` whose host takes ``factors`` times as long in forwards and backwards."""
    assert machine.host is not None
    times = {
        f"{part}_{phase}": factor * getattr(machine.host, f"{part}_{phase}")
        for part in ("block", "ends")
        for phase, factor in factors.items()
    }
    return dataclasses.replace(machine, host=dataclasses.replace(machine.host, **times))


def fit_rates(
    machine: Machine, options: JsonObject, measured: Mapping[str, Pair], world: int, wasted: Pair
) -> tuple[dict[str, float], dict[str, float]]:
    """Rates of products, memory and attention, and factors of the host's time, that forecast ``measured`` best.

    Damped Gauss-Newton on the logarithms of all, which keeps to RANGES and HOST_RANGES.
    """
    limits = [*RANGES.values(), *HOST_RANGES.values()]
    low, high = (np.log([one[side] for one in limits]) for side in (0, 1))

    def values_of(x: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
        values = np.exp(x).tolist()
        split = len(RANGES)
        return dict(zip(RANGES, values[:split], strict=True)), dict(zip(HOST_RANGES, values[split:], strict=True))

    def errors(x: np.ndarray) -> np.ndarray:
        rates, factors = values_of(x)
        found = pairs(with_host(with_efficiency(machine, rates), factors), options, measured, world, wasted)
        beside = HOST_WEIGHT * x[len(RANGES) :]
        return np.array([*(math.log(forecast / seconds) for forecast, seconds in found), *beside])

    x, damping = np.log([0.5, 0.5, 0.2, 16.0, *(1.0 for _ in HOST_RANGES)]), 1e-2
    best = errors(x)
    for _ in range(_ROUNDS):
        slopes = np.stack([(errors(x + step) - best) / 1e-3 for step in 1e-3 * np.eye(len(x))], axis=1)
        move = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(x)), -slopes.T @ best)
        there = np.clip(x + move, low, high)
        found = errors(there)
        if found @ found < best @ best:
            x, best, damping = there, found, damping / 3.0
        else:
            damping *= 5.0
    rates, factors = ({name: round(value, 4) for name, value in one.items()} for one in values_of(x))
    return rates, factors
