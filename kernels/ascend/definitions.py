"""Numpy definitions of the CANN operators in use: documented result layouts and dtypes, documented constraints.

Results are those of an Ascend up to rounding: values are float64 and carry the name of the dtype they are rounded to.
Constraints that CANN documents and MindSpore's checks on the CPU do not cover raise TypeError (dtypes) or ValueError.
docs/ascend.md names the sources. Argument names are those of kernels.ascend.calls; B batch, S queries, T keys, N heads,
D head dim.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray as Array

from telechat_twins.kernels import reference
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.ascend.attention_definitions import (
    fused_infer_attention,
    fusion_attention,
    fusion_attention_grad,
    ring_update,
)
from telechat_twins.kernels.ascend.operands import Operand, floats, need, same_dtype, same_shape

__all__ = [
    "NAMES",
    "Operand",
    "adamw",
    "add_rms_norm",
    "embedding_grad",
    "fused_infer_attention",
    "fusion_attention",
    "fusion_attention_grad",
    "gelu",
    "gelu_grad",
    "index_copy",
    "layer_norm",
    "layer_norm_grad",
    "ring_update",
    "rms_norm",
    "rms_norm_grad",
    "rotary",
    "rotary_grad",
    "swiglu",
    "swiglu_grad",
]

# MindSpore's operator name -> function of this module.
NAMES = {
    "AdamW": "adamw",
    "AddRmsNorm": "add_rms_norm",
    "EmbeddingDenseBackward": "embedding_grad",
    "FlashAttentionScore": "fusion_attention",
    "FlashAttentionScoreGrad": "fusion_attention_grad",
    "FusedInferAttentionScore": "fused_infer_attention",
    "InplaceIndexCopy": "index_copy",
    "GeluExt": "gelu",
    "GeluGradExt": "gelu_grad",
    "LayerNormExt": "layer_norm",
    "LayerNormGradExt": "layer_norm_grad",
    "RingAttentionUpdate": "ring_update",
    "RmsNorm": "rms_norm",
    "RmsNormGrad": "rms_norm_grad",
    "RotaryPositionEmbedding": "rotary",
    "RotaryPositionEmbeddingGrad": "rotary_grad",
    "Swiglu": "swiglu",
    "SwigluGrad": "swiglu_grad",
}


def rms_norm(x: Operand, gamma: Operand, epsilon: float) -> tuple[Operand, Operand]:
    _check_norm(x, gamma, epsilon)
    r = _rstd(x.value, epsilon)
    return Operand(x.value * r * gamma.value, x.dtype), Operand(r, "float32")


def rms_norm_grad(dy: Operand, x: Operand, rstd: Operand, gamma: Operand) -> tuple[Operand, Operand]:
    """(dx, dgamma), computed from the given rstd, so that a wrong rstd gives a wrong result."""
    floats(dy=dy, x=x, gamma=gamma)
    same_dtype(dy=dy, x=x, gamma=gamma)
    same_shape(dy=dy, x=x)
    need(gamma.value.shape == x.value.shape[-1:], "gamma", gamma.value.shape, f"the shape {x.value.shape[-1:]}")
    _check_statistic("rstd", rstd, x)
    g, r = dy.value * gamma.value, rstd.value
    dx = r * g - x.value * r**3 * np.mean(g * x.value, -1, keepdims=True)
    return Operand(dx, x.dtype), Operand((dy.value * x.value * r).reshape(-1, x.value.shape[-1]).sum(0), "float32")


def add_rms_norm(x1: Operand, x2: Operand, gamma: Operand, epsilon: float) -> tuple[Operand, Operand, Operand]:
    same_dtype(x1=x1, x2=x2)
    same_shape(x1=x1, x2=x2)
    total = Operand(x1.value + x2.value, x1.dtype)
    y, rstd = rms_norm(total, gamma, epsilon)
    return y, rstd, total


def layer_norm(
    input: Operand, normalized_shape: tuple[int, ...], weight: Operand, bias: Operand, eps: float
) -> tuple[Operand, Operand, Operand]:
    x = input.value
    need(normalized_shape == x.shape[-1:], "normalized_shape", normalized_shape, f"{x.shape[-1:]}, the last axis")
    _check_norm(input, weight, eps)
    same_dtype(weight=weight, bias=bias)
    same_shape(weight=weight, bias=bias)
    mean = x.mean(-1, keepdims=True)
    rstd = 1.0 / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
    out = (x - mean) * rstd * weight.value + bias.value
    return Operand(out, input.dtype), Operand(mean, "float32"), Operand(rstd, "float32")


def layer_norm_grad(
    dy: Operand,
    x: Operand,
    normalized_shape: tuple[int, ...],
    mean: Operand,
    rstd: Operand,
    gamma: Operand,
    beta: Operand,
) -> tuple[Operand, Operand, Operand]:
    floats(dy=dy, x=x, gamma=gamma)
    same_dtype(dy=dy, x=x, gamma=gamma, beta=beta)
    same_shape(dy=dy, x=x)
    need(normalized_shape == x.value.shape[-1:], "normalized_shape", normalized_shape, f"{x.value.shape[-1:]}")
    _check_statistic("mean", mean, x)
    _check_statistic("rstd", rstd, x)
    n = (x.value - mean.value) * rstd.value
    g = dy.value * gamma.value
    dx = rstd.value * (g - g.mean(-1, keepdims=True) - n * np.mean(g * n, -1, keepdims=True))
    rows = (-1, x.value.shape[-1])
    return (
        Operand(dx, x.dtype),
        Operand((dy.value * n).reshape(rows).sum(0), gamma.dtype),
        Operand(dy.value.reshape(rows).sum(0), gamma.dtype),
    )


def swiglu(input: Operand, dim: int) -> Operand:
    gate, up = _halves(input, dim)
    return Operand(reference.swiglu(gate, up), input.dtype)


def swiglu_grad(grad_output: Operand, input: Operand, dim: int) -> Operand:
    same_dtype(grad_output=grad_output, input=input)
    gate, up = _halves(input, dim)
    need(grad_output.value.shape == gate.shape, "grad_output", grad_output.value.shape, f"the shape {gate.shape}")
    grads = reference.swiglu_backward(grad_output.value, gate, up)
    return Operand(np.concatenate(grads, dim), input.dtype)


def gelu(input: Operand, approximate: str) -> Operand:
    floats(input=input)
    _check_tanh(approximate)
    return Operand(reference.gelu(input.value), input.dtype)


def gelu_grad(grad: Operand, input: Operand, approximate: str) -> Operand:
    floats(input=input)
    same_dtype(grad=grad, input=input)
    same_shape(grad=grad, input=input)
    _check_tanh(approximate)
    return Operand(reference.gelu_backward(grad.value, input.value), input.dtype)


def rotary(x: Operand, cos: Operand, sin: Operand, mode: int) -> Operand:
    """x [B, S, N, D]; cos and sin [1 or B, S, 1 or N, D]."""
    _check_rotary("x", x, cos, sin, mode)
    return Operand(x.value * cos.value + _turned(x.value) * sin.value, x.dtype)


def rotary_grad(dy: Operand, cos: Operand, sin: Operand, mode: int) -> tuple[Operand, Operand, Operand]:
    """(dx, dcos, dsin); without the forward's x the last two are undefined, here NaN."""
    _check_rotary("dy", dy, cos, sin, mode)
    dx = Operand(dy.value * cos.value - _turned(dy.value * sin.value), dy.dtype)
    nothing = Operand(np.full(cos.value.shape, np.nan), dy.dtype)
    return dx, nothing, nothing


def index_copy(input: Operand, dim: int, index: Operand, tensor: Operand) -> tuple[Operand]:
    """``input`` with the rows ``tensor`` at ``index``. Equal indices, undefined in CANN, are refused."""
    same_dtype(input=input, tensor=tensor)
    need(dim == 0 and index.value.ndim == 1, "index", index.value.shape, "one axis, along the first of input")
    need(index.dtype == "int64", "index", index.dtype, "int64")
    need(len(set(index.value.tolist())) == len(index.value), "index", "equal entries", "distinct entries")
    need(
        bool((index.value >= 0).all() and (index.value < len(input.value)).all()),
        "index",
        index.value.tolist(),
        f"indices from 0 to {len(input.value) - 1}",
    )
    out = input.value.copy()
    out[index.value] = tensor.value
    return (Operand(out, input.dtype),)


def embedding_grad(grad: Operand, indices: Operand, num_weights: int) -> Operand:
    floats(grad=grad)
    if indices.dtype not in ("int32", "int64"):
        raise TypeError(f"indices: {indices.dtype}; needs int32 or int64")
    need(grad.value.shape[:-1] == indices.value.shape, "indices", indices.value.shape, f"{grad.value.shape[:-1]}")
    return Operand(reference.embedding_backward(grad.value, indices.value, num_weights), grad.dtype)


def adamw(
    var: Operand,
    m: Operand,
    v: Operand,
    gradient: Operand,
    step: Operand,
    lr: float,
    beta1: float,
    beta2: float,
    decay: float,
    eps: float,
) -> tuple[Operand, Operand, Operand]:
    """The new var, m and v; update number ``step`` + 1."""
    floats(var=var, gradient=gradient)
    same_dtype(var=var, m=m, v=v)
    same_shape(var=var, m=m, v=v, gradient=gradient)
    if step.dtype not in ("float32", "int64"):
        raise TypeError(f"step: {step.dtype}; needs float32 or int64")
    need(step.value.shape == (1,), "step", step.value.shape, "the shape (1,)")
    number = int(step.value[0]) + 1
    need(number >= 1, "step", step.value[0], "a count from 0")
    scalars = AdamWStep(number, lr, beta1, beta2, eps, decay)
    results = reference.adamw(var.value, gradient.value, m.value, v.value, scalars)
    return Operand(results[0], var.dtype), Operand(results[1], m.dtype), Operand(results[2], v.dtype)


def _check_norm(x: Operand, gamma: Operand, epsilon: float) -> None:
    floats(x=x, gamma=gamma)
    same_dtype(x=x, gamma=gamma)
    need(gamma.value.shape == x.value.shape[-1:], "gamma", gamma.value.shape, f"the shape {x.value.shape[-1:]}")
    need(0.0 < epsilon <= 1.0, "epsilon", epsilon, "a number in (0, 1]")


def _check_statistic(name: str, statistic: Operand, x: Operand) -> None:
    """A row's number as the forward returns it: float32, the shape of x with a last axis of 1."""
    if statistic.dtype != "float32":
        raise TypeError(f"{name}: {statistic.dtype}; needs float32")
    wanted = (*x.value.shape[:-1], 1)
    need(statistic.value.shape == wanted, name, statistic.value.shape, f"the shape {wanted}")


def _rstd(x: Array, epsilon: float) -> Array:
    return 1.0 / np.sqrt(np.mean(x * x, -1, keepdims=True) + epsilon)


def _halves(input: Operand, dim: int) -> tuple[Array, Array]:
    floats(input=input)
    need(input.value.shape[dim] % 2 == 0, "input", input.value.shape, f"an even length in dim {dim}")
    gate, up = np.split(input.value, 2, dim)
    return gate, up


def _check_tanh(approximate: str) -> None:
    need(approximate == "tanh", "approximate", approximate, "tanh, the form of kernels.reference.gelu")


def _check_rotary(name: str, x: Operand, cos: Operand, sin: Operand, mode: int) -> None:
    floats(**{name: x})
    same_dtype(**{name: x, "cos": cos, "sin": sin})
    same_shape(cos=cos, sin=sin)
    need(x.value.ndim == 4, name, x.value.shape, "four axes")
    B, S, N, D = x.value.shape
    need(D % 2 == 0 and D < 896 and B < 1000 and N < 1000, name, x.value.shape, "even D < 896, B and N < 1000")
    allowed = ((1, S, 1, D), (B, S, 1, D), (B, S, N, D))
    need(cos.value.shape in allowed, "cos", cos.value.shape, f"one of {allowed}")
    need(mode == 0, "mode", mode, "0, the rotation of halves")


def _turned(x: Array) -> Array:
    first, second = np.split(x, 2, -1)
    return np.concatenate((-second, first), -1)
