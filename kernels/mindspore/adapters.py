"""Linear layers with a low-rank adapter (core.model.lora): the frozen product and the adapter's in one operator.

The frozen matrix has no gradient, so its input is not kept; in float32 on the CPU the adapter's part is added into the
product's result where that lies, forward and backward.
"""

from __future__ import annotations

from types import ModuleType

import mindspore as ms
from mindspore import Tensor, ops

from telechat_twins.kernels.int8 import Int8
from telechat_twins.kernels.mindspore import composite as composite
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.kernels.mindspore.autograd import Gradients, turned_product
from telechat_twins.kernels.mindspore.private import Context, Function


def adapted_linear(
    x: Tensor,
    dropped: Tensor | None,
    weight: Tensor | Int8,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    compute: ms.Type,
) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias + scale * dropped @ lora_a [r, in]^T @ lora_b [out, r]^T, in ``compute``.

    ``dropped``: x after dropout; None: x itself. ``weight`` and ``bias`` get no gradient.
    """
    if lora_a.shape[1] != x.shape[-1] or lora_b.shape[1] != lora_a.shape[0]:
        raise ValueError(
            f"lora_a: shape {list(lora_a.shape)} and lora_b {list(lora_b.shape)}, need [r, {x.shape[-1]}] and [out, r]"
        )
    cpp = kernels.serving("linear", compute)
    if cpp is None or compute == ms.float16 or isinstance(weight, Int8):
        low = kernels.linear(x if dropped is None else dropped, lora_a, None, compute)
        wide = composite.operand(low, compute)
        low = ops.cast(wide * Tensor(scale, wide.dtype), compute)
        return kernels.linear(x, weight, bias, compute) + kernels.linear(low, lora_b, None, compute)
    rows = ops.cast(x, compute).reshape(-1, x.shape[-1])
    other = rows if dropped is None else ops.cast(dropped, compute).reshape(-1, x.shape[-1])
    out = AdaptedLinear.apply(rows, other, weight, bias, lora_a, lora_b, scale, compute, cpp, dropped is None)
    return out.reshape(*x.shape[:-1], weight.shape[0])


class AdaptedLinear(Function):
    """x, dropped [N, in]; ``shared``: they are one tensor, whose whole gradient is then that of x.

    Keeps what the adapter reads, the matrices, and scale * dropped @ lora_a^T [N, r].
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        dropped: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        compute: ms.Type,
        cpp: ModuleType,
        shared: bool,
    ) -> Tensor:
        ctx.wanted, ctx.numbers = [*ctx.needs_input_grad[:2]], (scale, shared, cpp, lora_a.dtype, lora_b.dtype)
        weight, lora_a, lora_b = (ops.cast(matrix, compute) for matrix in (weight, lora_a, lora_b))
        low = _product(cpp, dropped, lora_a)
        low = low * Tensor(scale, low.dtype)
        ctx.save_for_backward(dropped, weight, lora_a, lora_b, low)
        out = _product(cpp, x, weight, None if bias is None else ops.cast(bias, compute))
        return _plus_product(cpp, out, low, lora_b, False)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        dropped, weight, lora_a, lora_b, low = ctx.saved_tensors
        (wants_x, wants_dropped), (scale, shared, cpp, a_dtype, b_dtype) = ctx.wanted, ctx.numbers
        dlow = turned_product(cpp, grad, lora_b)  # [N, out] times [out, r]
        dlow = dlow * Tensor(scale, dlow.dtype)
        da = ops.cast(turned_product(cpp, dlow, dropped, turn_a=True), a_dtype)
        db = ops.cast(turned_product(cpp, grad, low, turn_a=True), b_dtype)
        dx = ddropped = None
        if wants_x:
            dx = turned_product(cpp, grad, weight)
            if shared:
                dx = _plus_product(cpp, dx, dlow, lora_a, True)
        if wants_dropped and not shared:
            ddropped = turned_product(cpp, dlow, lora_a)
        return dx, ddropped, None, None, da, db, None, None, None, None


def _product(cpp: ModuleType, a: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [m, k] times w [n, k] transposed, plus bias [n], in the dtype of a."""
    if a.dtype == ms.float32:
        return cpp.matmul(a, w, bias)
    out = cpp.matmul_bf16(a, w, a.dtype)
    return out if bias is None else cpp.add_bias(out, bias)


def _plus_product(cpp: ModuleType, c: Tensor, a: Tensor, w: Tensor, turn_w: bool) -> Tensor:
    """c [m, n] plus a [m, k] times w [n, k] transposed, or with ``turn_w`` w [k, n]; c is used up."""
    if c.dtype == ms.float32:
        from telechat_twins.kernels.cpu.products import matmul_add

        return matmul_add(c, a, w, turn_w)
    return cpp.add(c, cpp.matmul_bf16(a, w, c.dtype, turn_w=turn_w))
