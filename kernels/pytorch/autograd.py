"""Autograd functions over the fused operators, for PyTorch; each saves for its backward only what the formula needs.

``package`` implements the operators (kernels.pytorch.composite, .cpu, .npu or kernels.triton.ops); all have the same
functions.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import Function, FunctionCtx, once_differentiable

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.visibility import KeyRanges
from telechat_twins.kernels.pytorch import cpu, in_cpp, tiles
from telechat_twins.kernels.pytorch.room import take_place


class Linear(Function):
    """x [..., in] @ weight [out, in]^T + bias.

    Saves the weight and, where the weight's gradient is wanted, x, or how to compute it ``again``.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        package: ModuleType,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        again: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        ctx.package, ctx.again = package, again if ctx.needs_input_grad[2] else None
        ctx.options = {"bias": bias} if package is tiles and bias is not None and bias.is_leaf else {}
        ctx.save_for_backward(x if ctx.needs_input_grad[2] and again is None else None, weight)
        return package.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.again is not None:
            x, ctx.again = ctx.again().to(weight.dtype), None
        return None, *ctx.package.linear_backward(grad, x, weight, ctx.needs_input_grad[1:4], **ctx.options), None


class Linears(Function):
    """Several linear layers of one x by kernels/pytorch/tiles.py, which adds the gradients of x inside the products:
    three for q, k and v would be two tensors more, and passes over them. Saves what Linear does."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        again: Callable[[], Tensor] | None,
        count: int,
        *parameters: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """``parameters``: ``count`` weights, and as many biases or None."""
        weights, biases = parameters[:count], parameters[count:]
        ctx.count, ctx.again = count, again if any(ctx.needs_input_grad[3 : 3 + count]) else None
        keeps = any(ctx.needs_input_grad[3 : 3 + count]) and again is None
        ctx.biases = [bias if bias is not None and bias.is_leaf else None for bias in biases]
        ctx.save_for_backward(x if keeps else None, *weights)
        return tuple(tiles.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        if ctx.again is not None:
            x, ctx.again = ctx.again(), None
        dx = tiles.added_products(grads, weights) if needs_x else None
        wanted = zip(grads, weights, ctx.biases, needs[: ctx.count], needs[ctx.count :], strict=True)
        found = [tiles.linear_backward(dy, x, weight, (False, *want), bias) for dy, weight, bias, *want in wanted]
        return dx, None, None, *(dweight for _, dweight, _ in found), *(dbias for *_, dbias in found)


class Add(Function):
    """stream + branch of one shape, in the dtype of the stream."""

    @staticmethod
    def forward(ctx: FunctionCtx, stream: Tensor, branch: Tensor) -> Tensor:
        ctx.dtype = branch.dtype
        return in_cpp.add(stream, branch)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.to(ctx.dtype)


class Embedding(Function):
    """Rows of a table. Saves the ids."""

    @staticmethod
    def forward(ctx: FunctionCtx, package: ModuleType, table: Tensor, ids: Tensor) -> Tensor:
        ctx.package, ctx.table = package, table
        ctx.save_for_backward(ids)
        return package.embedding(table, ids)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        options = {"out": take_place(ctx.table)} if ctx.package is in_cpp else {}
        rows, dtype = ctx.table.shape[0], ctx.table.dtype
        dtable = ctx.package.embedding_backward(grad.reshape(-1, grad.shape[-1]), ids.reshape(-1), rows, **options)
        return None, dtable.to(dtype), None


class RmsNorm(Function):
    """Saves x, the weight and rstd [N]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        package: ModuleType,
        x: Tensor,
        weight: Tensor,
        eps: float,
        out_dtype: torch.dtype,
        mask: Tensor | None,
    ) -> Tensor:
        out, rstd = package.rms_norm(x, weight, eps, out_dtype, mask)
        ctx.package = package
        ctx.save_for_backward(x, weight, rstd, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd, mask = ctx.saved_tensors
        dx, dweight = ctx.package.rms_norm_backward(grad, x, weight, rstd, mask)
        return None, dx, dweight.to(weight.dtype), None, None, None


class AddRmsNorm(Function):
    """x + residual and its RMS norm. Saves the sum, the weight and rstd [N]; both inputs have one gradient."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        package: ModuleType,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        out_dtype: torch.dtype,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, stream, rstd = package.add_rms_norm(x, residual, weight, eps, out_dtype, mask)
        ctx.package, ctx.dtype = package, x.dtype
        ctx.save_for_backward(stream, weight, rstd, mask)
        return out, stream

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, grad_stream: Tensor) -> tuple[Tensor | None, ...]:
        stream, weight, rstd, mask = ctx.saved_tensors
        dstream, dweight = ctx.package.add_rms_norm_backward(grad, grad_stream, stream, weight, rstd, mask)
        return None, dstream.to(ctx.dtype), dstream, dweight.to(weight.dtype), None, None, None


class LayerNorm(Function):
    """Saves x, the weight, mean and rstd [N]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        package: ModuleType,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        out_dtype: torch.dtype,
        mask: Tensor | None,
    ) -> Tensor:
        out, mean, rstd = package.layer_norm(x, weight, bias, eps, out_dtype, mask)
        ctx.package = package
        ctx.save_for_backward(x, weight, mean, rstd, mask)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, mask = ctx.saved_tensors
        dx, dweight, dbias = ctx.package.layer_norm_backward(grad, x, weight, mean, rstd, mask)
        return None, dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


class RopeQK(Function):
    """Rotary embedding of q and k. Saves the tables; the gradient is the rotation by the negative angle."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        package: ModuleType,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale_q: Tensor | None,
        scale_k: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.package = package
        ctx.save_for_backward(cos, sin, scale_q, scale_k)
        return package.rope_qk(q, k, cos, sin, scale_q, scale_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, scale_q, scale_k = ctx.saved_tensors
        if ctx.package is in_cpp:
            turned = in_cpp.rope_qk(grad_q, grad_k, cos, sin, scale_q, scale_k, sign=-1.0)
        else:
            turned = ctx.package.rope_qk(grad_q, grad_k, cos, -sin, scale_q, scale_k)
        return None, *turned, None, None, None, None


class SwiGLU(Function):
    """Saves gate and up; the backward recomputes silu, and on the CPU overwrites both with their gradients unless they
    are leaves: nothing else of this decoder's backward pass needs them by then, and they are its largest tensors."""

    @staticmethod
    def forward(ctx: FunctionCtx, package: ModuleType, gate: Tensor, up: Tensor) -> Tensor:
        in_place = package in (cpu, in_cpp) and gate.grad_fn is not None and up.grad_fn is not None
        ctx.package, ctx.options = package, {"in_place": True} if in_place else {}
        ctx.save_for_backward(gate, up)
        return package.swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.package.swiglu_backward(grad, *ctx.saved_tensors, **ctx.options)


class Gelu(Function):
    """Saves x."""

    @staticmethod
    def forward(ctx: FunctionCtx, package: ModuleType, x: Tensor) -> Tensor:
        ctx.package = package
        ctx.save_for_backward(x)
        return package.gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.package.gelu_backward(grad, *ctx.saved_tensors)


class Attention(Function):
    """Attention of q [B, S, H, D] over visible keys. Saves q, k, v, out and log_sum_exp [B, H, S]; no scores."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        package: ModuleType,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_ranges: KeyRanges,
        scale: float | None,
    ) -> Tensor:
        out, log_sum_exp = package.attention(q, k, v, key_ranges, scale=scale)
        ctx.package, ctx.key_ranges, ctx.scale = package, key_ranges, scale
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum_exp = ctx.saved_tensors
        grads = ctx.package.attention_backward(grad, q, k, v, ctx.key_ranges, out, log_sum_exp, scale=ctx.scale)
        return None, *grads, None, None


class CrossEntropy(Function):
    """Saves the logits [N, V], which the backward overwrites with their gradient if ``in_place``."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, package: ModuleType, logits: Tensor, targets: Tensor, z_loss: float, in_place: bool
    ) -> Tensor:
        log_sum_exp, picked = package.cross_entropy_forward(logits, targets, 0, logits.shape[-1])
        losses = log_sum_exp - picked
        if z_loss:
            losses = losses + z_loss * log_sum_exp.square()
        ctx.package, ctx.z_loss, ctx.in_place = package, z_loss, in_place
        ctx.save_for_backward(logits, targets, log_sum_exp)
        return losses.masked_fill(targets == IGNORE, 0.0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, log_sum_exp = ctx.saved_tensors
        part = (0, logits.shape[-1], log_sum_exp, grad, ctx.z_loss)
        return None, ctx.package.cross_entropy_backward(logits, targets, *part, in_place=ctx.in_place), None, None, None
