"""Loss of the head by blocks of rows: the logits of a whole micro-batch never exist.

All that the backward pass needs is the gradients of the head's input, [N, E], and of its matrix, [V, E], where that is
trained. They are computed with the loss while a block's logits are at hand, for a factor of 1: the loss is a sum, so
that the factor that arrives in the backward pass multiplies them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.head_rows import head_blocks, trained_by_rows
from telechat_twins.kernels.pytorch import cpu as torch_cpu
from telechat_twins.kernels.pytorch import native as torch_native
from telechat_twins.kernels.pytorch import ops as kernels
from telechat_twins.kernels.pytorch import tiles as torch_tiles
from telechat_twins.kernels.pytorch.attention_in_cpp import run


class Head(NamedTuple):
    """logits = multiplier * (x @ weight^T) + padding; weight [V, E], padding [V] float32 or None, a constant.
    ``ffn_hidden_size`` F: columns of ffn.down's input in the block before."""

    weight: Tensor
    multiplier: float
    padding: Tensor | None
    ffn_hidden_size: int


def serves(head: Head, rows: int, compute: torch.dtype) -> bool:
    """Whether ``head_loss`` takes this head and x [rows, E] in ``compute``: a frozen float32 head with operators of
    kernels.pytorch that it can call; on a CPU a trained one too, in float32, or bfloat16 without padding, where that
    spares memory (core.model.head_rows.trained_by_rows)."""
    weight = head.weight
    if kernels.serving("cross_entropy", torch.empty(0, dtype=compute, device=weight.device)) is torch_native:
        return False
    if not weight.requires_grad:
        return weight.dtype == torch.float32
    takes = compute == torch.float32 or (compute == torch.bfloat16 and head.padding is None)
    there = weight.device.type == "cpu" and kernels.serving("linear", weight) in (torch_cpu, torch_tiles)
    V, E = weight.shape
    return takes and there and trained_by_rows(rows, V, E, compute.itemsize)


def head_loss(x: Tensor, head: Head, targets: Tensor) -> Tensor:
    """kernels.pytorch.ops.cross_entropy of the head's logits of x [..., E], targets [...]: a sum, float32."""
    return HeadLoss.apply(x.reshape(-1, x.shape[-1]), head.weight, head, targets.reshape(-1))


class HeadLoss(Function):
    """x [N, E], weight [V, E], targets [N]. Keeps the gradients of x and weight, which the backward multiplies."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, head: Head, targets: Tensor) -> Tensor:
        _, multiplier, padding, ffn_hidden_size = head
        wants_x, trained = ctx.needs_input_grad[:2]
        V, package, weight = weight.shape[0], kernels.serving("cross_entropy", x), weight.to(x.dtype)
        losses, dx = x.new_empty(len(x), dtype=torch.float32), torch.empty_like(x) if wants_x else None
        dweight: Tensor | None = None
        for part in head_blocks(len(x), V, ffn_hidden_size, trained):
            logits = kernels.linear(x[part], weight, None, x.dtype)
            logits = logits if multiplier == 1.0 else logits.mul_(multiplier)
            logits = logits if padding is None else logits.add_(padding)
            log_sum_exp, picked = package.cross_entropy_forward(logits, targets[part], 0, V)
            torch.sub(log_sum_exp, picked, out=losses[part])
            one = log_sum_exp.new_ones(())
            dlogits = package.cross_entropy_backward(logits, targets[part], 0, V, log_sum_exp, one)
            if dx is not None:
                dx[part] = kernels.linear(dlogits, weight.t(), None, x.dtype)
            if trained:
                dweight = _weight_gradient(dlogits, x[part], weight, dweight)
            del logits, dlogits  # before the next block's are made
        ctx.save_for_backward(dx, dweight)
        ctx.multiplier, ctx.dtype = multiplier, head.weight.dtype
        return losses.masked_fill_(targets == IGNORE, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.saved_tensors
        factor = grad if ctx.multiplier == 1.0 else grad * ctx.multiplier
        dx = None if dx is None else dx.mul_(factor)
        return dx, None if dweight is None else dweight.mul_(factor).to(ctx.dtype), None, None


def _weight_gradient(dlogits: Tensor, x: Tensor, weight: Tensor, total: Tensor | None) -> Tensor:
    """dlogits [n, V]^T x [n, E] in float32, added to ``total`` [V, E] in place unless that is None."""
    package = kernels.serving("linear", weight)
    if total is not None and dlogits.dtype == torch.float32:
        if package is not torch_tiles:
            return total.addmm_(dlogits.t(), x)
        run("head_gradient", (total, dlogits, x), (), ())
        return total
    more = package.linear_backward(dlogits, x, weight, (False, True, False))[1]
    return more.to(torch.float32) if total is None else total.add_(more)
