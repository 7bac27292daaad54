"""Who talks to whom: the process groups of a layout in MindSpore (mccl on CPU, hccl on Ascend)."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint
from mindspore.communication import GlobalComm, create_group, get_group_size, get_rank, init, release
from mindspore.mint.distributed import distributed

from telechat_twins.core.launch.heartbeat import Heartbeat
from telechat_twins.core.parallel.layout import Coord, Layout
from telechat_twins.kernels.mindspore.ops import limit_threads
from telechat_twins.kernels.mindspore.private import set_world_rank

LONGEST_WAIT = 1800  # seconds; what PyTorch's gloo allows. MindSpore's CPU collectives give up after 30 by default.

_DTYPES = (ms.float32, ms.float16, ms.bfloat16, ms.float64, ms.int32, ms.int64)  # by number in a message's header
_HEADER = 10  # channel, dtype, rank of the tensor, its shape: int64 each
_early: dict[tuple[int, int], deque[Tensor]] = {}  # (sender, channel) -> messages that came before their turn

_AXES = ("tp", "cp", "ring", "ulysses", "dp", "replicas", "world")


@dataclass(frozen=True)
class Group:
    """Ranks that meet in collectives. ``ranks`` in increasing order, ``rank`` this process's index among them."""

    name: str
    ranks: tuple[int, ...]
    rank: int
    handle: str | None = None
    heartbeat: Heartbeat | None = None

    @property
    def size(self) -> int:
        return len(self.ranks)


class _Channel:
    """A link on the CPU. MindSpore (2.9.0) matches messages there by sender alone, in the order of sending: so each
    brings its channel's number and its shape along, and the receiver keeps those that come before their turn."""

    def __init__(self, number: int, src: int, dst: int) -> None:
        self.number, self.src, self.dst = number, src, dst

    def send(self, x: Tensor) -> None:
        """Returns when the other process has the message; it need not have asked for it."""
        header = np.zeros(_HEADER, np.int64)
        header[: 3 + x.ndim] = (self.number, _DTYPES.index(x.dtype), x.ndim, *x.shape)
        for part in (Tensor(header), x):
            distributed.isend(part, self.dst, group=GlobalComm.WORLD_COMM_GROUP)

    def recv(self, shape: tuple[int, ...], dtype: ms.Type) -> Tensor:
        """The channel's next message; RuntimeError when it is none of this shape and dtype."""
        waiting = _early.setdefault((self.src, self.number), deque())
        while not waiting:
            number, kind, ndim, *sizes = self._next((_HEADER,), ms.int64).asnumpy().tolist()
            _early.setdefault((self.src, number), deque()).append(self._next(tuple(sizes[:ndim]), _DTYPES[kind]))
        x = waiting.popleft()
        if (x.shape, x.dtype) != (shape, dtype):
            raise RuntimeError(f"rank {self.src} sent {x.dtype} {x.shape} where {dtype} {shape} was expected")
        return x

    def _next(self, shape: tuple[int, ...], dtype: ms.Type) -> Tensor:
        x = mint.empty(shape, dtype=dtype)
        distributed.irecv(x, self.src, group=GlobalComm.WORLD_COMM_GROUP).wait()
        return x


@dataclass(frozen=True)
class Link:
    """A one-way channel from global rank ``src`` to ``dst``, on Ascend on a communicator of its own.

    So a send that waits for its receiver never holds up a message on another channel between the same two ranks.
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


_handles: dict[tuple[int, ...], str] = {}  # one communicator for each distinct set of ranks
_channels: dict[tuple[str, int, int], Any] = {}  # and one for each direction of the pipeline between two ranks


def join(timeout_s: float | None = None) -> tuple[int, int]:
    """Meet the other processes of msrun, if there are any. Returns (rank, world), (0, 1) alone.

    timeout_s: how long a collective may wait before it raises; None allows LONGEST_WAIT. Called before the first
    collective of the process, which fixes the limit.
    """
    if "MS_ROLE" not in os.environ:
        return 0, 1
    if not GlobalComm.INITED:
        limit = "MS_NODE_TIMEOUT" if ms.get_context("device_target") == "CPU" else "HCCL_EXEC_TIMEOUT"
        os.environ[limit] = str(math.ceil(timeout_s or LONGEST_WAIT))
        init()
        if ms.get_context("device_target") == "CPU":
            # Idle kernel and dispatch threads call sched_yield without end, on cores that other ranks need: 4 ranks on
            # 2 cores took 5.3 s for a step of telechat2-tiny as it comes, and 2.8 s so.
            threads = max(1, (os.cpu_count() or 1) // get_group_size())
            ms.device_context.cpu.op_tuning.threads_num(threads)
            limit_threads(threads)
            ms.runtime.dispatch_threads_num(1)
        # isend and irecv ask for this process's rank in a group whose name was bound when their module was imported,
        # before the CPU's world group had its own.
        set_world_rank(get_rank())
    return get_rank(), get_group_size()


def make_group(name: str, ranks: tuple[int, ...], rank: int, heartbeat: Heartbeat | None = None) -> Group | None:
    """The group of ``ranks`` (global, increasing), or None when global rank ``rank`` is not one of them.

    All processes must call this for the same sets in the same order. Equal sets share one communicator. Raises
    ValueError when ``ranks`` is not increasing: MindSpore would send to the wrong ranks, without an error.
    """
    if list(ranks) != sorted(set(ranks)):
        raise ValueError(f"group {name}: ranks {ranks} are not in increasing order")
    if rank not in ranks:
        return None
    if len(ranks) > 1 and ranks not in _handles:
        _handles[ranks] = _communicator(ranks)
    return Group(name, ranks, ranks.index(rank), _handles.get(ranks), heartbeat)


def make_link(name: str, src: int, dst: int, rank: int, heartbeat: Heartbeat | None = None) -> Link | None:
    """A channel from ``src`` to ``dst``, or None when global rank ``rank`` is neither.

    All processes must make all links in the same order. A name between two ranks is made once.
    """
    key = (name.partition("_")[0], src, dst)
    if key not in _channels:
        if ms.get_context("device_target") == "CPU":
            _channels[key] = _Channel(len(_channels), src, dst)
        elif rank in (src, dst):
            _channels[key] = _communicator((min(src, dst), max(src, dst)), f"{key[0]}-{src}-{dst}")
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
    for made in (_handles, _channels, _early):
        made.clear()
    if GlobalComm.INITED:
        release()


def _communicator(ranks: tuple[int, ...], name: str = "ranks") -> str:
    if name == "ranks" and len(ranks) == get_group_size():
        return GlobalComm.WORLD_COMM_GROUP
    # A name that every member finds alone, and that fits Ascend's limit on lengths however many members there are.
    text = f"{name}-{hashlib.sha256(str(ranks).encode()).hexdigest()[:16]}"
    create_group(text, list(ranks))
    return text


def _distinct(layout: Layout, axis: str) -> list[tuple[int, ...]]:
    return list(dict.fromkeys(layout.ranks(axis, rank) for rank in range(layout.world)))
