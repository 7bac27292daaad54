"""Attention over pages in MindSpore: an operator that reads them where they lie, or their keys gathered first.

Gathered, sequences with one query each, as in decoding, go together, filled up to the longest with the blank page's
zeros; a piece of a prompt goes alone. N tokens, R sequences, T keys of the longest, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from core.runner import Step, key_slots, sequence_groups
from core.visibility import Block, KeyRanges, causal_ranges, single_ranges
from kernels import mindspore as kernels
from kernels import mindspore_composite as composite
from kernels.reference import visible_keys


class Keys(NamedTuple):
    """The queries [first, last) of the step, where the keys that they see lie, ``slots`` [R, T], and which of them."""

    first: int
    last: int
    slots: Tensor
    visible: kernels.Keys | list[Block]


class Pages(NamedTuple):
    """One step's places, made once and used by every layer: for an operator that reads pages itself, the arrays of the
    step, ``slots`` [N], ``starts`` [R + 1], ``lengths`` [R], ``tables`` [R, M], of which others take some; for the
    others also ``runs`` of new tokens on one page (first and last token, page, place) and ``parts``."""

    step: Step
    arrays: tuple[Tensor, ...]
    runs: list[tuple[int, int, int, int]]
    parts: list[Keys]


def page_dtype(compute: ms.Type) -> ms.Type:
    """What keys and values are kept in: the dtype that computes, but where this device cannot write to a part of such a
    tensor, a wider one."""
    module = kernels.serving("attention", compute)
    stuck = compute == ms.bfloat16 and not hasattr(module, "paged_attention") and not hasattr(module, "store_rows")
    return ms.float32 if stuck and ms.get_context("device_target") == "CPU" else compute


def place(step: Step, page_size: int, dtype: ms.Type) -> Pages:
    """What ``paged_attention`` needs of a step, whose keys and values are in ``dtype``."""
    module = kernels.serving("attention", dtype)
    if hasattr(module, "paged_attention"):
        arrays = step.slots, step.starts, step.lengths, step.tables
        return Pages(step, tuple(map(Tensor, arrays)), [], [])
    arrays, runs = (), []
    if hasattr(module, "store_rows"):
        arrays = Tensor(step.slots.astype(np.int64)), Tensor(step.tables[: step.singles])
    else:
        runs = _runs(step.slots, page_size)
    parts = []
    for first, last in sequence_groups(step):
        lengths = step.lengths[first:last]
        slots = key_slots(step.tables[first:last], lengths, page_size)
        begin, end = int(step.starts[first]), int(step.starts[last])
        # Single queries go together; a piece of a prompt goes alone.
        ranges = single_ranges(lengths) if end - begin == last - first else causal_ranges(end - begin, slots.shape[1])
        parts.append(Keys(begin, end, Tensor(slots), _visible(ranges, dtype)))
    return Pages(step, arrays, runs, parts)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, places: Pages) -> Tensor:
    """k and v [1, N, K, D] are stored in pages [P, size, K, D], in place; then causal attention of the last tokens of
    sequences, q [1, N, H, D] -> the same: kernels.reference.paged_attention."""
    module: Any = kernels.serving("attention", q.dtype)
    step = places.step
    if hasattr(module, "paged_attention"):
        return module.paged_attention(q, k, v, k_pages, v_pages, *places.arrays, step.singles)
    if hasattr(module, "store_rows"):
        slots, tables = places.arrays
        module.store_rows(k_pages, k[0], slots)
        module.store_rows(v_pages, v[0], slots)
    for first, last, page, at in places.runs:
        k_pages[page, at : at + last - first] = ops.cast(k[0, first:last], k_pages.dtype)
        v_pages[page, at : at + last - first] = ops.cast(v[0, first:last], v_pages.dtype)
    out = []
    for part in places.parts:
        queries = q[0, part.first : part.last]
        if part.last <= step.singles and hasattr(module, "takes_pages") and module.takes_pages(k_pages):
            lengths = step.lengths[: step.singles].tolist()
            queries = queries.reshape(-1, 1, *q.shape[2:])
            out.append(module.single_queries(queries, k_pages, v_pages, lengths, tables).reshape(-1, *q.shape[2:]))
        else:
            out.append(_attention(queries, k_pages, v_pages, part))
    return (out[0] if len(out) == 1 else ops.concat(out, 0))[None]


def _attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, keys: Keys) -> Tensor:
    n, H, D = q.shape
    R, T = keys.slots.shape
    K = k_pages.shape[2]
    k, v = (kernels.embedding(p.reshape(-1, K * D), keys.slots).reshape(R, T, K, D) for p in (k_pages, v_pages))
    q, k, v = q.reshape(R, n // R, H, D), ops.cast(k, q.dtype), ops.cast(v, q.dtype)
    serve = kernels.attention if isinstance(keys.visible, kernels.Keys) else composite.attention
    return serve(q, k, v, keys.visible).reshape(n, H, D)


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
    ]
