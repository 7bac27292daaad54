"""Attention when the sequence is split over ranks: Ulysses outside, a ring or a gathering of keys inside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from telechat_twins.core.parallel.mesh import Mesh
from telechat_twins.core.parallel.sequence import Visibility, gather_order, query_blocks
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.collectives import gather_sequence
from telechat_twins.pt_reference.model import Decoder
from telechat_twins.pt_reference.ring_attention import ring_attention, ring_masks
from telechat_twins.pt_reference.ulysses import heads_for_positions, positions_for_heads

SEQUENCE = 1  # the axis of positions in [B, S, H, D]


@dataclass(frozen=True)
class AttentionPlan:
    """How one batch's queries meet keys; stands where the single-process model has its list of blocks.

    ``method`` as in core.parallel.sequence.Visibility; ``masks`` by ring step, ``blocks`` of queries against gathered
    keys,
    ``order`` the slices that sort gathered keys.
    """

    method: str
    masks: list[ops.Parts | None]
    blocks: ops.Visible
    order: list[tuple[int, int]]


def attention_plan(visibility: Visibility, mesh: Mesh) -> AttentionPlan | ops.Visible:
    """The masks of one batch, made once and used by every layer."""
    if visibility.method == "plain":
        docs = None if visibility.doc_ids is None else visibility.doc_ids[0]
        n = visibility.index.shape[-1]
        blocks = ops.attention_blocks(n, n, docs)
        return blocks if mesh.cp.size == 1 else AttentionPlan("plain", [], blocks, [])
    if visibility.method == "ring":
        return AttentionPlan("ring", ring_masks(visibility, mesh.ring), [], [])
    blocks = ops.masked_blocks(query_blocks(visibility, mesh.ring.rank), visibility.length, visibility.index.size)
    return AttentionPlan("allgather", [], blocks, gather_order(visibility))


def apply_context_parallel(stage: Decoder, mesh: Mesh) -> None:
    """Let the attention of every block span the context-parallel ranks."""
    if mesh.cp.size == 1:
        return
    for block in stage.layers.values():
        block.attn.core = ContextParallelAttention(mesh)
        # A ring keeps no scores, so selective recomputation would send the keys round again for nothing.
        block.attn.recompute_core &= mesh.ring.size == 1


class ContextParallelAttention:
    """ops.attention for q [B, s, H, D], k and v [B, s, K, D] of this rank's positions."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
        q, k, v = positions_for_heads(q, k, v, self.mesh.ulysses)
        if plan.method == "ring":
            out = ring_attention(q, k, v, plan.masks, self.mesh.ring)
        elif plan.method == "allgather":
            keys = gather_sequence(torch.stack((k, v)), self.mesh.ring, SEQUENCE + 1)
            k, v = torch.cat([keys[:, :, first : first + size] for first, size in plan.order], SEQUENCE + 1)
            out = ops.attention(q, k, v, plan.blocks)
        else:
            out = ops.attention(q, k, v, plan.blocks)
        return heads_for_positions(out, self.mesh.ulysses)
