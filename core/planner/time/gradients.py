"""Gradient sums, optimizer update and gather of weights of one pipeline rank, with what overlaps the backward."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.layout import Coord, Layout
from telechat_twins.core.parallel.sharding import Shard, chunk_table
from telechat_twins.core.parallel.traffic import Traffic, Widths, gradient_bytes
from telechat_twins.core.planner.time.operators import Rates
from telechat_twins.core.planner.time.transfers import Ways
from telechat_twins.core.planner.time.work import Practice


class Held(NamedTuple):
    """What a pipeline rank holds: ``chunks``, the gradient elements of each chunk; ``traffic`` of its buckets."""

    chunks: tuple[int, ...]
    traffic: Traffic


class Tail(NamedTuple):
    """Seconds after a rank's last backward: ``reduce`` until its gradients are summed, of which ``sums`` over ranks of
    the model itself; then ``update`` and ``gather``."""

    reduce: float
    sums: float
    update: float
    gather: float


def held(
    model: ModelConfig,
    layout: Layout,
    counts: Sequence[int],
    rank: int,
    precision: str,
    by_class: bool,
    tensor: int | None = None,
) -> Held:
    """Elements and bucket traffic of pipeline rank ``rank``; ``counts``: layers of each global stage. ``tensor``: the
    tensor rank, by default the last one; ranks hold equally much, in buckets that may differ by one.

    Worked out once for all ranks and layouts with the same shards: only how many layers a chunk has, and whether it has
    the embedding or the head, tells them apart.
    """
    tensor = layout.tp - 1 if tensor is None else tensor
    last = layout.stages - 1
    kinds = tuple((counts[g], g == 0, g == last) for g in range(rank, layout.stages, layout.pp))
    shards = _Key(model), layout.tp, tensor, layout.sequence_parallel, layout.pp > 1, kinds
    key = *shards, layout.dp * layout.cp, layout.zero1, layout.bucket_mb, precision, by_class
    if key not in _HELD:
        if len(_HELD) >= _MOST_HELD:
            _HELD.clear()
        chunks, table = _tables(shards, model, layout, Coord(rank, 0, 0, tensor)), dict[str, Shard]()
        for here in chunks:
            table |= here
        sizes = tuple(sum(math.prod(shard.shape) for shard in here.values()) for here in chunks)
        _HELD[key] = Held(sizes, gradient_bytes(layout, table, Widths.of(precision), by_class))
    return _HELD[key]


def _tables(shards: Hashable, model: ModelConfig, layout: Layout, place: Coord) -> tuple[dict[str, Shard], ...]:
    """The parameters of each chunk of a rank."""
    if shards not in _TABLES:
        if len(_TABLES) >= _MOST_TABLES:
            _TABLES.clear()
        _TABLES[shards] = tuple(chunk_table(model, layout, place, chunk) for chunk in range(layout.virtual))
    return _TABLES[shards]


_MOST_HELD, _MOST_TABLES = 8192, 256
_HELD: dict[Hashable, Held] = {}
_TABLES: dict[Hashable, tuple[dict[str, Shard], ...]] = {}


class _Key:
    """A model as a key of a cache; a growing model has fields that cannot be hashed."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = model
        try:
            self.key: object = hash(model) and model
        except TypeError:
            self.key = repr(model)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


def tail(
    holding: Held,
    late: list[tuple[int, float, float]],
    layout: Layout,
    widths: Widths,
    ways: Ways,
    rates: Rates,
    practice: Practice,
    overlap: float,
) -> Tail:
    """What follows the last backwards ``late`` (chunk, start, end) of a rank.

    A chunk's buckets fill evenly during its last backward and are sent as they fill, one after the other.
    """
    end, total = late[-1][2], sum(holding.chunks)
    replicas = ways.ways["replicas"]
    scale = practice.gradient_bytes / widths.master
    sent, calls, gather, sums = 0.0, 0.0, 0.0, 0.0
    for (op, group), (count, payload) in holding.traffic.items():
        if group != "replicas":
            sums += ways.ways[group].seconds(op, count, payload)
        elif op == "all_gather":
            gather += replicas.seconds(op, count, payload)
        else:
            sent += replicas.seconds(op, count, payload * scale)
            calls += count
    done = 0.0
    for chunk, start, stop in late:
        part = sent * holding.chunks[chunk] / total
        buckets = max(1.0, calls * holding.chunks[chunk] / total)
        # The first bucket is full after 1/n of the pass; the last is sent after its end.
        done = max(done + part, start + (stop - start) / buckets + part, stop + part / buckets)
        # What does not run beside the pass is sent after it.
        done = max(done, stop + (1.0 - overlap) * part)
    parts = layout.dp * layout.cp if layout.zero1 else 1
    return Tail(max(0.0, done - end) + sums, sums, rates.update(updated_bytes(total, parts, widths)), gather)


def updated_bytes(elements: float, parts: int, widths: Widths) -> float:
    """Bytes that norm and update of a rank move, which updates 1/``parts`` of its ``elements``.

    AdamW reads master, m, v and gradient, writes the first three and the weight; the norm reads the gradients once
    more; the accumulator is cleared.
    """
    return elements / parts * (8.0 * widths.master + widths.weight) + elements * widths.master
