"""Collectives and point-to-point messages on torch.distributed. For a group of one, every function is the identity.

Inputs may have any strides; results are contiguous and new. Sums over ranks run in float32 or wider whatever the dtype
of x, and the result returns in x's dtype. Shapes and dtypes must be the same on all ranks of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx

from telechat_twins.core.parallel.mesh import Group, Link
from telechat_twins.core.parallel.traffic import TrafficCounter
from telechat_twins.core.parallel.transfer import Handle
from telechat_twins.pt_reference import ops

Operation = Callable[[Tensor], Tensor]

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_HOST: dict[str, Callable[..., np.ndarray]] = {"sum": np.sum, "max": np.max, "min": np.min}
# Names that PyTorch 2.13 gave these two; 2.12 has only the older ones, which later versions warn of at every call.
_SINGLE = hasattr(dist, "all_gather_single")
_all_gather_into: Callable[..., dist.Work] = dist.all_gather_single if _SINGLE else dist.all_gather_into_tensor
_reduce_scatter_into: Callable[..., dist.Work] = dist.reduce_scatter_single if _SINGLE else dist.reduce_scatter_tensor

TRAFFIC = TrafficCounter()


def all_reduce(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """Sum or maximum ("max") of x over the group."""
    return start_all_reduce(x, group, op).wait()


def start_all_reduce(x: Tensor, group: Group, op: str = "sum") -> Handle[Tensor]:
    """``all_reduce`` without waiting; x may be changed at once."""
    if group.size == 1:
        return Handle("all_reduce", group, (), x)
    wide = _sent(x, summed=op == "sum", copy=True)
    TRAFFIC.add("all_reduce", group.name, wide.nbytes)
    work = dist.all_reduce(wide, _REDUCE[op], group=group.handle, async_op=True)
    return Handle("all_reduce", group, (work,), lambda: wide.to(x.dtype))


def all_gather(x: Tensor, group: Group, axis: int, lengths: Sequence[int] | None = None) -> Tensor:
    """The group's tensors concatenated along ``axis`` in group order.

    lengths: every rank's length along ``axis``, where they differ. Raises ValueError when x has another.
    """
    if lengths is None:
        return _gather("all_gather", x, group, axis)
    if x.shape[axis] != lengths[group.rank]:
        raise ValueError(f"all_gather: length {x.shape[axis]} along axis {axis}, lengths say {lengths[group.rank]}")
    pad = list(x.shape)
    pad[axis] = max(lengths) - x.shape[axis]
    padded = _gather("all_gather", torch.cat((x, x.new_zeros(pad)), axis), group, axis)
    pieces = padded.split(max(lengths), axis)
    return torch.cat([piece.narrow(axis, 0, n) for piece, n in zip(pieces, lengths, strict=True)], axis)


def reduce_scatter(x: Tensor, group: Group, axis: int) -> Tensor:
    """This rank's slice, along ``axis``, of the sum of x over the group. Raises ValueError when it does not divide."""
    return start_reduce_scatter(x, group, axis).wait()


def start_reduce_scatter(x: Tensor, group: Group, axis: int) -> Handle[Tensor]:
    """``reduce_scatter`` without waiting; x may be changed only after ``wait``."""
    if group.size == 1:
        return Handle("reduce_scatter", group, (), x)
    wide = _sent(_pieces("reduce_scatter", x, group, axis), summed=True)
    TRAFFIC.add("reduce_scatter", group.name, wide.nbytes)
    out = torch.empty_like(wide[0])
    work = _reduce_scatter_into(out.view(-1), wide.view(-1), group=group.handle, async_op=True)
    return Handle("reduce_scatter", group, (work,), lambda: out.to(x.dtype), kept=wide)


def all_to_all(x: Tensor, group: Group, split_axis: int, concat_axis: int) -> Tensor:
    """Piece j of x along ``split_axis`` goes to rank j; the pieces received are concatenated along ``concat_axis``.

    Raises ValueError when the length of ``split_axis`` does not divide by the group's size.
    """
    if group.size == 1:
        return x
    sent = _sent(_pieces("all_to_all", x, group, split_axis))
    TRAFFIC.add("all_to_all", group.name, sent.nbytes)
    out = torch.empty_like(sent)
    work = dist.all_to_all_single(out, sent, group=group.handle, async_op=True)
    return Handle("all_to_all", group, (work,), lambda: torch.cat(out.unbind(0), concat_axis), kept=sent).wait()


def broadcast(x: Tensor, group: Group, source: int) -> Tensor:
    """x of the group's rank ``source`` (its index in the group); the others give a tensor of its shape and dtype."""
    if group.size == 1:
        return x
    out = _sent(x, copy=True)
    TRAFFIC.add("broadcast", group.name, out.nbytes)
    work = dist.broadcast(out, group.ranks[source], group=group.handle, async_op=True)
    return Handle("broadcast", group, (work,), out).wait()


def barrier(group: Group) -> None:
    """Block until all ranks of the group have entered the barrier."""
    agree([0.0], group, "max")


def start_shift(x: Tensor, group: Group) -> Handle[Tensor]:
    """Send x to the next rank of the ring and receive the previous rank's; x stays as it is until ``wait``."""
    if group.size == 1:
        return Handle("shift", group, (), x)
    sent = _sent(x)
    TRAFFIC.add("shift", group.name, sent.nbytes)
    received = torch.empty_like(sent)
    to, source = group.ranks[(group.rank + 1) % group.size], group.ranks[group.rank - 1]
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, to, group.handle),
            dist.P2POp(dist.irecv, received, source, group.handle),
        ]
    )
    return Handle("shift", group, works, received, kept=sent)


def send(x: Tensor, link: Link) -> Handle[Tensor]:
    """Start to send x over ``link``. Keep the handle and leave x unchanged until its ``wait``, at a step's end."""
    sent = _sent(x)
    TRAFFIC.add("send", link.name, sent.nbytes)
    return Handle("send", link, (dist.isend(sent, link.dst, group=link.handle),), sent)


def recv(shape: Sequence[int], dtype: torch.dtype, link: Link) -> Tensor:
    """The next tensor sent over ``link``, which must be of this shape and dtype."""
    received = torch.empty(tuple(shape), dtype=dtype, device=ops.device())
    return Handle("recv", link, (dist.irecv(received, link.src, group=link.handle),), received).wait()


def agree(values: list[float], group: Group, op: str) -> list[float]:
    """The "sum", "max" or "min" of each number over the group, in float64, bitwise identical on every rank."""
    if group.size == 1:
        return list(values)
    # As 32-bit words: not every backend carries float64. Summed here in group order, so that all ranks agree.
    words = torch.tensor(values, dtype=torch.float64).view(torch.int32)
    rows = _gather("agree", words.to(ops.device()).view(1, -1), group, 0).cpu().numpy().view(np.float64)
    return _HOST[op](rows, axis=0).tolist()


class _TwoWay(torch.autograd.Function):
    """A linear operation and its transpose, which the gradient takes."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, there: Operation, back: Operation) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None


def _two_way(x: Tensor, group: Group, there: Operation, back: Operation) -> Tensor:
    return x if group.size == 1 else _TwoWay.apply(x, there, back)


def gather_sequence(x: Tensor, group: Group, axis: int) -> Tensor:
    """``all_gather`` whose gradient is the reduce_scatter: each rank's loss may depend on every piece."""
    return _two_way(x, group, lambda t: all_gather(t, group, axis), lambda g: reduce_scatter(g, group, axis))


def scatter_sum(x: Tensor, group: Group, axis: int) -> Tensor:
    """``reduce_scatter`` whose gradient is the all_gather."""
    return _two_way(x, group, lambda t: reduce_scatter(t, group, axis), lambda g: all_gather(g, group, axis))


def copy_to(x: Tensor, group: Group) -> Tensor:
    """x itself; its gradient is summed over the group, each of whose ranks uses x for another part."""
    return _two_way(x, group, lambda t: t.view_as(t), lambda g: all_reduce(g, group))


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the group; the gradient, equal on all ranks, passes unchanged."""
    return _two_way(x, group, lambda t: all_reduce(t, group), lambda g: g)


def swap_heads(x: Tensor, group: Group, split_axis: int, concat_axis: int) -> Tensor:
    """``all_to_all`` whose gradient is the inverse ``all_to_all``."""
    there, back = (split_axis, concat_axis), (concat_axis, split_axis)
    return _two_way(x, group, lambda t: all_to_all(t, group, *there), lambda g: all_to_all(g, group, *back))


def _sent(x: Tensor, summed: bool = False, copy: bool = False) -> Tensor:
    """x as a contiguous tensor outside autograd, float32 or wider if ``summed``; with ``copy`` always a new one."""
    dtype = torch.float32 if summed and x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    return x.detach().to(dtype, copy=copy, memory_format=torch.contiguous_format).contiguous()


def _gather(op: str, x: Tensor, group: Group, axis: int) -> Tensor:
    if group.size == 1:
        return x
    sent = _sent(x)
    TRAFFIC.add(op, group.name, sent.nbytes)
    out = sent.new_empty((group.size, *sent.shape))
    work = _all_gather_into(out.view(-1), sent.view(-1), group=group.handle, async_op=True)
    joined = Handle(op, group, (work,), out, kept=sent).wait()
    return joined.flatten(0, 1) if axis == 0 else torch.cat(joined.unbind(0), axis)


def _pieces(op: str, x: Tensor, group: Group, axis: int) -> Tensor:
    """x [.., L, ..] as [size, .., L/size, ..], a view."""
    if x.shape[axis] % group.size:
        raise ValueError(f"{op}: length {x.shape[axis]} of axis {axis} does not divide by {group.size} ranks")
    return x.unflatten(axis, (group.size, -1)).movedim(axis if axis >= 0 else axis - 1, 0)
