"""Attention over pages that a ring of ranks shares out: each rank keeps its own, and the queries go round.

Every rank computes its own tokens (core.inference.ring_pages) and stores their keys and values in its own pages. A
message with queries travels while those that came before meet the keys that lie here; what they found, and its
log-sum-exp, goes back to where they came from in one exchange, and is merged there in float32 or wider, in the order
of the ranks.

n tokens of a rank, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import mindspore as ms
from mindspore import Tensor
from mindspore import ops as mops

from telechat_twins.core.inference.ring_pages import RankStep, RingBlock
from telechat_twins.core.parallel.mesh import Group
from telechat_twins.kernels.mindspore.paged import Rows
from telechat_twins.telechat_ms import ops
from telechat_twins.telechat_ms.collectives import all_to_all, start_shift
from telechat_twins.telechat_ms.model import Decoder

NO_KEYS = -1e30  # a log-sum-exp that weighs nothing and, unlike -inf, may be subtracted from another of its kind
HEADS_FIRST = (0, 2, 1, 3)  # [B, S, H, D] <-> [B, H, S, D]


class Meeting(NamedTuple):
    """core.inference.ring_pages.RingBlock on the device: queries [first, last), the slots [B, T] of keys, and what each
    query sees."""

    first: int
    last: int
    slots: Tensor
    visible: ops.Parts


class Places(NamedTuple):
    """Where one step reads and writes on this rank, made once for all layers: ``num_tokens`` tokens go to ``rows``."""

    num_tokens: int
    rows: Rows
    hops: list[list[Meeting]]


def place_step(own: RankStep, page_size: int, dtype: ms.Type) -> Places:
    """What RingPagedAttention needs of this rank's share of a step, whose keys and values are in ``dtype``."""

    def met(part: RingBlock) -> Meeting:
        return Meeting(part.first, part.last, Tensor(part.slots), ops.key_ranges(part.ranges, part.slots.shape[1]))

    hops = [[met(part) for part in parts] for parts in own.hops]
    return Places(len(own.slots), ops.place_rows(own.slots, page_size, dtype), hops)


def apply_ring_pages(stage: Decoder, num_pages: int, page_size: int, group: Group) -> None:
    """Let every block of a stage keep its part of the keys and values, in ``num_pages`` pages of this rank."""
    for block in stage.layers.values():
        heads = block.attn.k.weight.shape[0] // block.attn.head_dim
        shape = (num_pages, page_size, heads, block.attn.head_dim)
        block.attn.core = RingPagedAttention(shape, ops.page_dtype(stage.dtypes.compute), group)


class RingPagedAttention:
    """ops.attention of this rank's tokens, q [1, n, H, D], k and v [1, n, K, D], and of all before them on all ranks.

    Keys are kept as in PagedAttention; the blank page is never written.
    """

    def __init__(self, shape: tuple[int, ...], dtype: ms.Type, group: Group) -> None:
        self.k, self.v = (ms.mint.zeros(shape, dtype=dtype) for _ in "kv")
        self.group = group

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        ring = self.group
        if places.num_tokens:
            ops.store_rows(self.k, k[0, : places.num_tokens], places.rows)
            ops.store_rows(self.v, v[0, : places.num_tokens], places.rows)
        message, found = q, [q] * ring.size
        for hop in range(ring.size):
            coming = start_shift(message, ring) if hop < ring.size - 1 else None
            found[(ring.rank - hop) % ring.size] = meet(message, self.k, self.v, places.hops[hop])
            if coming is not None:
                message = coming.wait()
        return mops.cast(merged(all_to_all(mops.stack(found), ring, 0, 0)), q.dtype)


def meet(q: Tensor, k_pages: Tensor, v_pages: Tensor, meetings: list[Meeting]) -> Tensor:
    """Queries [1, n, H, D] against keys of this rank: out and log-sum-exp [H, n, D + 1] in float32 or wider; zeros and
    NO_KEYS for one that is in no meeting."""
    _, n, H, D = q.shape
    wide = ms.float64 if q.dtype == ms.float64 else ms.float32
    found, at = [], 0
    for first, last, slots, visible in meetings:
        found.append(_nothing(H, first - at, D, wide))
        B = slots.shape[0]
        queries = mops.transpose(q[0, first:last].reshape(B, -1, H, D), HEADS_FIRST)
        keys, values = (
            mops.transpose(mops.cast(ops.rows_at(pages, slots), q.dtype), HEADS_FIRST) for pages in (k_pages, v_pages)
        )
        out, log_sum_exp = ops.attention_block(queries, keys, values, visible)  # [B, H, S, D] and [B, H, S, 1]
        part = mops.concat((out, log_sum_exp), -1)
        found.append(mops.transpose(part, (1, 0, 2, 3)).reshape(H, last - first, D + 1))
        at = last
    found.append(_nothing(H, n - at, D, wide))
    found = [part for part in found if part is not None]
    return found[0] if len(found) == 1 else mops.concat(found, 1)


def merged(found: Tensor) -> Tensor:
    """What the same queries found on each of R ranks, [R, H, n, D + 1] from ``meet``, as attention over all of their
    keys: [1, n, H, D]."""
    out, log_sum_exp = found[:1, ..., :-1], found[:1, ..., -1:]
    for rank in range(1, found.shape[0]):
        other = found[rank : rank + 1]
        out, log_sum_exp = ops.merge_blocks(out, log_sum_exp, other[..., :-1], other[..., -1:])
    return mops.transpose(out, HEADS_FIRST)


def _nothing(H: int, n: int, D: int, dtype: ms.Type) -> Tensor | None:
    """What n queries without a key find, None of none."""
    if not n:
        return None
    return mops.concat((mops.zeros((H, n, D), dtype), mops.full((H, n, 1), NO_KEYS, dtype=dtype)), -1)
