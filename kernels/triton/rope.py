"""Rotary embedding of queries and keys in one launch, with optional xPos scales.

A program computes one position: it loads the angles once and rotates every head by them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from telechat_twins.kernels.triton.launch import check, heads_of, launch, tiles_for


@triton.jit
def _turn(x_ptr, out_ptr, cos, sin, num_heads, head_stride, dims, there, HALF_DIM: tl.constexpr, HEADS: tl.constexpr):
    """Half rotation of all heads of one position, at x_ptr and out_ptr: (a, b) -> (a cos - b sin, b cos + a sin)."""
    for first in range(0, num_heads, HEADS):
        heads = first + tl.arange(0, HEADS)
        seen = (heads < num_heads)[:, None] & there[None, :]
        at = heads[:, None] * head_stride + dims[None, :]
        a = tl.load(x_ptr + at, mask=seen, other=0.0).to(tl.float32)
        b = tl.load(x_ptr + at + HALF_DIM, mask=seen, other=0.0).to(tl.float32)
        first_half = a * cos[None, :] - b * sin[None, :]
        second_half = b * cos[None, :] + a * sin[None, :]
        to = heads[:, None] * (2 * HALF_DIM) + dims[None, :]
        tl.store(out_ptr + to, first_half.to(out_ptr.dtype.element_ty), mask=seen)
        tl.store(out_ptr + to + HALF_DIM, second_half.to(out_ptr.dtype.element_ty), mask=seen)


@triton.jit
def rotate(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    scale_q_ptr,
    scale_k_ptr,
    q_out_ptr,
    k_out_ptr,
    positions,
    S,
    H,
    K,
    q_batch,
    q_step,
    q_head,
    k_batch,
    k_step,
    k_head,
    table_batch,
    scale_batch,
    HALF_DIM: tl.constexpr,
    SCALED_Q: tl.constexpr,
    SCALED_K: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    dims = tl.arange(0, HALF)
    there = dims < HALF_DIM
    for position in range(tl.program_id(0), positions, tl.num_programs(0)):
        b = position // S
        s = position % S
        table_at = (b * table_batch + s) * HALF_DIM + dims
        scale_at = (b * scale_batch + s) * HALF_DIM + dims
        cos = tl.load(cos_ptr + table_at, mask=there, other=0.0)
        sin = tl.load(sin_ptr + table_at, mask=there, other=0.0)
        if INVERSE:
            sin = -sin
        cos_k = cos
        sin_k = sin
        if SCALED_Q:
            scale_q = tl.load(scale_q_ptr + scale_at, mask=there, other=0.0)
            cos = cos * scale_q
            sin = sin * scale_q
        if SCALED_K:
            scale_k = tl.load(scale_k_ptr + scale_at, mask=there, other=0.0)
            cos_k = cos_k * scale_k
            sin_k = sin_k * scale_k
        q_from = tl.cast(b, tl.int64) * q_batch + tl.cast(s, tl.int64) * q_step
        k_from = tl.cast(b, tl.int64) * k_batch + tl.cast(s, tl.int64) * k_step
        q_to = tl.cast(position, tl.int64) * H * (2 * HALF_DIM)
        k_to = tl.cast(position, tl.int64) * K * (2 * HALF_DIM)
        _turn(q_ptr + q_from, q_out_ptr + q_to, cos, sin, H, q_head, dims, there, HALF_DIM, HEADS)
        _turn(k_ptr + k_from, k_out_ptr + k_to, cos_k, sin_k, K, k_head, dims, there, HALF_DIM, HEADS)


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale_q: Tensor | None = None, scale_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """kernels.reference.rope_qk of q [B, S, H, D] and k [B, S, K, D], in their own dtypes.

    cos, sin and the xPos scales [B or 1, S, 1, D/2] float32; computed in float32. q and k may be views with a
    contiguous last axis, such as slices of one projection. Raises TypeError or ValueError naming the wrong argument.
    """
    return _rotate(q, k, cos, sin, scale_q, scale_k, inverse=False)


def rope_qk_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale_q: Tensor | None = None,
    scale_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The transposed rotation of the gradients: that of rope_qk with -sin."""
    return _rotate(grad_q, grad_k, cos, sin, scale_q, scale_k, inverse=True)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, scale_q: Tensor | None, scale_k: Tensor | None, inverse: bool
) -> tuple[Tensor, Tensor]:
    check("q", q, (None, None, None, None))
    B, S, H, D = q.shape
    if D == 0 or D % 2:
        raise ValueError(f"q: got head dim {D}, needs an even one to rotate in halves")
    check("k", k, (B, S, None, D), beside=q)
    check("cos", cos, (None, S, 1, D // 2), (torch.float32,), beside=q)
    check("sin", sin, cos.shape, (torch.float32,), beside=q)
    scales = [(name, x) for name, x in (("scale_q", scale_q), ("scale_k", scale_k)) if x is not None]
    for name, x in scales:
        check(name, x, (None, S, 1, D // 2), (torch.float32,), beside=q)
        if x.shape[0] != scales[0][1].shape[0]:
            raise ValueError(f"{name}: got batch {x.shape[0]}, needs {scales[0][1].shape[0]} as scale_q")
    for name, x in (("cos", cos), *scales):
        if x.shape[0] not in (1, B):
            raise ValueError(f"{name}: got batch {x.shape[0]}, needs 1 or {B}")
    q, k = heads_of(q), heads_of(k)
    K = k.shape[2]
    q_out = torch.empty((B, S, H, D), dtype=q.dtype, device=q.device)
    k_out = torch.empty((B, S, K, D), dtype=k.dtype, device=q.device)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "cos_ptr": cos.contiguous(),
        "sin_ptr": sin.contiguous(),
        "scale_q_ptr": None if scale_q is None else scale_q.contiguous(),
        "scale_k_ptr": None if scale_k is None else scale_k.contiguous(),
        "q_out_ptr": q_out,
        "k_out_ptr": k_out,
        "positions": B * S,
        "S": S,
        "H": H,
        "K": K,
        "q_batch": q.stride(0),
        "q_step": q.stride(1),
        "q_head": q.stride(2),
        "k_batch": k.stride(0),
        "k_step": k.stride(1),
        "k_head": k.stride(2),
        "table_batch": 0 if cos.shape[0] == 1 else S,
        "scale_batch": 0 if not scales or scales[0][1].shape[0] == 1 else S,
    }
    launch(
        rotate,
        B * S,
        tiles_for("rope", q if q.element_size() >= k.element_size() else k, D=D, H=max(H, K)),
        arguments,
        HALF_DIM=D // 2,
        SCALED_Q=scale_q is not None,
        SCALED_K=scale_k is not None,
        INVERSE=inverse,
    )
    return q_out, k_out
