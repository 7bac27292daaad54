"""Contestants of the operator benchmark, and their timing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from telechat_twins.core.bench.cases import Size
from telechat_twins.core.types import JsonObject

Call = Callable[[], object]


MIN_TIMED_S = 1e-2  # shorter calls are repeated within one measurement


class Contestant(NamedTuple):
    """One implementation: ``forward`` and ``backward``, or ``both`` in one call where they cannot be separated."""

    implementation: str
    forward: Call
    backward: Call | None = None
    both: Call | None = None


class Bench(Protocol):
    """The benchmarks of one framework."""

    def about(self) -> JsonObject: ...

    def contestants(self, operator: str, size: Size) -> dict[str, Contestant]: ...

    def copy(self) -> tuple[Call, float]:
        """A copy larger than any cache, and the number of bytes it reads and writes."""

    def read(self) -> tuple[Call, float]:
        """A reduction of an array larger than any cache, and its number of bytes."""

    def matmul(self) -> tuple[Call, float]:
        """A large matrix product, and its number of floating-point operations."""

    def seconds(self, call: Call, count: int) -> float:
        """Seconds of ``count`` calls, until the device has finished."""


def host_seconds(call: Call, count: int, wait: Call = lambda: None) -> float:
    """Seconds of ``count`` calls by the host's clock; ``wait`` returns when the device has finished."""
    wait()
    started = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return time.perf_counter() - started


def rest(longest: float = 0.5) -> None:
    """Wait until this process's threads sleep, at most ``longest`` seconds.

    Threads of MindSpore's operators spin for 0.1 s after their work and would compete with the next measurement.
    """
    until = time.perf_counter() + longest
    while time.perf_counter() < until:
        used = time.process_time()
        time.sleep(0.004)
        if time.process_time() - used < 0.0005:
            return


class Timer:
    """Warm calls, each with the number of repetitions of one measurement."""

    def __init__(self, bench: Bench, calls: dict[tuple[str, str], Call]) -> None:
        self.bench, self.calls = bench, calls
        self.counts, self.warmups = {}, {}
        for key, call in calls.items():
            bench.seconds(call, 2)
            once = bench.seconds(call, 1)
            self.counts[key] = max(1, min(100, round(MIN_TIMED_S / max(once, 1e-7))))
            self.warmups[key] = self.counts[key] if once < 10 * MIN_TIMED_S else 0

    def turn(self, rounds: int) -> dict[tuple[str, str], list[float]]:
        """Seconds per call of ``rounds`` measurements of each call, in alternation."""
        found: dict[tuple[str, str], list[float]] = {key: [] for key in self.calls}
        for _ in range(rounds):
            for key, call in self.calls.items():
                rest()
                if self.warmups[key]:  # the state within a training step: threads awake, full clock frequency
                    self.bench.seconds(call, self.warmups[key])
                found[key].append(self.bench.seconds(call, self.counts[key]) / self.counts[key])
        return found
