"""Contestants of the operator benchmark, and how calls are timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from telechat_twins.core.bench.cases import Size
from telechat_twins.core.types import JsonObject

Call = Callable[[], object]


SHORT = 1e-2  # seconds: shorter calls are timed several at a time


class Contestant(NamedTuple):
    """``backward`` alone, or where a framework cannot take it apart ``both``: forward and backward in one call."""

    implementation: str
    forward: Call
    backward: Call | None = None
    both: Call | None = None


class Bench(Protocol):
    """One framework's side."""

    def about(self) -> JsonObject: ...

    def contestants(self, operator: str, size: Size) -> dict[str, Contestant]: ...

    def copy(self) -> tuple[Call, float]:
        """A copy larger than any cache, and the bytes that it reads and writes."""

    def read(self) -> tuple[Call, float]:
        """Reading an array larger than any cache, and its bytes."""

    def matmul(self) -> tuple[Call, float]:
        """A large matrix product and its floating-point operations."""

    def seconds(self, call: Call, count: int) -> float:
        """The time of ``count`` calls, until the device is done."""


def host_seconds(call: Call, count: int, wait: Call = lambda: None) -> float:
    """``count`` calls by the host's clock; ``wait`` returns when the device is done."""
    wait()
    started = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return time.perf_counter() - started


def rest(longest: float = 0.5) -> None:
    """Until this process's threads sleep, or ``longest`` seconds: those of MindSpore's own operators go on looking for
    work for a tenth of a second, and would take a processor from whoever is measured next."""
    until = time.perf_counter() + longest
    while time.perf_counter() < until:
        used = time.process_time()
        time.sleep(0.004)
        if time.process_time() - used < 0.0005:
            return


class Timer:
    """Calls that are warm, each with the number of calls that make one measurement long enough."""

    def __init__(self, bench: Bench, calls: dict[tuple[str, str], Call]) -> None:
        self.bench, self.calls = bench, calls
        self.counts, self.warmups = {}, {}
        for key, call in calls.items():
            bench.seconds(call, 2)
            once = bench.seconds(call, 1)
            self.counts[key] = max(1, min(100, round(SHORT / max(once, 1e-7))))
            self.warmups[key] = self.counts[key] if once < 10 * SHORT else 0

    def turn(self, rounds: int) -> dict[tuple[str, str], list[float]]:
        """``rounds`` times each call in order; seconds of one call."""
        found: dict[tuple[str, str], list[float]] = {key: [] for key in self.calls}
        for _ in range(rounds):
            for key, call in self.calls.items():
                rest()
                if self.warmups[key]:  # as within a step: threads awake, processors up to speed
                    self.bench.seconds(call, self.warmups[key])
                found[key].append(self.bench.seconds(call, self.counts[key]) / self.counts[key])
        return found
