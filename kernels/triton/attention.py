"""Attention over key ranges, forward (FlashAttention-2, arXiv 2307.08691), and the merge of two blocks of a ring.

A program computes a block of queries of one head. It visits only key blocks with a key visible to one of its queries:
first, without a mask, those visible in full to every query, then the others. The query heads of a group read the same
keys and values.

Letters: B batch, S queries, T keys, H heads, K kv heads, D head dim (HEAD_DIM; BLOCK_D: padded to a power of two),
M = BLOCK_M queries and N = BLOCK_N keys of a tile.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from telechat_twins.kernels.triton.launch import check, heads_of, launch, tiles_for

LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-1.0e30)  # below any score, and finite: no NaN in a row without a visible key so far


class KeyRanges(Protocol):
    """core.model.visibility.KeyRanges with ``ranges`` as an int32 tensor [B or 1, S, 2] on the device."""

    @property
    def ranges(self) -> Tensor: ...

    @property
    def num_keys(self) -> int: ...


@triton.jit
def row_ranges(ranges_ptr, rows, there, T):
    """Key range [start, end) of each row, clipped to [0, T), and whether it is not empty."""
    start = tl.maximum(tl.load(ranges_ptr + rows * 2, mask=there, other=0), 0)
    end = tl.minimum(tl.load(ranges_ptr + rows * 2 + 1, mask=there, other=0), T)
    return start, end, start < end


@triton.jit
def key_blocks(start, end, sees, there, T, BLOCK_N: tl.constexpr):
    """The union [lo, hi) of the rows' key ranges, and the whole blocks [full_from, full_to) visible to every row.

    Invariant: lo, full_from and full_to are multiples of BLOCK_N with lo <= full_from <= full_to, so that [lo,
    full_from) and [full_to, hi) are the masked blocks before and after the full ones.
    """
    lo = tl.min(tl.where(sees, start, T), 0) // BLOCK_N * BLOCK_N
    hi = tl.max(tl.where(sees, end, 0), 0)
    full_from = (tl.max(tl.where(there, start, 0), 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    full_to = tl.min(tl.where(there, tl.where(sees, end, 0), T), 0) // BLOCK_N * BLOCK_N
    none = full_from >= full_to
    return lo, hi, tl.where(none, lo, full_from), tl.where(none, lo, full_to)


@triton.jit
def tile(base, rows, there, stride, dims, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUND: tl.constexpr):
    """A tile [rows, BLOCK_D] of a tensor with contiguous channels, 0 outside; without BOUND all rows exist."""
    at = base + rows[:, None] * stride + dims[None, :]
    if HEAD_DIM == BLOCK_D:
        x = tl.load(at, mask=there[:, None], other=0.0) if BOUND else tl.load(at)
    elif BOUND:
        x = tl.load(at, mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    else:
        x = tl.load(at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return x


@triton.jit
def _attend(
    q,
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
    top,
    total,
    acc,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One step of the online softmax over the key block at n0, in base 2: ``scale`` includes log2(e).

    Invariant, over the keys so far: top [M] = max(s), total [M] = sum(2^(s - top)), acc [M, D] = sum(2^(s - top) v).
    """
    steps = tl.arange(0, BLOCK_N)
    there = n0 + steps < T
    k = tile(k_base + tl.cast(n0, tl.int64) * k_step, steps, there, k_step, dims, HEAD_DIM, BLOCK_D, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [M, N]
    if MASKED:
        keys = n0 + steps
        seen = (keys[None, :] >= start[:, None]) & (keys[None, :] < end[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    # A larger maximum rescales what was summed under the old one by 2^(old - new).
    larger = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - larger[:, None])
    shrink = tl.exp2(top - larger)
    total = total * shrink + tl.sum(weights, 1)
    v = tile(v_base + tl.cast(n0, tl.int64) * v_step, steps, there, v_step, dims, HEAD_DIM, BLOCK_D, MASKED)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return larger, total, acc


@triton.jit
def attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    ranges_ptr,
    out_ptr,
    lse_ptr,
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
        m0 = (blocks - 1 - task % blocks) * BLOCK_M  # causal: the last queries have most keys and start first
        b = task // blocks // H
        h = task // blocks % H
        rows = m0 + steps
        there = rows < S
        start, end, sees = row_ranges(ranges_ptr + b * ranges_batch, rows, there, T)
        lo, hi, full_from, full_to = key_blocks(start, end, sees, there, T, BLOCK_N)
        q_base = q_ptr + tl.cast(b, tl.int64) * q_batch + tl.cast(h, tl.int64) * q_head
        k_base = k_ptr + tl.cast(b, tl.int64) * k_batch + tl.cast(h // GROUP, tl.int64) * k_head
        v_base = v_ptr + tl.cast(b, tl.int64) * v_batch + tl.cast(h // GROUP, tl.int64) * v_head
        q = tile(q_base + tl.cast(m0, tl.int64) * q_step, steps, there, q_step, dims, HEAD_DIM, BLOCK_D, True)  # [M, D]
        top = tl.full((BLOCK_M,), _LOWEST, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        for n0 in range(full_from, full_to, BLOCK_N):
            top, total, acc = _attend(
                q, k_base, v_base, n0, k_step, v_step, start, end, T, dims, scale, top, total, acc,
                False, PRECISION, HEAD_DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        # The masked blocks, those before [full_from, full_to) and those after it, in one loop.
        before = (full_from - lo) // BLOCK_N
        after = tl.maximum(hi - full_to + BLOCK_N - 1, 0) // BLOCK_N
        for i in range(0, before + after):
            n0 = tl.where(i < before, lo + i * BLOCK_N, full_to + (i - before) * BLOCK_N)
            top, total, acc = _attend(
                q, k_base, v_base, n0, k_step, v_step, start, end, T, dims, scale, top, total, acc,
                True, PRECISION, HEAD_DIM, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        # log_sum_exp = ln(2) (top + log2(total)); a row without keys has total 0 and gives zeros and -inf.
        safe = tl.where(total > 0.0, total, 1.0)
        lse = tl.where(total > 0.0, (top + tl.log2(safe)) * _LN_2, float("-inf"))
        tl.store(lse_ptr + tl.cast(b * H + h, tl.int64) * S + rows, lse, mask=there)
        acc = acc / safe[:, None]
        out_base = out_ptr + ((tl.cast(b, tl.int64) * S + m0) * H + h) * HEAD_DIM
        at = out_base + steps[:, None] * (H * HEAD_DIM) + dims[None, :]
        tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=there[:, None] & (dims < HEAD_DIM)[None, :])


@triton.jit
def merge(
    out_ptr,
    lse_ptr,
    more_ptr,
    more_lse_ptr,
    joint_ptr,
    joint_lse_ptr,
    tasks,
    S,
    H,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(S, ROWS)
    dims = tl.arange(0, BLOCK_D)
    steps = tl.arange(0, ROWS)
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        m0 = task % blocks * ROWS
        b = task // blocks // H
        h = task // blocks % H
        there = m0 + steps < S
        lse_at = tl.cast(b * H + h, tl.int64) * S + m0 + steps
        # (e^a out + e^c more) / (e^a + e^c), with both exponents relative to the larger one.
        a = tl.load(lse_ptr + lse_at, mask=there, other=0.0)
        c = tl.load(more_lse_ptr + lse_at, mask=there, other=0.0)
        top = tl.maximum(tl.maximum(a, c), _LOWEST)
        first = tl.exp(a - top)
        second = tl.exp(c - top)
        total = first + second
        safe = tl.where(total > 0.0, total, 1.0)
        tl.store(joint_lse_ptr + lse_at, tl.where(total > 0.0, top + tl.log(safe), float("-inf")), mask=there)
        base = ((tl.cast(b, tl.int64) * S + m0) * H + h) * HEAD_DIM
        at = base + steps[:, None] * (H * HEAD_DIM) + dims[None, :]
        seen = there[:, None] & (dims < HEAD_DIM)[None, :]
        out = tl.load(out_ptr + at, mask=seen, other=0.0).to(tl.float32) * (first / safe)[:, None]
        out += tl.load(more_ptr + at, mask=seen, other=0.0).to(tl.float32) * (second / safe)[:, None]
        tl.store(joint_ptr + at, out, mask=seen)


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges, scale: float | None = None, out_f32: bool = False
) -> tuple[Tensor, Tensor]:
    """kernels.reference.attention: q [B, S, H, D], k and v [B, T, K, D] -> (out [B, S, H, D], log_sum_exp [B, H, S]).

    Query heads j*H/K .. (j+1)*H/K - 1 share kv head j. ``key_ranges`` is core.model.visibility.KeyRanges with
    ``ranges`` an int32 tensor [B or 1, S, 2] on the device. out has the dtype of q, or float32 with ``out_f32``;
    log_sum_exp is float32. A row without visible keys gives zeros and -inf. ``scale`` defaults to D**-0.5. The inputs
    may be views with a contiguous last axis. Float32 inputs are multiplied with float32 accuracy. Raises TypeError or
    ValueError naming the wrong argument.
    """
    check_attention(q, k, v, key_ranges)
    q, k, v = heads_of(q), heads_of(k), heads_of(v)
    B, S, H, D = q.shape
    out = torch.empty((B, S, H, D), dtype=torch.float32 if out_f32 else q.dtype, device=q.device)
    log_sum_exp = torch.empty((B, H, S), dtype=torch.float32, device=q.device)
    tiles = tiles_for("attention_forward", q, D=D)
    tasks = triton.cdiv(S, tiles.constants["BLOCK_M"]) * B * H
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "ranges_ptr": key_ranges.ranges.contiguous(),
        "out_ptr": out,
        "lse_ptr": log_sum_exp,
        "tasks": tasks,
        "S": S,
        "T": k.shape[1],
        "H": H,
        "GROUP": H // k.shape[2],
        **strides(q=q, k=k, v=v),
        "ranges_batch": 0 if key_ranges.ranges.shape[0] == 1 else 2 * S,
        "scale": (D**-0.5 if scale is None else scale) * LOG2_E,
    }
    launch(attention_forward, tasks, tiles, arguments, HEAD_DIM=D)
    return out, log_sum_exp


def merge_blocks(out: Tensor, log_sum_exp: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """kernels.reference.merge_blocks: out and more [B, S, H, D], log-sum-exps [B, H, S] float32 -> both, float32.

    Zeros and -inf where neither set has a key. Raises TypeError or ValueError naming the wrong argument.
    """
    check("out", out, (None, None, None, None))
    B, S, H, D = out.shape
    check("log_sum_exp", log_sum_exp, (B, H, S), (torch.float32,), beside=out)
    check("more", more, out.shape, beside=out)
    check("more_lse", more_lse, (B, H, S), (torch.float32,), beside=out)
    joint = torch.empty((B, S, H, D), dtype=torch.float32, device=out.device)
    joint_lse = torch.empty_like(log_sum_exp, memory_format=torch.contiguous_format)
    tiles = tiles_for("attention_rows", out, D=D)
    tasks = triton.cdiv(S, tiles.constants["ROWS"]) * B * H
    arguments = {
        "out_ptr": out.contiguous(),
        "lse_ptr": log_sum_exp.contiguous(),
        "more_ptr": more.contiguous(),
        "more_lse_ptr": more_lse.contiguous(),
        "joint_ptr": joint,
        "joint_lse_ptr": joint_lse,
        "tasks": tasks,
        "S": S,
        "H": H,
    }
    launch(merge, tasks, tiles, arguments, HEAD_DIM=D)
    return joint, joint_lse


def check_attention(q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges) -> None:
    """Raises TypeError or ValueError naming the wrong argument of an attention call."""
    check("q", q, (None, None, None, None))
    B, S, H, D = q.shape
    if D == 0:
        raise ValueError("q: got head dim 0, needs at least 1")
    check("k", k, (B, None, None, D), (q.dtype,), beside=q)
    check("v", v, k.shape, (q.dtype,), beside=q)
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"k: got {k.shape[2]} kv heads, needs a divisor of the {H} heads of q")
    check("key_ranges.ranges", key_ranges.ranges, (None, S, 2), (torch.int32,), beside=q)
    if key_ranges.ranges.shape[0] not in (1, B):
        raise ValueError(f"key_ranges.ranges: got batch {key_ranges.ranges.shape[0]}, needs 1 or {B}")
    if key_ranges.num_keys != k.shape[1]:
        raise ValueError(f"key_ranges.num_keys: got {key_ranges.num_keys}, needs {k.shape[1]}, the length of k")


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of batch, position and head of [B, S, H, D] tensors, under the kernels' argument names."""
    return {
        f"{name}_{axis}": x.stride(i) for name, x in tensors.items() for i, axis in enumerate(("batch", "step", "head"))
    }
