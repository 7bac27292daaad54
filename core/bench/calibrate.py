"""Machine file of this computer's cores, from a minute of measurements (``tele plan --calibrate``).

    core/bench/calibrate.py BACKEND FOLDER       (a rank, under msrun or torchrun)

core.bench.probes takes the times. From them follow, each from its own: collectives by operation and size; the host's
time of a block, of the ends, of a step, and of what tp, a ring and a stage add; by how much a process alone is faster;
the update. Only the rates of products, of attention and of memory, and how much of the host's time remains beside wide
operators, are fitted together (core.bench.rates), to the phases of small models in as many processes as there are
cores.
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
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.bench.probes import (
    DEPTHS,
    NARROW_DEPTHS,
    NARROW_MICRO_BATCHES,
    PROBED,
    SIZES,
    STAGES,
    Probes,
    narrow,
    outside_a_launch,
    ring_attention,
)
from telechat_twins.core.bench.rates import HOST_RANGES, Pair, fit_rates, pairs, works
from telechat_twins.core.bench.step import processor
from telechat_twins.core.bench.worker import PROCESSOR, bench_config
from telechat_twins.core.launch.worker import run_script
from telechat_twins.core.model.params import count_parameters
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parallel.traffic import Widths
from telechat_twins.core.planner.machine import Machine, machine_from
from telechat_twins.core.planner.time.gradients import updated_bytes
from telechat_twins.core.planner.time.operators import Rates, Shape, block_passes, ends_passes
from telechat_twins.core.planner.time.step import stage_costs, step_time
from telechat_twins.core.planner.time.traffic import block_traffic, ends_traffic, message_bytes
from telechat_twins.core.planner.time.transfers import Ways
from telechat_twins.core.planner.time.work import OURS, work_of
from telechat_twins.core.types import JsonObject

OPTIONS = {"model": "telechat2-tiny", "seq_len": 128, "micro_batch": 2, "micro_batches": 4, "precision": "fp32"}
ROUNDS = 6
OPERATORS = 13  # of a block's forward, for `launch`
_HOST_ROUNDS = 3


def main() -> int:
    """Entry point of a rank: takes all probes in rounds, and writes them to FOLDER/rank_<rank>.json."""
    backend, folder = sys.argv[1], Path(sys.argv[2])
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when the framework is loaded; see core.bench.worker
    rank, world = backends.load(backend, "mesh").join()
    with ExitStack() as stack:
        probes = Probes(backend, OPTIONS, rank, world, stack, outside_a_launch())
        for _ in range(ROUNDS):
            probes.turn()
    (folder / f"rank_{rank}.json").write_text(json.dumps(probes.raw()), encoding="utf-8")
    return 0


def calibrate(backend: str, name: str) -> JsonObject:
    """Measure this machine with ``backend``; the mapping of a machine file."""
    from telechat_twins.core.launch.launcher import launch

    world = min(2, len(os.sched_getaffinity(0)))
    folder = Path(tempfile.mkdtemp(prefix="tele-calibrate-"))
    code = launch(backend, [backend, str(folder)], world, folder / "logs", script=__file__, instead=lambda: None)
    if code:
        if code == 130:  # interrupted: there is nothing to look up
            shutil.rmtree(folder, ignore_errors=True)
        raise SystemExit(code)  # the launch has printed the reason, and its logs are kept
    ranks = [json.loads((folder / f"rank_{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
    shutil.rmtree(folder)
    return fitted(backend, name, OPTIONS, ranks)


def fitted(
    backend: str,
    name: str,
    options: JsonObject,
    ranks: Sequence[JsonObject],
    clock: str = "",
    typical: Callable[[Sequence[float]], float] = statistics.median,
) -> JsonObject:
    """The mapping of a machine file, from the raw times of all ranks.

    ``clock``: "" for the wall's, PROCESSOR for the time that a process spent on processors; ``typical``: of several
    times of the same.
    """
    cores = len(os.sched_getaffinity(0))
    place = int(clock == PROCESSOR)
    operations = {
        op: [
            max(typical([times[place] for times in rank["collectives"][op][size]]) for rank in ranks)
            for size in range(len(SIZES))
        ]
        for op in ranks[0]["collectives"]
    }
    found = describe(backend, name, cores, operations)
    crowd, alone, layouts = (_typical(ranks[0][part], clock, typical) for part in ("crowd", "alone", "layouts"))
    measured = {key: (crowd[key]["forward"], crowd[key]["gradients"]) for key in crowd if not key.startswith("narrow")}
    found["host"], wasted = host_times(crowd, options)
    found["host"]["exponent"] = host_exponent(crowd, alone, cores)
    narrow_host = dict(found["host"])
    factors = dict.fromkeys(HOST_RANGES, 1.0)
    for _ in range(_HOST_ROUNDS):
        rates, factors = fit_rates(machine_from(found, name), options, measured, cores, wasted)
        found["efficiency"] |= rates
        # The little that the narrow model's operators have to do is not the host's time.
        done = narrow_work(machine_from(found, name), options, cores)
        found["host"] |= {key: max(0.0, round(narrow_host[key] - us, 2)) for key, us in done.items()}
    for key in done:
        found["host"][key] = round(found["host"][key] * factors[key.split("_")[1]], 2)
    found["efficiency"]["launch"] = round(found["host"]["block_forward"] / OPERATORS, 2)
    machine = machine_from(found, name)
    errors = [a / b - 1.0 for a, b in pairs(machine, options, measured, cores, wasted)]
    found["efficiency"] |= {
        "faster": round(min(0.9, max(0.1, *errors)), 3),
        "slower": round(min(9.0, max(0.1, *(-e for e in errors))), 3),
    }
    found["core_exponent"] = rates_exponent(machine, options, alone, wasted)
    if layouts:
        found["host"] |= added_by_layouts(machine_from(found, name), options, crowd, layouts)
        found["host"] |= added_by_queries(machine_from(found, name), options, layouts)
        # Of a pipeline's ranks the wall's clock says when they wait. What they do is on the processors' clock.
        busy = [_typical(rank["layouts"], PROCESSOR, typical) for rank in ranks]
        found["host"] |= added_by_stages(machine_from(found, name), options, busy)
    return found


def _typical(
    probes: Mapping[str, Mapping[str, Sequence[float]]], clock: str, typical: Callable[[Sequence[float]], float]
) -> dict[str, dict[str, float]]:
    """Seconds of the phases by ``clock``, of each probe."""
    phases = ("forward", "gradients", "update")
    return {name: {phase: typical(times[phase + clock]) for phase in phases} for name, times in probes.items()}


def machines_of(backend: str, options: JsonObject, ranks: Sequence[JsonObject]) -> tuple[Machine, Machine]:
    """The machine by both clocks: the wall's, and the processors' (whose times forecast a rank's work, not a step)."""
    wall, processor = (
        machine_from(fitted(backend, f"this machine, {backend}", options, ranks, clock), "--calibrate")
        for clock in ("", PROCESSOR)
    )
    return wall, processor


def host_times(crowd: Mapping[str, Mapping[str, float]], options: JsonObject) -> tuple[JsonObject, Pair]:
    """Section ``host`` from the narrow models, and the seconds that a step takes beside its micro-batches, in a forward
    alone and with a backward."""
    few, many = NARROW_MICRO_BATCHES
    shallow, deep = NARROW_DEPTHS
    each = {}  # of a micro-batch, by depth and phase
    wasted: dict[str, list[float]] = {}
    for phase in ("forward", "gradients"):
        for depth in NARROW_DEPTHS:
            one, four = (crowd[f"narrow {depth} x{count}"][phase] for count in NARROW_MICRO_BATCHES)
            each[depth, phase] = max(0.0, (four - one) / (many - few))
            wasted.setdefault(phase, []).append(max(0.0, one - few * each[depth, phase]))
    beside = {phase: statistics.median(times) for phase, times in wasted.items()}
    block = {phase: max(0.0, each[deep, phase] - each[shallow, phase]) / (deep - shallow) for phase in beside}
    ends = {phase: max(0.0, each[shallow, phase] - shallow * block[phase]) for phase in beside}
    update, bandwidth = _update_times(crowd, options)
    us = {
        "block_forward": block["forward"],
        "block_backward": max(0.0, block["gradients"] - block["forward"]),
        "ends_forward": ends["forward"],
        "ends_backward": max(0.0, ends["gradients"] - ends["forward"]),
        "step": beside["gradients"],
        "update": update,
    }
    host: JsonObject = {name: round(seconds * 1e6, 2) for name, seconds in us.items()}
    host |= dict.fromkeys(("exchange", "ring_forward", "ring_backward"), 0.0)
    host["update_bandwidth"] = round(bandwidth / 1e9, 4)
    host["source"] = "models of 32 channels and 8 tokens, in two depths and numbers of micro-batches"
    return host, (beside["forward"], beside["gradients"])


def host_exponent(
    crowd: Mapping[str, Mapping[str, float]], alone: Mapping[str, Mapping[str, float]], cores: int
) -> float:
    """The power of the number of cores by which the host is faster in a process that has all of them to itself."""
    names = [name for name in alone if name.startswith("narrow")]
    if cores == 1 or not names:
        return 0.0
    ratio = statistics.fmean(math.log(crowd[name]["gradients"] / alone[name]["gradients"]) for name in names)
    return round(min(1.0, max(0.0, ratio / math.log(cores))), 3)


def rates_exponent(
    machine: Machine, options: JsonObject, alone: Mapping[str, Mapping[str, float]], wasted: Pair
) -> float:
    """Likewise for the rates of products, attention and memory, after the host's time has been taken off."""
    assert machine.host is not None
    whole = {key: (alone[key]["forward"], alone[key]["gradients"]) for key in alone if key.startswith("whole")}
    faster = machine.devices_per_node**machine.host.exponent
    beside = wasted[0] / faster, wasted[1] / faster
    return min(
        (x / 100 for x in range(0, 101, 2)),
        key=lambda x: sum(
            math.log(a / b) ** 2
            for a, b in pairs(dataclasses.replace(machine, core_exponent=x), options, whole, 1, beside)
        ),
    )


def _update_times(crowd: Mapping[str, Mapping[str, float]], options: JsonObject) -> tuple[float, float]:
    """Seconds of norm and update without parameters, and bytes per second, from a small and a larger model."""
    names = f"narrow {NARROW_DEPTHS[0]} x{NARROW_MICRO_BATCHES[0]}", f"whole {DEPTHS[-1]}"
    few, many = (crowd[name]["update"] for name in names)
    small, large = (
        updated_bytes(count_parameters(model), 1, Widths.of(options["precision"]))
        for model, _ in works(json.dumps(options), names)
    )
    bandwidth = (large - small) / max(many - few, 1e-7)
    return max(0.0, few - small / bandwidth), bandwidth


def narrow_work(machine: Machine, options: JsonObject, world: int) -> dict[str, float]:
    """Microseconds of the operators of a narrow model's micro-batch, by the names of core.planner.machine.Host."""
    ((model, work),) = works(json.dumps(options), (f"narrow {NARROW_DEPTHS[0]} x{NARROW_MICRO_BATCHES[0]}",))
    layout = Layout()
    rates, shape = Rates.of(machine, work.precision, world), Shape.of(model, layout, work, OURS)
    block = block_passes(model, layout, work, rates, OURS, shape)
    ends = ends_passes(model, layout, rates, OURS, shape)
    costs = {
        "block_forward": block.forward,
        "block_backward": block.backward,
        "ends_forward": ends["first"].forward.plus(ends["last"].forward),
        "ends_backward": ends["first"].backward.plus(ends["last"].backward),
    }
    return {name: 1e6 * (cost.seconds - cost.host) for name, cost in costs.items()}


def added_by_layouts(
    machine: Machine,
    options: JsonObject,
    crowd: Mapping[str, Mapping[str, float]],
    layouts: Mapping[str, Mapping[str, float]],
) -> JsonObject:
    """What tp and a ring add to a block of the narrow model, and tp to its ends, beside the collectives themselves, in
    microseconds."""
    many, shallow = NARROW_MICRO_BATCHES[-1], NARROW_DEPTHS[0]
    plain = _of_a_micro_batch(lambda depth: crowd[f"narrow {depth} x{many}"])
    cut = {name: _of_a_micro_batch(lambda depth, name=name: layouts[f"{name} {depth}"]) for name in PROBED}  # type: ignore[misc]
    config = bench_config(narrow(options, shallow, many, "tp2"))
    work = work_of(config)
    shape = Shape.of(config.model, config.parallel, work, OURS)
    ways = Ways(config.model, config.parallel, machine)
    sent = block_traffic(config.model, config.parallel, work, shape).tensor
    added = sum(cut["tp2"][0]) - sum(plain[0]) - ways.seconds(sent)
    exchange = max(0.0, added / sum(calls for calls, _ in sent.values()))
    ends = ends_traffic(config.model, config.parallel, shape, 0)
    messages = (ways.seconds(ends) + exchange * sum(calls for calls, _ in ends.values())) / 2
    # Once a step: the ranks agree on the loss, and sum the gradients that each has a part of.
    agreed = ways.ways["world"].seconds("all_reduce", 1, 8)
    summed = step_time(config.model, config.parallel, work, machine).tails[0].reduce
    once = agreed / many, summed / many
    tensor = [cut["tp2"][1][i] - plain[1][i] - messages - once[i] for i in range(2)]
    hop = Ways(config.model, Layout(cp=2), machine).ways["ring"].seconds("shift", 1, SIZES[0])
    # A ring of two sends keys once forward; backward keys once and their gradients twice.
    ring = [(cut["ring2"][0][i] - plain[0][i] - hops * hop) / 2 for i, hops in enumerate((1, 3))]
    found = {
        "tensor_ends_forward": tensor[0],
        "tensor_ends_backward": tensor[1],
        "exchange": exchange,
        "ring_forward": ring[0],
        "ring_backward": ring[1],
    }
    return {name: round(max(0.0, seconds) * 1e6, 2) for name, seconds in found.items()}


def _of_a_micro_batch(times: Callable[[int], Mapping[str, float]]) -> tuple[Pair, Pair]:
    """Forward and backward seconds of a block of the narrow model, and of all else in a micro-batch, with its share of
    what happens once a step. ``times``: of the phases of a step, by depth."""
    many, (shallow, deep) = NARROW_MICRO_BATCHES[-1], NARROW_DEPTHS

    def of(phase: str) -> Pair:
        block = (times(deep)[phase] - times(shallow)[phase]) / many / (deep - shallow)
        return block, times(shallow)[phase] / many - shallow * block

    forward, both = of("forward"), of("gradients")
    return (forward[0], both[0] - forward[0]), (forward[1], both[1] - forward[1])


def added_by_queries(
    machine: Machine, options: JsonObject, layouts: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Microseconds a MB of queries that a ring's step takes beyond attention, messages and what it adds to the narrow
    model: merging, copies, and the slower attention to blocks of keys."""
    config = bench_config(ring_attention(options, DEPTHS[0]))
    model, layout, work = config.model, config.parallel, work_of(config)
    rates, shape, ways = (
        Rates.of(machine, work.precision, 2),
        Shape.of(model, layout, work, OURS),
        Ways(model, layout, machine),
    )
    stages = [
        stage_costs(model, layout, work, machine, OURS, ways, rates, shape, [layers])[0].seconds for layers in DEPTHS
    ]
    shallow, deep = (layouts[f"ring2 attention {layers}"] for layers in DEPTHS)
    count = DEPTHS[1] - DEPTHS[0]
    forward = (deep["forward"] - shallow["forward"]) / count / work.micro_batches
    both = (deep["gradients"] - shallow["gradients"]) / count / work.micro_batches
    queries = 4e-6 * shape.tokens * shape.heads * model.head_dim
    found = {}
    for name, side, measured in (("ring_forward_mb", 0, forward), ("ring_backward_mb", 1, both - forward)):
        forecast = (stages[1][side] - stages[0][side]) / count
        found[name] = round(max(0.0, measured - forecast) * 1e6 / layout.ring / queries, 2)
    return found


def added_by_stages(
    machine: Machine, options: JsonObject, busy: Sequence[Mapping[str, Mapping[str, float]]]
) -> dict[str, float]:
    """Microseconds that a further stage of a pipeline adds to a micro-batch's forward and backward, beside the message:
    receiving it, and starting a graph. ``busy``: each rank's time on processors, in pipelines of the narrow model."""
    few, many = STAGES
    if few not in busy[0]:  # measured before there were these probes
        return {}
    micro_batches, more = NARROW_MICRO_BATCHES[-1], STAGES[many] - STAGES[few]
    forward, both = (
        sum(rank[many][phase] - rank[few][phase] for rank in busy) / micro_batches / more
        for phase in ("forward", "gradients")
    )
    config = bench_config(narrow(options, STAGES[many], micro_batches, few))
    message = message_bytes(config.model, Shape.of(config.model, config.parallel, work_of(config), OURS))
    sent = Ways(config.model, config.parallel, machine).ways["forward_out"].seconds("send", 1, message)
    found = {"stage_forward": forward - sent, "stage_backward": both - forward - sent}
    return {name: round(max(0.0, seconds) * 1e6, 2) for name, seconds in found.items()}


def describe(backend: str, name: str, cores: int, operations: Mapping[str, Sequence[float]]) -> JsonObject:
    """The machine file but for what is fitted; peaks are those of numpy, which need not be the backend's.

    ``operations``: seconds of each of SIZES, by collective.
    """
    how = f"measured by tele plan --calibrate --backend {backend}"
    n = 512
    a = np.ones((n, n), np.float32)
    product = 2.0 * n**3 / _best(lambda: a @ a) / 1e12
    wide = np.ones(1 << 23, np.float32)
    copy = 2.0 * wide.nbytes / _best(wide.copy) / 1e9
    peak = {"value": round(product, 4), "source": f"{how}: numpy's product of {n} x {n} float32 matrices"}
    link = {
        "bandwidth": {"value": 1.0, "source": f"{how}; `measured` has precedence"},
        "latency": {"value": 100.0, "source": f"{how}; `measured` has precedence"},
        "efficiency": {"value": 1.0, "source": "measured times need none"},
        "measured": [_operation(op, seconds) for op, seconds in operations.items()],
    }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": name,
        "title": f"{cores} cores of {_described_processor()}",
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
            **dict.fromkeys(("matmul", "attention", "memory"), 0.5),
            "tile": 16.0,
            "launch": 20.0,
            "overlap": 0.0,
            "faster": 0.1,
            "slower": 0.1,
            "source": f"{how}: phases of small models in one process; nothing overlaps, since all share the cores",
        },
        "backend": backend,
        "shared_cores": True,
        "core_exponent": 1.0,
    }


def _described_processor() -> str:
    """The processor's name, with family, model and the widest operations, since virtual machines hide its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in found.get("flags", "").split()]
    known = [f"{key.removeprefix('cpu ')} {found[key]}" for key in ("cpu family", "model") if key in found]
    return f"{processor()} ({', '.join([*known, *wide])})" if known or wide else processor()


def _best(call: Callable[[], object]) -> float:
    """Processor time of the shortest of some calls: a yardstick, of which `matmul` and `memory` are shares."""
    seconds = []
    for _ in range(12):
        started = time.process_time()
        call()
        seconds.append(time.process_time() - started)
    return max(min(seconds), 1e-6)


def _operation(op: str, seconds: Sequence[float]) -> JsonObject:
    """A collective as it was measured at each of SIZES. Times rise with the size; the wire's latency and bandwidth are
    those of the smallest and the largest."""
    times = np.maximum.accumulate(np.maximum(seconds, 1e-7))
    moved = {"all_reduce": 1.0, "all_gather": 1.0, "reduce_scatter": 0.5, "all_to_all": 0.5, "shift": 1.0}[op]
    per_byte = max((times[-1] - times[0]) / (moved * (SIZES[-1] - SIZES[0])), 1e-13)
    return {
        "op": op,
        "latency": round(float(times[0]) * 1e6, 2),
        "bandwidth": round(1e-9 / float(per_byte), 4),
        "sizes": list(SIZES),
        "microseconds": [round(float(one) * 1e6, 2) for one in times],
    }


if __name__ == "__main__":
    raise SystemExit(run_script(main))
