"""Attention visibility: the key positions that each query position may attend to.

Causal attention inside documents lets every query see one run of keys, so two numbers a query say all of it
(``KeyRanges``): what fused operators take. For composite ones there are blocks with small masks; the full S x S mask is
never made: queries come in blocks, and a block needs only the keys up to its last row, which also halves the work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np


class KeyRanges(NamedTuple):
    """Query i of row b sees keys [ranges[b, i, 0], ranges[b, i, 1]) of ``num_keys``; ranges int32 [B or 1, S, 2].

    ``kind`` names the mode that a fused operator may use instead: "full" (every key), "causal" (the queries are
    the last S of the keys), "documents" (causal inside documents), "ranges" (anything else).
    """

    ranges: np.ndarray
    num_keys: int
    kind: str


def causal_ranges(num_queries: int, num_keys: int, doc_ids: np.ndarray | None = None) -> KeyRanges:
    """Causal visibility of the last ``num_queries`` of ``num_keys`` positions, inside documents if these are given.

    doc_ids [B, num_keys]: every document is one run of its id; ValueError when an id comes back after another.
    """
    last = np.arange(num_keys - num_queries, num_keys, dtype=np.int32)[None] + 1  # [1, S]
    if doc_ids is None:
        kind = "full" if num_queries == 1 else "causal"
        return KeyRanges(np.stack((np.zeros_like(last), last), -1), num_keys, kind)
    begins = np.ones(doc_ids.shape, bool)
    begins[:, 1:] = doc_ids[:, 1:] != doc_ids[:, :-1]
    for row, begin in zip(doc_ids, begins, strict=True):
        if len(np.unique(row)) != np.count_nonzero(begin):
            raise ValueError("doc_ids: the positions of a document must follow each other; an id comes back")
    first = np.maximum.accumulate(np.where(begins, np.arange(num_keys, dtype=np.int32), 0), 1)
    first = first[:, num_keys - num_queries :]
    return KeyRanges(np.stack((first, np.broadcast_to(last, first.shape)), -1).astype(np.int32), num_keys, "documents")


def single_ranges(lengths: np.ndarray) -> KeyRanges:
    """One query a row, each of which sees the first ``lengths`` [B] of as many keys as the longest row has."""
    longest = int(lengths.max())
    ranges = np.stack((np.zeros_like(lengths), lengths), -1)[:, None].astype(np.int32)
    return KeyRanges(ranges, longest, "full" if (lengths == longest).all() else "ranges")


class Block(NamedTuple):
    """Queries [first, last) against keys [0, keys). ``visible`` is bool [B or 1, last - first, keys], None when all
    keys are visible."""

    first: int
    last: int
    keys: int
    visible: np.ndarray | None


def causal_blocks(
    num_queries: int, num_keys: int, doc_ids: np.ndarray | None = None, block: int = 1024
) -> Iterator[Block]:
    """Causal visibility of the last ``num_queries`` of ``num_keys`` positions, split into blocks of queries.

    With ``doc_ids`` [B, num_keys] attention stays inside one document.
    """
    offset = num_keys - num_queries
    for first in range(0, num_queries, block):
        last = min(first + block, num_queries)
        keys = offset + last
        rows = np.arange(offset + first, offset + last)
        if last - first == 1 and doc_ids is None:
            yield Block(first, last, keys, None)
            continue
        visible = (np.arange(keys)[None, :] <= rows[:, None])[None]  # [1, q, keys]
        if doc_ids is not None:
            visible = visible & (doc_ids[:, rows][:, :, None] == doc_ids[:, None, :keys])
        yield Block(first, last, keys, visible)


def block_ranges(blocks: Iterable[Block], num_queries: int, num_keys: int) -> KeyRanges:
    """Blocks of queries as ranges; ValueError when a query sees keys with a gap between them."""
    parts = list(blocks)
    rows = max((1 if b.visible is None else len(b.visible) for b in parts), default=1)
    ranges = np.zeros((rows, num_queries, 2), np.int32)
    for block in parts:
        part = (0, block.keys) if block.visible is None else mask_ranges(block.visible)
        ranges[:, block.first : block.last] = part
    return KeyRanges(ranges, num_keys, "ranges")


def mask_ranges(visible: np.ndarray) -> np.ndarray:
    """A mask bool [B, S, T] as ranges int32 [B, S, 2]; ValueError when a query sees keys with a gap between them."""
    count = visible.sum(-1)
    first = np.where(count > 0, visible.argmax(-1), 0)
    last = np.where(count > 0, visible.shape[-1] - visible[..., ::-1].argmax(-1), 0)
    if (last - first != count).any():
        raise ValueError("visible: the keys of each query must be contiguous to be a range; found a query with a gap")
    return np.stack((first, last), -1).astype(np.int32)
