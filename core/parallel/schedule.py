"""Pipeline schedules as lists of actions per rank, with their messages, activation memory and idle time.

A model is cut into ``pp * virtual`` global stages; stage g lives on pipeline rank g % pp as its chunk g // pp. A rank
does its actions in order. Sending never waits; an action waits for its input. Both backends execute exactly these
lists, so that the order of messages on every link is known beforehand.

Every function takes the same five numbers: ``schedule`` ("gpipe" or "1f1b", which is interleaved 1F1B when
``virtual`` > 1), ``pp`` ranks, ``virtual`` chunks a rank, ``micro_batches`` of a step, ``rank`` on the pipeline; and
raises ValueError where they make no schedule (core.parallel.layout has refused those with a message for users).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Action(NamedTuple):
    """``kind`` F (forward) or B (backward) of one micro-batch through one of this rank's chunks."""

    kind: str
    micro: int
    chunk: int


class Span(NamedTuple):
    """When an action ran."""

    action: Action
    start: float
    end: float


def actions(schedule: str, pp: int, virtual: int, micro_batches: int, rank: int) -> list[Action]:
    """What ``rank`` does in one optimizer step, in order: every (micro, chunk) once forward and once backward.

    GPipe: all forwards, then all backwards, both in order of micro-batch. 1F1B: pp - rank - 1 forwards ahead, then
    one forward and one backward in turn. Interleaved 1F1B (arXiv 2104.04473, section 2.2, in the order of
    Megatron-LM): micro-batches go in groups of pp through chunk 0, then the group through chunk 1, and so on;
    backwards likewise from the last chunk; (pp - rank - 1) * 2 + (virtual - 1) * pp forwards ahead.
    """
    _check(schedule, pp, virtual, micro_batches, rank)
    total = micro_batches * virtual
    forwards = [Action("F", *_turn(k, pp, virtual, "F")) for k in range(total)]
    backwards = [Action("B", *_turn(k, pp, virtual, "B")) for k in range(total)]
    if schedule == "gpipe":
        return forwards + backwards
    ahead = min(_ahead(pp, virtual, rank), total)
    plan = forwards[:ahead]
    for k in range(total - ahead):
        plan += [forwards[ahead + k], backwards[k]]
    return plan + backwards[total - ahead :]


def incoming(kind: str, schedule: str, pp: int, virtual: int, micro_batches: int, rank: int) -> list[tuple[int, int]]:
    """(micro, own chunk) of everything that reaches ``rank`` over one link, in the order in which it was sent.

    ``kind`` "F": activations from the rank before; "B": gradients from the rank after, both ring-wise, since the last
    rank's chunk is followed by the first rank's next one. Messages on a link are matched in order only; with these
    schedules that is also the order in which the receiver needs them.
    """
    _check(schedule, pp, virtual, micro_batches, rank)
    step = {"F": 1, "B": -1}[kind]
    sender = (rank - step) % pp
    messages = []
    for action in actions(schedule, pp, virtual, micro_batches, sender):
        stage = action.chunk * pp + sender + step
        if action.kind == kind and 0 <= stage < pp * virtual and pp > 1:
            messages.append((action.micro, stage // pp))
    return messages


def peak_live(schedule: str, pp: int, virtual: int, micro_batches: int, rank: int) -> int:
    """The most (micro, chunk) graphs ``rank`` holds at once: forward done or under way, backward not yet done.

    GPipe micro_batches; 1F1B min(micro_batches, pp - rank); interleaved one more than its forwards ahead, at most all.
    """
    _check(schedule, pp, virtual, micro_batches, rank)
    total = micro_batches * virtual
    return total if schedule == "gpipe" else min(_ahead(pp, virtual, rank) + 1, total)


def simulate(
    schedule: str,
    pp: int,
    virtual: int,
    micro_batches: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
) -> list[list[Span]]:
    """Timeline of each rank: its actions with start and end, messages taking no time.

    ``forward`` and ``backward`` are the time of one micro-batch through one stage, or one number for each of the
    pp * virtual global stages. Raises RuntimeError on a deadlock.
    """
    plans = [actions(schedule, pp, virtual, micro_batches, rank) for rank in range(pp)]
    return play(plans, virtual, forward, backward)


def play(
    plans: Sequence[Sequence[Action]],
    virtual: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
) -> list[list[Span]]:
    """``simulate`` for given lists of actions, one a rank. A deadlock is a RuntimeError naming the waiting actions.

    A forward needs that of the stage before; a backward its own forward and the backward of the stage after.
    """
    pp = len(plans)
    stages = pp * virtual
    cost = {
        "F": [forward] * stages if isinstance(forward, (int, float)) else forward,
        "B": [backward] * stages if isinstance(backward, (int, float)) else backward,
    }
    done: dict[tuple[str, int, int], float] = {}  # (kind, micro, global stage) -> end
    timeline: list[list[Span]] = [[] for _ in plans]
    moved = True
    while moved:
        moved = False
        for rank, plan in enumerate(plans):
            while len(timeline[rank]) < len(plan):
                action = plan[len(timeline[rank])]
                stage = action.chunk * pp + rank
                needs = _needs(action, stage, stages)
                if any(need not in done for need in needs):
                    break
                free = timeline[rank][-1].end if timeline[rank] else 0.0
                start = max([free, *(done[need] for need in needs)])
                end = start + cost[action.kind][stage]
                done[action.kind, action.micro, stage] = end
                timeline[rank].append(Span(action, start, end))
                moved = True
    waiting = [
        f"rank {rank} at {''.join(map(str, plan[len(spans)][:2]))} chunk {plan[len(spans)].chunk}"
        for rank, (plan, spans) in enumerate(zip(plans, timeline, strict=True))
        if len(spans) < len(plan)
    ]
    if waiting:
        raise RuntimeError(f"deadlock in the pipeline schedule: {', '.join(waiting)}")
    return timeline


def bubble(
    schedule: str,
    pp: int,
    virtual: int,
    micro_batches: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
) -> float:
    """Share of the ranks' time spent waiting, from ``simulate``: 0 on one rank."""
    timeline = simulate(schedule, pp, virtual, micro_batches, forward, backward)
    length = max(spans[-1].end for spans in timeline)
    busy = sum(span.end - span.start for spans in timeline for span in spans)
    return 1.0 - busy / (length * pp)


def bubble_formula(schedule: str, pp: int, virtual: int, micro_batches: int) -> float:
    """``bubble`` for equal stages: (pp - 1) / (virtual * micro_batches + pp - 1).

    GPipe and 1F1B share it (they differ in memory); interleaving divides the filling and draining by ``virtual``.
    """
    _check(schedule, pp, virtual, micro_batches, 0)
    return (pp - 1) / (virtual * micro_batches + pp - 1)


def _ahead(pp: int, virtual: int, rank: int) -> int:
    """Forwards of 1F1B before its first backward, where there are as many."""
    return pp - rank - 1 if virtual == 1 else (pp - rank - 1) * 2 + (virtual - 1) * pp


def _turn(k: int, pp: int, virtual: int, kind: str) -> tuple[int, int]:
    """(micro, chunk) of a rank's k-th forward or backward."""
    if virtual == 1:
        return k, 0
    group, place = divmod(k, pp * virtual)
    chunk, micro = divmod(place, pp)
    return group * pp + micro, chunk if kind == "F" else virtual - 1 - chunk


def _needs(action: Action, stage: int, stages: int) -> list[tuple[str, int, int]]:
    if action.kind == "F":
        return [("F", action.micro, stage - 1)] if stage > 0 else []
    own = ("F", action.micro, stage)
    return [own, ("B", action.micro, stage + 1)] if stage < stages - 1 else [own]


def _check(schedule: str, pp: int, virtual: int, micro_batches: int, rank: int) -> None:
    if schedule not in ("gpipe", "1f1b") or min(pp, virtual, micro_batches) < 1 or not 0 <= rank < pp:
        raise ValueError(f"no schedule {schedule!r} of pp {pp}, virtual {virtual}, {micro_batches} micro-batches")
    if virtual > 1 and (schedule != "1f1b" or pp == 1 or micro_batches % pp):
        raise ValueError(
            f"interleaving needs 1f1b, pp >= 2 and a multiple of pp micro-batches, found {schedule}, pp {pp}, "
            f"{micro_batches} micro-batches"
        )
