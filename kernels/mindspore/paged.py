"""Paged attention in MindSpore: an operator that reads pages in place, or attention over gathered keys.

Gathered, the sequences with one query each (decoding) form batches of similar length, padded to their longest with the
blank page's zeros; a chunk of a prompt is a batch of its own. N tokens, R sequences, T keys of the longest, M pages of
a table, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from telechat_twins.core.inference.pages import PAGE_SIZE
from telechat_twins.core.inference.runner import Step, key_slots, sequence_groups, single_order
from telechat_twins.core.model.visibility import Block, KeyRanges, causal_ranges, single_ranges
from telechat_twins.kernels.mindspore import composite as composite
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.kernels.reference import visible_keys


class Keys(NamedTuple):
    """Queries [first, last) of a step, in the order of its groups, the ``slots`` [R, T] of their keys, and which of
    these are visible."""

    first: int
    last: int
    slots: Tensor
    visible: kernels.Keys | list[Block]


class Rows(NamedTuple):
    """Destinations of new rows: ``slots`` int64 [N] for an operator that scatters rows; otherwise ``runs`` of rows that
    are contiguous in one page, (first row, last row, page, place)."""

    slots: Tensor | None
    runs: list[tuple[int, int, int, int]]


class Pages(NamedTuple):
    """Addressing of one step, computed once for all layers.

    ``arrays`` on the device: ``slots`` [N], ``starts`` [R + 1], ``lengths`` [R], ``tables`` [R, M] for an operator
    that reads pages, ``tables`` or nothing for others, which take ``rows`` and ``parts``. ``order``: the tokens in the
    order of the parts and its inverse, int32 [N] each; None: the step's own order.
    """

    step: Step
    arrays: tuple[Tensor, ...]
    rows: Rows | None
    parts: list[Keys]
    order: tuple[Tensor, Tensor] | None = None


def page_dtype(compute: ms.Type) -> ms.Type:
    """Dtype of the pages: ``compute``, or float32 where this device cannot write to a slice of a bfloat16 tensor."""
    module = kernels.serving("attention", compute)
    stuck = compute == ms.bfloat16 and not hasattr(module, "paged_attention") and not hasattr(module, "store_rows")
    return ms.float32 if stuck and ms.get_context("device_target") == "CPU" else compute


def short_page() -> int:
    """Tokens of the shortest pages that cost attention nothing: on a CPU a quarter of the usual, so that sequences with
    a common beginning compute up to three tokens of it again, not fifteen. CANN reads multiples of 16."""
    return PAGE_SIZE // 4 if ms.get_context("device_target") == "CPU" else PAGE_SIZE


def place(step: Step, page_size: int, dtype: ms.Type) -> Pages:
    """Addressing of a step for ``paged_attention``, with keys and values in ``dtype``."""
    module = kernels.serving("attention", dtype)
    if hasattr(module, "paged_attention"):
        arrays = step.slots, step.starts, step.lengths, step.tables
        return Pages(step, tuple(map(Tensor, arrays)), None, [])
    groups, parts, begin = sequence_groups(step), [], 0
    for group in groups:
        lengths, tokens = step.lengths[group], int(np.sum(step.starts[group + 1] - step.starts[group]))
        slots = key_slots(step.tables[group], lengths, page_size)
        # A group is sequences with one query, which attends to the whole of its sequence, or one prompt's chunk.
        ranges = single_ranges(lengths) if tokens == len(group) else causal_ranges(tokens, slots.shape[1])
        parts.append(Keys(begin, begin + tokens, Tensor(slots), _visible(ranges, dtype)))
        begin += tokens
    order = single_order(step, groups)
    tables = (Tensor(step.tables[: step.singles]),) if hasattr(module, "takes_pages") else ()
    placed = None if order is None else (Tensor(order[0]), Tensor(order[1]))
    return Pages(step, tables, place_rows(step.slots, page_size, dtype), parts, placed)


def place_rows(slots: np.ndarray, page_size: int, dtype: ms.Type) -> Rows:
    """Slots int32 [N] in the form of ``store_rows`` for rows in ``dtype``."""
    if hasattr(kernels.serving("attention", dtype), "store_rows"):
        return Rows(Tensor(slots.astype(np.int64)), [])
    return Rows(None, _runs(slots, page_size))


def store_rows(pages: Tensor, x: Tensor, rows: Rows) -> None:
    """x [N, K, D] into pages [P, size, K, D], in place."""
    module = kernels.serving("attention", x.dtype)
    if rows.slots is not None and module is not None:
        module.store_rows(pages, x, rows.slots)
    for first, last, page, at in rows.runs:
        pages[page, at : at + last - first] = ops.cast(x[first:last], pages.dtype)


def rows_at(pages: Tensor, slots: Tensor) -> Tensor:
    """The rows of pages [P, size, K, D] at ``slots`` int32 [R, T]: [R, T, K, D]."""
    _, _, K, D = pages.shape
    return kernels.embedding(pages.reshape(-1, K * D), slots).reshape(*slots.shape, K, D)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, places: Pages) -> Tensor:
    """kernels.reference.paged_attention: writes k and v [1, N, K, D] to pages [P, size, K, D] in place, then causal
    attention of the last tokens of each sequence, q [1, N, H, D] -> [1, N, H, D]."""
    module = kernels.serving("attention", q.dtype)
    step = places.step
    if module is not None and hasattr(module, "paged_attention"):
        return module.paged_attention(q, k, v, k_pages, v_pages, *places.arrays, step.singles)
    assert places.rows is not None  # place() makes them unless an operator stores the rows itself
    store_rows(k_pages, k[0], places.rows)
    store_rows(v_pages, v[0], places.rows)
    out, parts, order = [], places.parts, places.order
    if places.arrays and step.singles and module is not None and module.takes_pages(k_pages):
        # Single queries read their pages in place, in the step's order; only chunks of prompts are gathered.
        lengths, (tables,) = step.lengths[: step.singles].tolist(), places.arrays
        queries = q[0, : step.singles].reshape(-1, 1, *q.shape[2:])
        out.append(module.single_queries(queries, k_pages, v_pages, lengths, tables).reshape(-1, *q.shape[2:]))
        parts, order = [part for part in parts if part.first >= step.singles], None
    queries = q[0] if order is None else _rows(q[0], order[0])
    out += [_attention(queries[part.first : part.last], k_pages, v_pages, part) for part in parts]
    whole = out[0] if len(out) == 1 else ops.concat(out, 0)
    return (whole if order is None else _rows(whole, order[1]))[None]


def _rows(x: Tensor, order: Tensor) -> Tensor:
    """Rows of x [N, H, D] in an order [N]."""
    return kernels.embedding(x.reshape(x.shape[0], -1), order).reshape(x.shape)


def _attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, keys: Keys) -> Tensor:
    n, H, D = q.shape
    R = keys.slots.shape[0]
    k, v = (ops.cast(rows_at(pages, keys.slots), q.dtype) for pages in (k_pages, v_pages))
    q = q.reshape(R, n // R, H, D)
    if isinstance(keys.visible, kernels.Keys):
        return kernels.attention(q, k, v, keys.visible).reshape(n, H, D)
    return composite.attention(q, k, v, keys.visible).reshape(n, H, D)


def _visible(key_ranges: KeyRanges, dtype: ms.Type) -> kernels.Keys | list[Block]:
    keys = kernels.keys_on_device(key_ranges) if dtype != ms.float64 else None
    if keys is not None:
        return keys
    mask = visible_keys(key_ranges.ranges, key_ranges.num_keys)
    return [Block(0, mask.shape[1], key_ranges.num_keys, composite.hidden_keys(mask))]


def _runs(slots: np.ndarray, page_size: int) -> list[tuple[int, int, int, int]]:
    breaks = np.flatnonzero((np.diff(slots) != 1) | (slots[1:] % page_size == 0)) + 1
    ends = [0, *breaks.tolist(), len(slots)]
    return [
        (first, last, int(slots[first]) // page_size, int(slots[first]) % page_size)
        for first, last in zip(ends[:-1], ends[1:], strict=True)
        if first < last
    ]
