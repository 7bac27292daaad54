"""Ulysses: an all-to-all trades heads for positions, so that each rank attends over all positions with some heads.

Jacobs et al., arXiv 2309.14509. It surrounds the ring: with cp = ring x ulysses the positions that one ring rank stands
for are those of its Ulysses group together.
"""

from __future__ import annotations

from torch import Tensor

from telechat_twins.core.parallel.mesh import Group
from telechat_twins.pt_reference.collectives import swap_heads

SEQUENCE, HEADS = 1, 2  # axes of [B, S, H, D]


def positions_for_heads(q: Tensor, k: Tensor, v: Tensor, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """[B, s, H, D] of some positions and all heads -> [B, s * U, H / U, D] of the group's positions and some heads."""
    if group.size == 1:
        return q, k, v
    return tuple(swap_heads(x, group, HEADS, SEQUENCE) for x in (q, _enough_heads(k, group), _enough_heads(v, group)))


def heads_for_positions(out: Tensor, group: Group) -> Tensor:
    """The way back: [B, s * U, H / U, D] -> [B, s, H, D]."""
    return swap_heads(out, group, SEQUENCE, HEADS)


def _enough_heads(x: Tensor, group: Group) -> Tensor:
    """Repeat kv heads where there are fewer than ranks; query heads j*H/K.. stay beside kv head j."""
    K = x.shape[HEADS]
    return x if K % group.size == 0 else x.repeat_interleave(group.size // K, HEADS)
