"""Linear layers with low-rank adapters (core.model.lora) that read one input: frozen products and adapters in one
operator.

A frozen matrix has no gradient, so its input is not kept for it. In float32 on the CPU a layer with its adapter is one
operator forward and one backward. Otherwise the adapters' A are multiplied as one matrix, whose rows they are: one thin
product of x in place of one a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import mindspore as ms
from mindspore import Tensor, ops

from telechat_twins.kernels.cpu.products import adapted, adapted_backward
from telechat_twins.kernels.int8 import Int8
from telechat_twins.kernels.mindspore import composite as composite
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.kernels.mindspore.autograd import Gradients, converted, turned_product
from telechat_twins.kernels.mindspore.private import Context, Function

Again = Callable[[], Tensor]


class Adapted(NamedTuple):
    """weight [out, in] and bias [out] or None, frozen; lora_a [r, in], lora_b [out, r]; scale = alpha / rank."""

    weight: Tensor | Int8
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scale: float


def adapted_linears(
    x: Tensor,
    dropped: Tensor | None,
    layers: Sequence[Adapted],
    compute: ms.Type,
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
    cpp = kernels.serving("linear", compute)
    if cpp is None or compute == ms.float16 or any(isinstance(layer.weight, Int8) for layer in layers):
        return tuple(_composite(x, x if dropped is None else dropped, layer, compute) for layer in layers)
    rows = converted(cpp, x, compute).reshape(-1, x.shape[-1])
    read = rows if dropped is None else converted(cpp, dropped, compute).reshape(-1, x.shape[-1])
    frozen = [(layer.weight, layer.bias, layer.scale) for layer in layers]
    factors = [factor for layer in layers for factor in (layer.lora_a, layer.lora_b)]
    function = LowRankLinears if compute == ms.float32 else AdaptedLinears
    outs = function.apply(rows, read, frozen, (compute, cpp, dropped is None, again), *factors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return tuple(out.reshape(*x.shape[:-1], out.shape[-1]) for out in outs)


def _composite(x: Tensor, read: Tensor, layer: Adapted, compute: ms.Type) -> Tensor:
    low = kernels.linear(read, layer.lora_a, None, compute)
    wide = composite.operand(low, compute)
    low = ops.cast(wide * Tensor(layer.scale, wide.dtype), compute)
    return kernels.linear(x, layer.weight, layer.bias, compute) + kernels.linear(low, layer.lora_b, None, compute)


Frozen = list[tuple[Tensor, Tensor | None, float]]  # weight, bias, scale
Options = tuple[ms.Type, ModuleType, bool, Again | None]


class LowRankLinears(Function):
    """The layers in float32: arguments as of ``AdaptedLinears``, which keeps the same.

    The gradients of the layers' x are sums in the order of the layers, each with its adapter's.
    """

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, read: Tensor, frozen: Frozen, options: Options, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        _, cpp, shared, again = options
        ctx.wanted, ctx.dtypes = [*ctx.needs_input_grad[:2]], [factor.dtype for factor in factors]
        factors = tuple(converted(cpp, factor, ms.float32) for factor in factors)
        outs: list[Tensor] = []
        lows: list[Tensor] = []
        for (weight, bias, scale), lora_a, lora_b in zip(frozen, factors[::2], factors[1::2], strict=True):
            weight = converted(cpp, weight, ms.float32)
            bias = None if bias is None else converted(cpp, bias, ms.float32)
            out, low = adapted(x, read, weight, bias, lora_a, lora_b, scale)
            outs.append(out)
            lows.append(low)
        ctx.frozen, ctx.options = frozen, options
        kept = () if shared and again is not None else (read,)
        ctx.save_for_backward(*lows, *factors, *kept)
        return tuple(outs) if len(outs) > 1 else outs[0]

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Gradients:
        frozen, (_, cpp, shared, again) = ctx.frozen, ctx.options
        saved, (wants_x, wants_read), count = ctx.saved_tensors, ctx.wanted, len(ctx.frozen)
        lows, factors, kept = saved[:count], saved[count : 3 * count], saved[3 * count :]
        read = kept[0] if kept else converted(cpp, again(), ms.float32).reshape(-1, factors[0].shape[1])
        dx = ms.mint.empty(tuple(read.shape), dtype=ms.float32) if wants_x else None
        dread = dx if shared else ms.mint.empty(tuple(read.shape), dtype=ms.float32) if wants_read else None
        pairs: list[Tensor] = []
        for dy, low, lora_a, lora_b, (weight, _, scale) in zip(
            grads, lows, factors[::2], factors[1::2], frozen, strict=True
        ):
            weight = converted(cpp, weight, ms.float32)
            pairs += adapted_backward(dy, read, low, weight, lora_a, lora_b, scale, dx, dread, add=bool(pairs))
        found = (converted(cpp, d, dtype) for d, dtype in zip(pairs, ctx.dtypes, strict=True))
        return dx, None if shared else dread, None, None, *found


class AdaptedLinears(Function):
    """The layers in bfloat16; x, read [N, in].

    ``options``: the dtype of computation, the package that serves, whether ``read`` is x, whose whole gradient is then
    that of x, and how to compute x again.

    Keeps what the adapters read, unless it can be computed again, the factors, and of each layer
    scale * read @ lora_a^T [N, r].
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        read: Tensor,
        frozen: Frozen,
        options: Options,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        compute, cpp, shared, again = options
        ctx.wanted, ctx.dtypes = [*ctx.needs_input_grad[:2]], [factor.dtype for factor in factors]
        factors = tuple(ops.cast(factor, compute) for factor in factors)
        low = _product(cpp, read, _stacked(factors))
        lows, outs = [], []
        for (weight, bias, scale), part, lora_b in zip(frozen, _columns(low, factors), factors[1::2], strict=True):
            part = part * Tensor(scale, part.dtype)
            bias = None if bias is None else ops.cast(bias, compute)
            out = _product(cpp, x, ops.cast(weight, compute), bias)
            outs.append(_plus_product(cpp, out, part, lora_b, False))
            lows.append(part)
        ctx.frozen, ctx.options = frozen, options
        kept = () if shared and again is not None else (read,)
        ctx.save_for_backward(*lows, *factors, *kept)
        return tuple(outs) if len(outs) > 1 else outs[0]

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Gradients:
        frozen, (compute, cpp, shared, again) = ctx.frozen, ctx.options
        saved, (wants_x, wants_read) = ctx.saved_tensors, ctx.wanted
        count = len(frozen)
        lows, factors, kept = saved[:count], saved[count : 3 * count], saved[3 * count :]
        if kept:
            read = kept[0]
        else:
            assert again is not None
            read = ops.cast(again(), compute)
            read = read.reshape(-1, read.shape[-1])
        # d(B A x): dB = dy^T (scale A x); d(A x) = scale dy B; dA = d(A x)^T x; dx = d(A x) A.
        dbs = [turned_product(cpp, low, dy, turn_a=True).T for low, dy in zip(lows, grads, strict=True)]
        dlows = [
            turned_product(cpp, dy, lora_b) * Tensor(scale, dy.dtype)
            for dy, lora_b, (_, _, scale) in zip(grads, factors[1::2], frozen, strict=True)
        ]
        dlow = dlows[0] if len(dlows) == 1 else ops.concat(dlows, 1)  # [N, layers * r]
        das = ops.split(turned_product(cpp, dlow, read, turn_a=True), [a.shape[0] for a in factors[::2]])
        dx = dread = None
        if wants_x:
            for dy, (weight, _, _) in zip(grads, frozen, strict=True):
                weight = ops.cast(weight, compute)
                dx = turned_product(cpp, dy, weight) if dx is None else _plus_product(cpp, dx, dy, weight, True)
            if shared:
                dx = _plus_product(cpp, dx, dlow, _stacked(factors), True)
        if wants_read and not shared:
            dread = turned_product(cpp, dlow, _stacked(factors))
        pairs = (d for pair in zip(das, dbs, strict=True) for d in pair)
        return dx, dread, None, None, *(ops.cast(d, dtype) for d, dtype in zip(pairs, ctx.dtypes, strict=True))


def _stacked(factors: Sequence[Tensor]) -> Tensor:
    """The A of all layers as the rows of one matrix [layers * r, in]."""
    return factors[0] if len(factors) == 2 else ops.concat(tuple(factors[::2]), 0)


def _columns(low: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns of each layer, [N, r]."""
    return (low,) if len(factors) == 2 else ops.split(low, [a.shape[0] for a in factors[::2]], 1)


def _product(cpp: ModuleType, a: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [m, k] times w [n, k] transposed, plus bias [n], in the dtype of a, bfloat16."""
    out = cpp.matmul_bf16(a, w, a.dtype)
    return out if bias is None else cpp.add_bias(out, bias)


def _plus_product(cpp: ModuleType, c: Tensor, a: Tensor, w: Tensor, turn_w: bool) -> Tensor:
    """c [m, n] plus a [m, k] times w [n, k] transposed, or with ``turn_w`` w [k, n]; c is used up."""
    return cpp.add(c, cpp.matmul_bf16(a, w, c.dtype, turn_w=turn_w))
