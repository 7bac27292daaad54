"""Linear layers with low-rank adapters (core.model.lora) that read one input: frozen products and adapters in one
operator.

A frozen matrix has no gradient, so its input is not kept for it. The adapters' A are multiplied as one matrix, whose
rows they are: one thin product of x in place of one a layer, forward and backward. Their results, and the layers'
shares of dx, are added where the frozen products lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

from telechat_twins.kernels.pytorch import ops as kernels
from telechat_twins.kernels.pytorch.weights import Matrix

Again = Callable[[], Tensor]


class Adapted(NamedTuple):
    """weight [out, in] and bias [out] or None, frozen; lora_a [r, in], lora_b [out, r]; scale = alpha / rank."""

    weight: Matrix
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float


def adapted_linears(
    x: Tensor,
    dropped: Tensor | None,
    layers: Sequence[Adapted],
    compute: torch.dtype,
    again: Again | None = None,
) -> tuple[Tensor, ...]:
    """Of each layer x [..., in] @ weight^T + bias + scale * dropped @ lora_a^T @ lora_b^T, in ``compute``.

    ``dropped``: x after dropout; None: x itself. ``again`` computes x anew, bit for bit; the backward pass then calls
    it where it would otherwise have kept x. Weights and biases get no gradient. ValueError: unfit shapes.
    """
    for layer in layers:
        if layer.lora_a.shape[1] != x.shape[-1] or layer.lora_b.shape[1] != layer.lora_a.shape[0]:
            raise ValueError(
                f"lora_a: shape {list(layer.lora_a.shape)} and lora_b {list(layer.lora_b.shape)}, need "
                f"[r, {x.shape[-1]}] and [out, r]"
            )
    x = x.to(compute)
    dropped = None if dropped is None else dropped.to(compute)
    frozen = [(layer.weight, layer.bias, layer.scale) for layer in layers]
    factors = [factor.to(compute) for layer in layers for factor in (layer.lora_a, layer.lora_b)]
    if not torch.is_grad_enabled():
        return _forward(x, dropped, frozen, factors, compute)[0]
    return AdaptedLinears.apply(x, dropped, frozen, (compute, again), *factors)


Frozen = list[tuple[Matrix, Tensor | None, float]]  # weight, bias, scale
Options = tuple[torch.dtype, Again | None]


class AdaptedLinears(Function):
    """Keeps what adapters read, unless it can be computed again, the matrices, and dropped @ A^T [N, layers * r]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, dropped: Tensor | None, frozen: Frozen, options: Options, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        compute, again = options
        outs, low = _forward(x, dropped, frozen, factors, compute)
        ctx.frozen, ctx.compute, ctx.shared = frozen, compute, dropped is None
        ctx.again = again if ctx.shared else None
        ctx.save_for_backward(None if ctx.again is not None else x if dropped is None else dropped, low, *factors)
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        read, low, *factors = ctx.saved_tensors
        if ctx.again is not None:
            read, ctx.again = ctx.again().to(ctx.compute), None
        wants_x, wants_dropped, *_ = ctx.needs_input_grad
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # each [N, out]
        # d(B A x): dB = scale dy^T (A x); d(A x) = scale dy B; dA = d(A x)^T x; dx = d(A x) A.
        dlow, parts, dbs = torch.empty_like(low), _columns(low, factors), []
        for dy, part, dpart, lora_b, (_, _, scale) in zip(
            rows, parts, _columns(dlow, factors), factors[1::2], ctx.frozen, strict=True
        ):
            dpart.copy_(torch.mm(dy, lora_b)).mul_(scale)
            dbs.append(torch.mm(part.t(), dy).mul_(scale).t())
        da = torch.mm(dlow.t(), read.reshape(-1, read.shape[-1]))
        das = da.split([lora_a.shape[0] for lora_a in factors[::2]])
        stacked = torch.cat(factors[::2])
        dx = ddropped = None
        if wants_x:
            dx = kernels.linear(rows[0], ctx.frozen[0][0].t(), None, ctx.compute)
            for dy, (weight, _, _) in zip(rows[1:], ctx.frozen[1:], strict=True):
                dx += kernels.linear(dy, weight.t(), None, ctx.compute)
            if ctx.shared:
                dx.addmm_(dlow, stacked)
            dx = dx.view(read.shape)
        if wants_dropped:
            ddropped = torch.mm(dlow, stacked).view(read.shape)
        return dx, ddropped, None, None, *(d for pair in zip(das, dbs, strict=True) for d in pair)


def _forward(
    x: Tensor, dropped: Tensor | None, frozen: Frozen, factors: Sequence[Tensor], compute: torch.dtype
) -> tuple[tuple[Tensor, ...], Tensor]:
    """(results, dropped @ A^T [N, layers * r])."""
    with torch.no_grad():
        read = x if dropped is None else dropped
        low = F.linear(read.reshape(-1, read.shape[-1]), torch.cat(tuple(factors[::2])))
        outs = []
        for (weight, bias, scale), part, lora_b in zip(frozen, _columns(low, factors), factors[1::2], strict=True):
            out = kernels.linear(x, weight, bias, compute)
            out.view(-1, out.shape[-1]).addmm_(part, lora_b.t(), alpha=scale)
            outs.append(out)
    return tuple(outs), low


def _columns(low: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns of each layer, [N, r]."""
    return low.split([lora_a.shape[0] for lora_a in factors[::2]], dim=1)
