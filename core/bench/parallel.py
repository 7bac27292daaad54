"""Layout benchmark (``tele bench parallel``): measurements on each rank, and their summary.

    core/bench/parallel.py BACKEND FOLDER       (a rank, under msrun or torchrun)

A rank reads FOLDER/plan.json, builds its part of every layout, measures the layouts in turns, and writes
FOLDER/rank_<rank>.json. Rank 0 also runs a single-process trainer as a child process, which takes a turn in every round
while the ranks wait, so that each layout is compared with it under the same load of the machine.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from telechat_twins.core import backends
from telechat_twins.core.bench.probes import Probes, outside_a_launch
from telechat_twins.core.bench.worker import Worker, bench_config, clocks, paired_ratios, random_batch, timed_steps
from telechat_twins.core.config import RunConfig
from telechat_twins.core.launch.worker import run_script
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import Layout, parse_layout
from telechat_twins.core.parallel.schedule import bubble, bubble_formula
from telechat_twins.core.parallel.sequence import split_batch, visible_pairs
from telechat_twins.core.parallel.sharding import Shard, chunk_table, kv_copies, plan_buckets
from telechat_twins.core.parallel.traffic import Traffic, Widths, expected_traffic, wire_bytes
from telechat_twins.core.planner.machine import Machine
from telechat_twins.core.planner.time.step import step_time
from telechat_twins.core.planner.time.work import work_of
from telechat_twins.core.train.recipe import tells_classes_apart
from telechat_twins.core.types import JsonObject

HOST = ("agree", "barrier")  # collectives of a few host numbers, which core.parallel.traffic does not count
Span = tuple[float, float, float]  # a pipeline's run: start, end, and seconds spent waiting for other stages


def plan_path(folder: Path) -> Path:
    return folder / "plan.json"


def rank_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"


@dataclass
class RankRecord:
    """One rank's measurements of one layout.

    ``seconds`` of each step, a list for each turn; ``spans`` of each step's pipeline run, ``forwards`` of runs without
    a backward; ``sent`` in one step: (operation, group, calls, bytes); ``states``: bytes of masters, m and v; ``peak``:
    largest number of graphs alive at once; ``loss`` after the warm-up; ``processor``: seconds that this process spent
    on processors in a step, a mean for each turn.
    """

    seconds: list[list[float]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    forwards: list[Span] = field(default_factory=list)
    sent: list[tuple[str, str, float, float]] = field(default_factory=list)
    states: int = 0
    peak: int = 0
    loss: float = 0.0
    processor: list[float] = field(default_factory=list)


class Pipeline(Protocol):
    """The pipeline of a trainer, whose ``run`` may be replaced; ``peak`` and ``waited`` as in telechat_ms.pipeline."""

    run: Callable[..., float]
    peak: int
    waited: float


class Master(Protocol):
    """A flat buffer of master weights."""

    @property
    def nbytes(self) -> int: ...


class Masters(Protocol):
    """The optimizer of a trainer, whose master weights the benchmark counts."""

    @property
    def masters(self) -> Sequence[Master]: ...


class ParallelTrainer(Protocol):
    """A backend's trainer on one rank of a layout."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    @property
    def pipeline(self) -> Pipeline: ...

    @property
    def optimizer(self) -> Masters: ...

    def agree(self, values: list[float], op: str) -> list[float]: ...

    def share(self, global_batch: int) -> tuple[int, int]: ...

    def gradients(self, batch: Batch, num_targets: int, loss_scale: float, /, *, backward: bool = True) -> float: ...

    def grad_norm(self, loss_scale: float, /) -> float: ...

    def update(self, lr: float, grad_scale: float, /) -> None: ...

    def implementation(self) -> dict[str, str]: ...


class Counter(Protocol):
    """A backend's traffic counter: (operation, group) -> [calls, bytes]."""

    def reset(self) -> None: ...

    def items(self) -> Iterable[tuple[tuple[str, str], list[int]]]: ...


class Single(Protocol):
    """The single-process trainer beside the ranks (core.bench.worker.Worker)."""

    def steps(self, count: int) -> JsonObject: ...


class LayoutTrial:
    """This rank's part of one layout, and its record."""

    def __init__(self, trainer: ParallelTrainer, config: RunConfig, traffic: Counter) -> None:
        self.trainer, self.config, self.traffic = trainer, config, traffic
        self.record = RankRecord()
        self._done = 0
        self._runs: list[Span] = []
        trainer.pipeline.run = self._watched(trainer.pipeline.run)
        # m and v have their master's shape and dtype.
        self.record.states = 3 * sum(int(master.nbytes) for master in trainer.optimizer.masters)

    def warm_up(self, count: int) -> None:
        """1 + ``count`` steps that are not timed. Traffic is counted from the second step on, since the first also
        gathers the newly created weights."""
        self._steps(1)
        self.traffic.reset()
        self.record.loss = self._steps(count)[1]
        self.record.sent = [
            (op, group, calls / count, payload / count)
            for (op, group), (calls, payload) in sorted(self.traffic.items())
            if op not in HOST
        ]

    def turn(self, count: int) -> None:
        """``count`` timed steps, and for a pipeline one forward without a backward."""
        _, started = clocks()
        self.record.seconds.append(self._steps(count)[0])
        self.record.processor.append((clocks()[1] - started) / count)
        self.record.spans += self._runs
        self.record.peak = self.trainer.pipeline.peak
        if self.config.parallel.pp > 1:
            self._runs = []
            batch = random_batch(self.config, self._done)
            first, rows = self.trainer.share(self.config.train.global_batch)
            self.trainer.gradients(batch.rows(first, first + rows), batch.num_targets, 1.0, backward=False)
            self.record.forwards += self._runs

    def _steps(self, count: int) -> tuple[list[float], float]:
        self._runs = []
        seconds, loss = timed_steps(self.trainer, self.config, self._done, count)
        self._done += count
        return seconds, loss

    def _watched(self, run: Callable[..., float]) -> Callable[..., float]:
        """``Pipeline.run`` that records its times; all processes of a machine share this clock."""

        def timed(*arguments: object, **options: object) -> float:
            started = time.perf_counter()
            loss = run(*arguments, **options)
            self._runs.append((started, time.perf_counter(), self.trainer.pipeline.waited))
            return loss

        return timed


def main() -> int:
    """Entry point of a rank: builds the layouts, measures them in turns and writes the record."""
    backend, folder = sys.argv[1], Path(sys.argv[2])
    plan = json.loads(plan_path(folder).read_text(encoding="utf-8"))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when the framework is loaded; see core.bench.worker
    traffic = backends.load(backend, "collectives").TRAFFIC
    trials = {}
    for layout in plan["layouts"]:
        config = bench_config(plan["options"] | {"layout": layout})
        trials[layout] = LayoutTrial(backends.load(backend, "train").Trainer(config), config, traffic)
    trainer = next(iter(trials.values())).trainer
    with ExitStack() as stack:
        single = None
        if trainer.rank == 0:
            single = stack.enter_context(Worker(backend, plan["options"], outside_a_launch(plan["threads"])))
        probes = None
        if plan.get("calibrate"):
            probes = Probes(
                backend, plan["options"], trainer.rank, trainer.world, stack, outside_a_launch(plan["threads"])
            )
        # An all-reduce of one number serves as the barrier.
        found = take_turns(trials, single, lambda: trainer.agree([0.0], "max"), plan["steps"], plan["block"], probes)
    if probes is not None:
        found["calibration"] = probes.raw()
    found["implementation"] = trainer.implementation()
    rank_path(folder, trainer.rank).write_text(json.dumps(found), encoding="utf-8")
    return 0


def take_turns(
    trials: Mapping[str, LayoutTrial],
    single: Single | None,
    meet: Callable[[], object],
    steps: int,
    block: int,
    probes: Probes | None = None,
) -> JsonObject:
    """Warm-up of one step and one block, then ``steps`` steps of each layout in blocks; every other round is in reverse
    order.

    ``single``: the core.bench.worker.Worker that takes turns, too, on rank 0; None on other ranks. ``meet``: a barrier.
    ``probes`` of a calibration take a turn in every round, so that what slows the machine for a while slows both.
    """
    seconds: list[list[float]] = []
    loss = 0.0
    order = [None, *trials.values()]
    for trial in order:
        if trial is not None:
            trial.warm_up(block)
        elif single is not None:
            loss = single.steps(1 + block)["loss"]
        meet()
    rounds = -(-steps // block)
    for number in range(rounds):
        count = min(block, steps - number * block)
        for trial in order if number % 2 == 0 else reversed(order):
            if trial is not None:
                trial.turn(count)
            elif single is not None:
                seconds.append(single.steps(count)["seconds"])
            meet()
        if probes is not None:
            probes.turn()
        if single is not None:
            latest = {name: trial.record.seconds[-1] for name, trial in trials.items()}
            shown = [f"{name} {statistics.median(times) * 1e3:.0f}" for name, times in latest.items()]
            print(
                f"round {number + 1} of {rounds}, ms a step: {', '.join(shown)}; "
                f"one process alone {statistics.median(seconds[-1]) * 1e3:.0f}",
                flush=True,
            )
    return {
        "single": {"seconds": seconds, "loss": loss},
        "layouts": {name: asdict(trial.record) for name, trial in trials.items()},
    }


def summarise(options: JsonObject, text: str, records: Sequence[RankRecord], single: JsonObject) -> dict:
    """The table row of one layout, from the records of all its ranks and the turns of the single process.

    Lists are by rank unless noted. ``traffic``: bytes passed to collectives in a step as counted ("counted") and by
    core.parallel.traffic.expected_traffic ("formula"), the latter as sent ("wire"), and every (operation, group) in
    which counter and formula disagree ("differs"). ``pipeline`` and ``ring`` are None where the layout has none.
    """
    config = bench_config({**options, "layout": text})
    layout, model = config.parallel, config.model
    # A step ends when it has ended on every rank.
    seconds = [
        [max(step) for step in zip(*turns, strict=True)] for turns in zip(*(r.seconds for r in records), strict=True)
    ]
    counted = [{(op, group): [calls, size] for op, group, calls, size in r.sent} for r in records]
    formula = [traffic_of(config, rank) for rank in range(layout.world)]
    return {
        "layout": text,
        "world": layout.world,
        "seconds": seconds,
        "processor": [r.processor for r in records],
        "ratios": paired_ratios(seconds, single["seconds"]),
        "loss_difference": max(abs(r.loss - single["loss"]) for r in records) / abs(single["loss"]),
        "traffic": {
            "counted": [sum(size for _, size in rank.values()) for rank in counted],
            "formula": [sum(size for _, size in rank.values()) for rank in formula],
            "wire": [on_the_wire(model, layout, rank) for rank in formula],
            "differs": differences(counted, formula),
            "detail": [{f"{op} {group}": row for (op, group), row in rank.items()} for rank in counted],
        },
        "states": {"held": [r.states for r in records], "formula": [states_of(config, n) for n in range(layout.world)]},
        "pipeline": pipeline_row(config, records) if layout.pp > 1 else None,
        "ring": ring_row(config) if layout.ring > 1 else None,
    }


def forecast_of(options: JsonObject, text: str, machine: Machine) -> JsonObject:
    """The forecast of a step in layout ``text`` on ``machine``: seconds, those in which the busiest rank works, and the
    shares of its classes."""
    config = bench_config({**options, "layout": text})
    work = work_of(config, tells_classes_apart(config.optim))
    step = step_time(config.model, config.parallel, work, machine)
    breakdown = dict(step.breakdown)
    working = sum(seconds for name, seconds in breakdown.items() if name not in ("pipeline", "stragglers"))
    return {"machine": machine.name, "seconds": step.seconds, "working": working, "breakdown": breakdown}


def forecasts_of(
    options: JsonObject, text: str, wall: Machine | None, processor: Machine | None = None
) -> JsonObject | None:
    """``forecast_of`` layout ``text`` by a calibration with the wall's clock, if there is one; with ``working`` of one
    with the processors' clock, if there is one."""
    if wall is None:
        return None
    found = forecast_of(options, text, wall)
    found["working"] = None if processor is None else forecast_of(options, text, processor)["working"]
    return found


def traffic_of(config: RunConfig, rank: int) -> Traffic:
    """Traffic of a step of ``config`` on ``rank`` by the formulas of core.parallel.traffic."""
    return expected_traffic(
        config.model,
        config.parallel,
        seq_len=config.data.seq_len,
        micro_batch=config.train.micro_batch,
        micro_batches=_micro_batches(config),
        rank=rank,
        precision=config.train.precision,
        by_class=tells_classes_apart(config.optim),
    )


def differences(counted: Sequence[Mapping], formula: Sequence[Mapping]) -> list[str]:
    """A line for each operation and group in which counter and formula disagree, in calls or bytes."""
    lines = []
    for rank, (here, there) in enumerate(zip(counted, formula, strict=True)):
        for op, group in sorted(here.keys() | there.keys()):
            found, expected = here.get((op, group), [0, 0]), there.get((op, group), [0, 0])
            if list(found) != list(expected):
                lines.append(
                    f"rank {rank}, {op} over {group}: counted {found[0]:g} calls, {found[1]:,.0f} bytes; "
                    f"formula {expected[0]} calls, {expected[1]:,} bytes"
                )
    return lines


def on_the_wire(model: ModelConfig, layout: Layout, traffic: Mapping[tuple[str, str], Sequence[float]]) -> float:
    """Bytes that a rank sends for ``traffic`` when collectives use ring algorithms."""
    sizes = {axis: len(layout.ranks(axis, 0)) for axis in ("tp", "cp", "ring", "ulysses", "dp", "replicas", "world")}
    sizes |= {"kv": kv_copies(model, layout), "tied": 2, "forward_out": 2, "backward_out": 2}
    return sum(wire_bytes(op, sizes[group], int(payload)) for (op, group), (_, payload) in traffic.items())


def states_of(config: RunConfig, rank: int) -> int:
    """Bytes of masters, m and v on ``rank``: three times its part of every bucket."""
    layout = config.parallel
    table: dict[str, Shard] = {}
    for chunk in range(layout.virtual):
        table |= chunk_table(config.model, layout, layout.coord(rank), chunk)
    parts = layout.dp * layout.cp if layout.zero1 else 1
    # The backends' limit on a bucket, which decides how much padding there is.
    limit = int(layout.bucket_mb * 2**20 / 4) if layout.dp * layout.cp > 1 else None
    by_class = tells_classes_apart(config.optim)
    held = sum(bucket.size // parts for bucket in plan_buckets(table, parts, limit, by_class))
    return 3 * Widths.of(config.train.precision).master * held


def pipeline_row(config: RunConfig, records: Sequence[RankRecord]) -> JsonObject:
    """Pipeline bubble, the fraction of time that ranks waited for other stages: measured in each step, and predicted.

    ``formula``: for equal stages. ``simulated``: core.parallel.schedule with the measured seconds of each global stage
    (``forward``, ``backward``).
    """
    layout, micro_batches = config.parallel, _micro_batches(config)
    shape = (layout.schedule, layout.pp, layout.virtual, micro_batches)
    forward, backward = stage_seconds(config, records)
    return {
        "measured": [idle_share(layout, spans) for spans in zip(*(r.spans for r in records), strict=True)],
        "formula": bubble_formula(*shape),
        "simulated": bubble(*shape, forward, backward),
        "forward": forward,
        "backward": backward,
        "peak": [r.peak for r in records],
    }


def idle_share(layout: Layout, spans: Sequence[Span]) -> float:
    """Idle fraction of one step, from every rank's span: waiting inside the run, and after its own last action until
    the last rank of its pipeline has ended, over the time of all ranks."""
    idle = whole = 0.0
    for rank, (start, end, waited) in enumerate(spans):
        last = max(spans[peer][1] for peer in layout.ranks("pp", rank))
        idle += waited + last - end
        whole += last - start
    return idle / whole


def stage_seconds(config: RunConfig, records: Sequence[RankRecord]) -> tuple[list[float], list[float]]:
    """Seconds of one micro-batch's forward and backward in every global stage, without waiting.

    Forwards are timed in runs without a backward. A rank's chunks are timed together, and the time is divided in
    proportion to their weights that take part in matrix products.
    """
    layout, micro_batches = config.parallel, _micro_batches(config)
    forward, backward = [0.0] * layout.stages, [0.0] * layout.stages
    for p in range(layout.pp):
        ranks = [rank for rank in range(layout.world) if layout.coord(rank).pp == p]
        whole, ahead = (
            statistics.median(end - start - waited for rank in ranks for start, end, waited in runs(records[rank]))
            for runs in (lambda r: r.spans, lambda r: r.forwards)
        )
        sizes = [_weights(config.model, layout, ranks[0], chunk) for chunk in range(layout.virtual)]
        for chunk, size in enumerate(sizes):
            share = size / sum(sizes) / micro_batches
            forward[chunk * layout.pp + p] = ahead * share
            backward[chunk * layout.pp + p] = max(whole - ahead, 0.0) * share
    return forward, backward


def ring_row(config: RunConfig) -> JsonObject:
    """Visible query-key pairs a row and layer by ring rank, and the largest over the mean: for the zigzag split, and if
    each rank had one contiguous piece of the row."""
    layout = config.parallel
    row = random_batch(config, 0).rows(0, 1)
    pairs = [
        sum(visible_pairs(split_batch(row, layout, rank * layout.ulysses).visibility, rank))
        for rank in range(layout.ring)
    ]
    mean, length = sum(pairs) / layout.ring, config.data.seq_len / layout.ring
    in_order = length * (length + 1) / 2 + (layout.ring - 1) * length * length  # the rank with the last piece
    return {"pairs": pairs, "heaviest": max(pairs) / mean, "heaviest_in_order": in_order / mean}


def _weights(model: ModelConfig, layout: Layout, rank: int, chunk: int) -> int:
    """Elements of a chunk's parameters that take part in products; an embedding only where it is also the head."""
    last = chunk * layout.pp + layout.coord(rank).pp == layout.stages - 1
    table = chunk_table(model, layout, layout.coord(rank), chunk)
    return sum(
        math.prod(shard.shape)
        for name, shard in table.items()
        if name != "embed.weight" or (last and model.tied_embeddings)
    )


def _micro_batches(config: RunConfig) -> int:
    """Micro-batches of a data-parallel rank in a step."""
    return config.train.global_batch // (config.train.micro_batch * config.parallel.dp)


def worlds(layouts: Sequence[str]) -> dict[int, list[str]]:
    """Layouts by their number of processes, each of which needs one launch."""
    found: dict[int, list[str]] = {}
    for text in layouts:
        found.setdefault(parse_layout(text).world, []).append(text)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    raise SystemExit(run_script(main))
