"""Who talks to whom: the process groups of a layout on torch.distributed (gloo on CPU, nccl on GPU, hccl on NPU)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist

from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.heartbeat import Heartbeat
from telechat_twins.core.parallel.layout import Coord, Layout
from telechat_twins.pt_reference import ops

_BACKENDS = {"cuda": "nccl", "npu": "hccl"}
_AXES = ("tp", "cp", "ring", "ulysses", "dp", "replicas", "world")


@dataclass(frozen=True)
class Group:
    """Ranks that meet in collectives. ``ranks`` in increasing order, ``rank`` this process's index among them."""

    name: str
    ranks: tuple[int, ...]
    rank: int
    handle: dist.ProcessGroup | None = None
    heartbeat: Heartbeat | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Link:
    """A one-way channel from global rank ``src`` to ``dst`` on a communicator of its own.

    So a send that waits for its receiver never holds up a message on another channel between the same two ranks.
    """

    name: str
    src: int
    dst: int
    handle: dist.ProcessGroup | None = None
    heartbeat: Heartbeat | None = None

    @cached_property
    def ranks(self) -> tuple[int, int]:
        return self.src, self.dst


@dataclass(frozen=True)
class Mesh:
    """The groups and links of one rank. ``tied``: first and last pipeline rank of tied embeddings, else size 1; ``kv``:
    tensor ranks that hold the same kv head, else size 1.

    The pipeline is a ring: ``forward_out`` leads to pipeline rank (p+1) % pp. Links that no message takes are None:
    all of them when pp is 1, those between last and first rank when a rank holds one chunk of the model.
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


_handles: dict[tuple[int, ...], dist.ProcessGroup] = {}  # one communicator for each distinct set of ranks
_channels: dict[tuple[str, int, int], dist.ProcessGroup] = {}  # and one a direction between two ranks


def join(timeout_s: float | None = None) -> tuple[int, int]:
    """Meet the other processes of torchrun, if there are any. Returns (rank, world), (0, 1) alone.

    timeout_s: how long a collective may wait before it raises; None leaves PyTorch's own limit. Raises UserError when
    this machine has fewer devices than processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        kind, local = ops.device().type, int(os.environ.get("LOCAL_RANK", "0"))
        options: dict[str, torch.device | timedelta] = {}
        if kind != "cpu":
            here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), getattr(torch, kind).device_count()
            if here > devices:
                raise UserError(
                    f"--nproc: {here} processes on this machine, which has {devices} {kind} devices; "
                    f"use --nproc {devices}, or hide the devices to run on the CPU"
                )
            getattr(torch, kind).set_device(local)
        if kind == "cuda":
            # Bound to a device, nccl connects each group when it is made, by all ranks in the same order, and not at
            # its first message, where a pipeline's sends would wait for each other.
            options["device_id"] = torch.device(kind, local)
        if timeout_s is not None:
            options["timeout"] = timedelta(seconds=timeout_s)
        dist.init_process_group(_BACKENDS.get(kind, "gloo"), **options)
    return dist.get_rank(), dist.get_world_size()


def make_group(name: str, ranks: tuple[int, ...], rank: int, heartbeat: Heartbeat | None = None) -> Group | None:
    """The group of ``ranks`` (global, increasing), or None when global rank ``rank`` is not one of them.

    All processes must call this for the same sets in the same order. Equal sets share one communicator. Raises
    ValueError when ``ranks`` is not increasing.
    """
    if list(ranks) != sorted(set(ranks)):
        raise ValueError(f"group {name}: ranks {ranks} are not in increasing order")
    if len(ranks) > 1 and ranks not in _handles:
        _handles[ranks] = dist.group.WORLD if len(ranks) == dist.get_world_size() else dist.new_group(list(ranks))
    return Group(name, ranks, ranks.index(rank), _handles.get(ranks), heartbeat) if rank in ranks else None


def make_link(name: str, src: int, dst: int, rank: int, heartbeat: Heartbeat | None = None) -> Link | None:
    """A channel from ``src`` to ``dst``, or None when global rank ``rank`` is neither.

    All processes must make all links in the same order. A name between two ranks is made once.
    """
    key = (name.partition("_")[0], src, dst)
    if key not in _channels:
        _channels[key] = dist.new_group([src, dst])
    return Link(name, src, dst, _channels[key], heartbeat) if rank in (src, dst) else None


def make_mesh(
    layout: Layout, rank: int, heartbeat: Heartbeat | None = None, tied: bool = False, kv_copies: int = 1
) -> Mesh:
    """Make every group and link of ``layout`` in the same order on every process, and pick those of ``rank``.

    tied: the model's embeddings are tied, so that the first and last pipeline ranks share a weight. kv_copies: as many
    neighbouring tensor ranks hold the same kv head.
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
    """Around a call that may wait for other ranks: a note of who waits where, for whoever watches this process."""
    if group.heartbeat is None:
        yield
        return
    group.heartbeat.enter(op, group.name, group.ranks)
    try:
        yield
    finally:
        group.heartbeat.leave()


def leave() -> None:
    """End the process groups; a process alone has none."""
    _handles.clear()
    _channels.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def _distinct(layout: Layout, axis: str) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(layout.ranks(axis, rank) for rank in range(layout.world)))
