"""Loss of the head by blocks of rows: the logits of a whole micro-batch never exist.

All that the backward pass needs is the gradients of the head's input, [N, E], and of its matrix, [V, E], where that is
trained. They are computed with the loss while a block's logits are at hand, for a factor of 1: the loss is a sum, so
that the factor that arrives in the backward pass multiplies them.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import mindspore as ms
from mindspore import Tensor, ops

from telechat_twins.core.model.head_rows import head_blocks, trained_by_rows
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.kernels.mindspore.autograd import Gradients, converted, turned_product
from telechat_twins.kernels.mindspore.composite import total_loss
from telechat_twins.kernels.mindspore.private import Context, Function

_WIDTHS = {ms.float32: 4, ms.bfloat16: 2}


class Head(NamedTuple):
    """logits = multiplier * (x @ weight^T) + padding; weight [V, E], padding [V] float32 or None, a constant.
    ``ffn_hidden_size`` F: columns of ffn.down's input in the block before."""

    weight: Tensor
    multiplier: float
    padding: Tensor | None
    ffn_hidden_size: int


def serves(head: Head, rows: int, compute: ms.Type) -> bool:
    """Whether ``head_loss`` takes this head and x [rows, E] in ``compute``, with operators of kernels.cpu: a frozen
    float32 head; a trained one in float32, or bfloat16 without padding, where that spares memory
    (core.model.head_rows.trained_by_rows)."""
    weight = head.weight
    if any(not hasattr(kernels.serving(name, compute), "head_gradient") for name in ("linear", "cross_entropy")):
        return False
    if not weight.requires_grad:
        return weight.dtype == ms.float32
    takes = compute == ms.float32 or (compute == ms.bfloat16 and head.padding is None)
    V, E = weight.shape
    return takes and trained_by_rows(rows, V, E, _WIDTHS[compute])


def head_loss(x: Tensor, head: Head, targets: Tensor) -> Tensor:
    """kernels.mindspore.ops.cross_entropy of the head's logits of x [..., E], targets [...]: a sum, float32."""
    return HeadLoss.apply(x.reshape(-1, x.shape[-1]), head.weight, head, targets.reshape(-1))


class HeadLoss(Function):
    """x [N, E], weight [V, E], targets [N]. Keeps the gradients of x and weight, which the backward multiplies."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, head: Head, targets: Tensor) -> Tensor:
        _, multiplier, padding, ffn_hidden_size = head
        wants_x, trained = ctx.needs_input_grad[:2]
        cpp, module = kernels.serving("linear", x.dtype), kernels.serving("cross_entropy", x.dtype)
        assert cpp is not None and module is not None  # ``serves``
        V, one, times = weight.shape[0], Tensor([1.0], ms.float32), Tensor(multiplier, ms.float32)
        ctx.cpp, ctx.dtypes = cpp, (x.dtype, weight.dtype)
        weight = converted(cpp, weight, x.dtype)
        losses, dxs, dweight = [], [], None
        for part in head_blocks(x.shape[0], V, ffn_hidden_size, trained):
            rows = x[part]
            logits = cpp.matmul(rows, weight) if x.dtype == ms.float32 else cpp.matmul_bf16(rows, weight, x.dtype)
            logits = logits if multiplier == 1.0 else _multiplied(cpp, logits, times)
            logits = logits if padding is None else logits + padding
            log_sum_exp, picked = module.cross_entropy_forward(logits, targets[part], 0, V)
            losses.append(log_sum_exp - picked)
            dlogits = module.cross_entropy_backward(logits, targets[part], 0, V, log_sum_exp, one)
            if wants_x:
                dxs.append(turned_product(cpp, dlogits, weight))
            if trained:
                dweight = cpp.head_gradient(dlogits, rows, dweight)
            del logits, dlogits  # before the next block's are made
        ctx.gradients = _joined(dxs) if dxs else None, dweight
        ctx.times = None if multiplier == 1.0 else times
        return total_loss(_joined(losses), targets)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        found, ctx.gradients = ctx.gradients, (None, None)
        factor = grad if ctx.times is None else grad * ctx.times
        dx, dweight = (
            None if x is None else converted(ctx.cpp, _multiplied(ctx.cpp, x, factor), dtype)
            for x, dtype in zip(found, ctx.dtypes, strict=True)
        )
        return dx, dweight, None, None


def _multiplied(cpp: ModuleType, x: Tensor, factor: Tensor) -> Tensor:
    """x times a float32 number, rounded once to the dtype of x: MindSpore's CPU has no product of the two dtypes."""
    return converted(cpp, converted(cpp, x, ms.float32) * factor, x.dtype)


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else ops.concat(blocks, 0)
