"""Graphs that are alive together on a pipeline rank, by model chunk."""

from __future__ import annotations

from functools import lru_cache

from telechat_twins.core.parallel.schedule import actions

GROUPS = 3  # groups of pp micro-batches after which 1F1B repeats itself


@lru_cache(maxsize=4096)
def live_graphs(schedule: str, pp: int, virtual: int, micro_batches: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """The largest sets of outstanding graphs of a step: of each, how many belong to each of the rank's chunks.

    A set that another one contains is left out. Arguments are those of core.parallel.schedule.
    """
    if schedule == "gpipe":
        return ((micro_batches,) * virtual,)
    if virtual == 1:
        return ((min(micro_batches, pp - rank),),)
    few = min(micro_batches, GROUPS * pp)
    counts, found = [0] * virtual, set[tuple[int, ...]]()
    for action in actions(schedule, pp, virtual, few, rank):
        if action.kind == "B":
            found.add(tuple(counts))
            counts[action.chunk] -= 1
        else:
            counts[action.chunk] += 1
    return tuple(one for one in found if not any(other != one and all(map(int.__ge__, other, one)) for other in found))
