"""Gradient sums, optimizer update and gather of weights of one pipeline rank, with what overlaps the backward."""

from __future__ import annotations

import math
from functools import lru_cache
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


def held(model: ModelConfig, layout: Layout, rank: int, precision: str, by_class: bool) -> Held:
    """Elements and bucket traffic of pipeline rank ``rank``; worked out once for all layouts with the same shards."""
    shards = Shards(
        _Key(model),
        layout.pp,
        layout.tp,
        layout.virtual,
        layout.sequence_parallel,
        tuple(layout.stage_layers),
        rank,
    )
    return _held(shards, layout.dp * layout.cp, layout.zero1, layout.bucket_mb, precision, by_class)


class Shards(NamedTuple):
    """What decides a pipeline rank's shards."""

    model: _Key
    pp: int
    tp: int
    virtual: int
    sequence_parallel: bool
    counts: tuple[int, ...]
    rank: int

    def layout(self, replicas: int = 1, zero1: bool = True, bucket_mb: float = 25.0) -> Layout:
        """A layout with these shards, and so many ranks that hold them."""
        return Layout(
            pp=self.pp,
            tp=self.tp,
            dp=replicas,
            virtual=self.virtual,
            sequence_parallel=self.sequence_parallel,
            stage_layers=list(self.counts),
            zero1=zero1,
            bucket_mb=bucket_mb,
        )


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


@lru_cache(maxsize=1024)
def _tables(shards: Shards) -> tuple[dict[str, Shard], ...]:
    """The parameters of each chunk of a pipeline rank."""
    layout, place = shards.layout(), Coord(shards.rank, 0, 0, 0)
    return tuple(chunk_table(shards.model.model, layout, place, chunk) for chunk in range(shards.virtual))


@lru_cache(maxsize=8192)
def _held(shards: Shards, replicas: int, zero1: bool, bucket_mb: float, precision: str, by_class: bool) -> Held:
    chunks, table = _tables(shards), dict[str, Shard]()
    for here in chunks:
        table |= here
    layout = shards.layout(replicas, zero1, bucket_mb)
    sizes = tuple(sum(_elements(shard) for shard in here.values()) for here in chunks)
    return Held(sizes, gradient_bytes(layout, table, Widths.of(precision), by_class))


def _elements(shard: Shard) -> int:
    return math.prod(shard.shape)


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
    # AdamW reads master, m, v and gradient, writes the first three and the weight; the accumulator is cleared.
    moved = total / parts * (7.0 * widths.master + widths.weight) + total * widths.master
    # The norm reads the gradients once more.
    moved += total / parts * widths.master
    return Tail(max(0.0, done - end) + sums, sums, rates.stream(moved, 4), gather)
