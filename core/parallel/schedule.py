"""Pipeline schedules as lists of actions per rank, with their activation memory and idle time.

A model is cut into ``pp * virtual`` global stages; stage g lives on pipeline rank g % pp as its chunk g // pp. A rank
executes its actions in order. Sends do not block; an action waits for its input. Both backends execute exactly these
lists, so the order of messages on every link is known in advance.

Every function takes the same five values: ``schedule`` ("gpipe" or "1f1b", which is interleaved 1F1B when
``virtual`` > 1), the number ``pp`` of pipeline ranks, ``virtual`` chunks a rank, ``micro_batches`` of a step, and
``rank`` on the pipeline. It raises ValueError for values without a schedule; core.parallel.layout refuses those before,
with a message for users.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Action(NamedTuple):
    """Forward (``kind`` "F") or backward ("B") of one micro-batch through one of the rank's chunks."""

    kind: str
    micro: int
    chunk: int


class Span(NamedTuple):
    """An action with its start and end, in the units of ``simulate``'s costs."""

    action: Action
    start: float
    end: float


def actions(schedule: str, pp: int, virtual: int, micro_batches: int, rank: int) -> list[Action]:
    """Actions of ``rank`` in one optimizer step, in order: every (micro, chunk) once forward and once backward.

    GPipe: all forwards, then all backwards, both in order of micro-batch. 1F1B: pp - rank - 1 warm-up forwards, then
    one forward and one backward in turn, then the remaining backwards. Interleaved 1F1B (arXiv 2104.04473, section 2.2,
    in the order of Megatron-LM): micro-batches go in groups of pp through chunk 0, then the same group through chunk 1,
    and so on; backwards likewise, from the last chunk; (pp - rank - 1) * 2 + (virtual - 1) * pp warm-up forwards.
    """
    _check(schedule, pp, virtual, micro_batches, rank)
    total = micro_batches * virtual
    forwards = [Action("F", *_turn(k, pp, virtual, "F")) for k in range(total)]
    backwards = [Action("B", *_turn(k, pp, virtual, "B")) for k in range(total)]
    if schedule == "gpipe":
        return forwards + backwards
    # Warm-up: forwards only, as many as it takes until the first gradient can arrive.
    ahead = min(_ahead(pp, virtual, rank), total)
    plan = forwards[:ahead]
    # Steady state: each backward frees the activations of one micro-batch before the next forward keeps more, so a
    # rank never holds more than ahead + 1 graphs (peak_live).
    for k in range(total - ahead):
        plan += [forwards[ahead + k], backwards[k]]
    # Cool-down: the backwards of the last `ahead` forwards.
    return plan + backwards[total - ahead :]


def peak_live(schedule: str, pp: int, virtual: int, micro_batches: int, rank: int) -> int:
    """Largest number of (micro, chunk) graphs that ``rank`` holds at once, from the start of a forward to the end
    of its backward.

    GPipe: micro_batches. 1F1B: min(micro_batches, pp - rank). Interleaved: warm-up forwards + 1, at most all.
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
    """Timeline of each rank: its actions with start and end, for messages that take no time.

    ``forward`` and ``backward``: the time of one micro-batch through a stage, in any unit; one number, or one for each
    of the pp * virtual global stages. RuntimeError on a deadlock.
    """
    plans = [actions(schedule, pp, virtual, micro_batches, rank) for rank in range(pp)]
    return play(plans, virtual, forward, backward)


def play(
    plans: Sequence[Sequence[Action]],
    virtual: int,
    forward: float | Sequence[float] = 1.0,
    backward: float | Sequence[float] = 2.0,
) -> list[list[Span]]:
    """``simulate`` for given lists of actions, one a rank. RuntimeError, naming the waiting actions, on a deadlock.

    A forward depends on the forward of the stage before. A backward depends on its own forward and on the backward of
    the stage after.
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
    # Each round advances every rank as far as the results of the others allow. When a round moves no rank, either all
    # lists are finished or the ranks wait for each other.
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
    """Fraction of the ranks' time spent waiting, from ``simulate``; 0 for one rank."""
    timeline = simulate(schedule, pp, virtual, micro_batches, forward, backward)
    length = max(spans[-1].end for spans in timeline)
    busy = sum(span.end - span.start for spans in timeline for span in spans)
    return 1.0 - busy / (length * pp)


def bubble_formula(schedule: str, pp: int, virtual: int, micro_batches: int) -> float:
    """``bubble`` for equal stages: (pp - 1) / (virtual * micro_batches + pp - 1).

    GPipe and 1F1B have the same bubble and differ in memory. Interleaving makes filling and draining shorter by the
    factor ``virtual``.
    """
    _check(schedule, pp, virtual, micro_batches, 0)
    return (pp - 1) / (virtual * micro_batches + pp - 1)


def _ahead(pp: int, virtual: int, rank: int) -> int:
    """Warm-up forwards of 1F1B, if the step has that many.

    The first gradient reaches a rank after its activation has passed the pp - rank - 1 stages behind it. Interleaved, a
    rank also runs the first virtual - 1 chunks of its first group before any backward, and twice the distance keeps the
    ranks busy while gradients of the last chunk come back (Megatron-LM's number).
    """
    return pp - rank - 1 if virtual == 1 else (pp - rank - 1) * 2 + (virtual - 1) * pp


def _turn(k: int, pp: int, virtual: int, kind: str) -> tuple[int, int]:
    """(micro, chunk) of a rank's k-th forward or backward."""
    if virtual == 1:
        return k, 0
    # A group is pp micro-batches through all chunks: chunk 0 for each of them, then chunk 1, ...; backwards run through
    # the chunks in reverse.
    group, place = divmod(k, pp * virtual)
    chunk, micro = divmod(place, pp)
    return group * pp + micro, chunk if kind == "F" else virtual - 1 - chunk


def _needs(action: Action, stage: int, stages: int) -> list[tuple[str, int, int]]:
    """(kind, micro, global stage) of the actions that must have ended before ``action`` can start."""
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
