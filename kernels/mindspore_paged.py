"""Attention over pages in MindSpore: an operator that reads them where they lie, or their keys gathered first.

Gathered, sequences with one query each, as in decoding, go together, filled up to the longest with the blank page's
zeros; a piece of a prompt goes alone. N tokens, R sequences, T keys of the longest, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from core.runner import Step, key_slots
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
    """One step's places, made once and used by every layer: for an operator that reads pages, the arrays of the step;
    for the others ``runs`` of new tokens on one page (first and last token, page, place) and ``parts``."""

    arrays: tuple[Tensor, ...]  # slots [N], starts [R + 1], lengths [R], tables [R, M]
    singles: int
    runs: list[tuple[int, int, int, int]]
    parts: list[Keys]


def page_dtype(compute: ms.Type) -> ms.Type:
    """What keys and values are kept in: the dtype that computes, but where this device cannot write to a part of such a
    tensor, a wider one."""
    stuck = compute == ms.bfloat16 and not hasattr(kernels.serving("attention", compute), "paged_attention")
    return ms.float32 if stuck and ms.get_context("device_target") == "CPU" else compute


def place(step: Step, page_size: int, dtype: ms.Type) -> Pages:
    """What ``paged_attention`` needs of a step, whose keys and values are in ``dtype``."""
    singles = step.singles
    if hasattr(kernels.serving("attention", dtype), "paged_attention"):
        arrays = (step.slots, step.starts, step.lengths, step.tables)
        return Pages(tuple(map(Tensor, arrays)), singles, [], [])
    parts = []
    if singles:
        lengths = step.lengths[:singles]
        slots = key_slots(step.tables[:singles], lengths, page_size)
        parts.append(Keys(0, singles, Tensor(slots), _visible(single_ranges(lengths), dtype)))
    for r in range(singles, len(step.lengths)):
        first, last = int(step.starts[r]), int(step.starts[r + 1])
        slots = key_slots(step.tables[r : r + 1], step.lengths[r : r + 1], page_size)
        parts.append(Keys(first, last, Tensor(slots), _visible(causal_ranges(last - first, slots.shape[1]), dtype)))
    return Pages((), singles, _runs(step.slots, page_size), parts)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, places: Pages) -> Tensor:
    """k and v [1, N, K, D] are stored in pages [P, size, K, D], in place; then causal attention of the last tokens of
    sequences, q [1, N, H, D] -> the same: kernels.reference.paged_attention."""
    if places.arrays:
        module: Any = kernels.serving("attention", q.dtype)
        return module.paged_attention(q, k, v, k_pages, v_pages, *places.arrays, places.singles)
    for first, last, page, at in places.runs:
        k_pages[page, at : at + last - first] = ops.cast(k[0, first:last], k_pages.dtype)
        v_pages[page, at : at + last - first] = ops.cast(v[0, first:last], v_pages.dtype)
    out = [_attention(q[0, part.first : part.last], k_pages, v_pages, part) for part in places.parts]
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
