"""Raw times of a calibration, taken in rounds: collectives and narrow layouts on the ranks of a launch, and the phases
of small models in processes beside it.

What has to be told apart is measured apart. A model of two depths gives a block and the rest. A model so narrow that
its operators have nothing to do gives the time of the host; cut by tp or by a ring, what these add to it; cut into few
and many stages, what a stage adds. As many processes as there are cores run at once, since they share memory, caches
and the clock's reserves; one alone with all cores tells how much faster a process is with more of them.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.bench.worker import PhasedTrainer, Worker, bench_config, clocks, timed_phases
from telechat_twins.core.launch.command import RANK_VARIABLES
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.types import JsonObject

OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shift")
SIZES = (1 << 11, 1 << 13, 1 << 15, 1 << 17, 1 << 19, 1 << 21, 1 << 23)  # bytes a rank passes in
CALLS, FEW_CALLS, LARGE = 12, 4, 1 << 19
DEPTHS = (1, 3)
NARROW_DEPTHS = (1, 5)
MICRO_BATCHES, NARROW_MICRO_BATCHES = 2, (1, 4)
NARROW = {
    "hidden_size": 32,
    "ffn_hidden_size": 32,
    "num_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
}
NARROW_PLACES = 8
PROBED = ("tp2", "ring2")
STAGES = {"pp2": 2, "pp2.vpp4": 8}  # pipelines of the narrow model, and their stages, a layer of the longer one's each
REPEATS = 2  # of each model in a round

Times = dict[str, list[float]]  # by phase of core.bench.worker.timed_phases


class Group(Protocol):
    """A group of ranks, of a backend's mesh."""

    @property
    def size(self) -> int: ...


def small_models(options: JsonObject) -> dict[str, JsonObject]:
    """The models whose phases are measured, by name: variants of ``options`` in two depths each, and narrow ones."""
    model = load_model_config(options["model"])
    half = {
        "num_heads": max(1, model.num_heads // 2),
        "num_kv_heads": max(1, model.num_kv_heads // 2),
        "head_dim": model.head_dim,
        "ffn_hidden_size": max(1, model.ffn_hidden_size // 2),
        "vocab_size": max(1, model.vocab_size // 2),
    }
    attention = {**NARROW, **{name: getattr(model, name) for name in ("num_heads", "num_kv_heads", "head_dim")}}
    variants: dict[str, tuple[JsonObject, JsonObject]] = {
        "whole": ({}, {}),
        "short": ({}, {"seq_len": max(1, options["seq_len"] // 2)}),
        "more": ({}, {"micro_batch": 2 * options["micro_batch"]}),
        "half": (half, {}),
        "attention": (attention, {}),  # of the whole model, with little beside it
    }
    found = {}
    for name, (overrides, changes) in variants.items():
        for layers in DEPTHS:
            here = {**options, **changes, "micro_batches": MICRO_BATCHES}
            found[f"{name} {layers}"] = {**here, "overrides": {**overrides, "num_layers": layers}}
    for layers in NARROW_DEPTHS:
        for count in NARROW_MICRO_BATCHES:
            found[f"narrow {layers} x{count}"] = narrow(options, layers, count)
    return found


def narrow(options: JsonObject, layers: int, micro_batches: int, layout: str = "single") -> JsonObject:
    """Options of a model whose operators have nothing to do."""
    return {
        "model": options["model"],
        "overrides": {**NARROW, "num_layers": layers},
        "seq_len": NARROW_PLACES,
        "micro_batch": 1,
        "micro_batches": micro_batches,
        "precision": options["precision"],
        "layout": layout,
    }


def ring_attention(options: JsonObject, layers: int) -> JsonObject:
    """Options of the model with little beside attention, on a ring."""
    return {**small_models(options)[f"attention {layers}"], "layout": "ring2"}


def alone_models(options: JsonObject) -> dict[str, JsonObject]:
    """Those that are measured once more in one process with all cores: the whole and the narrow ones."""
    return {name: one for name, one in small_models(options).items() if name.startswith(("whole", "narrow"))}


class Probes:
    """The probes of one rank of a launch.

    Rank 0 also starts the processes beside the launch, in ``environment``: one a core with a thread each, and one with
    all cores. They end with ``stack``.
    """

    def __init__(
        self,
        backend: str,
        options: JsonObject,
        rank: int,
        world: int,
        stack: ExitStack,
        environment: Mapping[str, str],
    ) -> None:
        self.backend, self.options = backend, options
        self.collectives: dict[str, list[list[tuple[float, float]]]] = {}  # by operation and size, of both clocks
        self.layouts: dict[str, Times] = {}
        self.crowd: dict[str, Times] = {}
        self.alone: dict[str, Times] = {}
        self._trainers: dict[str, tuple[PhasedTrainer, JsonObject]] = {}
        self._calls, self._meet = ({}, lambda: None) if world == 1 else _calls(backend, world)
        if world == 2:
            train = backends.load(backend, "train")
            for layout in PROBED:
                for layers in NARROW_DEPTHS:
                    chosen = narrow(options, layers, NARROW_MICRO_BATCHES[-1], layout)
                    self._trainers[f"{layout} {layers}"] = train.Trainer(bench_config(chosen)), chosen
            for layout in STAGES:
                chosen = narrow(options, max(STAGES.values()), NARROW_MICRO_BATCHES[-1], layout)
                self._trainers[layout] = train.Trainer(bench_config(chosen)), chosen
            for layers in DEPTHS:
                chosen = ring_attention(options, layers)
                self._trainers[f"ring2 attention {layers}"] = train.Trainer(bench_config(chosen)), chosen
        self._workers: list[Worker] = []
        self._single: Worker | None = None
        if rank == 0:
            cores = len(os.sched_getaffinity(0))
            one = {**environment, "OMP_NUM_THREADS": "1"}
            all_of_them = {"OMP_NUM_THREADS": str(cores), **environment}  # or as many as the user wants
            first = narrow(options, 1, 1)
            self._workers = [stack.enter_context(Worker(backend, first, one)) for _ in range(cores)]
            self._single = stack.enter_context(Worker(backend, first, all_of_them))

    def turn(self) -> None:
        """One round: every probe once, in the same order on all ranks."""
        convert = backends.load(self.backend, "model").to_tensor if self._calls else None
        for op, call in self._calls.items():
            rows = self.collectives.setdefault(op, [[] for _ in SIZES])
            for row, size in zip(rows, SIZES, strict=True):
                assert convert is not None
                x = convert(np.ones((2, size // 512, 64), np.float32))
                row.append(_medians(call, x, FEW_CALLS if size >= LARGE else CALLS))
        for name, (trainer, chosen) in self._trainers.items():
            _add(self.layouts.setdefault(name, {}), timed_phases(trainer, bench_config(chosen), REPEATS))
        self._meet()
        if self._single is not None:
            self._beside(self._single)
        self._meet()

    def _beside(self, single: Worker) -> None:
        """The phases in the processes beside the launch, whose ranks wait."""
        with ThreadPoolExecutor(len(self._workers)) as pool:
            for name, chosen in small_models(self.options).items():
                here = self.crowd.setdefault(name, {})
                orders = [pool.submit(worker.phases, chosen, REPEATS) for worker in self._workers]
                for order in orders:
                    _add(here, order.result())
        for name, chosen in alone_models(self.options).items():
            _add(self.alone.setdefault(name, {}), single.phases(chosen, REPEATS))

    def raw(self) -> JsonObject:
        """All times so far, in seconds."""
        return {
            "collectives": self.collectives,
            "layouts": self.layouts,
            "crowd": self.crowd,
            "alone": self.alone,
        }


def outside_a_launch(threads: str | None = None) -> dict[str, str]:
    """Environment of a process beside a launch; ``threads``: OMP_NUM_THREADS as it was before it."""
    env = {name: value for name, value in os.environ.items() if name not in (*RANK_VARIABLES, "OMP_NUM_THREADS")}
    return env if threads is None else env | {"OMP_NUM_THREADS": threads}


def _calls(backend: str, world: int) -> tuple[dict[str, Callable[[object], object]], Callable[[], object]]:
    """The collectives of a step, by their names in core.parallel.traffic, and a barrier; a message takes what a shift
    does. Along the second axis, the sequence, as layers use them: its pieces are not contiguous."""
    collectives = backends.load(backend, "collectives")
    mesh = backends.load(backend, "parallelize").open_mesh(load_model_config("telechat2-tiny"), Layout(dp=world))
    group: Group = mesh.replicas
    calls = {
        "all_reduce": lambda x: collectives.all_reduce(x, group),
        "all_gather": lambda x: collectives.all_gather(x, group, 1),
        "reduce_scatter": lambda x: collectives.reduce_scatter(x, group, 1),
        "all_to_all": lambda x: collectives.all_to_all(x, group, 1, 1),
        "shift": lambda x: collectives.start_shift(x, group).wait(),
    }
    return calls, lambda: collectives.barrier(group)


def _medians(call: Callable[[object], object], x: object, count: int) -> tuple[float, float]:
    """Median seconds of a call, and the mean of the time on processors, whose clock may be coarse."""
    call(x)
    seconds, (_, started) = [], clocks()
    for _ in range(count):
        before = time.perf_counter()
        call(x)
        seconds.append(time.perf_counter() - before)
    return statistics.median(seconds), (clocks()[1] - started) / count


def _add(times: Times, more: Mapping[str, Sequence[float]]) -> None:
    for phase, seconds in more.items():
        times.setdefault(phase, []).extend(seconds)
