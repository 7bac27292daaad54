"""Attention over a sequence that is spread over a ring of ranks, in zigzag order, forward and backward.

Each rank keeps its queries; keys and values travel round the ring in one message while the block that came before is
computed. Partial results are merged in float32 by their log-sum-exp. The backward sends keys and values round once more
and behind them, one hop later, the float32 sums of their gradients, which arrive home after R hops (Liu et al.,
arXiv 2310.01889; zigzag order as in the ring-flash-attention project). The probabilities of the backward come from the
*final* log-sum-exp, so every block's part is exact.
"""

from __future__ import annotations

from mindspore import Tensor
from mindspore import ops as mops

from telechat_twins.core.parallel.mesh import Group
from telechat_twins.core.parallel.sequence import Visibility, ranges_between, visible_part
from telechat_twins.core.parallel.transfer import Handle
from telechat_twins.telechat_ms import ops
from telechat_twins.telechat_ms.autograd import Context, Function
from telechat_twins.telechat_ms.collectives import start_shift

HEADS_FIRST = (0, 2, 1, 3)  # [B, S, H, D] <-> [B, H, S, D]


def ring_masks(visibility: Visibility, group: Group) -> list[ops.Parts | None]:
    """What is hidden from this rank's queries of the keys it meets at each of the R steps; made once a forward pass."""
    masks: list[ops.Parts | None] = []
    for step in range(group.size):
        parts = ranges_between(visibility, group.rank, (group.rank - step) % group.size)
        masks.append(None if parts is None else ops.key_parts(parts))
    return masks


def ring_attention(q: Tensor, k: Tensor, v: Tensor, masks: list[ops.Parts | None], group: Group) -> Tensor:
    """q [B, S/R, H, D], k and v [B, S/R, K, D] of this rank's positions -> [B, S/R, H, D]."""
    return RingAttention.apply(q, k, v, masks, group)


class RingAttention(Function):
    """``ring_attention`` with its gradient: keys and values go around the ring once more, with theirs behind them."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, masks: list[ops.Parts | None], group: Group) -> Tensor:
        queries = mops.transpose(q, HEADS_FIRST)  # [B, H, S/R, D]
        message = _message(k, v)
        out = log_sum_exp = None
        for step in range(group.size):
            coming = start_shift(message, group) if step < group.size - 1 else None
            rows, keys = visible_part(group.rank, (group.rank - step) % group.size, q.shape[1])
            block_k, block_v = message[0, :, :, keys], message[1, :, :, keys]
            part = ops.attention_block(queries[:, :, rows], block_k, block_v, masks[step])
            if out is None or log_sum_exp is None:
                out, log_sum_exp = part
            else:
                merged = ops.merge_blocks(out[:, :, rows], log_sum_exp[:, :, rows], *part)
                out, log_sum_exp = _replace(out, rows, merged[0]), _replace(log_sum_exp, rows, merged[1])
            if coming is not None:
                message = coming.wait()
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        ctx.masks, ctx.group = masks, group
        return mops.cast(mops.transpose(out, HEADS_FIRST), q.dtype)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum_exp = ctx.saved_tensors
        group, masks = ctx.group, ctx.masks
        queries, grad_out = (mops.transpose(x, HEADS_FIRST) for x in (q, grad))
        delta = mops.ReduceSum(keep_dims=True)(out * mops.cast(grad_out, out.dtype), -1)  # float32 or wider, as out is
        message = _message(k, v)
        dq = mops.zeros_like(out)
        travelling: Handle[Tensor] | None = None
        for step in range(group.size):
            coming = start_shift(message, group) if step < group.size - 1 else None
            rows, keys = visible_part(group.rank, (group.rank - step) % group.size, q.shape[1])
            block_k, block_v = message[0, :, :, keys], message[1, :, :, keys]
            dq_part, dk_part, dv_part = ops.attention_block_backward(
                queries[:, :, rows],
                block_k,
                block_v,
                masks[step],
                log_sum_exp[:, :, rows],
                grad_out[:, :, rows],
                delta[:, :, rows],
                out[:, :, rows],
            )
            dq = _replace(dq, rows, dq[:, :, rows] + dq_part)
            part = mops.stack((dk_part, dv_part))
            if travelling is None:
                sums = part
            else:
                # The sums for these keys were last touched by the rank before; they come one hop behind the keys.
                sums = travelling.wait()
                sums = _replace(sums, keys, sums[:, :, :, keys] + part, axis=3)
            travelling = start_shift(sums, group)
            if coming is not None:
                message = coming.wait()
        assert travelling is not None  # a ring has at least one rank
        sums = travelling.wait()
        gradients = ((dq, q), (sums[0], k), (sums[1], v))
        return *(mops.cast(mops.transpose(d, HEADS_FIRST), x.dtype) for d, x in gradients), None, None


def _message(k: Tensor, v: Tensor) -> Tensor:
    """Keys and values as one contiguous tensor [2, B, K, S/R, D]; the CPU cannot stack bfloat16, but concatenate it."""
    k, v = (mops.transpose(x, HEADS_FIRST) for x in (k, v))
    return mops.concat((k.reshape(1, *k.shape), v.reshape(1, *v.shape)))


def _replace(x: Tensor, rows: slice, part: Tensor, axis: int = 2) -> Tensor:
    """x with all, the first half or the second half of ``axis`` replaced: assignment to a slice would copy twice."""
    if part.shape[axis] == x.shape[axis]:
        return part
    first, second = mops.split(x, x.shape[axis] // 2, axis)
    return mops.concat((part, second) if rows.start == 0 else (first, part), axis)
