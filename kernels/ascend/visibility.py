"""Visible keys in the forms of CANN's attention: a sparse mode with the compressed mask, document lengths, or a mask.

On the host and in numpy, for MindSpore and torch_npu.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from telechat_twins.core.model.visibility import KeyRanges

COMPRESSED = 2048  # side of the triangular mask that sparse modes 2 and 3 read, for every length
ALL, MASK, LAST_SEES_LAST = 0, 1, 3  # sparse_mode: no mask; the mask given; causal, last query aligned to last key
MAX_DOCUMENTS = 1024  # of one TND call


class Plan(NamedTuple):
    """Arguments of one call. ``layout``: BSND, or TND with the ends of the documents among all B * S queries and B * T
    keys. ``mask`` bool [B or 1, S, T], True where a key is hidden. ``blind`` bool [B or 1, S]: queries without visible
    keys, or None."""

    layout: str
    sparse_mode: int
    query_ends: tuple[int, ...] | None
    key_ends: tuple[int, ...] | None
    mask: np.ndarray | None
    blind: np.ndarray | None


def triangle() -> np.ndarray:
    """bool [2048, 2048], True (hidden) above the diagonal."""
    return np.triu(np.ones((COMPRESSED, COMPRESSED), bool), 1)


def plan(key_ranges: KeyRanges, batch: int) -> Plan:
    """The call for ``batch`` rows. More than MAX_DOCUMENTS documents are expressed as a mask."""
    ranges, T, kind = key_ranges
    rows, S = ranges.shape[:2]
    if rows not in (1, batch):
        raise ValueError(f"key_ranges: {rows} rows for a batch of {batch}; needs 1 or {batch}")
    if kind == "full" or (kind == "causal" and S == T == 1):
        return Plan("BSND", ALL, None, None, None, None)
    if kind == "causal":
        return Plan("BSND", LAST_SEES_LAST, None, None, None, None)
    if kind == "documents":
        query_ends, key_ends = _document_ends(np.broadcast_to(ranges, (batch, S, 2)), T)
        if len(query_ends) <= MAX_DOCUMENTS:
            return Plan("TND", LAST_SEES_LAST, query_ends, key_ends, None, None)
    keys = np.arange(T)
    hidden = (keys < ranges[..., :1]) | (keys >= ranges[..., 1:])
    blind = hidden.all(-1)
    return Plan("BSND", MASK, None, None, hidden, blind if blind.any() else None)


def _document_ends(ranges: np.ndarray, num_keys: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """End of each document among the concatenated queries and among the concatenated keys of all rows.

    Keys before a row's first visible key form a document without queries.
    """
    query_ends, key_ends = [], []
    for row, (first, last) in enumerate(ranges.transpose(0, 2, 1)):
        S = len(first)
        ends = [*(np.flatnonzero(first[1:] != first[:-1]) + 1), S]
        if first[0] > 0:
            query_ends.append(row * S)
            key_ends.append(row * num_keys + int(first[0]))
        query_ends.extend(row * S + int(end) for end in ends)
        key_ends.extend(row * num_keys + int(last[end - 1]) for end in ends)
    return tuple(query_ends), tuple(key_ends)


def statistic_order(query_ends: tuple[int, ...], num_heads: int) -> np.ndarray:
    """int32 [T * N]: position in a TND result of the softmax statistic of query t and head n, at index t * N + n.

    The result is the concatenation of one [N, S, 8] per document.
    """
    order = np.empty((query_ends[-1], num_heads), np.int32)
    begin = 0
    for end in query_ends:
        size = end - begin
        order[begin:end] = begin * num_heads + np.arange(size)[:, None] + size * np.arange(num_heads)
        begin = end
    return order.reshape(-1)
