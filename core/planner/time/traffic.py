"""Messages of a step as the forecast counts them, from the formulas of core.parallel.traffic.

core.parallel.traffic.expected_traffic is the definition for a whole rank; here are its parts, which the forecast turns
into seconds one by one. A test holds their sum equal to it.
"""

from __future__ import annotations

from typing import NamedTuple

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parallel.traffic import (
    Traffic,
    ends_bytes,
    gather_bytes,
    ring_bytes,
    tensor_bytes,
    ulysses_bytes,
)
from telechat_twins.core.planner.time.operators import Shape
from telechat_twins.core.planner.time.work import Work


class BlockTraffic(NamedTuple):
    """Messages of a block, forward and backward; ``keys``: elements of the keys and values that travel the ring."""

    tensor: Traffic
    ulysses: Traffic
    ring: Traffic
    keys: int


def block_traffic(model: ModelConfig, layout: Layout, work: Work, shape: Shape) -> BlockTraffic:
    """Messages of one block and micro-batch."""
    half = tensor_bytes(layout, shape.tokens * model.hidden_size, shape.widths.compute)
    places, width = shape.tokens * model.head_dim, shape.widths.compute
    # After Ulysses a rank has that many more places and that many fewer heads; at least one kv head each.
    kv_heads = shape.kv_heads if shape.kv_heads % layout.ulysses == 0 else layout.ulysses
    keys = 2 * shape.tokens * kv_heads * model.head_dim
    meet = gather_bytes if work.method == "allgather" else ring_bytes
    return BlockTraffic(
        {key: [2 * calls, 2 * payload] for key, (calls, payload) in half.items()},
        ulysses_bytes(layout, places, shape.heads, shape.kv_heads, width),
        meet(layout.ring, keys, width),
        keys,
    )


def ends_traffic(model: ModelConfig, layout: Layout, shape: Shape, stage: int) -> Traffic:
    """Messages of the embedding and of the head, if global stage ``stage`` has them, in one micro-batch."""
    first, last = stage == 0, stage == layout.stages - 1
    return ends_bytes(layout, shape.tokens, model.hidden_size, shape.widths, first, last)


def message_bytes(model: ModelConfig, shape: Shape) -> int:
    """Bytes of the stream of a micro-batch between two stages, on one rank."""
    return shape.tokens // shape.spread * model.hidden_size * shape.widths.residual
