"""Loss of a frozen head, by blocks of rows: the logits of a whole micro-batch never exist.

A frozen head has no gradient of its own, so all that the backward pass needs is the gradient of its input, [N, E]. It
is computed with the loss while a block's logits are at hand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

from telechat_twins.core.model.batch import IGNORE, head_blocks
from telechat_twins.kernels.pytorch import native as torch_native
from telechat_twins.kernels.pytorch import ops as kernels


class FrozenHead(NamedTuple):
    """logits = multiplier * (x @ weight^T) + padding; weight [V, E] float32, padding [V] or None, both constants.
    ``ffn_hidden_size`` F: columns of ffn.down's input in the block before."""

    weight: Tensor
    multiplier: float
    padding: Tensor | None
    ffn_hidden_size: int


def serves(head: FrozenHead) -> bool:
    """Whether ``frozen_head_loss`` takes this head: float32, with operators of kernels.pytorch that it can call."""
    weight = head.weight
    return (
        weight.dtype == torch.float32
        and not weight.requires_grad
        and kernels.serving("cross_entropy", weight) is not torch_native
    )


def frozen_head_loss(x: Tensor, head: FrozenHead, targets: Tensor) -> Tensor:
    """kernels.pytorch.ops.cross_entropy of the head's logits of x [..., E] float32, targets [...]: a sum, float32."""
    return FrozenHeadLoss.apply(x.reshape(-1, x.shape[-1]), head, targets.reshape(-1))


class FrozenHeadLoss(Function):
    """x [N, E], targets [N]. Keeps the gradient of x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, head: FrozenHead, targets: Tensor) -> Tensor:
        weight, multiplier, padding, ffn_hidden_size = head
        V, package = weight.shape[0], kernels.serving("cross_entropy", weight)
        losses, dx = x.new_empty(len(x)), torch.empty_like(x)
        for part in head_blocks(len(x), V, ffn_hidden_size):
            logits = kernels.linear(x[part], weight, None, x.dtype)
            logits = logits if multiplier == 1.0 else logits.mul_(multiplier)
            logits = logits if padding is None else logits.add_(padding)
            log_sum_exp, picked = package.cross_entropy_forward(logits, targets[part], 0, V)
            torch.sub(log_sum_exp, picked, out=losses[part])
            dlogits = package.cross_entropy_backward(logits, targets[part], 0, V, log_sum_exp, x.new_ones(()))
            dx[part] = kernels.linear(dlogits, weight.t(), None, x.dtype)
            del logits, dlogits  # before the next block's are made
        ctx.save_for_backward(dx if multiplier == 1.0 else dx.mul_(multiplier))
        return losses.masked_fill_(targets == IGNORE, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (dx,) = ctx.saved_tensors
        return dx.mul(grad), None, None
