"""What a search for the best layout is asked, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.planner.machine import Machine
from telechat_twins.core.planner.memory.estimate import FRAGMENTATION, RankMemory
from telechat_twins.core.planner.time.step import StepTime
from telechat_twins.core.planner.time.work import Work

# GiB of a device that communicators, compiled kernels and the driver take.
RESERVE_GIB = 4.0
POLICIES = ("none", "selective", "full")


def usable_bytes(machine: Machine, memory_gib: float | None) -> float:
    """Bytes that the estimate of a plan may have, so that with its margin it fits ``memory_gib`` (None: all of a device
    but RESERVE_GIB)."""
    gib = machine.memory.value - RESERVE_GIB if memory_gib is None else memory_gib
    return gib * 2**30 / (1.0 + FRAGMENTATION)


@dataclass(frozen=True)
class Question:
    """The best way to train ``model`` on at most ``devices`` devices of ``machine``, at ``global_batch`` sequences of
    ``seq_len`` tokens a step. ``memory_gib``: what a plan may need of a device, its margin included; None: all but
    RESERVE_GIB. ``most_samples``: largest micro-batch that is tried. ``top``: number of plans wanted."""

    model: ModelConfig
    machine: Machine
    devices: int
    seq_len: int
    global_batch: int
    precision: str = "bf16"
    memory_gib: float | None = None
    most_samples: int = 16
    top: int = 11

    @property
    def limit(self) -> float:
        """Bytes that the estimate of a plan may have, so that with its margin it fits."""
        return usable_bytes(self.machine, self.memory_gib)


@dataclass(frozen=True)
class Plan:
    """A legal plan, with its time and the memory of its fullest rank."""

    layout: Layout
    work: Work
    time: StepTime
    memory: RankMemory


@dataclass(frozen=True)
class TooLarge:
    """A plan that does not fit: ``needed`` bytes; ``bound``: seconds that its step takes at least."""

    layout: Layout
    work: Work
    needed: int
    bound: float


@dataclass
class Found:
    """Result of a search: plans by time, those too large that might have been faster, and how many were ruled out how.

    ``considered``: legal combinations of layout, schedule, recomputation and micro-batch; ``too_large``: ruled out by
    memory; ``timed``: simulated; of the rest a bound says that they are slower. ``least``: of those too large the one
    that needs least.
    """

    plans: list[Plan] = field(default_factory=list)
    large: list[TooLarge] = field(default_factory=list)
    least: TooLarge | None = None
    considered: int = 0
    too_large: int = 0
    timed: int = 0
