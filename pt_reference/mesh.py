"""Process groups and point-to-point links of a layout on torch.distributed (gloo on CPU, nccl on GPU, hccl on NPU)."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.heartbeat import Heartbeat
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parallel.mesh import Group, Link, Mesh, build_mesh
from telechat_twins.pt_reference import ops

_BACKENDS = {"cuda": "nccl", "npu": "hccl"}


_handles: dict[tuple[int, ...], dist.ProcessGroup] = {}  # one communicator for each distinct set of ranks
_channels: dict[tuple[str, int, int], dist.ProcessGroup] = {}  # and one a direction between two ranks


def join(timeout_s: float | None = None) -> tuple[int, int]:
    """Rendezvous with the other processes of torchrun. Returns (rank, world); (0, 1) for a single process.

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
    """core.parallel.mesh.build_mesh with this backend's communicators."""
    return build_mesh(layout, rank, make_group, make_link, heartbeat, tied, kv_copies)


def leave() -> None:
    """Destroy the process groups; a single process has none."""
    _handles.clear()
    _channels.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
