"""Attention over pages that a ring of ranks shares out: each rank keeps its own, and the queries go round.

Every rank computes its own tokens (core.inference.ring_pages) and stores their keys and values in its own pages. A
message with queries travels while those that came before meet the keys that lie here; what they found, and its
log-sum-exp, goes back to where they came from in one exchange, and is merged there in float32 or wider, in the order
of the ranks.

n tokens of a rank, H heads, K kv heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from telechat_twins.core.inference.ring_pages import RankStep, RingBlock
from telechat_twins.core.parallel.mesh import Group
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.collectives import all_to_all, start_shift
from telechat_twins.pt_reference.model import Decoder


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
    rows: Tensor
    hops: list[list[Meeting]]


def place_step(own: RankStep, page_size: int, dtype: torch.dtype) -> Places:
    """What RingPagedAttention needs of this rank's share of a step, whose keys and values are in ``dtype``."""

    def met(part: RingBlock) -> Meeting:
        slots = torch.from_numpy(part.slots).to(ops.device())
        return Meeting(part.first, part.last, slots, ops.key_ranges(part.ranges, slots.shape[1]))

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

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> None:
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=ops.device()) for _ in "kv")
        self.group = group

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, places: Places) -> Tensor:
        ring = self.group
        ops.store_rows(self.k, k[0, : places.num_tokens], places.rows)
        ops.store_rows(self.v, v[0, : places.num_tokens], places.rows)
        message, found = q, [q] * ring.size
        for hop in range(ring.size):
            coming = start_shift(message, ring) if hop < ring.size - 1 else None
            found[(ring.rank - hop) % ring.size] = meet(message, self.k, self.v, places.hops[hop])
            if coming is not None:
                message = coming.wait()
        return merged(all_to_all(torch.stack(found), ring, 0, 0)).to(q.dtype)


def meet(q: Tensor, k_pages: Tensor, v_pages: Tensor, meetings: list[Meeting]) -> Tensor:
    """Queries [1, n, H, D] against keys of this rank: out and log-sum-exp [H, n, D + 1] in float32 or wider; zeros and
    -inf for one that is in no meeting."""
    _, n, H, D = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    found = torch.zeros((H, n, D + 1), dtype=wide, device=q.device)
    found[..., -1] = -torch.inf
    for first, last, slots, visible in meetings:
        B = len(slots)
        queries = q[0, first:last].view(B, -1, H, D).transpose(1, 2)
        keys, values = (ops.rows_at(pages, slots).transpose(1, 2) for pages in (k_pages, v_pages))
        out, log_sum_exp = ops.attention_block(queries, keys, values, visible)  # [B, H, S, D] and [B, H, S, 1]
        part = torch.cat((out, log_sum_exp), -1)
        found[:, first:last] = part.transpose(0, 1).reshape(H, last - first, D + 1)
    return found


def merged(found: Tensor) -> Tensor:
    """What the same queries found on each of R ranks, [R, H, n, D + 1] from ``meet``, as attention over all of their
    keys: [1, n, H, D]."""
    out, log_sum_exp = found[:1, ..., :-1], found[:1, ..., -1:]
    for rank in range(1, len(found)):
        other = found[rank : rank + 1]
        out, log_sum_exp = ops.merge_blocks(out, log_sum_exp, other[..., :-1], other[..., -1:])
    return out.transpose(1, 2)
