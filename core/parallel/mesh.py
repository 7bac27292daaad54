"""Process groups and one-way links of one rank in a layout; the backends supply the communicators behind them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from telechat_twins.core.launch.heartbeat import Heartbeat
from telechat_twins.core.parallel.layout import Coord, Layout

_AXES = ("tp", "cp", "ring", "ulysses", "dp", "replicas", "world")


@dataclass(frozen=True)
class Group:
    """Ranks that meet in collectives: ``ranks`` in increasing order, ``rank`` this process's index among them.

    ``handle`` is the backend's communicator; None for a group of one. ``heartbeat`` records who waits where.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    handle: Any = None  # str in MindSpore, torch.distributed.ProcessGroup in PyTorch
    heartbeat: Heartbeat | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Link:
    """A one-way channel from global rank ``src`` to ``dst``; where the device allows, on a communicator of its own.

    A send that waits for its receiver then never blocks a message on another channel between the same two ranks.
    """

    name: str
    src: int
    dst: int
    handle: Any = None
    heartbeat: Heartbeat | None = None

    @cached_property
    def ranks(self) -> tuple[int, int]:
        return self.src, self.dst


@dataclass(frozen=True)
class Mesh:
    """The groups and links of one rank.

    ``tied``: first and last pipeline rank when embeddings are tied, else this rank alone. ``kv``: tensor ranks that
    hold the same kv head, else this rank alone. The pipeline is a ring: ``forward_out`` leads to pipeline rank
    (p+1) % pp. Unused links are None: all of them when pp is 1, those between last and first rank when a rank holds one
    chunk of the model.
    """

    layout: Layout
    rank: int
    coord: Coord
    tp: Group
    cp: Group
    ring: Group
    ulysses: Group
    dp: Group
    replicas: Group
    world: Group
    tied: Group
    kv: Group
    forward_in: Link | None
    forward_out: Link | None
    backward_in: Link | None
    backward_out: Link | None


class GroupMaker(Protocol):
    """A backend's ``make_group``: the group of global ``ranks``, None when global rank ``rank`` is not in it."""

    def __call__(
        self, name: str, ranks: tuple[int, ...], rank: int, heartbeat: Heartbeat | None = None
    ) -> Group | None: ...


class LinkMaker(Protocol):
    """A backend's ``make_link``: the link from ``src`` to ``dst``, None when global rank ``rank`` is neither."""

    def __call__(self, name: str, src: int, dst: int, rank: int, heartbeat: Heartbeat | None = None) -> Link | None: ...


def build_mesh(
    layout: Layout,
    rank: int,
    make_group: GroupMaker,
    make_link: LinkMaker,
    heartbeat: Heartbeat | None = None,
    tied: bool = False,
    kv_copies: int = 1,
) -> Mesh:
    """Make every group and link of ``layout`` in the same order on every process, and pick those of ``rank``.

    tied: embeddings are tied, so the first and last pipeline ranks share a weight. kv_copies: number of neighbouring
    tensor ranks that hold the same kv head.
    """
    groups: dict[str, Group] = {}
    for axis in _AXES:
        for ranks in _distinct(layout, axis):
            made = make_group(axis, ranks, rank, heartbeat)
            if made is not None:
                groups[axis] = made
    shared = Group("tied", (rank,), 0)
    kv = Group("kv", (rank,), 0)
    for ranks in _distinct(layout, "tp") if kv_copies > 1 else ():
        for first in range(0, layout.tp, kv_copies):
            kv = make_group("kv", ranks[first : first + kv_copies], rank, heartbeat) or kv
    links: dict[str, Link | None] = dict.fromkeys(("forward_in", "forward_out", "backward_in", "backward_out"))
    for stages in _distinct(layout, "pp") if layout.pp > 1 else ():
        if tied:
            shared = make_group("tied", (stages[0], stages[-1]), rank, heartbeat) or shared
        for i in range(layout.pp if layout.virtual > 1 else layout.pp - 1):
            a, b = stages[i], stages[(i + 1) % layout.pp]
            for direction, src, dst in (("forward", a, b), ("backward", b, a)):
                end = f"{direction}_out" if rank == src else f"{direction}_in"
                links[end] = make_link(end, src, dst, rank, heartbeat) or links[end]
    return Mesh(
        layout=layout,
        rank=rank,
        coord=layout.coord(rank),
        tp=groups["tp"],
        cp=groups["cp"],
        ring=groups["ring"],
        ulysses=groups["ulysses"],
        dp=groups["dp"],
        replicas=groups["replicas"],
        world=groups["world"],
        tied=shared,
        kv=kv,
        forward_in=links["forward_in"],
        forward_out=links["forward_out"],
        backward_in=links["backward_in"],
        backward_out=links["backward_out"],
    )


@contextmanager
def watched(op: str, group: Group | Link) -> Iterator[None]:
    """Record in the group's heartbeat, for the launcher to read, that this rank waits in ``op`` while active."""
    if group.heartbeat is None:
        yield
        return
    group.heartbeat.enter(op, group.name, group.ranks)
    try:
        yield
    finally:
        group.heartbeat.leave()


def used(link: Link | None) -> Link:
    """A link that the schedule uses, and that ``build_mesh`` has therefore made."""
    assert link is not None
    return link


def _distinct(layout: Layout, axis: str) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(layout.ranks(axis, rank) for rank in range(layout.world)))
