"""Time of an optimizer step of a layout on a machine.

A micro-batch through a stage costs its operators (operators.py) and the transfers that its ranks wait for; the
pipeline is played with the lists of actions that the backends execute (pipeline.py); then come gradient sums as far as
the last backward does not hide them, the update and the gather of weights (gradients.py). Bytes are those of
core.parallel.traffic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.parallel.layout import Layout, stage_layers
from telechat_twins.core.parallel.traffic import Traffic
from telechat_twins.core.planner.machine import Machine
from telechat_twins.core.planner.time.gradients import Tail, held, tail
from telechat_twins.core.planner.time.operators import Cost, HostTimes, Passes, Rates, Shape, block_passes, ends_passes
from telechat_twins.core.planner.time.pipeline import Played, play
from telechat_twins.core.planner.time.traffic import BlockTraffic, block_traffic, ends_traffic, message_bytes
from telechat_twins.core.planner.time.transfers import Ways
from telechat_twins.core.planner.time.work import OURS, Practice, Work

# Collectives of a few host numbers a step: targets, loss, gradient norm (core.train.trainer).
_AGREEMENTS = 3


@dataclass(frozen=True)
class StepTime:
    """Forecast of one optimizer step.

    ``seconds`` with its interval ``low`` .. ``high``. ``tflops``: model TFLOP/s of a device by
    core.model.flops.flops_per_token, without recomputation; ``mfu``: their share of ``peak_tflops``. ``bubble``: share
    of the pipeline ranks' time spent waiting. ``exposed``: seconds a step that the ranks wait for transfers along tp,
    cp, pp and dp. ``breakdown``: seconds of the busiest pipeline rank by class of operator, transfer and waiting
    ("pp": messages that occupy it; "pipeline": other stages); they add up to ``seconds``. ``forward`` and ``backward``:
    seconds of a micro-batch in each global stage, ``message`` between two stages, ``tails`` of each pipeline rank after
    its last backward.
    """

    seconds: float
    low: float
    high: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    tflops: float
    peak_tflops: float
    mfu: float
    bubble: float
    exposed: Mapping[str, float]
    breakdown: Mapping[str, float]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    message: float
    tails: tuple[Tail, ...]


class Stage(NamedTuple):
    """A micro-batch through one global stage: operators, and seconds of waiting for tp and cp, forward and backward."""

    forward: Cost
    backward: Cost
    tp: tuple[float, float]
    cp: tuple[float, float]

    @property
    def seconds(self) -> tuple[float, float]:
        """Forward and backward, with their transfers."""
        return (
            self.forward.seconds + self.tp[0] + self.cp[0],
            self.backward.seconds + self.tp[1] + self.cp[1],
        )


def step_time(model: ModelConfig, layout: Layout, work: Work, machine: Machine, practice: Practice = OURS) -> StepTime:
    """Time of one step of ``work`` in ``layout`` on ``machine``; the layout must fit the model (check_layout)."""
    ways = Ways(model, layout, machine)
    rates = Rates.of(machine, work.precision, layout.world)
    shape = Shape.of(model, layout, work, practice)
    counts = [len(layers) for layers in stage_layers(layout, model)]
    stages = stage_costs(model, layout, work, machine, practice, ways, rates, shape, counts)
    overlap = machine.efficiency.overlap
    message = ways.ways["forward_out"].seconds("send", 1, message_bytes(model, shape))
    # The receiver's host is busy with a message and the start of its stage; the part of a message that does not run
    # beside computation occupies its sender.
    begin, last, blocked = rates.host.stage, layout.stages - 1, (1.0 - overlap) * message
    silent = (
        [stage.seconds[0] + begin[0] * (g > 0) for g, stage in enumerate(stages)],
        [stage.seconds[1] + begin[1] * (g < last) for g, stage in enumerate(stages)],
    )
    forward = [seconds + blocked * (g < last) for g, seconds in enumerate(silent[0])]
    backward = [seconds + blocked * (g > 0) for g, seconds in enumerate(silent[1])]
    pipeline = layout.schedule, layout.pp, layout.virtual, work.micro_batches
    played = play(*pipeline, forward, backward, overlap * message)
    tails = [
        tail(
            held(model, layout, counts, rank, work.precision, work.by_class),
            played.last_backward[rank],
            layout,
            shape.widths,
            ways,
            rates,
            practice,
            overlap,
        )
        for rank in range(layout.pp)
    ]
    times = forward, backward, message, blocked
    return _summed(model, layout, work, machine, ways, stages, played, tails, times, silent, rates.host)


def stage_costs(
    model: ModelConfig,
    layout: Layout,
    work: Work,
    machine: Machine,
    practice: Practice,
    ways: Ways,
    rates: Rates,
    shape: Shape,
    counts: list[int],
) -> list[Stage]:
    """Costs of a micro-batch in each global stage, which has ``counts`` layers."""
    block = block_passes(model, layout, work, rates, practice, shape)
    ends = ends_passes(model, layout, rates, practice, shape)
    sent, waited = block_traffic(model, layout, work, shape), 1.0 - practice.tp_overlap
    exchange = rates.host.exchange
    tp = _halves(ways, sent.tensor, practice, waited, exchange)
    cp = _context_wait(layout, work, machine, ways, shape, block, sent, rates.host, model.head_dim)
    again, tp_again, cp_again = _repeated(work, block, tp, cp)
    gathers = {key: row for key, row in sent.tensor.items() if key[0] == "all_gather"}
    tp_again += practice.gathers_again * _halves(ways, gathers, practice, waited, exchange)[0]
    kinds: dict[tuple[int, bool, bool], Stage] = {}
    stages = []
    for g, layers in enumerate(counts):
        key = layers, g == 0, g == layout.stages - 1
        if key not in kinds:
            n, first, last = key
            edge = _halves(ways, ends_traffic(model, layout, shape, g), practice, 1.0, exchange)
            forward, backward = block.forward.times(n), block.backward.plus(again).times(n)
            for name, here in (("first", first), ("last", last)):
                if here:
                    forward, backward = forward.plus(ends[name].forward), backward.plus(ends[name].backward)
            kinds[key] = Stage(
                forward,
                backward,
                (n * tp[0] + edge[0], n * (tp[1] + tp_again) + edge[1]),
                (n * cp[0], n * (cp[1] + cp_again)),
            )
        stages.append(kinds[key])
    return stages


def _repeated(work: Work, block: Passes, tp: tuple[float, float], cp: tuple[float, float]) -> tuple[Cost, float, float]:
    """What the backward of a block computes again, and the transfers that it repeats."""
    share = work.recompute_share
    if work.recompute == "full":
        return block.forward.times(share), share * tp[0], share * cp[0]
    if work.recompute == "selective":
        return block.again.times(share), 0.0, share * cp[0]
    return Cost(), 0.0, 0.0


def _halves(ways: Ways, traffic: Traffic, practice: Practice, share: float, exchange: float) -> tuple[float, float]:
    """Seconds of the forward's and the backward's half of ``traffic``, of which ``share`` is waited for; ``exchange``:
    seconds of the host beside each call."""
    total = 0.0
    for (op, group), (calls, payload) in traffic.items():
        width = practice.sum_bytes
        scale = width / 4.0 if width is not None and op in ("all_reduce", "reduce_scatter") else 1.0
        total += ways.ways[group].seconds(op, calls, scale * payload) + calls * exchange
    return 0.5 * share * total, 0.5 * share * total


def _context_wait(
    layout: Layout,
    work: Work,
    machine: Machine,
    ways: Ways,
    shape: Shape,
    block: Passes,
    sent: BlockTraffic,
    host: HostTimes,
    head_dim: int,
) -> tuple[float, float]:
    """Seconds that a block waits for context-parallel transfers, forward and backward.

    Ulysses' exchanges hide nothing. In a ring of R ranks, each of R steps attends to one block of keys while the next
    is on its way; in the backward the sums of the gradients of keys travel along, one step behind, and the last hop
    waits for nothing else.
    """
    if layout.cp == 1:
        return 0.0, 0.0
    exchange = (ways.seconds(sent.ulysses) + host.exchange * sum(calls for calls, _ in sent.ulysses.values())) / 2
    ring = layout.ring
    if ring == 1 or work.method == "allgather":
        meeting = ways.seconds(sent.ring) / 2
        return exchange + meeting, exchange + meeting
    way, overlap, a = ways.ways["ring"], machine.efficiency.overlap, shape.widths.compute
    hop, home = way.seconds("shift", 1, sent.keys * a), way.seconds("shift", 1, sent.keys * max(a, 4))
    step, back = block.forward.attention / ring, block.backward.attention / ring
    forward = (ring - 1) * _exposed(hop, step, overlap)
    # Step 0 sends keys only; the sums of step i travel beside step i + 1; the last ones beside nothing.
    backward = _exposed(hop, back, overlap) + (ring - 2) * _exposed(hop + home, back, overlap)
    backward += _exposed(home, back, overlap) + home
    queries = 4 * shape.tokens * shape.heads * head_dim
    steps = [ring * (a_step + queries * a_byte) for a_step, a_byte in zip(host.ring, host.ring_byte, strict=True)]
    return exchange + forward + steps[0], exchange + backward + steps[1]


def _exposed(transfer: float, computing: float, overlap: float) -> float:
    """What is left of a transfer that ``overlap`` of it may run beside ``computing`` seconds."""
    return max(transfer - computing, (1.0 - overlap) * transfer, 0.0)


def _summed(
    model: ModelConfig,
    layout: Layout,
    work: Work,
    machine: Machine,
    ways: Ways,
    stages: list[Stage],
    played: Played,
    tails: list[Tail],
    times: tuple[list[float], list[float], float, float],
    silent: tuple[list[float], list[float]],
    host: HostTimes,
) -> StepTime:
    """``silent``: seconds of the stages, forward and backward, for messages that take no time."""
    forward, backward, message, blocked = times
    # The norm of all gradients is where all ranks meet; then each updates and gathers.
    reduced = max(end + one.reduce for end, one in zip(played.ends, tails, strict=True))
    after = max(one.update + one.gather for one in tails)
    agreement = _AGREEMENTS * ways.ways["world"].seconds("all_reduce", 1, 8)
    together = reduced + after + agreement + host.step
    seconds = together * stretch(machine, layout.world)
    rank = max(range(layout.pp), key=played.busy.__getitem__)
    mine = range(rank, layout.stages, layout.pp)
    m = work.micro_batches
    parts = {
        name: m * sum(getattr(stages[g].forward, name) + getattr(stages[g].backward, name) for g in mine)
        for name in Cost._fields
    }
    started = sum(host.stage[0] * (g > 0) + host.stage[1] * (g < layout.stages - 1) for g in mine)
    parts["host"] += host.step + m * started
    tp, cp = (m * sum(sum(getattr(stages[g], axis)) for g in mine) for axis in ("tp", "cp"))
    update = max(one.update for one in tails)
    dp = max(0.0, reduced - played.seconds) + after - update + agreement
    unsent = play(layout.schedule, layout.pp, layout.virtual, m, *silent)
    exposed = {"tp": tp, "cp": cp, "pp": max(0.0, played.seconds - unsent.seconds), "dp": dp}
    sent = m * sum((g < layout.stages - 1) + (g > 0) for g in mine)
    breakdown = {**parts, "optimizer": update, "tp": tp, "cp": cp, "dp": dp, "pp": sent * blocked}
    breakdown |= {"pipeline": together - sum(breakdown.values()), "stragglers": seconds - together}
    tokens = work.tokens(layout.dp)
    per_device = tokens / seconds / layout.world
    flops = per_device * flops_per_token(model, work.seq_len)
    peak = machine.peak(work.precision)
    return StepTime(
        seconds=seconds,
        low=seconds * (1.0 - machine.efficiency.faster),
        high=seconds * (1.0 + machine.efficiency.slower),
        tokens_per_s=tokens / seconds,
        tokens_per_s_per_device=per_device,
        tflops=flops / 1e12,
        peak_tflops=peak / 1e12,
        mfu=flops / peak,
        bubble=played.bubble,
        exposed=exposed,
        breakdown=breakdown,
        forward=tuple(forward),
        backward=tuple(backward),
        message=machine.efficiency.overlap * message,
        tails=tuple(tails),
    )


def stretch(machine: Machine, world: int) -> float:
    """How much longer ``world`` devices take than a node, waiting for the slowest of them."""
    return 1.0 + machine.scaling.value * max(0.0, math.log2(world / machine.devices_per_node))
