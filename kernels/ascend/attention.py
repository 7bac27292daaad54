"""Attention on Ascend: flash attention with its gradient, merging of blocks, and attention over a cache.

CANN returns the softmax statistics of a row as its maximum and its sum, float32, each stored 8 times; log_sum_exp =
maximum + log(sum). The gradient is called with softmax_max = log_sum_exp and softmax_sum = 1: the same softmax,
exp(score - log_sum_exp) / 1, also for the final log_sum_exp of a ring. B batch, S queries, T keys, H heads,
K kv heads, D head dim.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from telechat_twins.core.model.visibility import KeyRanges, causal_ranges
from telechat_twins.kernels.ascend import calls as cann
from telechat_twins.kernels.ascend import visibility as visibility

LANES = 8  # copies of each softmax statistic in CANN's layout
HEAD_STEP = 16  # D must be a multiple; other heads are padded with zeros, which leave scores unchanged
HALVES = (ms.float16, ms.bfloat16)
_TINY = 2.0**-126  # the smallest normal float32: divisor where a gradient row, and thus its delta, is zero
_NO_KEYS = -1.0e30  # log_sum_exp of a row without keys, where -inf would give NaN


class _Call(NamedTuple):
    """A visibility.Plan with its tensors on the device.

    ``seeing``: bool [B or 1, S], False for a query without visible keys. ``order``: int32 [B * S * H] of
    visibility.statistic_order; ``back``: its inverse.
    """

    plan: visibility.Plan
    mask: Tensor | None
    seeing: Tensor | None
    order: Tensor | None
    back: Tensor | None


class AscendRanges:
    """KeyRanges for ``attention``, made once per forward pass; masks and lengths are cached by batch and heads."""

    def __init__(self, key_ranges: KeyRanges) -> None:
        self.key_ranges = key_ranges
        self._calls: dict[tuple[int, int], _Call] = {}

    def prepared(self, batch: int, num_heads: int) -> _Call:
        if (batch, num_heads) not in self._calls:
            self._calls[batch, num_heads] = _prepare(visibility.plan(self.key_ranges, batch), num_heads)
        return self._calls[batch, num_heads]


def device_ranges(key_ranges: KeyRanges) -> AscendRanges:
    """The form of ``key_ranges`` that ``attention`` and ``attention_backward`` take."""
    return AscendRanges(key_ranges)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: AscendRanges | KeyRanges,
    scale: float | None = None,
    out_f32: bool = False,
) -> tuple[Tensor, Tensor]:
    """q [B, S, H, D], k and v [B, T, K, D] -> out [B, S, H, D] in q's dtype, log_sum_exp [B, H, S] float32.

    ``scale`` defaults to D^-0.5. With ``out_f32`` out is float32 with the precision of q's dtype: the operator rounds.
    A single query that attends to all keys (decoding) uses the inference operator, which lacks float32. A row without
    visible keys gives zeros and -inf. Raises TypeError for dtypes, ValueError for shapes.
    """
    _check(q, k, v, key_ranges)
    B, S, H, D = q.shape
    if k.shape[1] == 0:
        return ops.zeros(q.shape, ms.float32 if out_f32 else q.dtype), ops.full((B, H, S), -np.inf, dtype=ms.float32)
    made = _ranges(key_ranges).prepared(B, H)
    if S == 1 and made.plan.sparse_mode == visibility.ALL and q.dtype in HALVES:
        out, log_sum_exp = _infer(q, k, v, k.shape[1], scale, True)
        return (ops.cast(out, ms.float32) if out_f32 else out), log_sum_exp.reshape(B, H, S)
    query, key, value = (_laid_out(x, made) for x in (q, k, v))
    options = _options(made, H, D, scale)
    top, total, _, out = cann.flash_attention(query, key, value, made.mask, *_lengths(made), **options)
    out = out.reshape(B, S, H, -1)[..., :D]
    if made.order is None:  # BSND: statistics [B, H, S, 8]
        log_sum_exp = top[..., 0] + ops.log(total[..., 0])
    else:  # TND: [H, S, 8] of each document in turn
        flat = (top.reshape(-1, LANES)[:, 0] + ops.log(total.reshape(-1, LANES)[:, 0]))[made.order]
        log_sum_exp = ops.transpose(flat.reshape(B, S, H), (0, 2, 1))
    if made.seeing is not None:
        seen = ops.broadcast_to(made.seeing, (B, S))
        wide = ops.cast(out, ms.float32)  # ops.where supports float32 on every device
        out = ops.cast(ops.where(seen[:, :, None, None], wide, ops.zeros_like(wide)), out.dtype)
        log_sum_exp = ops.where(seen[:, None], log_sum_exp, ops.full_like(log_sum_exp, -np.inf))
    return (ops.cast(out, ms.float32) if out_f32 else out), log_sum_exp


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: AscendRanges | KeyRanges,
    out: Tensor | None,
    log_sum_exp: Tensor,
    scale: float | None = None,
    delta: Tensor | None = None,
    out_f32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k and v, or, rounded to these first, in float32 with ``out_f32``.

    ``out`` and ``log_sum_exp`` [B, H, S] may be the final ones of a ring. CANN computes delta = sum(grad * out) over D
    itself; from ``delta`` [B, H, S] alone, an ``out`` with the same sum is constructed.
    """
    _check(q, k, v, key_ranges)
    if out is None:
        if delta is None:
            raise ValueError("delta: got None without out, needs one of the two")
        out = _output_of(grad, delta)
    for name, x in (("grad", grad), ("out", out)):
        if x.shape != q.shape:
            raise ValueError(f"{name}: {x.shape}; needs the shape of q, {q.shape}")
    B, S, H, D = q.shape
    if log_sum_exp.shape != (B, H, S):
        raise ValueError(f"log_sum_exp: {log_sum_exp.shape}; needs {(B, H, S)}")
    if k.shape[1] == 0:
        gradients: tuple[Tensor, ...] = tuple(ops.zeros_like(x) for x in (q, k, v))
    else:
        made = _ranges(key_ranges).prepared(B, H)
        # A row without keys: its scores are about -1e30, so softmax_max = 0 gives weights 0, and -1e30 weights 1.
        top = ops.cast(log_sum_exp, ms.float32)
        top = ops.where(top > 0.5 * _NO_KEYS, top, ops.zeros_like(top))
        if made.back is None:
            top = _lanes(top)
        else:
            top = _lanes(ops.transpose(top, (0, 2, 1)).reshape(-1)[made.back]).reshape(B * S, H, LANES)
        queries, keys, values, dy, attention_in = (_laid_out(ops.cast(x, q.dtype), made) for x in (q, k, v, grad, out))
        statistics = (top, ops.ones_like(top))
        results = cann.flash_attention_grad(
            queries,
            keys,
            values,
            dy,
            made.mask,
            *statistics,
            attention_in,
            *_lengths(made),
            **_options(made, H, D, scale),
        )
        whole = zip(results[:3], (q, k, v), strict=True)
        gradients = tuple(d.reshape(*x.shape[:3], -1)[..., :D] for d, x in whole)
    return tuple(ops.cast(d, ms.float32) for d in gradients) if out_f32 else gradients  # type: ignore[return-value]


def merge_blocks(out: Tensor, log_sum_exp: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys: out and more [B, S, H, D] float32, log-sum-exps [B, H, S].

    Zeros and -inf where neither set has a key.
    """
    for name, x, wanted in (("more", more, out.shape), ("more_lse", more_lse, log_sum_exp.shape)):
        if x.shape != wanted:
            raise ValueError(f"{name}: {x.shape}; needs {wanted}")
    B, S, H, D = out.shape
    if log_sum_exp.shape != (B, H, S):
        raise ValueError(f"log_sum_exp: {log_sum_exp.shape}; needs {(B, H, S)}")
    first, second = (ops.transpose(x, (1, 0, 2, 3)).reshape(S, B, H * D) for x in (out, more))
    top, other = (_lanes(_finite(x)) for x in (log_sum_exp, more_lse))
    one = ops.ones_like(top)
    merged, top, total = cann.ring_attention_update(first, top, one, second, other, one, "SBH")
    joint = top[..., 0] + ops.log(total[..., 0])
    joint = ops.where(joint > 0.5 * _NO_KEYS, joint, ops.full_like(joint, -np.inf))
    return ops.transpose(merged.reshape(S, B, H, D), (1, 0, 2, 3)), joint


def cached_attention(q: Tensor, k: Tensor, v: Tensor, length: int, scale: float | None = None) -> Tensor:
    """Causal attention of the last S of ``length`` positions over a cache k, v [B, capacity, K, D] with ``length``
    filled rows; q [B, S, H, D] -> [B, S, H, D].

    In float16 and bfloat16 one operator reads the cache in place; in float32, and for several queries with D not a
    multiple of 16, ``attention`` takes the filled part.
    """
    B, S, H, D = q.shape
    if not S <= length <= k.shape[1]:
        raise ValueError(f"length: {length}; needs {S} to {k.shape[1]}, the queries and the capacity of the cache")
    if q.dtype not in HALVES or (S > 1 and D % HEAD_STEP):
        return attention(q, k[:, :length], v[:, :length], causal_ranges(S, length), scale)[0]
    _check(q, k, v, None)
    return _infer(q, k, v, length, scale, False)[0]


def store_rows(pages: Tensor, x: Tensor, slots: Tensor) -> None:
    """Write rows x [N, K, D] to pages [P, size, K, D], in place: row i at slots[i] = page * size + place, int64 [N]."""
    width = x.shape[1] * x.shape[2]
    cann.index_copy(pages.view(-1, width), 0, slots, x.reshape(-1, width))


def takes_pages(pages: Tensor) -> bool:
    """Whether ``single_queries`` can read pages [P, size, K, D] in place: CANN's limits for block tables."""
    _, size, K, D = pages.shape
    return pages.dtype in HALVES and size % 16 == 0 and size <= 512 and K * D <= 65536 and pages.size < 2**31


def single_queries(q: Tensor, k_pages: Tensor, v_pages: Tensor, lengths: list[int], tables: Tensor) -> Tensor:
    """Attention of one query per sequence, q [R, 1, H, D], over the first lengths[r] keys in pages [P, size, K, D] by
    page tables [R, M]."""
    _, size, K, D = k_pages.shape
    keys, values = (pages.reshape(-1, size, K * D) for pages in (k_pages, v_pages))
    return cann.fused_infer_attention(
        q, keys, values, None, [1] * len(lengths), lengths, q.shape[2], D**-0.5, "BSND", K, 0, False, tables, size
    )[0]


@cache
def triangle() -> Tensor:
    """The compressed causal mask, 4 MiB, made once per process."""
    return Tensor(visibility.triangle())


def _infer(
    q: Tensor, k: Tensor, v: Tensor, length: int, scale: float | None, log_sum_exp: bool
) -> tuple[Tensor, Tensor]:
    """The inference operator, which divides long key sequences over the cores; the training operator does not."""
    B, S, H, D = q.shape
    return cann.fused_infer_attention(
        q,
        k,
        v,
        None if S == 1 else triangle(),
        [S] * B,
        [length] * B,
        H,
        D**-0.5 if scale is None else scale,
        "BSND",
        k.shape[2],
        visibility.ALL if S == 1 else visibility.LAST_SEES_LAST,
        log_sum_exp,
    )


def _prepare(plan: visibility.Plan, num_heads: int) -> _Call:
    mask = seeing = order = back = None
    if plan.sparse_mode == visibility.LAST_SEES_LAST:
        mask = triangle()
    elif plan.mask is not None:
        mask = Tensor(plan.mask[0] if len(plan.mask) == 1 else plan.mask[:, None])
    if plan.blind is not None:
        seeing = Tensor(~plan.blind)
    if plan.query_ends is not None:
        where = visibility.statistic_order(plan.query_ends, num_heads)
        order, back = Tensor(where), Tensor(np.argsort(where).astype(np.int32))
    return _Call(plan, mask, seeing, order, back)


def _ranges(key_ranges: AscendRanges | KeyRanges) -> AscendRanges:
    return key_ranges if isinstance(key_ranges, AscendRanges) else AscendRanges(key_ranges)


def _laid_out(x: Tensor, made: _Call) -> Tensor:
    """x [B, S, H, D] with D padded to HEAD_STEP, in the layout BSND or TND."""
    rest = -x.shape[3] % HEAD_STEP
    if rest:
        x = ops.concat((x, ops.zeros((*x.shape[:3], rest), x.dtype)), -1)
    return x if made.plan.layout == "BSND" else x.reshape(-1, *x.shape[2:])


def _lengths(made: _Call) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    return made.plan.query_ends, made.plan.key_ends


def _options(made: _Call, num_heads: int, head_dim: int, scale: float | None) -> dict[str, Any]:
    return {
        "head_num": num_heads,
        "scale_value": head_dim**-0.5 if scale is None else scale,
        "input_layout": made.plan.layout,
        "sparse_mode": made.plan.sparse_mode,
    }


def _lanes(x: Tensor) -> Tensor:
    """x [...] repeated to [..., LANES]."""
    return ops.broadcast_to(x.reshape(*x.shape, 1), (*x.shape, LANES))


def _output_of(grad: Tensor, delta: Tensor) -> Tensor:
    """An output o = grad * delta / sum(grad^2): sum(grad * o) over D is delta, all that the gradient uses of it."""
    wide = ops.cast(grad, ms.float32)
    squares = (wide * wide).sum(-1, keepdims=True)
    rows = ops.transpose(delta, (0, 2, 1)).reshape(squares.shape)
    return wide * (rows / ops.maximum(squares, Tensor(_TINY, ms.float32)))


def _finite(log_sum_exp: Tensor) -> Tensor:
    return ops.maximum(ops.cast(log_sum_exp, ms.float32), Tensor(_NO_KEYS, ms.float32))


def _check(q: Tensor, k: Tensor, v: Tensor, key_ranges: AscendRanges | KeyRanges | None) -> None:
    if q.dtype not in (*HALVES, ms.float32):
        raise TypeError(f"q: {q.dtype}; needs float16, bfloat16 or float32")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: {x.dtype}; needs the dtype of q, {q.dtype}")
        if x.ndim != 4 or x.shape != k.shape or (x.shape[0], x.shape[3]) != (q.shape[0], q.shape[3]):
            raise ValueError(f"{name}: {x.shape}; needs [B, T, K, D] with B and D of q {q.shape}")
    H, K = q.shape[2], k.shape[2]
    if H % K:
        raise ValueError(f"q: {H} heads; needs a multiple of the {K} heads of k")
    if key_ranges is None:
        return
    host = key_ranges.key_ranges if isinstance(key_ranges, AscendRanges) else key_ranges
    if host.ranges.shape[1] != q.shape[1] or host.num_keys != k.shape[1]:
        found = (host.ranges.shape[1], host.num_keys)
        raise ValueError(f"key_ranges: for {found} queries and keys; needs {(q.shape[1], k.shape[1])}")
