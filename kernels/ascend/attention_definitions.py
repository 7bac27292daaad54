"""Numpy definitions of CANN's attention operators: documented layouts of operands and softmax statistics, and masks.

On the device a masked score is a large negative number, not minus infinity, so a row whose keys are all masked gives
the mean of the values, here too: a caller that needs zeros must set them. docs/ascend.md names the sources; argument
names are those of kernels.ascend.calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

from telechat_twins.kernels.ascend.operands import HALVES, Operand, floats, need, same_dtype, same_shape

_Lengths = tuple[list[int], list[int]]  # ends of the documents among queries and keys; both empty for BSND

_MASKED = -1.0e30
_COMPRESSED = (2048, 2048)  # the mask of sparse modes 2 and 3, for every S and T
_LANES = 8  # copies of each softmax statistic
_MOST_HEADS, _MOST_DOCUMENTS, _LARGEST_HEAD = 256, 1024, 512


class _Part(NamedTuple):
    """Queries and keys of one document; ``hidden``: bool, broadcast to [B, N, S, T], or None."""

    batch: slice
    queries: slice
    keys: slice
    hidden: Array | None


def fusion_attention(
    query: Operand,
    key: Operand,
    value: Operand,
    attn_mask: Operand | None,
    actual_seq_qlen: Sequence[int] | None,
    actual_seq_kvlen: Sequence[int] | None,
    head_num: int,
    scale_value: float,
    input_layout: str,
    sparse_mode: int,
    softmax_layout: str = "",
) -> tuple[Operand, Operand, Operand, Operand]:
    """(softmax_max, softmax_sum, empty, attention_out).

    BSND: statistics [B, N, S, 8]. TND: the declared shape is [T, N, 8], but memory holds [N, S, 8] of each document in
    turn; with ``softmax_layout`` "TND", which only torch_npu has, memory has the declared order.
    """
    lengths = (list(actual_seq_qlen or ()), list(actual_seq_kvlen or ()))
    q, k, v = _check(query, key, value, attn_mask, lengths, head_num, input_layout, sparse_mode)
    out = np.zeros_like(q)
    tops, sums = [], []
    for part in _parts(q, k, attn_mask, lengths, input_layout, sparse_mode):
        scores = _scores(q, k, part, scale_value)
        top = scores.max(-1, keepdims=True) if scores.shape[-1] else np.full((*scores.shape[:-1], 1), _MASKED)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out[part.batch, part.queries] = np.einsum(
            "bhst,bthd->bshd", weights / np.where(total == 0.0, 1.0, total), _spread(v[part.batch, part.keys], head_num)
        )
        tops.append(top)
        sums.append(total)
    need(softmax_layout in ("", input_layout), "softmax_layout", softmax_layout, f'"" or {input_layout}')
    if softmax_layout == "TND":
        tops, sums = ([x.transpose(0, 2, 1, 3) for x in parts] for parts in (tops, sums))
    statistics = (Operand(_stored(parts, query, input_layout), "float32") for parts in (tops, sums))
    softmax_max, softmax_sum = statistics
    nothing = Operand(np.zeros(0), query.dtype)
    return softmax_max, softmax_sum, nothing, Operand(out.reshape(query.value.shape), query.dtype)


def fusion_attention_grad(
    query: Operand,
    key: Operand,
    value: Operand,
    dy: Operand,
    attn_mask: Operand | None,
    softmax_max: Operand,
    softmax_sum: Operand,
    attention_in: Operand,
    actual_seq_qlen: Sequence[int] | None,
    actual_seq_kvlen: Sequence[int] | None,
    head_num: int,
    scale_value: float,
    input_layout: str,
    sparse_mode: int,
    softmax_layout: str = "",
) -> tuple[Operand, Operand, Operand, Operand]:
    """(dq, dk, dv, empty) from the given statistics: P = exp(scores - softmax_max) / softmax_sum."""
    lengths = (list(actual_seq_qlen or ()), list(actual_seq_kvlen or ()))
    q, k, v = _check(query, key, value, attn_mask, lengths, head_num, input_layout, sparse_mode)
    same_dtype(query=query, dy=dy, attention_in=attention_in)
    same_shape(query=query, dy=dy, attention_in=attention_in)
    parts = list(_parts(q, k, attn_mask, lengths, input_layout, sparse_mode))
    B, S, N, D = q.shape
    need(softmax_layout in ("", input_layout), "softmax_layout", softmax_layout, f'"" or {input_layout}')
    wanted = (B, N, S, _LANES) if input_layout == "BSND" else (S, N, _LANES)
    for name, statistic in (("softmax_max", softmax_max), ("softmax_sum", softmax_sum)):
        if statistic.dtype != "float32":
            raise TypeError(f"{name}: {statistic.dtype}; needs float32")
        need(statistic.value.shape == wanted, name, statistic.value.shape, f"the shape {wanted}")
    grad, out = dy.value.reshape(q.shape), attention_in.value.reshape(q.shape)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    K = k.shape[2]
    at = 0
    for part in parts:
        scores = _scores(q, k, part, scale_value)
        rows = scores.shape[2]
        if input_layout == "BSND":
            top, total = softmax_max.value[..., :1], softmax_sum.value[..., :1]
        else:
            flat = (x.value.reshape(-1, _LANES)[at : at + N * rows, :1] for x in (softmax_max, softmax_sum))
            if softmax_layout == "TND":
                top, total = (x.reshape(1, rows, N, 1).transpose(0, 2, 1, 3) for x in flat)
            else:
                top, total = (x.reshape(1, N, rows, 1) for x in flat)
            at += N * rows
        weights = np.exp(scores - top) / total
        part_grad = grad[part.batch, part.queries]
        part_q, part_k, part_v = q[part.batch, part.queries], k[part.batch, part.keys], v[part.batch, part.keys]
        delta = np.einsum("bshd,bshd->bhs", part_grad, out[part.batch, part.queries])[..., None]
        d_weights = np.einsum("bshd,bthd->bhst", part_grad, _spread(part_v, N))
        d_scores = weights * (d_weights - delta) * scale_value
        dq[part.batch, part.queries] = np.einsum("bhst,bthd->bshd", d_scores, _spread(part_k, N))
        dk[part.batch, part.keys] += _gathered(np.einsum("bhst,bshd->bthd", d_scores, part_q), K)
        dv[part.batch, part.keys] += _gathered(np.einsum("bhst,bshd->bthd", weights, part_grad), K)
    d_query, d_key, d_value = (
        Operand(d.reshape(x.value.shape), x.dtype) for d, x in ((dq, query), (dk, key), (dv, value))
    )
    return d_query, d_key, d_value, Operand(np.zeros(0), query.dtype)


def ring_update(
    prev_attn_out: Operand,
    prev_softmax_max: Operand,
    prev_softmax_sum: Operand,
    cur_attn_out: Operand,
    cur_softmax_max: Operand,
    cur_softmax_sum: Operand,
    layout: str,
) -> tuple[Operand, Operand, Operand]:
    """attn_out [S, B, N * D] and statistics [B, N, S, 8] of the union of two blocks."""
    need(layout == "SBH", "layout", layout, "SBH, the layout that is used here")
    floats(prev_attn_out=prev_attn_out)
    same_dtype(prev_attn_out=prev_attn_out, cur_attn_out=cur_attn_out)
    same_shape(prev_attn_out=prev_attn_out, cur_attn_out=cur_attn_out)
    statistics = {
        "prev_softmax_max": prev_softmax_max,
        "prev_softmax_sum": prev_softmax_sum,
        "cur_softmax_max": cur_softmax_max,
        "cur_softmax_sum": cur_softmax_sum,
    }
    for name, statistic in statistics.items():
        if statistic.dtype != "float32":
            raise TypeError(f"{name}: {statistic.dtype}; needs float32")
    same_shape(**statistics)
    S, B, H = prev_attn_out.value.shape
    shape = prev_softmax_max.value.shape
    fits = len(shape) == 4 and shape[0] == B and shape[2:] == (S, _LANES) and H % shape[1] == 0
    need(fits, "prev_softmax_max", shape, f"the shape ({B}, heads, {S}, {_LANES}) for an output {(S, B, H)}")
    for name, statistic in statistics.items():
        need(bool(np.all(statistic.value == statistic.value[..., :1])), name, "unequal lanes", "eight equal ones")
        need(bool(np.all(np.isfinite(statistic.value))), name, "an infinity or NaN", "finite numbers")
    top = np.maximum(prev_softmax_max.value, cur_softmax_max.value)
    first = prev_softmax_sum.value * np.exp(prev_softmax_max.value - top)
    second = cur_softmax_sum.value * np.exp(cur_softmax_max.value - top)
    total = first + second

    def weighed(out: Operand, weight: Array) -> Array:
        rows = weight[..., 0].transpose(2, 0, 1)[..., None]  # [S, B, N, 1]
        return out.value.reshape(S, B, shape[1], -1) * rows

    out = weighed(prev_attn_out, first / total) + weighed(cur_attn_out, second / total)
    return Operand(out.reshape(S, B, H), prev_attn_out.dtype), Operand(top, "float32"), Operand(total, "float32")


def fused_infer_attention(
    query: Operand,
    key: Operand,
    value: Operand,
    atten_mask: Operand | None,
    actual_seq_lengths: Sequence[int],
    actual_seq_lengths_kv: Sequence[int],
    num_heads: int,
    scale: float,
    input_layout: str,
    num_key_value_heads: int,
    sparse_mode: int,
    softmax_lse_flag: bool,
    block_table: Operand | None = None,
    block_size: int = 0,
) -> tuple[Operand, Operand]:
    """(attention_out, log_sum_exp [B, N, S, 1] or one zero). Keys beyond a row's actual length are not read."""
    same_dtype(query=query, key=key, value=value)
    if query.dtype not in HALVES:
        raise TypeError(f"query: {query.dtype}; needs one of {', '.join(HALVES)}")
    need(input_layout == "BSND", "input_layout", input_layout, "BSND, the layout that is used here")
    B, S, N, D = query.value.shape
    same_shape(key=key, value=value)
    if block_table is not None:
        need(S == 1, "query", query.value.shape, "one query per row with a block_table")
        key, value = (_from_blocks(x, block_table, block_size, num_key_value_heads, D) for x in (key, value))
    need(num_heads == N, "num_heads", num_heads, f"{N}, the heads of the query")
    K = key.value.shape[2]
    need(num_key_value_heads == K, "num_key_value_heads", num_key_value_heads, f"{K}, the heads of the key")
    need(N % K == 0 and N // K <= 64, "num_heads", N, f"a multiple of {K}, 64 times at most")
    need(key.value.shape[::3] == (B, D), "key", key.value.shape, f"B and D of the query, {(B, D)}")
    need(N <= _MOST_HEADS and D <= _LARGEST_HEAD, "query", query.value.shape, "N <= 256 and D <= 512")
    capacity = key.value.shape[1]
    need(
        len(actual_seq_lengths_kv) == B and all(0 <= n <= capacity for n in actual_seq_lengths_kv),
        "actual_seq_lengths_kv",
        list(actual_seq_lengths_kv),
        f"{B} lengths up to {capacity}",
    )
    if S == 1:
        need(atten_mask is None, "atten_mask", "a mask", "None for one query, which sees all keys")
    else:
        need(list(actual_seq_lengths) == [S] * B, "actual_seq_lengths", list(actual_seq_lengths), f"{B} times {S}")
        need(D % 16 == 0, "query", query.value.shape, "D a multiple of 16 for more than one query")
        need(N * D < 65535, "query", query.value.shape, "N * D below 65535 in the layout BSND")
        need(sparse_mode == 3, "sparse_mode", sparse_mode, "3: the last query sees the last key")
        _check_compressed("atten_mask", atten_mask)
    out, log_sum_exp = np.zeros_like(query.value), np.zeros((B, N, S, 1))
    for row, length in enumerate(actual_seq_lengths_kv):
        hidden = None if S == 1 else ~np.tri(S, length, length - S, dtype=bool)[None, None]
        part = _Part(slice(row, row + 1), slice(None), slice(length), hidden)
        scores = _scores(query.value, key.value, part, scale)
        top = scores.max(-1, keepdims=True)
        total = np.exp(scores - top).sum(-1, keepdims=True)
        weights, log_sum_exp[part.batch] = np.exp(scores - top) / total, top + np.log(total)
        out[part.batch] = np.einsum("bhst,bthd->bshd", weights, _spread(value.value[part.batch, part.keys], N))
    return Operand(out, query.dtype), Operand(log_sum_exp if softmax_lse_flag else np.zeros(1), "float32")


def _from_blocks(blocks: Operand, table: Operand, size: int, heads: int, head_dim: int) -> Operand:
    """Rows [B, M * size, heads, head_dim] gathered from blocks [P, size, heads * head_dim] by a table [B, M]."""
    need(size % 16 == 0 and 0 < size <= 512, "block_size", size, "a multiple of 16, 512 at most")
    need(table.dtype == "int32" and table.value.ndim == 2, "block_table", table.dtype, "int32 [B, blocks of a row]")
    width = heads * head_dim
    need(blocks.value.shape[1:] == (size, width), "key", blocks.value.shape, f"[P, {size}, {width}]")
    need(width <= 65536, "num_key_value_heads", heads, "times D 65536 at most in the layout of blocks")
    need(blocks.value.size < 2**31, "key", blocks.value.shape, "fewer than 2^31 elements")
    need(bool((table.value >= 0).all() and (table.value < len(blocks.value)).all()), "block_table", "a block", "inside")
    rows = blocks.value[table.value].reshape(len(table.value), -1, heads, head_dim)
    return Operand(rows, blocks.dtype)


def _check(
    query: Operand,
    key: Operand,
    value: Operand,
    mask: Operand | None,
    lengths: _Lengths,
    head_num: int,
    layout: str,
    sparse_mode: int,
) -> tuple[Array, Array, Array]:
    """The three values as [B, S, N, D], with B = 1 for TND."""
    floats(query=query)
    same_dtype(query=query, key=key, value=value)
    same_shape(key=key, value=value)
    axes = {"BSND": 4, "TND": 3}
    need(layout in axes, "input_layout", layout, "BSND or TND, the layouts that are used here")
    for name, operand in (("query", query), ("key", key)):
        need(operand.value.ndim == axes[layout], name, operand.value.shape, f"{axes[layout]} axes for {layout}")
    q, k, v = (x.value if layout == "BSND" else x.value[None] for x in (query, key, value))
    B, S, N, D = q.shape
    T, K = k.shape[1:3]
    need(head_num == N, "head_num", head_num, f"{N}, the heads of the query")
    need(N % K == 0 and N <= _MOST_HEADS, "head_num", N, f"a multiple of {K}, the heads of the key, up to 256")
    need(k.shape[0] == B and k.shape[3] == D, "key", key.value.shape, f"B and D of the query, {(B, D)}")
    need(D % 16 == 0 and D <= _LARGEST_HEAD, "query", query.value.shape, "D a multiple of 16, up to 512")
    if layout == "TND":
        need(sparse_mode in (2, 3), "sparse_mode", sparse_mode, "2 or 3 for TND")
        for name, ends, rows in (("actual_seq_qlen", lengths[0], S), ("actual_seq_kvlen", lengths[1], T)):
            grows = bool(ends) and all(a <= b for a, b in zip((0, *ends), ends, strict=False)) and ends[-1] == rows
            need(grows, name, ends, f"sums of lengths that grow to {rows}")
        need(len(lengths[0]) == len(lengths[1]), "actual_seq_kvlen", len(lengths[1]), f"{len(lengths[0])} of them")
        need(len(lengths[0]) <= _MOST_DOCUMENTS, "actual_seq_qlen", len(lengths[0]), f"{_MOST_DOCUMENTS} at most")
        need(all(np.diff((0, *lengths[1])) > 0), "actual_seq_kvlen", lengths[1], "no document without keys")
    else:
        need(lengths == ([], []), "actual_seq_qlen", lengths[0], f"None for {layout}")
    if sparse_mode in (2, 3):
        _check_compressed("attn_mask", mask)
    elif mask is None:
        need(sparse_mode == 0, "sparse_mode", sparse_mode, "0 without a mask")
    else:
        need(sparse_mode in (0, 1), "sparse_mode", sparse_mode, "0 to 3, the modes that are used here")
        _check_mask_dtype("attn_mask", mask)
        allowed = ((B, N, S, T), (B, 1, S, T), (S, T))
        need(mask.value.shape in allowed, "attn_mask", mask.value.shape, f"one of {allowed}")
    return q, k, v


def _check_compressed(name: str, mask: Operand | None) -> None:
    """Check of the mask of sparse modes 2 and 3, the same for every S and T: True above the diagonal."""
    if mask is None:
        raise ValueError(f"{name}: None; needs the compressed mask {_COMPRESSED}")
    _check_mask_dtype(name, mask)
    need(mask.value.shape == _COMPRESSED, name, mask.value.shape, f"the compressed mask {_COMPRESSED}")
    triangle = np.triu(np.ones(_COMPRESSED, bool), 1)
    need(bool(np.array_equal(mask.value.astype(bool), triangle)), name, "other values", "True above the diagonal")


def _check_mask_dtype(name: str, mask: Operand) -> None:
    if mask.dtype not in ("bool", "uint8"):
        raise TypeError(f"{name}: {mask.dtype}; needs bool or uint8")


def _parts(
    q: Array,
    k: Array,
    mask: Operand | None,
    lengths: _Lengths,
    layout: str,
    sparse_mode: int,
) -> Iterator[_Part]:
    spans = [(0, q.shape[1], 0, k.shape[1])]
    if layout == "TND":
        spans = list(zip((0, *lengths[0]), lengths[0], (0, *lengths[1]), lengths[1], strict=False))
    for q_begin, q_end, k_begin, k_end in spans:
        S, T = q_end - q_begin, k_end - k_begin
        hidden: Array | None
        if sparse_mode in (2, 3):
            hidden = ~np.tri(S, T, T - S if sparse_mode == 3 else 0, dtype=bool)[None, None]
        else:
            hidden = None if mask is None else mask.value.astype(bool)  # [S, T] or [B, 1 or N, S, T]
        yield _Part(slice(None), slice(q_begin, q_end), slice(k_begin, k_end), hidden)


def _scores(q: Array, k: Array, part: _Part, scale: float) -> Array:
    """Scores [B, N, S, T] of a part."""
    keys = _spread(k[part.batch, part.keys], q.shape[2])
    scores = np.einsum("bshd,bthd->bhst", q[part.batch, part.queries], keys) * scale
    return scores if part.hidden is None else np.where(part.hidden, _MASKED, scores)


def _stored(parts: list[Array], query: Operand, layout: str) -> Array:
    """Statistics [B, N, S, 1] of the parts in the operator's layout."""
    if layout == "BSND":
        return np.repeat(parts[0], _LANES, -1)
    flat = np.concatenate([part.reshape(-1, 1) for part in parts])
    return np.repeat(flat, _LANES, -1).reshape(*query.value.shape[:2], _LANES)


def _spread(kv: Array, num_heads: int) -> Array:
    return np.repeat(kv, num_heads // kv.shape[2], 2)


def _gathered(d: Array, num_kv_heads: int) -> Array:
    B, T, N, D = d.shape
    return d.reshape(B, T, num_kv_heads, N // num_kv_heads, D).sum(3)
