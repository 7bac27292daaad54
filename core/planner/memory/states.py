"""Bytes of weights, gradients, optimizer states and communication buffers on a rank, from its parameters by class."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import NamedTuple

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import LoraConfig
from telechat_twins.core.parallel.layout import Coord, Layout
from telechat_twins.core.parallel.sharding import Shard, chunk_table
from telechat_twins.core.parallel.traffic import Widths
from telechat_twins.core.planner.memory.executor import Executor


class Held(NamedTuple):
    """Parameters of a pipeline rank, in elements: all, those trained, and the largest trained one; bytes of frozen
    ones."""

    parameters: int
    trained: int
    largest: int
    frozen_bytes: int


def states_bytes(held: Held, layout: Layout, widths: Widths, executor: Executor) -> dict[str, int]:
    """Bytes by use that stand during the whole step, and ``buffers`` of the sums over ranks.

    Masters, m and v are divided among the ranks that share weights (ZeRO-1); gradients are summed whole, in the
    masters' dtype. Where weights have that dtype they are the masters. After the reduce-scatter a rank also has its
    part of the sums; without ZeRO-1 the sums are copies.
    """
    replicas = layout.dp * layout.cp
    parts = replicas if layout.zero1 else 1
    P, master = held.trained, widths.master
    same = widths.weight == master
    owned = master * P // parts
    # Rounded copies, or whole weights beside the masters of the own part.
    if same and (parts == 1 or executor.views):
        masters, copy = (master * P, 0) if parts == 1 else (0, master * P)
    else:
        masters, copy = owned, (widths.weight if executor.casts else min(widths.weight, widths.compute)) * P
    sums = 0 if replicas == 1 else owned if parts > 1 else master * P
    return {
        "masters": masters,
        "compute_copy": copy,
        **({"frozen": held.frozen_bytes} if held.frozen_bytes else {}),
        "gradients": master * P,
        "optimizer": 2 * owned,
        "buffers": sums,
    }


def held_by(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    widths: Widths,
    lora: LoraConfig | None = None,
    constants: Collection[str] = (),
) -> tuple[Held, dict[str, Shard]]:
    """The parameters of pipeline rank ``rank``, from their table."""
    table: dict[str, Shard] = {}
    for chunk in range(layout.virtual):
        table |= chunk_table(config, layout, Coord(rank, 0, 0, 0), chunk, lora)
    sizes = {name: math.prod(shard.shape) for name, shard in table.items()}
    trained = {name: size for name, size in sizes.items() if name not in constants}
    frozen = sum(_frozen_width(name, table[name], widths) * size for name, size in sizes.items() if name in constants)
    return Held(sum(sizes.values()), sum(trained.values()), max(trained.values(), default=0), frozen), table


class Sizes(NamedTuple):
    """Elements on a tensor rank: of a block, of the embedding, of final norm and head, and of a block's largest."""

    block: int
    embedding: int
    ends: int
    largest: int


def part_sizes(config: ModelConfig, tp: int) -> Sizes:
    """The elements of a model's parts on a tensor rank, from the table of one block."""
    one = dataclasses.replace(config, num_layers=1, growth=None)
    sizes = {name: math.prod(shard.shape) for name, shard in chunk_table(one, Layout(tp=tp), Coord(0, 0, 0, 0)).items()}
    block = [size for name, size in sizes.items() if name.startswith("layers.")]
    embedding = sizes["embed.weight"]
    return Sizes(sum(block), embedding, sum(sizes.values()) - sum(block) - embedding, max(block))


def held_quickly(sizes: Sizes, tied: bool, layout: Layout, rank: int, layers: int) -> Held:
    """``held_by`` of a rank with ``layers`` blocks of a model that is trained whole, without a table of its layers."""
    held = layers * sizes.block
    first, last = rank == 0, rank == layout.pp - 1
    if first or (last and tied):
        held += sizes.embedding
    if last:
        held += sizes.ends
    return Held(held, held, max(sizes.embedding, sizes.largest) if first or last else sizes.largest, 0)


def _frozen_width(name: str, shard: Shard, widths: Widths) -> int:
    """Matrices are held in the dtype that products are computed in, everything else in the stream's where that is
    wider."""
    return widths.residual if len(shard.shape) == 1 or name == "embed.weight" else widths.compute
