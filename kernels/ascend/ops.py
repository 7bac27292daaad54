"""Fused operators on Ascend, implemented by CANN through MindSpore. Not run on a device; rehearsed (docs/ascend.md).

Functions without autograd; each ``*_backward`` takes results of its forward. Statistics are float32. Rounding is
CANN's: an operator computes in float32 and rounds its result once, so where the released model rounds between two
steps (norm, then gain) there is one rounding less. E hidden, N rows, F ffn, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import mindspore as ms
from mindspore import Tensor, ops

from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.ascend import calls as cann
from telechat_twins.kernels.ascend.attention import (
    AscendRanges,
    attention,
    attention_backward,
    cached_attention,
    device_ranges,
    merge_blocks,
    single_queries,
    store_rows,
    takes_pages,
)

__all__ = [
    "CANN_OPERATORS",
    "AscendRanges",
    "CannOperator",
    "adamw",
    "add_rms_norm",
    "add_rms_norm_backward",
    "attention",
    "attention_backward",
    "cached_attention",
    "device_ranges",
    "embedding",
    "embedding_backward",
    "gelu",
    "gelu_backward",
    "layer_norm",
    "layer_norm_backward",
    "merge_blocks",
    "rms_norm",
    "rms_norm_backward",
    "rope_qk",
    "rope_qk_backward",
    "single_queries",
    "store_rows",
    "swiglu",
    "swiglu_backward",
    "takes_pages",
]


class CannOperator(NamedTuple):
    """``serves``: whether this module implements the operator; ``calls``: CANN operators by MindSpore's names;
    ``reason``: a remark for docs/ascend.md."""

    serves: bool
    calls: tuple[str, ...]
    reason: str = ""


# By the names of core.config.KernelsConfig.
CANN_OPERATORS = {
    "linear": CannOperator(False, ("MatMul",), "MindSpore's matrix product already is CANN's"),
    "embedding": CannOperator(
        True, ("Gather", "EmbeddingDenseBackward"), "a fixed order of sums under mindspore.set_deterministic(True)"
    ),
    "rms_norm": CannOperator(True, ("RmsNorm", "RmsNormGrad", "AddRmsNorm")),
    "layer_norm": CannOperator(True, ("LayerNormExt", "LayerNormGradExt"), "plain operators with a growth mask"),
    "rope": CannOperator(True, ("RotaryPositionEmbedding", "RotaryPositionEmbeddingGrad"), "in the tables' float32"),
    "swiglu": CannOperator(True, ("Swiglu", "SwigluGrad"), "reads gate and up as one tensor, which costs a copy"),
    "gelu": CannOperator(True, ("GeluExt", "GeluGradExt"), "tanh form"),
    "attention": CannOperator(
        True, ("FlashAttentionScore", "FlashAttentionScoreGrad", "FusedInferAttentionScore"), "layouts BSND and TND"
    ),
    "merge_blocks": CannOperator(True, ("RingAttentionUpdate",), "float32, layout SBH"),
    "cross_entropy": CannOperator(
        False,
        ("CrossEntropyLoss", "CrossEntropyLossGrad"),
        "CANN's allocates a second tensor of the size of the logits and does not support a vocabulary shard",
    ),
    "adamw": CannOperator(True, ("AdamW",), "scaling the gradient and the bfloat16 copy are passes of their own"),
}


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, out_dtype: ms.Type, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [..., E], weight [E] -> out [..., E] in ``out_dtype``, rstd [N] float32.

    ``mask`` [E]: the growth mask of kernels.reference.rms_norm. With a = sqrt(mask * E / sum(mask)) the result is the
    norm of x * a with gain weight * mask / a: mean((x a)^2) = sum(mask x^2) / sum(mask).
    """
    dtype = _wider(x.dtype, out_dtype)
    gain = weight
    if mask is not None:
        dtype = ms.float32
        before, after = _growth(mask)
        x, gain = ops.cast(x, dtype) * before, ops.cast(weight, dtype) * after
    out, rstd = cann.rms_norm(ops.cast(x, dtype), ops.cast(gain, dtype), eps)
    return ops.cast(out, out_dtype), rstd.reshape(-1)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dx in the dtype of x, dweight [E] float32)."""
    _same_shape("grad", grad, "x", x)
    dtype = _wider(x.dtype, grad.dtype)
    wide, gain = x, weight
    if mask is not None:
        dtype = ms.float32
        before, after = _growth(mask)
        wide, gain = ops.cast(x, dtype) * before, ops.cast(weight, dtype) * after
    rows = rstd.reshape(*x.shape[:-1], 1)
    dx, dweight = cann.rms_norm_grad(ops.cast(grad, dtype), ops.cast(wide, dtype), rows, ops.cast(gain, dtype))
    if mask is not None:
        dx, dweight = dx * before, dweight * after
    return ops.cast(dx, x.dtype), dweight


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out_dtype: ms.Type, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(norm of the stream in ``out_dtype``, stream = x + residual in the dtype of residual, rstd [N] float32)."""
    _same_shape("x", x, "residual", residual)
    if mask is not None:
        stream = ops.cast(x, residual.dtype) + residual
        return _with_stream(rms_norm(stream, weight, eps, out_dtype, mask), stream)
    dtype = _wider(_wider(x.dtype, residual.dtype), out_dtype)
    out, rstd, stream = cann.add_rms_norm(ops.cast(x, dtype), ops.cast(residual, dtype), ops.cast(weight, dtype), eps)
    return ops.cast(out, out_dtype), ops.cast(stream, residual.dtype), rstd.reshape(-1)


def add_rms_norm_backward(
    grad: Tensor, grad_stream: Tensor, stream: Tensor, weight: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dstream in the dtype of stream, the gradient of both x and residual; dweight [E] float32)."""
    dx, dweight = rms_norm_backward(grad, stream, weight, rstd, mask)
    return dx + ops.cast(grad_stream, stream.dtype), dweight


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: ms.Type, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., E], weight and bias [E] -> out in ``out_dtype``, mean [N] and rstd [N] float32.

    With a growth mask [E], which CANN does not support, composed of MindSpore's primitive operators.
    """
    if mask is not None:
        wide = ops.cast(x, ms.float32)
        share = mask / mask.sum()
        mean = (wide * share).sum(-1, keepdims=True)
        rstd = ops.rsqrt(((wide - mean) * (wide - mean) * share).sum(-1, keepdims=True) + eps)
        out = ((wide - mean) * rstd * ops.cast(weight, ms.float32) + ops.cast(bias, ms.float32)) * mask
        return ops.cast(out, out_dtype), mean.reshape(-1), rstd.reshape(-1)
    dtype = _wider(x.dtype, out_dtype)
    wide, gain, shift = (ops.cast(t, dtype) for t in (x, weight, bias))
    out, mean, rstd = cann.layer_norm(wide, (x.shape[-1],), gain, shift, eps)
    return ops.cast(out, out_dtype), mean.reshape(-1), rstd.reshape(-1)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in the dtype of x, dweight [E] and dbias [E] float32)."""
    _same_shape("grad", grad, "x", x)
    mean, rstd = (t.reshape(*x.shape[:-1], 1) for t in (mean, rstd))
    if mask is not None:
        share = mask / mask.sum()
        n = (ops.cast(x, ms.float32) - mean) * rstd
        grad = ops.cast(grad, ms.float32) * mask
        g = grad * ops.cast(weight, ms.float32)
        dx = rstd * (g - share * g.sum(-1, keepdims=True) - n * share * (g * n).sum(-1, keepdims=True))
        rows = (-1, x.shape[-1])
        return ops.cast(dx, x.dtype), (grad * n).reshape(rows).sum(0), grad.reshape(rows).sum(0)
    # In float32: the sums over all rows have the dtype of the gain and must not be rounded.
    wide, dy, gain = (ops.cast(t, ms.float32) for t in (x, grad, weight))
    dx, dweight, dbias = cann.layer_norm_grad(dy, wide, (x.shape[-1],), mean, rstd, gain, ops.zeros_like(gain))
    return ops.cast(dx, x.dtype), dweight, dbias


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale_q: Tensor | None = None, scale_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotary embedding, half rotation, of q [B, S, H, D] and k [B, S, K, D] by cos, sin [B or 1, S, 1, D/2] float32, in
    their dtypes.

    ``scale_q``, ``scale_k``, of the shape of cos, multiply both halves and are folded into the tables. The gradient is
    the same call with -sin, or ``rope_qk_backward``.
    """
    return tuple(  # type: ignore[return-value]
        ops.cast(cann.rotary(ops.cast(x, cos.dtype), *_tables(cos, sin, scale), 0), x.dtype)
        for x, scale in ((q, scale_q), (k, scale_k))
    )


def rope_qk_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dq, dk) from the gradients of both results and the forward's tables."""
    return tuple(  # type: ignore[return-value]
        ops.cast(cann.rotary_grad(ops.cast(x, cos.dtype), *_tables(cos, sin, scale), 0)[0], x.dtype)
        for x, scale in ((grad_q, scale_q), (grad_k, scale_k))
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both [..., F] of one dtype."""
    _same_shape("up", up, "gate", gate)
    return cann.swiglu(ops.concat((gate, up), -1), -1)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup)."""
    _same_shape("grad", grad, "gate", gate)
    both = cann.swiglu_grad(ops.cast(grad, gate.dtype), ops.concat((gate, up), -1), -1)
    return tuple(ops.split(both, gate.shape[-1], -1))  # type: ignore[return-value]


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form."""
    return cann.gelu(x, "tanh")


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    _same_shape("grad", grad, "x", x)
    return cann.gelu_grad(ops.cast(grad, x.dtype), x, "tanh")


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """table [V, E], ids [...] -> [..., E], by MindSpore's gather."""
    if table.dtype == ms.bfloat16 and ms.get_context("device_target") == "CPU":
        return ops.cast(ops.gather(ops.cast(table, ms.float32), ids, 0), table.dtype)  # the CPU's lacks bfloat16
    return ops.gather(table, ids, 0)


def embedding_backward(grad: Tensor, ids: Tensor, vocab_size: int, dtype: ms.Type = ms.float32) -> Tensor:
    """grad [..., E] summed by ids [...] into [V, E], in float32, the sums rounded to ``dtype``.

    The order of summation is fixed only under mindspore.set_deterministic(True).
    """
    return ops.cast(cann.embedding_grad(ops.cast(grad, ms.float32), ids, vocab_size), dtype)


def adamw(master: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: AdamWStep, copy: Tensor | None = None) -> None:
    """kernels.reference.adamw of float32 ``master``, ``m`` and ``v``, in place; ``grad`` of any float dtype.

    ``copy``, of the same shape, receives the new master, rounded to the dtype of ``copy``.
    """
    for name, x in (("master", master), ("m", m), ("v", v)):
        if x.dtype != ms.float32:
            raise TypeError(f"{name}: {x.dtype}; needs float32")
    _same_shape("grad", grad, "master", master)
    grad = ops.cast(grad, ms.float32)
    if step.grad_scale != 1.0:
        grad = grad * step.grad_scale
    done = Tensor([step.step - 1], ms.float32)  # the operator adds 1 before the bias correction
    cann.adamw(master, m, v, grad, done, step.lr, step.beta1, step.beta2, step.weight_decay, step.eps)
    if copy is not None:
        copy.copy_(ops.cast(master, copy.dtype))


def _growth(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(mask * E / sum(mask)), the factor of x; sqrt(mask * sum(mask) / E), the factor of the gain)."""
    share = mask.sum() / mask.shape[0]
    return ops.sqrt(mask / share), ops.sqrt(mask * share)


def _with_stream(normed: tuple[Tensor, Tensor], stream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return normed[0], stream, normed[1]


def _tables(cos: Tensor, sin: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tables [..., D] as CANN reads them; both halves rotate by the same angles."""
    if scale is not None:
        cos, sin = cos * scale, sin * scale
    return ops.concat((cos, cos), -1), ops.concat((sin, sin), -1)


def _wider(first: ms.Type, second: ms.Type) -> ms.Type:
    """The one dtype an operator computes in: CANN's want all their operands in one."""
    for dtype in (first, second):
        if dtype not in (ms.float16, ms.bfloat16, ms.float32):
            raise TypeError(f"x: {dtype}; Ascend's operators need float16, bfloat16 or float32")
    return first if first == second else ms.float32


def _same_shape(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.shape != y.shape:
        raise ValueError(f"{name}: {x.shape}; needs the shape of {other}, {y.shape}")
