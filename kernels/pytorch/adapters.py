"""Linear layers with a low-rank adapter (core.model.lora): the frozen product and the adapter's in one operator.

The frozen matrix has no gradient, so its input is not kept; the adapter's part is added into the product's result where
that lies, forward and backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

from telechat_twins.kernels.pytorch import ops as kernels
from telechat_twins.kernels.pytorch.weights import Matrix


def adapted_linear(
    x: Tensor,
    dropped: Tensor | None,
    weight: Matrix,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    compute: torch.dtype,
) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias + scale * dropped @ lora_a [r, in]^T @ lora_b [out, r]^T, in ``compute``.

    ``dropped``: x after dropout; None: x itself. ``weight`` and ``bias`` get no gradient.
    """
    x, lora_a, lora_b = x.to(compute), lora_a.to(compute), lora_b.to(compute)
    dropped = None if dropped is None else dropped.to(compute)
    if lora_a.shape[1] != x.shape[-1] or lora_b.shape[1] != lora_a.shape[0]:
        raise ValueError(
            f"lora_a: shape {list(lora_a.shape)} and lora_b {list(lora_b.shape)}, need [r, {x.shape[-1]}] and [out, r]"
        )
    if not torch.is_grad_enabled():
        return _forward(x, dropped, weight, bias, lora_a, lora_b, scale, compute)[0]
    return AdaptedLinear.apply(x, dropped, weight, bias, lora_a, lora_b, scale, compute)


class AdaptedLinear(Function):
    """Keeps what the adapter reads, the matrices, and dropped @ lora_a^T [N, r]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        dropped: Tensor | None,
        weight: Matrix,
        bias: Tensor | None,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        compute: torch.dtype,
    ) -> Tensor:
        out, low = _forward(x, dropped, weight, bias, lora_a, lora_b, scale, compute)
        ctx.scale, ctx.compute, ctx.shared = scale, compute, dropped is None
        ctx.save_for_backward(x if dropped is None else dropped, weight, lora_a, lora_b, low)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        read, weight, lora_a, lora_b, low = ctx.saved_tensors
        wants_x, wants_dropped, *_ = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # [N, out]
        dlow = torch.mm(rows, lora_b).mul_(ctx.scale)  # [N, r]
        da = torch.mm(dlow.t(), read.reshape(-1, read.shape[-1]))
        db = torch.mm(rows.t(), low).mul_(ctx.scale)
        dx = ddropped = None
        if wants_x:
            dx = kernels.linear(rows, weight.t(), None, ctx.compute)
            if ctx.shared:
                dx.addmm_(dlow, lora_a)
            dx = dx.view(read.shape)
        if wants_dropped:
            ddropped = torch.mm(dlow, lora_a).view(read.shape)
        return dx, ddropped, None, None, da, db, None, None


def _forward(
    x: Tensor,
    dropped: Tensor | None,
    weight: Matrix,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(result, dropped @ lora_a^T [N, r])."""
    with torch.no_grad():
        out = kernels.linear(x, weight, bias, compute)
        read = x if dropped is None else dropped
        low = F.linear(read.reshape(-1, read.shape[-1]), lora_a)
        out.view(-1, out.shape[-1]).addmm_(low, lora_b.t(), alpha=scale)
    return out, low
