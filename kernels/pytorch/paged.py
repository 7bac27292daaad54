"""Paged attention in PyTorch: the C++ operator that reads pages in place, or attention over gathered keys.

On a CPU with a C++ compiler the operator of kernels/cpu serves the default choice. Elsewhere the sequences with one
query each (decoding) form batches of similar length, padded to their longest with the blank page's zeros and masked; a
chunk of a prompt is a batch of its own. N tokens, R sequences, T keys of the longest, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from telechat_twins.core.inference.pages import PAGE_SIZE
from telechat_twins.core.inference.runner import Step, key_slots, sequence_groups, single_order
from telechat_twins.core.model.visibility import Block, KeyRanges, causal_ranges, single_ranges
from telechat_twins.kernels.pytorch import ops as kernels
from telechat_twins.kernels.pytorch.pages_in_place import PagesInPlace, reads_pages


class Keys(NamedTuple):
    """Queries [first, last) of a step, in the order of its groups, and the ``slots`` [R, T] of their keys.

    ``visible`` has the form of the selected attention; for single queries on the CPU, an additive mask [R, 1, 1, T].
    """

    first: int
    last: int
    slots: Tensor
    visible: KeyRanges | list[Block] | Tensor


class Gathered(NamedTuple):
    """Addressing of one step for attention over gathered keys. ``slots`` [N]: destinations of new keys and values;
    ``order``: the tokens in the order of the groups and its inverse, int32 [N] each; None: the step's own order."""

    slots: Tensor
    order: tuple[Tensor, Tensor] | None
    parts: list[Keys]


Pages: TypeAlias = PagesInPlace | Gathered  # addressing of one step, computed once for all layers


def page_dtype(compute: torch.dtype) -> torch.dtype:
    """Dtype of the pages: ``compute``."""
    return compute


def short_page() -> int:
    """Tokens of the shortest pages that cost attention nothing: on a CPU a quarter of the usual, so that sequences with
    a common beginning compute up to three tokens of it again, not fifteen."""
    return PAGE_SIZE // 4 if kernels.default_device() == "cpu" else PAGE_SIZE


def place(step: Step, page_size: int, dtype: torch.dtype, device: torch.device) -> Pages:
    """Addressing of a step for ``paged_attention``, with keys and values in ``dtype``."""
    if kernels.choices()["attention"].implementation in ("cpp", "torch") and reads_pages(dtype, device):
        return PagesInPlace(step)
    groups, parts, begin = sequence_groups(step), [], 0
    for group in groups:
        lengths, tokens = step.lengths[group], int(np.sum(step.starts[group + 1] - step.starts[group]))
        slots = key_slots(step.tables[group], lengths, page_size)
        visible: KeyRanges | list[Block] | Tensor
        if tokens == len(group):
            visible = _single_visible(lengths, dtype, device)
        else:
            visible = _visible(causal_ranges(tokens, slots.shape[1]), device)
        parts.append(Keys(begin, begin + tokens, _tensor(slots, device), visible))
        begin += tokens
    order = single_order(step, groups)
    placed = None if order is None else (_tensor(order[0], device), _tensor(order[1], device))
    return Gathered(place_rows(step.slots, device), placed, parts)


def place_rows(slots: np.ndarray, device: torch.device) -> Tensor:
    """Slots int32 [N] in the form of ``store_rows``."""
    return _tensor(slots, device).long()


def store_rows(pages: Tensor, x: Tensor, rows: Tensor) -> None:
    """x [N, K, D] into pages [P, size, K, D], in place: row i at rows[i] = page * size + place."""
    pages.view(-1, *x.shape[1:]).index_copy_(0, rows, x)


def rows_at(pages: Tensor, slots: Tensor) -> Tensor:
    """The rows of pages [P, size, K, D] at ``slots`` int32 [R, T]: [R, T, K, D]."""
    _, _, K, D = pages.shape
    return pages.view(-1, K * D).index_select(0, slots.view(-1)).view(*slots.shape, K, D)


def paged_attention(q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, places: Pages) -> Tensor:
    """kernels.reference.paged_attention: writes k and v [1, N, K, D] to pages [P, size, K, D] in place, then causal
    attention of the last tokens of each sequence, q [1, N, H, D] -> [1, N, H, D]."""
    if isinstance(places, PagesInPlace):
        return places.attention(q, k, v, k_pages, v_pages)
    store_rows(k_pages, k[0], places.slots)
    store_rows(v_pages, v[0], places.slots)
    queries = q[0] if places.order is None else q[0].index_select(0, places.order[0])
    out = [_attention(queries[part.first : part.last], k_pages, v_pages, part) for part in places.parts]
    whole = out[0] if len(out) == 1 else torch.cat(out)
    return (whole if places.order is None else whole.index_select(0, places.order[1]))[None]


def _attention(q: Tensor, k_pages: Tensor, v_pages: Tensor, keys: Keys) -> Tensor:
    n, H, D = q.shape
    R, K = keys.slots.shape[0], k_pages.shape[2]
    k, v = rows_at(k_pages, keys.slots), rows_at(v_pages, keys.slots)
    if isinstance(keys.visible, Tensor):
        # One query per sequence: the H/K query heads of a kv head become queries of it [R, K, H/K, D], so that keys
        # and values are not repeated.
        rows = q.view(R, K, H // K, D)
        return F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), keys.visible).reshape(n, H, D)
    return kernels.attention(q.view(R, -1, H, D), k, v, keys.visible).reshape(n, H, D)


def _single_visible(lengths: np.ndarray, dtype: torch.dtype, device: torch.device) -> KeyRanges | list[Block] | Tensor:
    if kernels.choices()["attention"].implementation in ("cpp", "torch") and device.type == "cpu":
        hidden = np.arange(lengths.max()) >= lengths[:, None]
        return torch.from_numpy(np.where(hidden, -np.inf, 0.0)[:, None, None]).to(dtype)
    return _visible(single_ranges(lengths), device)


def _visible(key_ranges: KeyRanges, device: torch.device) -> KeyRanges | list[Block]:
    if not kernels.takes_blocks():
        return kernels.place_ranges(key_ranges, device)
    keys = np.arange(key_ranges.num_keys)
    seen = (keys >= key_ranges.ranges[..., :1]) & (keys < key_ranges.ranges[..., 1:])
    mask = torch.from_numpy(seen).to(device)[:, None]
    return [Block(0, seen.shape[1], key_ranges.num_keys, mask)]


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)
