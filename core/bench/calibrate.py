"""Machine file of this computer's cores, from a minute of measurements (``tele plan --calibrate``).

    core/bench/calibrate.py BACKEND FOLDER       (one of two ranks, under msrun or torchrun)

Two ranks time the collectives of a step, by operation and size. Then single processes train small models: as many at
once as there are cores, one core each, and one alone with all of them. The rates of products and memory and the time
between operators are those with which core.planner.time forecasts these steps best.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.bench.step import processor
from telechat_twins.core.bench.worker import Worker
from telechat_twins.core.launch.worker import run_script
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.planner.fit import with_efficiency
from telechat_twins.core.planner.machine import Machine, machine_from
from telechat_twins.core.planner.time.step import step_time
from telechat_twins.core.planner.time.work import Work
from telechat_twins.core.types import JsonObject

MODEL = "telechat2-tiny"
# (model, tokens a sample, samples, micro-batches): small and larger products, short and long attention.
STEPS = (
    ("telechat2-tiny", 64, 1, 4),
    ("telechat2-tiny", 256, 4, 1),
    ("telechat2-mini", 128, 1, 1),
    ("telechat2-mini", 512, 1, 1),
)
SIZES = (1 << 12, 1 << 16, 1 << 20)  # bytes a rank passes in
CALLS = 12
RANGES = {"matmul": (0.02, 3.0), "memory": (0.02, 3.0), "launch": (0.5, 400.0)}
_ROUNDS = 25
Point = tuple[str, int, int, int]


def main() -> int:
    """Entry point of a rank: times the collectives and writes them to FOLDER/rank_<rank>.json."""
    backend, folder = sys.argv[1], Path(sys.argv[2])
    collectives, model = (backends.load(backend, name) for name in ("collectives", "model"))
    mesh = backends.load(backend, "parallelize").open_mesh(load_model_config(MODEL), Layout(dp=2))
    found: dict[str, list[float]] = {}
    for op, call in _calls(collectives, mesh.replicas).items():
        for size in SIZES:
            x = model.to_tensor(np.ones((size // 256, 64), np.float32))
            found.setdefault(op, []).append(_median(lambda call=call, x=x: call(x)))  # type: ignore[misc]
    (folder / f"rank_{mesh.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    return 0


def _calls(collectives: object, group: object) -> dict[str, Callable[[object], object]]:
    """The collectives of a step, by their names in core.parallel.traffic; a message takes what a shift does."""
    get = {name: getattr(collectives, name) for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")}
    shift = collectives.start_shift  # type: ignore[attr-defined]
    return {
        "all_reduce": lambda x: get["all_reduce"](x, group),
        "all_gather": lambda x: get["all_gather"](x, group, 0),
        "reduce_scatter": lambda x: get["reduce_scatter"](x, group, 0),
        "all_to_all": lambda x: get["all_to_all"](x, group, 0, 0),
        "shift": lambda x: shift(x, group).wait(),
    }


def _median(call: Callable[[], object]) -> float:
    call()
    seconds = []
    for _ in range(CALLS):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def calibrate(backend: str, name: str) -> JsonObject:
    """Measure this machine with ``backend``; the mapping of a machine file."""
    cores = len(os.sched_getaffinity(0))
    crowded, alone = measure_steps(backend, cores)
    found = describe(backend, name, cores, measure_collectives(backend) if cores > 1 else {})
    machine = machine_from(found, name)
    values = fit_steps(machine, crowded, world=cores)
    found["efficiency"] |= values
    machine = machine_from(found, name)
    errors = [forecast / seconds - 1.0 for forecast, seconds in _forecasts(machine, crowded, cores)]
    found["efficiency"] |= {"faster": round(max(0.1, *errors), 3), "slower": round(max(0.1, *(-e for e in errors)), 3)}
    # With all cores the rates of a process are larger by a power of their number.
    exponents = [
        (x, sum(math.log(a / b) ** 2 for a, b in _forecasts(dataclasses.replace(machine, core_exponent=x), alone, 1)))
        for x in (i / 100 for i in range(0, 101, 2))
    ]
    found["core_exponent"] = min(exponents, key=lambda one: one[1])[0]
    return found


def describe(backend: str, name: str, cores: int, operations: Mapping[str, Sequence[float]]) -> JsonObject:
    """The machine file but for what is fitted; peaks are those of numpy, which need not be the backend's."""
    how = f"measured by tele plan --calibrate --backend {backend}"
    n = 512
    a = np.ones((n, n), np.float32)
    product = 2.0 * n**3 / _median(lambda: a @ a) / 1e12
    wide = np.ones(1 << 23, np.float32)
    copy = 2.0 * wide.nbytes / _median(wide.copy) / 1e9
    peak = {"value": round(product, 4), "source": f"{how}: numpy's product of {n} x {n} float32 matrices"}
    rows = [_operation(op, seconds) for op, seconds in operations.items()]
    link = {
        "bandwidth": {"value": 1.0, "source": f"{how}; `measured` has precedence"},
        "latency": {"value": 100.0, "source": f"{how}; `measured` has precedence"},
        "efficiency": {"value": 1.0, "source": "measured bandwidths need none"},
        "measured": rows,
    }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": name,
        "title": f"{cores} cores of {processor()}",
        "devices_per_node": cores,
        "peak_bf16": peak,
        "peak_fp32": peak,
        "memory": {"value": round(memory / cores / 2**30, 3), "source": "the operating system, divided by the cores"},
        "memory_bandwidth": {"value": round(copy, 3), "source": f"{how}: numpy's copy of 32 MiB"},
        "node": link,
        "cluster": link,
        "scaling": {"value": 1e-6, "source": "one machine"},
        "power": {"value": 10.0, "source": "assumed, watts a core"},
        "efficiency": {
            **dict.fromkeys(("matmul", "memory"), 0.5),
            "attention": 0.5,
            "tile": 16.0,
            "launch": 20.0,
            "overlap": 0.0,
            "faster": 0.1,
            "slower": 0.1,
            "source": f"{how}; attention as products; tile assumed; nothing overlaps, since all share the cores",
        },
        "backend": backend,
        "shared_cores": True,
        "core_exponent": 1.0,
    }


def _operation(op: str, seconds: Sequence[float]) -> JsonObject:
    """Latency and bandwidth of an operation: the smallest size is all latency, the largest decides the bandwidth."""
    moved = {"all_reduce": 1.0, "all_gather": 1.0, "reduce_scatter": 0.5, "all_to_all": 0.5, "shift": 1.0}[op]
    latency = max(seconds[0], 1e-7)
    per_byte = max((seconds[-1] - seconds[0]) / (moved * (SIZES[-1] - SIZES[0])), 1e-13)
    return {"op": op, "latency": round(latency * 1e6, 2), "bandwidth": round(1e-9 / per_byte, 4)}


def measure_collectives(backend: str) -> dict[str, list[float]]:
    """Seconds of each operation between two ranks, for each of SIZES."""
    from telechat_twins.core.launch.launcher import launch

    folder = Path(tempfile.mkdtemp(prefix="tele-calibrate-"))
    code = launch(backend, [backend, str(folder)], 2, folder / "logs", script=__file__, instead=lambda: None)
    if code:
        raise SystemExit(code)  # the launch has printed the reason, and its logs are kept
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    shutil.rmtree(folder)
    return {op: [max(pair) for pair in zip(*(rank[op] for rank in ranks), strict=True)] for op in ranks[0]}


def measure_steps(backend: str, cores: int) -> tuple[dict[Point, float], dict[Point, float]]:
    """Seconds of each of STEPS: with a process on every core at once, and of one process with all cores."""
    single = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    crowded = _medians(backend, [single] * cores)
    return crowded, _medians(backend, [{**single, "OMP_NUM_THREADS": str(cores)}]) if cores > 1 else dict(crowded)


def _medians(backend: str, environments: Sequence[Mapping[str, str]]) -> dict[Point, float]:
    """Median seconds of each of STEPS, of processes in these environments that run at the same time."""
    found = {}
    with ExitStack() as stack, ThreadPoolExecutor(len(environments)) as pool:
        workers = [stack.enter_context(Worker(backend, _options(STEPS[0]), env)) for env in environments]
        for point in STEPS:
            rows = pool.map(lambda worker, point=point: _steps(worker, point), workers)  # type: ignore[misc]
            found[point] = statistics.median(seconds for row in rows for seconds in row)
    return found


def _options(point: Point) -> JsonObject:
    names = ("model", "seq_len", "micro_batch", "micro_batches")
    return {**dict(zip(names, point, strict=True)), "precision": "fp32"}


def _steps(worker: Worker, point: Point) -> list[float]:
    """Seconds of each step, of about two seconds of steps after two that are not counted."""
    first = worker.other_steps(_options(point), 2)["seconds"][1]
    return worker.steps(max(3, min(30, round(2.0 / first))))["seconds"]


def fit_steps(machine: Machine, measured: Mapping[Point, float], world: int) -> dict[str, float]:
    """Rates of products and of memory, and microseconds between operators, that forecast ``measured`` best.

    Damped Gauss-Newton on the logarithms of both, which keeps to RANGES.
    """
    low, high = (np.log([limits[side] for limits in RANGES.values()]) for side in (0, 1))

    def values_of(x: np.ndarray) -> dict[str, float]:
        found = dict(zip(RANGES, np.exp(x).tolist(), strict=True))
        return {**found, "attention": found["matmul"]}

    def errors(x: np.ndarray) -> np.ndarray:
        pairs = _forecasts(with_efficiency(machine, values_of(x)), measured, world)
        return np.array([math.log(forecast / seconds) for forecast, seconds in pairs])

    x, damping = np.log([0.5, 0.5, 20.0]), 1e-2
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
    return {name: round(value, 4) for name, value in values_of(x).items()}


def _forecasts(machine: Machine, measured: Mapping[Point, float], world: int) -> list[tuple[float, float]]:
    """(forecast, measured) seconds; ``world`` processes share the cores."""
    here = dataclasses.replace(machine, devices_per_node=max(1, machine.devices_per_node // world))
    return [
        (step_time(_model(point[0]), Layout(), _work(point), here).seconds, seconds)
        for point, seconds in measured.items()
    ]


@cache
def _model(name: str) -> ModelConfig:
    return load_model_config(name)


def _work(point: Point) -> Work:
    _, seq_len, micro_batch, micro_batches = point
    return Work(seq_len=seq_len, micro_batch=micro_batch, micro_batches=micro_batches, precision="fp32")


if __name__ == "__main__":
    raise SystemExit(run_script(main))
