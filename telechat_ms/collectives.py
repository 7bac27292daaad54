"""Collectives and point-to-point messages in MindSpore. For a group of one, every function is the identity.

Inputs may have any strides; results are contiguous and new. Sums over ranks run in float32 or wider whatever the dtype
of x, and the result returns in x's dtype. Shapes and dtypes must be the same on all ranks of a group.

On the CPU, MindSpore (2.9.0) lacks some collectives, which are composed here, and completes each one before the call
returns. It matches messages by sender alone, in order, whatever their group: so no message may be left on a link when
both its ranks enter a collective. On Ascend the native operators are called; that branch has not run on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops
from mindspore.mint import distributed as dist

from telechat_twins.core.parallel.mesh import Group, Link, watched
from telechat_twins.core.parallel.traffic import TrafficCounter
from telechat_twins.core.parallel.transfer import Handle, Work
from telechat_twins.telechat_ms.autograd import Context, Function

Operation = Callable[[Tensor], Tensor]

_FOLD = {"sum": ops.add, "max": ops.maximum}
_HOST: dict[str, Callable[..., np.ndarray]] = {"sum": np.sum, "max": np.max, "min": np.min}

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
    if wide.dtype == ms.float64:  # which neither mccl nor hccl adds
        return Handle("all_reduce", group, (), reduce(_FOLD[op], _gather("all_reduce", wide, group)))
    works = _started("all_reduce", group, dist.all_reduce, wide, op)
    return Handle("all_reduce", group, works, lambda: ops.cast(wide, x.dtype))


def all_gather(x: Tensor, group: Group, axis: int, lengths: Sequence[int] | None = None) -> Tensor:
    """The group's tensors concatenated along ``axis`` in group order.

    lengths: every rank's length along ``axis``, where they differ. Raises ValueError when x has another.
    """
    if group.size == 1:
        return x
    lengths = lengths or [x.shape[axis]] * group.size
    if x.shape[axis] != lengths[group.rank]:
        raise ValueError(f"all_gather: length {x.shape[axis]} along axis {axis}, lengths say {lengths[group.rank]}")
    sent = _padded(_sent(x), max(lengths), axis)
    TRAFFIC.add("all_gather", group.name, sent.nbytes)
    pieces = zip(_gather("all_gather", sent, group), lengths, strict=True)
    return ops.concat([p if n == sent.shape[axis] else mint.narrow(p, axis, 0, n) for p, n in pieces if n], axis)


def reduce_scatter(x: Tensor, group: Group, axis: int) -> Tensor:
    """This rank's slice, along ``axis``, of the sum of x over the group. Raises ValueError when it does not divide."""
    return start_reduce_scatter(x, group, axis).wait()


def start_reduce_scatter(x: Tensor, group: Group, axis: int) -> Handle[Tensor]:
    """``reduce_scatter`` without waiting; x may be changed only after ``wait``."""
    if group.size == 1:
        return Handle("reduce_scatter", group, (), x)
    pieces = [p.contiguous() for p in _pieces("reduce_scatter", _sent(x, summed=True), group, axis)]
    TRAFFIC.add("reduce_scatter", group.name, group.size * pieces[0].nbytes)
    if _composed():
        total = reduce(ops.add, _exchange("reduce_scatter", pieces, group))
        return Handle("reduce_scatter", group, (), ops.cast(total, x.dtype))
    wide, out = ops.concat(pieces, 0), mint.empty_like(pieces[0])
    works = _started("reduce_scatter", group, dist.reduce_scatter_tensor, out, wide)
    return Handle("reduce_scatter", group, works, lambda: ops.cast(out, x.dtype), kept=wide)


def all_to_all(x: Tensor, group: Group, split_axis: int, concat_axis: int) -> Tensor:
    """Piece j of x along ``split_axis`` goes to rank j; the pieces received are concatenated along ``concat_axis``.

    Raises ValueError when the length of ``split_axis`` does not divide by the group's size.
    """
    if group.size == 1:
        return x
    pieces = [_sent(piece) for piece in _pieces("all_to_all", x, group, split_axis)]
    TRAFFIC.add("all_to_all", group.name, group.size * pieces[0].nbytes)
    if _composed():
        return ops.concat(_exchange("all_to_all", pieces, group), concat_axis)
    sent = ops.concat(pieces, 0)
    out = mint.empty_like(sent)
    received = Handle("all_to_all", group, _started("all_to_all", group, dist.all_to_all_single, out, sent), out).wait()
    return ops.concat(ops.split(received, pieces[0].shape[0], 0), concat_axis)


def broadcast(x: Tensor, group: Group, source: int) -> Tensor:
    """x of the group's rank ``source`` (its index in the group); the others give a tensor of its shape and dtype."""
    if group.size == 1:
        return x
    out = _sent(x, copy=True)
    TRAFFIC.add("broadcast", group.name, out.nbytes)
    works = _started("broadcast", group, dist.broadcast, out, group.ranks[source])
    return Handle("broadcast", group, works, out).wait()


def barrier(group: Group) -> None:
    """Block until all ranks of the group have entered the barrier."""
    agree([0.0], group, "max")


def start_shift(x: Tensor, group: Group) -> Handle[Tensor]:
    """Send x to the next rank of the ring and receive the previous rank's; x stays as it is until ``wait``."""
    if group.size == 1:
        return Handle("shift", group, (), x)
    sent = _sent(x)
    TRAFFIC.add("shift", group.name, sent.nbytes)
    received = mint.empty_like(sent)
    to, source = group.ranks[(group.rank + 1) % group.size], group.ranks[group.rank - 1]
    if _composed():
        with watched("shift", group):
            dist.isend(sent, to, group=group.handle)
            dist.irecv(received, source, group=group.handle).wait()
        return Handle("shift", group, (), received)
    pair = (("isend", sent, to), ("irecv", received, source))
    works = dist.batch_isend_irecv([dist.P2POp(*one, group=group.handle) for one in pair])
    return Handle("shift", group, works, received, kept=sent)


def send(x: Tensor, link: Link) -> Handle[Tensor]:
    """Start to send x over ``link``. Keep the handle and leave x unchanged until its ``wait``, at a step's end."""
    sent = _sent(x)
    TRAFFIC.add("send", link.name, sent.nbytes)
    if not _composed():
        return Handle("send", link, (dist.isend(sent, link.dst, group=link.handle),), sent)
    link.handle.send(sent)
    return Handle("send", link, (), sent)


def recv(shape: Sequence[int], dtype: ms.Type, link: Link) -> Tensor:
    """The next tensor sent over ``link``, which must be of this shape and dtype."""
    if not _composed():
        received = mint.empty(tuple(shape), dtype=dtype)
        return Handle("recv", link, (dist.irecv(received, link.src, group=link.handle),), received).wait()
    with watched("recv", link):
        return link.handle.recv(tuple(shape), dtype)


def agree(values: list[float], group: Group, op: str) -> list[float]:
    """The "sum", "max" or "min" of each number over the group, in float64, bitwise identical on every rank."""
    if group.size == 1:
        return list(values)
    # As 32-bit words: not every backend carries float64. Summed here in group order, so that all ranks agree.
    words = Tensor(np.asarray(values, np.float64).view(np.int32))
    TRAFFIC.add("agree", group.name, words.nbytes)
    rows = np.stack([row.asnumpy().view(np.float64) for row in _gather("agree", words, group)])
    return _HOST[op](rows, axis=0).tolist()


class _TwoWay(Function):
    """A linear operation and its transpose, which the gradient takes."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, there: Operation, back: Operation) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor, None, None]:
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
    return _two_way(x, group, lambda t: t, lambda g: all_reduce(g, group))


def reduce_from(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the group; the gradient, equal on all ranks, passes unchanged."""
    return _two_way(x, group, lambda t: all_reduce(t, group), lambda g: g)


def swap_heads(x: Tensor, group: Group, split_axis: int, concat_axis: int) -> Tensor:
    """``all_to_all`` whose gradient is the inverse ``all_to_all``."""
    there, back = (split_axis, concat_axis), (concat_axis, split_axis)
    return _two_way(x, group, lambda t: all_to_all(t, group, *there), lambda g: all_to_all(g, group, *back))


def _composed() -> bool:
    """Whether this device's library offers only all_reduce, all_gather, broadcast, isend and irecv."""
    return ms.get_context("device_target") == "CPU"


def _sent(x: Tensor, summed: bool = False, copy: bool = False) -> Tensor:
    """x as a contiguous tensor outside autograd, float32 or wider if ``summed``; with ``copy`` always a new one.

    Contiguous above all: MindSpore's CPU all_reduce of a transposed tensor leaves it as it was, without an error.
    """
    sent = ops.stop_gradient(x).contiguous()
    if summed and x.dtype in (ms.bfloat16, ms.float16):
        return ops.cast(sent, ms.float32)
    return sent * 1 if copy else sent  # `copy()` takes thirty times as long


def _started(op: str, group: Group, call: Callable[..., Work], *arguments: object) -> tuple[Work, ...]:
    """The transfers that ``call`` leaves in flight: none on the CPU, where the call itself blocks."""
    if not _composed():
        return (call(*arguments, group=group.handle, async_op=True),)
    with watched(op, group):
        call(*arguments, group=group.handle, async_op=True)
    return ()


def _gather(op: str, sent: Tensor, group: Group) -> list[Tensor]:
    out = [mint.empty_like(sent) for _ in group.ranks]
    Handle(op, group, _started(op, group, dist.all_gather, out, sent), sent).wait()
    return out


def _exchange(op: str, pieces: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Piece j goes to rank j; returns what each rank had for this one, in group order."""
    out = list(pieces)
    with watched(op, group):
        for step in range(1, group.size):
            to, source = (group.rank + step) % group.size, (group.rank - step) % group.size
            dist.isend(pieces[to], group.ranks[to], group=group.handle)
            out[source] = mint.empty_like(pieces[source])
            dist.irecv(out[source], group.ranks[source], group=group.handle).wait()
    return out


def _padded(x: Tensor, length: int, axis: int) -> Tensor:
    shape = list(x.shape)
    shape[axis] = length - x.shape[axis]
    return ops.concat((x, mint.zeros(tuple(shape), dtype=x.dtype)), axis) if shape[axis] else x


def _pieces(op: str, x: Tensor, group: Group, axis: int) -> Sequence[Tensor]:
    """x cut along ``axis`` into one piece for each rank."""
    if x.shape[axis] % group.size:
        raise ValueError(f"{op}: length {x.shape[axis]} of axis {axis} does not divide by {group.size} ranks")
    return ops.split(x, x.shape[axis] // group.size, axis)
