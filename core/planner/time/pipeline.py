"""Time of a pipeline schedule with messages: the very lists of actions that the backends execute, played forward.

core.parallel.schedule.play is the definition for messages without time. Here the order is worked out once for a shape
of pipeline, so that playing it with new costs is one pass over the actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from telechat_twins.core.parallel.schedule import Action, Span, simulate

# Above so many actions the middle of a step, which repeats itself, is extrapolated: exactly for most pipelines, within
# 0.4 % in the worst of 60 with stages that differ by a factor of two.
_MOST_ACTIONS = 1500


class Plan(NamedTuple):
    """Actions of all ranks, each after those it needs. ``before`` and ``needs`` are 1 + the position of the action
    before on the same rank and of the one whose result is needed, 0 where there is none; ``slot`` is the global stage,
    plus the number of stages for a backward; ``crosses``: the result comes from another rank."""

    actions: list[Action]
    rank: list[int]
    before: list[int]
    needs: list[int]
    slot: list[int]
    crosses: list[bool]
    last: list[int]


class Played(NamedTuple):
    """``ends``: when each rank ends its last action; ``busy``: seconds it computes; ``last_backward``: for each rank,
    the (start, end) of its chunks' last backwards, in the order in which they end."""

    ends: list[float]
    busy: list[float]
    last_backward: list[list[tuple[int, float, float]]]

    @property
    def seconds(self) -> float:
        """When the last rank ends."""
        return max(self.ends)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time spent waiting, as core.parallel.schedule.bubble."""
        return 1.0 - sum(self.busy) / (self.seconds * len(self.ends)) if self.seconds else 0.0


def play(
    schedule: str,
    pp: int,
    virtual: int,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    message: float = 0.0,
) -> Played:
    """Play a step: seconds of ``forward`` and ``backward`` of each global stage, ``message`` seconds between ranks."""
    unit = pp if virtual > 1 else 1
    if 2 * pp * virtual * micro_batches > _MOST_ACTIONS and micro_batches > 9 * pp:
        # A step of many micro-batches repeats with a period of `unit`; from 6 pp on its length grows linearly.
        few = 6 * pp // unit * unit
        rest = (micro_batches - few) % unit
        short = _play(schedule, pp, virtual, few + rest, forward, backward, message)
        longer = _play(schedule, pp, virtual, few + rest + 2 * pp // unit * unit, forward, backward, message)
        more = (micro_batches - few - rest) / (2 * pp // unit * unit)
        return _stretched(short, longer, more)
    return _play(schedule, pp, virtual, micro_batches, forward, backward, message)


def spans(
    schedule: str,
    pp: int,
    virtual: int,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    message: float = 0.0,
) -> list[list[Span]]:
    """The timeline of each rank, in the order in which it executes."""
    plan = _plan(schedule, pp, virtual, micro_batches)
    costs = [*forward, *backward]
    ends = _ends(plan, costs, message)
    timeline: list[list[Span]] = [[] for _ in range(pp)]
    for number, action in enumerate(plan.actions):
        end = ends[number + 1]
        timeline[plan.rank[number]].append(Span(action, end - costs[plan.slot[number]], end))
    return timeline


def _play(
    schedule: str,
    pp: int,
    virtual: int,
    micro_batches: int,
    forward: Sequence[float],
    backward: Sequence[float],
    message: float,
) -> Played:
    if pp == 1:  # one stage: no rank waits
        end = micro_batches * (forward[0] + backward[0])
        return Played([end], [end], [[(0, end - backward[0], end)]])
    plan = _plan(schedule, pp, virtual, micro_batches)
    ends = _ends(plan, [*forward, *backward], message)
    stages = pp * virtual
    late: list[list[tuple[int, float, float]]] = [[] for _ in range(pp)]
    for stage in range(stages):
        end = ends[plan.last[stage]]
        late[stage % pp].append((stage // pp, end - backward[stage], end))
    for chunks in late:
        chunks.sort(key=lambda chunk: chunk[2])
    busy = [micro_batches * sum(forward[g] + backward[g] for g in range(rank, stages, pp)) for rank in range(pp)]
    return Played([chunks[-1][2] for chunks in late], busy, late)


def _ends(plan: Plan, costs: Sequence[float], message: float) -> list[float]:
    """End of each action, after a leading 0."""
    ends = [0.0]
    append = ends.append
    for before, need, slot, crosses in zip(plan.before, plan.needs, plan.slot, plan.crosses, strict=True):
        start, ready = ends[before], ends[need]
        if crosses:
            ready += message
        append((start if start > ready else ready) + costs[slot])
    return ends


@lru_cache(maxsize=128)
def _plan(schedule: str, pp: int, virtual: int, micro_batches: int) -> Plan:
    stages = pp * virtual
    timeline = simulate(schedule, pp, virtual, micro_batches)
    order = sorted(
        ((span, rank, place) for rank, ranks in enumerate(timeline) for place, span in enumerate(ranks)),
        key=lambda one: (one[0].start, one[1]),
    )
    plan = Plan([], [], [], [], [], [], [0] * stages)
    where: dict[tuple[str, int, int], int] = {}
    latest = [0] * pp
    for number, (span, rank, _) in enumerate(order, 1):
        kind, micro, chunk = span.action
        stage = chunk * pp + rank
        other = stage - 1 if kind == "F" else stage + 1
        plan.actions.append(span.action)
        plan.rank.append(rank)
        plan.before.append(latest[rank])
        plan.needs.append(where.get((kind, micro, other), 0))
        plan.slot.append(stage if kind == "F" else stages + stage)
        plan.crosses.append(pp > 1 and (kind, micro, other) in where)
        where[kind, micro, stage] = latest[rank] = number
        if kind == "B":
            plan.last[stage] = number
    return plan


def _stretched(short: Played, longer: Played, more: float) -> Played:
    """``short`` continued ``more`` times by what ``longer`` has in addition."""
    added = [more * (b - a) for a, b in zip(short.ends, longer.ends, strict=True)]
    busy = [a + more * (b - a) for a, b in zip(short.busy, longer.busy, strict=True)]
    late = [
        [(chunk, start + extra, end + extra) for chunk, start, end in chunks]
        for chunks, extra in zip(short.last_backward, added, strict=True)
    ]
    return Played([end + extra for end, extra in zip(short.ends, added, strict=True)], busy, late)
