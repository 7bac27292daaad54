"""Gradient of attention (FlashAttention-2, arXiv 2307.08691) from the final output and log_sum_exp.

P = exp(scale q k - log_sum_exp), dP = dO V^T, dS = P (dP - delta) with delta = rowsum(dO * out); dQ = scale dS K,
dK = scale dS^T Q, dV = P^T dO. Two kernels without atomic sums, hence deterministic: one computes dq of a block of
queries, the other dk and dv of a block of keys, summed over the query heads of its group. With the log_sum_exp and
output of a whole ring, the gradients of its blocks add up exactly. Letters as in attention.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from telechat_twins.kernels.triton.attention import (
    LOG2_E,
    KeyRanges,
    check_attention,
    key_blocks,
    row_ranges,
    strides,
    tile,
)
from telechat_twins.kernels.triton.launch import check, heads_of, launch, tiles_for

_LOG2_E = tl.constexpr(LOG2_E)
_SCAN = tl.constexpr(256)  # rows whose ranges are reduced together


@triton.jit
def row_product(
    grad_ptr,
    out_ptr,
    delta_ptr,
    tasks,
    S,
    H,
    grad_batch,
    grad_step,
    grad_head,
    out_batch,
    out_step,
    out_head,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """delta [B, H, S] = sum over D of grad * out."""
    blocks = tl.cdiv(S, ROWS)
    dims = tl.arange(0, BLOCK_D)
    steps = tl.arange(0, ROWS)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        m0 = tl.cast(task % blocks * ROWS, tl.int64)
        b = tl.cast(task // blocks // H, tl.int64)
        h = task // blocks % H
        there = m0 + steps < S
        grad_base = grad_ptr + b * grad_batch + m0 * grad_step + h * grad_head
        out_base = out_ptr + b * out_batch + m0 * out_step + h * out_head
        grad = tile(grad_base, steps, there, grad_step, dims, HEAD_DIM, BLOCK_D, True).to(tl.float32)
        out = tile(out_base, steps, there, out_step, dims, HEAD_DIM, BLOCK_D, True).to(tl.float32)
        tl.store(delta_ptr + (b * H + h) * S + m0 + steps, tl.sum(grad * out, 1), mask=there)


@triton.jit
def _finite(lse):
    """log_sum_exp in base 2, with 0 for the -inf of a row without keys: its weights are masked in any case."""
    return tl.where(lse == float("-inf"), 0.0, lse) * _LOG2_E


@triton.jit
def _query_part(
    q,
    grad,
    lse,
    delta,
    k_base,
    v_base,
    n0,
    k_step,
    v_step,
    start,
    end,
    T,
    dims,
    scale,
    dq,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dq [M, D] / scale of one query block, with the key block at n0 added."""
    steps = tl.arange(0, BLOCK_N)
    there = n0 + steps < T
    k = tile(k_base + tl.cast(n0, tl.int64) * k_step, steps, there, k_step, dims, HEAD_DIM, BLOCK_D, MASKED)
    v = tile(v_base + tl.cast(n0, tl.int64) * v_step, steps, there, v_step, dims, HEAD_DIM, BLOCK_D, MASKED)
    weights = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])  # P [M, N]
    if MASKED:
        keys = n0 + steps
        seen = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
        weights = tl.where(seen, weights, 0.0)
    d_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # dP [M, N]
    d_scores = weights * (d_weights - delta[:, None])  # dS [M, N]
    return dq + tl.dot(d_scores.to(k.dtype), k, input_precision=PRECISION)


@triton.jit
def attention_dq(
    q_ptr,
    k_ptr,
    v_ptr,
    ranges_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    tasks,
    S,
    T,
    H,
    GROUP,
    q_batch,
    q_step,
    q_head,
    k_batch,
    k_step,
    k_head,
    v_batch,
    v_step,
    v_head,
    grad_batch,
    grad_step,
    grad_head,
    ranges_batch,
    scale,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(S, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    steps = tl.arange(0, BLOCK_M)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        m0 = (blocks - 1 - task % blocks) * BLOCK_M
        m = tl.cast(m0, tl.int64)
        b = tl.cast(task // blocks // H, tl.int64)
        h = task // blocks % H
        rows = m0 + steps
        there = rows < S
        start, end, sees = row_ranges(ranges_ptr + b * ranges_batch, rows, there, T)
        lo, hi, full_from, full_to = key_blocks(start, end, sees, there, T, BLOCK_N)
        q_base = q_ptr + b * q_batch + m * q_step + h * q_head
        k_base = k_ptr + b * k_batch + h // GROUP * k_head
        v_base = v_ptr + b * v_batch + h // GROUP * v_head
        grad_base = grad_ptr + b * grad_batch + m * grad_step + h * grad_head
        q = tile(q_base, steps, there, q_step, dims, HEAD_DIM, BLOCK_D, True)
        grad = tile(grad_base, steps, there, grad_step, dims, HEAD_DIM, BLOCK_D, True).to(q.dtype)
        row_at = (b * H + h) * S + rows
        lse = _finite(tl.load(lse_ptr + row_at, mask=there, other=0.0))
        delta = tl.load(delta_ptr + row_at, mask=there, other=0.0)
        dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for n0 in range(full_from, full_to, BLOCK_N):
            dq = _query_part(
                q, grad, lse, delta, k_base, v_base, n0, k_step, v_step, start, end, T, dims, scale * _LOG2_E, dq,
                False, PRECISION, HEAD_DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        before = (full_from - lo) // BLOCK_N
        after = tl.maximum(hi - full_to + BLOCK_N - 1, 0) // BLOCK_N
        for i in range(0, before + after):
            n0 = tl.where(i < before, lo + i * BLOCK_N, full_to + (i - before) * BLOCK_N)
            dq = _query_part(
                q, grad, lse, delta, k_base, v_base, n0, k_step, v_step, start, end, T, dims, scale * _LOG2_E, dq,
                True, PRECISION, HEAD_DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        at = ((b * S + m) * H + h) * HEAD_DIM + steps[:, None] * (H * HEAD_DIM) + dims[None, :]
        dq = (dq * scale).to(dq_ptr.dtype.element_ty)
        tl.store(dq_ptr + at, dq, mask=there[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def query_rows(ranges_ptr, n0, n1, S, T, BLOCK_M: tl.constexpr):
    """The smallest interval [first, last) with all queries that attend to a key of [n0, n1), and a ``split`` from which
    on each query before ``last`` attends to all of these keys. ``first`` and ``split`` are multiples of BLOCK_M."""
    first = S
    last = 0
    for scan in range(0, S, _SCAN):
        rows = scan + tl.arange(0, _SCAN)
        start, end, sees = row_ranges(ranges_ptr, rows, rows < S, T)
        meets = sees & (start < n1) & (end > n0)
        first = tl.minimum(first, tl.min(tl.where(meets, rows, S), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, rows + 1, 0), 0))
    split = 0
    for scan in range(0, last, _SCAN):
        rows = scan + tl.arange(0, _SCAN)
        start, end, sees = row_ranges(ranges_ptr, rows, rows < S, T)
        partly = ((start > n0) | (end < n1)) & (rows < last)
        split = tl.maximum(split, tl.max(tl.where(partly, rows + 1, 0), 0))
    first = first // BLOCK_M * BLOCK_M
    split = tl.maximum(first, (split + BLOCK_M - 1) // BLOCK_M * BLOCK_M)
    return first, split, last


@triton.jit
def _key_part(
    k,
    v,
    n0,
    m0,
    q_base,
    grad_base,
    row_base,
    lse_ptr,
    delta_ptr,
    ranges_ptr,
    q_step,
    grad_step,
    S,
    T,
    dims,
    scale,
    dk,
    dv,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dk / scale and dv [N, D] of one key block, with the query block at m0 added.

    Scores are transposed, [N, M]: dv = P^T dO and dk = dS^T Q then need no transposed operand.
    """
    steps = tl.arange(0, BLOCK_M)
    rows = m0 + steps
    there = rows < S
    m = tl.cast(m0, tl.int64)
    q = tile(q_base + m * q_step, steps, there, q_step, dims, HEAD_DIM, BLOCK_D, MASKED)
    grad = tile(grad_base + m * grad_step, steps, there, grad_step, dims, HEAD_DIM, BLOCK_D, MASKED).to(q.dtype)
    if MASKED:
        lse = _finite(tl.load(lse_ptr + row_base + rows, mask=there, other=0.0))
        delta = tl.load(delta_ptr + row_base + rows, mask=there, other=0.0)
    else:
        lse = _finite(tl.load(lse_ptr + row_base + rows))
        delta = tl.load(delta_ptr + row_base + rows)
    weights = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :])  # P^T [N, M]
    if MASKED:
        start, end, sees = row_ranges(ranges_ptr, rows, there, T)
        keys = n0 + tl.arange(0, BLOCK_N)
        seen = (keys[:, None] >= start[None, :]) & (keys[:, None] < end[None, :])
        weights = tl.where(seen, weights, 0.0)
    dv += tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
    d_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # dP^T [N, M]
    d_scores = weights * (d_weights - delta[None, :])  # dS^T [N, M]
    dk += tl.dot(d_scores.to(q.dtype), q, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attention_dkdv(
    q_ptr,
    k_ptr,
    v_ptr,
    ranges_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tasks,
    S,
    T,
    H,
    GROUP,
    q_batch,
    q_step,
    q_head,
    k_batch,
    k_step,
    k_head,
    v_batch,
    v_step,
    v_head,
    grad_batch,
    grad_step,
    grad_head,
    ranges_batch,
    scale,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(T, BLOCK_N)
    K = H // GROUP
    dims = tl.arange(0, BLOCK_D)
    steps = tl.arange(0, BLOCK_N)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        n0 = task % blocks * BLOCK_N  # causal: the first keys have most queries and start first
        n = tl.cast(n0, tl.int64)
        b = tl.cast(task // blocks // K, tl.int64)
        kv = task // blocks % K
        there = n0 + steps < T
        own_ranges = ranges_ptr + b * ranges_batch
        first, split, last = query_rows(own_ranges, n0, tl.minimum(n0 + BLOCK_N, T), S, T, BLOCK_M)
        # Masked blocks [first, split), full blocks [split, whole), and the incomplete block [whole, last), masked too.
        whole = tl.maximum(last // BLOCK_M * BLOCK_M, split)
        before = (split - first) // BLOCK_M
        after = tl.maximum(last - whole + BLOCK_M - 1, 0) // BLOCK_M
        k_base = k_ptr + b * k_batch + n * k_step + kv * k_head
        v_base = v_ptr + b * v_batch + n * v_step + kv * v_head
        k = tile(k_base, steps, there, k_step, dims, HEAD_DIM, BLOCK_D, True)
        v = tile(v_base, steps, there, v_step, dims, HEAD_DIM, BLOCK_D, True)
        dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        # Grouped heads: one kv head collects the gradients of its GROUP query heads.
        for h in range(kv * GROUP, (kv + 1) * GROUP):
            q_base = q_ptr + b * q_batch + tl.cast(h, tl.int64) * q_head
            grad_base = grad_ptr + b * grad_batch + tl.cast(h, tl.int64) * grad_head
            row_base = (b * H + h) * S
            for i in range(0, before + after):
                m0 = tl.where(i < before, first + i * BLOCK_M, whole + (i - before) * BLOCK_M)
                dk, dv = _key_part(
                    k, v, n0, m0, q_base, grad_base, row_base, lse_ptr, delta_ptr, own_ranges, q_step, grad_step,
                    S, T, dims, scale * _LOG2_E, dk, dv, True, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip
            for m0 in range(split, whole, BLOCK_M):
                dk, dv = _key_part(
                    k, v, n0, m0, q_base, grad_base, row_base, lse_ptr, delta_ptr, own_ranges, q_step, grad_step,
                    S, T, dims, scale * _LOG2_E, dk, dv, False, PRECISION, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
                )  # fmt: skip
        at = ((b * T + n) * K + kv) * HEAD_DIM + steps[:, None] * (K * HEAD_DIM) + dims[None, :]
        seen = there[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=seen)
        tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=seen)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges,
    out: Tensor | None,
    log_sum_exp: Tensor,
    scale: float | None = None,
    delta: Tensor | None = None,
    out_f32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """kernels.reference.attention_backward: dq, dk, dv in the dtypes of q, k, v, or float32 with ``out_f32``.

    grad and out [B, S, H, D] in any float dtype, log_sum_exp [B, H, S] float32: of these keys alone, or the final ones
    of a ring that contains them. ``delta`` [B, H, S] float32 = rowsum(grad * out) replaces ``out``, so that a ring
    computes it once. Raises TypeError or ValueError naming the wrong argument.
    """
    check_attention(q, k, v, key_ranges)
    check("grad", grad, q.shape, beside=q)
    q, k, v, grad = heads_of(q), heads_of(k), heads_of(v), heads_of(grad)
    B, S, H, D = q.shape
    T, K = k.shape[1:3]
    check("log_sum_exp", log_sum_exp, (B, H, S), (torch.float32,), beside=q)
    if delta is not None:
        check("delta", delta, (B, H, S), (torch.float32,), beside=q)
    elif out is None:
        raise ValueError("out: got None without delta, needs the forward's output")
    else:
        delta = attention_delta(grad, out)
    dq, dk, dv = (torch.empty(x.shape, dtype=torch.float32 if out_f32 else x.dtype, device=x.device) for x in (q, k, v))
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "ranges_ptr": key_ranges.ranges.contiguous(),
        "grad_ptr": grad,
        "lse_ptr": log_sum_exp.contiguous(),
        "delta_ptr": delta.contiguous(),
    }
    sizes = {
        "S": S,
        "T": T,
        "H": H,
        "GROUP": H // K,
        **strides(q=q, k=k, v=v, grad=grad),
        "ranges_batch": 0 if key_ranges.ranges.shape[0] == 1 else 2 * S,
        "scale": D**-0.5 if scale is None else float(scale),
    }
    tiles = tiles_for("attention_dq", q, D=D)
    tasks = triton.cdiv(S, tiles.constants["BLOCK_M"]) * B * H
    launch(attention_dq, tasks, tiles, {**shared, "dq_ptr": dq, "tasks": tasks, **sizes}, HEAD_DIM=D)
    tiles = tiles_for("attention_dkdv", q, D=D)
    tasks = triton.cdiv(T, tiles.constants["BLOCK_N"]) * B * K
    launch(attention_dkdv, tasks, tiles, {**shared, "dk_ptr": dk, "dv_ptr": dv, "tasks": tasks, **sizes}, HEAD_DIM=D)
    return dq, dk, dv


def attention_delta(grad: Tensor, out: Tensor) -> Tensor:
    """rowsum(grad * out) of two [B, S, H, D]: [B, H, S] float32."""
    check("grad", grad, (None, None, None, None))
    check("out", out, grad.shape, beside=grad)
    grad, out = heads_of(grad), heads_of(out)
    B, S, H, D = grad.shape
    delta = torch.empty((B, H, S), dtype=torch.float32, device=grad.device)
    tiles = tiles_for("attention_rows", grad, D=D)
    tasks = triton.cdiv(S, tiles.constants["ROWS"]) * B * H
    arguments = {
        "grad_ptr": grad,
        "out_ptr": out,
        "delta_ptr": delta,
        "tasks": tasks,
        "S": S,
        "H": H,
        **strides(grad=grad, out=out),
    }
    launch(row_product, tasks, tiles, arguments, HEAD_DIM=D)
    return delta
