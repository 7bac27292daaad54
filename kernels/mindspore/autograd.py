"""Autograd functions over the fused operators, for MindSpore; each saves for its backward only what the formula needs.

``module`` implements the operators (kernels.cpu.ops or kernels.ascend.ops); both have the same functions. Gradients
of weights are summed in float32 and returned in the dtype of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import mindspore as ms
from mindspore import Tensor, ops

from telechat_twins.kernels.cpu import ops as cpu
from telechat_twins.kernels.mindspore.composite import total_loss
from telechat_twins.kernels.mindspore.keys import Keys
from telechat_twins.kernels.mindspore.private import Context, Function, is_leaf

Gradients = tuple[Tensor | None, ...]


def converted(module: ModuleType, x: Tensor, dtype: ms.Type) -> Tensor:
    """x in ``dtype``, by the operator of ``module`` where it has one: MindSpore's own, on the CPU, takes the time of a
    matrix product for 16-bit floats."""
    if x.dtype == dtype:
        return x
    return module.cast(x, dtype) if hasattr(module, "cast") else ops.cast(x, dtype)


class Shared(Function):
    """x for ``count`` readers, whose gradients are added by the operators of ``module``, the last reader's first.

    The engine would add them by MindSpore's own sums, in the same order; on the CPU, bfloat16 sums of those take 30
    times as long.
    """

    @staticmethod
    def forward(ctx: Context, x: Tensor, count: int, module: ModuleType) -> tuple[Tensor, ...]:
        ctx.module = module
        return (x,) * count

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> Gradients:
        total = grads[-1]
        for grad in grads[-2::-1]:
            total = ctx.module.add(total, grad)
        return total, None, None


class Add(Function):
    """stream + branch of one shape, in the dtype of the stream."""

    @staticmethod
    def forward(ctx: Context, stream: Tensor, branch: Tensor, module: ModuleType) -> Tensor:
        ctx.module, ctx.dtype = module, branch.dtype
        return module.add(stream, branch)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        return grad, converted(ctx.module, grad, ctx.dtype), None


class Linear(Function):
    """x [N, in] @ weight [out, in]^T + bias. Gradients that are not wanted are not computed.

    y = x W^T, dx = dy W, dW = dy^T x: the operator reads transposed operands in place (``turn_a``, ``turn_w``). Saves
    the weight in ``compute`` and, where dW is wanted, x, or how to compute it ``again``.
    """

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        compute: ms.Type,
        cpp: ModuleType,
        again: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        x, wide = converted(cpp, x, compute), converted(cpp, weight, compute)
        # Wanted are the gradients of x, of the weight and of the bias.
        ctx.wanted = [*ctx.needs_input_grad[:3]]
        ctx.again = again if ctx.wanted[1] else None
        ctx.save_for_backward(x if ctx.wanted[1] and again is None else wide, wide)
        ctx.dtypes, ctx.cpp = (weight.dtype, None if bias is None else bias.dtype), cpp
        bias = None if bias is None else converted(cpp, bias, compute)
        if compute == ms.float32:
            return cpp.matmul(x, wide, bias)
        out = cpp.matmul_bf16(x, wide, compute)
        return out if bias is None else cpp.add_bias(out, bias)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        (x, weight), cpp = ctx.saved_tensors, ctx.cpp
        wants_x, wants_weight, wants_bias = ctx.wanted
        dx = turned_product(cpp, grad, weight) if wants_x else None
        dweight = dbias = None
        if ctx.again is not None:
            x, ctx.again = converted(cpp, ctx.again(), grad.dtype).reshape(-1, weight.shape[1]), None
        if wants_weight:
            dweight = converted(cpp, turned_product(cpp, grad, x, turn_a=True), ctx.dtypes[0])
        if wants_bias:
            dbias = converted(cpp, cpp.column_sum(grad), ctx.dtypes[1])
        return dx, dweight, dbias, None, None, None


def turned_product(cpp: ModuleType, a: Tensor, w: Tensor, turn_a: bool = False) -> Tensor:
    """a [m, k], or with ``turn_a`` [k, m], times w [k, n], in the dtype of a."""
    if a.dtype == ms.float32:
        return cpp.matmul(a, w, turn_a=turn_a, turn_w=True)
    return cpp.matmul_bf16(a, w, a.dtype, turn_a=turn_a, turn_w=True)


class Embedding(Function):
    """Rows of a table. Saves the ids."""

    @staticmethod
    def forward(ctx: Context, table: Tensor, ids: Tensor, module: ModuleType) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.table, ctx.module = (table.dtype, table.shape[0]), module
        return module.embedding(table, ids)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        dtype, rows = ctx.table
        return ctx.module.embedding_backward(grad, ctx.saved_tensors[0], rows, dtype), None, None


class RmsNorm(Function):
    """Saves x, the weight and rstd [N]."""

    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, eps: float, compute: ms.Type, mask: Tensor | None, module: ModuleType
    ) -> Tensor:
        out, rstd = module.rms_norm(x, weight, eps, compute, mask)
        ctx.save_for_backward(x, weight, rstd)
        ctx.mask, ctx.module = mask, module
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        x, weight, rstd = ctx.saved_tensors
        dx, dweight = ctx.module.rms_norm_backward(grad, x, weight, rstd, ctx.mask)
        return dx, converted(ctx.module, dweight, weight.dtype), None, None, None, None


class AddRmsNorm(Function):
    """x + residual and its RMS norm. Saves the sum, the weight and rstd [N]; both inputs have one gradient."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        compute: ms.Type,
        mask: Tensor | None,
        module: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        out, stream, rstd = module.add_rms_norm(x, residual, weight, eps, compute, mask)
        ctx.save_for_backward(stream, weight, rstd)
        ctx.mask, ctx.module, ctx.dtype = mask, module, x.dtype
        return out, stream

    @staticmethod
    def backward(ctx: Context, grad: Tensor, grad_stream: Tensor) -> Gradients:
        stream, weight, rstd = ctx.saved_tensors
        dstream, dweight = ctx.module.add_rms_norm_backward(grad, grad_stream, stream, weight, rstd, ctx.mask)
        dx, dweight = converted(ctx.module, dstream, ctx.dtype), converted(ctx.module, dweight, weight.dtype)
        return dx, dstream, dweight, None, None, None, None


class LayerNorm(Function):
    """Saves x, the weight, mean and rstd [N]."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        compute: ms.Type,
        mask: Tensor | None,
        module: ModuleType,
    ) -> Tensor:
        out, mean, rstd = module.layer_norm(x, weight, bias, eps, compute, mask)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mask, ctx.module, ctx.dtype = mask, module, bias.dtype
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = ctx.module.layer_norm_backward(grad, x, weight, mean, rstd, ctx.mask)
        dweight, dbias = converted(ctx.module, dweight, weight.dtype), converted(ctx.module, dbias, ctx.dtype)
        return dx, dweight, dbias, None, None, None, None


class Rope(Function):
    """Rotary embedding of q and k. Saves the tables; the gradient is the rotation by the negative angle."""

    @staticmethod
    def forward(
        ctx: Context,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale_q: Tensor | None,
        scale_k: Tensor | None,
        module: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        ctx.tables, ctx.module = (cos, sin, scale_q, scale_k), module
        return module.rope_qk(q, k, cos, sin, scale_q, scale_k)

    @staticmethod
    def backward(ctx: Context, grad_q: Tensor, grad_k: Tensor) -> Gradients:
        return *ctx.module.rope_qk_backward(grad_q, grad_k, *ctx.tables), None, None, None, None, None


class Swiglu(Function):
    """Saves gate and up; the backward recomputes silu, and on the CPU overwrites both with their gradients unless they
    are leaves: nothing else of this decoder's backward pass needs them by then, and they are its largest tensors."""

    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor, module: ModuleType) -> Tensor:
        in_place = module is cpu and not is_leaf(gate) and not is_leaf(up)
        ctx.module, ctx.options = module, {"in_place": True} if in_place else {}
        ctx.save_for_backward(gate, up)
        return module.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        return *ctx.module.swiglu_backward(grad, *ctx.saved_tensors, **ctx.options), None


class Gelu(Function):
    """Saves x."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, module: ModuleType) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        return module.gelu(x)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        return ctx.module.gelu_backward(grad, *ctx.saved_tensors), None


class Attention(Function):
    """Attention of q [B, S, H, D] over ``keys``. Saves q, k, v, out and log_sum_exp [B, H, S]; no scores."""

    @staticmethod
    def forward(ctx: Context, q: Tensor, k: Tensor, v: Tensor, keys: Keys) -> Tensor:
        out, log_sum_exp = keys.module.attention(q, k, v, keys.device)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        ctx.keys = keys
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        q, k, v, out, log_sum_exp = ctx.saved_tensors
        return *ctx.keys.module.attention_backward(grad, q, k, v, ctx.keys.device, out, log_sum_exp), None


class CrossEntropy(Function):
    """Saves the logits [N, V], which the backward overwrites with their gradient: no second tensor of that size."""

    @staticmethod
    def forward(ctx: Context, logits: Tensor, targets: Tensor, z_loss: float, module: ModuleType) -> Tensor:
        log_sum_exp, picked = module.cross_entropy_forward(logits, targets, 0, logits.shape[-1])
        ctx.save_for_backward(logits, targets, log_sum_exp)
        ctx.z_loss, ctx.module = z_loss, module
        losses = log_sum_exp - picked
        if z_loss:
            losses = losses + Tensor(z_loss, losses.dtype) * log_sum_exp * log_sum_exp
        return total_loss(losses, targets)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Gradients:
        logits, targets, log_sum_exp = ctx.saved_tensors
        factor, columns = ops.cast(grad, ms.float32).reshape(1), logits.shape[-1]
        dlogits = ctx.module.cross_entropy_backward(logits, targets, 0, columns, log_sum_exp, factor, ctx.z_loss)
        return dlogits, None, None, None
