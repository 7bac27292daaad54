"""Process groups and point-to-point links of a layout in MindSpore (mccl on CPU, hccl on Ascend)."""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint
from mindspore.communication import GlobalComm, create_group, get_group_size, get_rank, init, release
from mindspore.mint.distributed import distributed

from telechat_twins.core.launch.heartbeat import Heartbeat
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parallel.mesh import Group, Link, Mesh, build_mesh
from telechat_twins.kernels.mindspore.ops import limit_threads
from telechat_twins.kernels.mindspore.private import set_world_rank
from telechat_twins.kernels.mindspore.settings import keep_threads

LONGEST_WAIT = 1800  # seconds; what PyTorch's gloo allows. MindSpore's CPU collectives give up after 30 by default.

_DTYPES = (ms.float32, ms.float16, ms.bfloat16, ms.float64, ms.int32, ms.int64)  # by number in a message's header
_HEADER = 10  # channel, dtype, rank of the tensor, its shape: int64 each
_early: dict[tuple[int, int], deque[Tensor]] = {}  # (sender, channel) -> messages that came before their turn


class _Channel:
    """One direction of a link on the CPU, where MindSpore (2.9.0) matches messages by sender alone, in sending order.

    Each message is therefore preceded by a header with its channel number, dtype and shape; the receiver queues
    messages of other channels until their turn.
    """

    def __init__(self, number: int, src: int, dst: int) -> None:
        self.number, self.src, self.dst = number, src, dst

    def send(self, x: Tensor) -> None:
        """Return when the other process holds the message; it need not have posted a receive."""
        header = np.zeros(_HEADER, np.int64)
        header[: 3 + x.ndim] = (self.number, _DTYPES.index(x.dtype), x.ndim, *x.shape)
        for part in (Tensor(header), x):
            distributed.isend(part, self.dst, group=GlobalComm.WORLD_COMM_GROUP)

    def recv(self, shape: tuple[int, ...], dtype: ms.Type) -> Tensor:
        """The channel's next message; RuntimeError when its shape or dtype differs."""
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


_handles: dict[tuple[int, ...], str] = {}  # one communicator for each distinct set of ranks
_channels: dict[tuple[str, int, int], Any] = {}  # and one for each direction of the pipeline between two ranks


def join(timeout_s: float | None = None) -> tuple[int, int]:
    """Rendezvous with the other processes of msrun. Returns (rank, world); (0, 1) for a single process.

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
            threads = _threads(get_group_size())
            keep_threads(threads)
            limit_threads(threads)
            ms.runtime.dispatch_threads_num(1)
        # isend and irecv ask for this process's rank in a group whose name was bound when their module was imported,
        # before the CPU's world group had its own.
        set_world_rank(get_rank())
    return get_rank(), get_group_size()


def _threads(ranks: int) -> int:
    """Threads of each of ``ranks`` processes: OMP_NUM_THREADS, which the user sets or core.launch.command (msrun alone
    leaves its ranks 1, as torchrun does); without it an equal share of the cores that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return (int(asked) if asked.isdecimal() else 0) or max(1, len(os.sched_getaffinity(0)) // ranks)


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
    """core.parallel.mesh.build_mesh with this backend's communicators."""
    return build_mesh(layout, rank, make_group, make_link, heartbeat, tied, kv_copies)


def leave() -> None:
    """Destroy the process groups; a single process has none."""
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
