"""Attention over a sequence that is spread over a ring of ranks, in zigzag order, forward and backward.

Each rank keeps its queries; keys and values travel round the ring in one message while the block that came before is
computed. Partial results are merged in float32 by their log-sum-exp. The backward sends keys and values round once more
and behind them, one hop later, the float32 sums of their gradients, which arrive home after R hops (Liu et al.,
arXiv 2310.01889; zigzag order as in the ring-flash-attention project). The probabilities of the backward come from the
*final* log-sum-exp, so every block's part is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from telechat_twins.core.parallel.mesh import Group
from telechat_twins.core.parallel.sequence import Visibility, ranges_between, visible_part
from telechat_twins.core.parallel.transfer import Handle
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.collectives import start_shift


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


class RingAttention(torch.autograd.Function):
    """``ring_attention`` with its gradient: keys and values go around the ring once more, with theirs behind them."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, masks: list[ops.Parts | None], group: Group
    ) -> Tensor:
        queries = q.transpose(1, 2)  # [B, H, S/R, D]
        message = torch.stack((k.transpose(1, 2), v.transpose(1, 2)))  # [2, B, K, S/R, D], contiguous
        out = log_sum_exp = None
        for step in range(group.size):
            coming = start_shift(message, group) if step < group.size - 1 else None
            rows, keys = visible_part(group.rank, (group.rank - step) % group.size, q.shape[1])
            block_k, block_v = message[:, :, :, keys]
            part = ops.attention_block(queries[:, :, rows], block_k, block_v, masks[step])
            if out is None or log_sum_exp is None:
                out, log_sum_exp = part
            else:
                merged = ops.merge_blocks(out[:, :, rows], log_sum_exp[:, :, rows], *part)
                out[:, :, rows], log_sum_exp[:, :, rows] = merged
            if coming is not None:
                message = coming.wait()
        assert out is not None  # a ring has at least one rank
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        ctx.masks, ctx.group = masks, group
        return out.transpose(1, 2).to(q.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum_exp = ctx.saved_tensors
        group, masks = ctx.group, ctx.masks
        queries, grad_out = q.transpose(1, 2), grad.transpose(1, 2)
        delta = (out * grad_out).sum(-1, keepdim=True)  # float32 or wider, as out is
        message = torch.stack((k.transpose(1, 2), v.transpose(1, 2)))
        dq = torch.zeros_like(queries, dtype=out.dtype)
        travelling: Handle[Tensor] | None = None
        for step in range(group.size):
            coming = start_shift(message, group) if step < group.size - 1 else None
            rows, keys = visible_part(group.rank, (group.rank - step) % group.size, q.shape[1])
            block_k, block_v = message[:, :, :, keys]
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
            dq[:, :, rows] += dq_part
            # The sums for these keys were last touched by the rank before; they come one hop behind the keys.
            sums = torch.zeros_like(message, dtype=out.dtype) if travelling is None else travelling.wait()
            sums[0, :, :, keys] += dk_part
            sums[1, :, :, keys] += dv_part
            travelling = start_shift(sums, group)
            if coming is not None:
                message = coming.wait()
        assert travelling is not None
        dk, dv = travelling.wait()
        return *(d.transpose(1, 2).to(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v))), None, None
