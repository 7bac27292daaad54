"""Parameter shards of a rank, and the map from its flat optimizer shard to boxes of the logical tensors.

A rank's table has the form of core.model.params.parameter_table with local shapes. The decoder is built from it and
needs no other information about ranks. Letters: H query heads, K kv heads, D head dim, E hidden, F ffn, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.lora import LoraConfig, lora_table, sharded_axis
from telechat_twins.core.model.params import VECTOR, ParamSpec, parameter_table
from telechat_twins.core.parallel.layout import Coord, Layout, stage_layers

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Shard:
    """One parameter's shard on one rank.

    ``shape``: local shape. ``whole``: logical shape. ``index``: the box of the logical tensor that fills the first rows
    of the local one; rows after it are padding (vocabulary only) and stay zero. ``sum_over``: axes along which ranks
    hold the same values and each computes a part of their gradient, so that gradients are summed. ``owner``: whether
    this rank, of all in a replica that hold these values, counts them in the norm and writes them to checkpoints.
    """

    shape: tuple[int, ...]
    whole: tuple[int, ...]
    index: Box
    decays: bool
    mup_class: str
    sum_over: tuple[str, ...]
    owner: bool


def chunk_table(
    config: ModelConfig, layout: Layout, coord: Coord, chunk: int = 0, lora: LoraConfig | None = None
) -> dict[str, Shard]:
    """The parameters of model chunk ``chunk`` of pipeline rank ``coord.pp``, as tensor rank ``coord.tp`` holds them;
    with ``lora`` the adapters' too, after all others."""
    stage = chunk * layout.pp + coord.pp
    layers = stage_layers(layout, config)[stage]
    last = stage == layout.stages - 1
    table = {}
    for name, spec in parameter_table(config, layers).items():
        if name.startswith("layers."):
            here = True
        elif name == "embed.weight":
            here = stage == 0 or (last and config.tied_embeddings)
        else:
            here = last
        if here:
            table[name] = _shard(name, spec, config, layout, coord, copy=name == "embed.weight" and stage != 0)
    if lora is not None:
        for name, spec in lora_table(config, lora, layers).items():
            table[name] = _shard(name, spec, config, layout, coord, copy=False)
    return table


def kv_copies(config: ModelConfig, layout: Layout) -> int:
    """Number of tensor ranks that hold the same kv head: 1 unless tp exceeds the number of kv heads."""
    return max(1, layout.tp // config.num_kv_heads)


def is_tied_across(config: ModelConfig, layout: Layout) -> bool:
    """Whether the first and the last pipeline rank hold copies of one embedding."""
    return config.tied_embeddings and layout.pp > 1


def padded_rows(vocab_size: int, tp: int) -> int:
    """Vocabulary rows of one tensor rank; on the last ranks some may be padding."""
    return -(-vocab_size // tp)


def _shard(name: str, spec: ParamSpec, config: ModelConfig, layout: Layout, coord: Coord, copy: bool) -> Shard:
    tp, t = layout.tp, coord.tp
    recipe = spec.decays, spec.mup_class
    module = name.split(".")[-2]
    tied = is_tied_across(config, layout) and name == "embed.weight"
    if spec.kind == "norm" or (spec.kind == "bias" and module not in ("q", "k", "v", "gate", "up")):
        # With sequence parallelism every rank sees its own positions only; without, all compute the same gradient.
        sums: tuple[str, ...] = ("tp",) if tp > 1 and layout.sequence_parallel else ()
        return Shard(spec.shape, spec.shape, _box(spec.shape), *recipe, sums, t == 0)
    if spec.kind == "adapter" and sharded_axis(name) is None:
        # Every rank multiplies it with its own part of the other factor, so its gradient is always a sum over ranks.
        return Shard(spec.shape, spec.shape, _box(spec.shape), *recipe, ("tp",) if tp > 1 else (), t == 0)
    if spec.kind in ("embedding", "head"):
        rows = padded_rows(spec.shape[0], tp)
        first, last = min(t * rows, spec.shape[0]), min((t + 1) * rows, spec.shape[0])
        box = _box(spec.shape, 0, first, last)
        return Shard((rows, spec.shape[1]), spec.shape, box, *recipe, ("tied",) if tied else (), not copy)
    if module in ("k", "v"):
        copies = kv_copies(config, layout)
        parts = tp // copies
        rows = spec.shape[0] // parts
        first = t // copies * rows
        sums = ("kv",) if copies > 1 else ()
        box = _box(spec.shape, 0, first, first + rows)
        return Shard((rows, *spec.shape[1:]), spec.shape, box, *recipe, sums, t % copies == 0)
    axis = 1 if module in ("o", "down") else 0
    size = spec.shape[axis] // tp
    shape = tuple(size if i == axis else n for i, n in enumerate(spec.shape))
    return Shard(shape, spec.shape, _box(spec.shape, axis, t * size, (t + 1) * size), *recipe, (), True)


def _box(shape: tuple[int, ...], axis: int = -1, first: int = 0, last: int = 0) -> Box:
    return tuple(slice(first, last) if i == axis else slice(0, n) for i, n in enumerate(shape))


@dataclass(frozen=True)
class Segment:
    """Place of a parameter in a bucket: elements start .. start + size - 1."""

    name: str
    start: int
    size: int


@dataclass(frozen=True)
class Bucket:
    """Parameters whose gradients are reduced in one collective, as one flat vector, padded to divide among the ranks.

    All its parameters share ``decays``, ``mup_class``, ``sum_over`` and ``owner``.
    """

    segments: tuple[Segment, ...]
    size: int
    decays: bool
    mup_class: str
    sum_over: tuple[str, ...]
    owner: bool


def plan_buckets(
    table: Mapping[str, Shard], parts: int, max_elements: int | None = None, by_class: bool = False
) -> list[Bucket]:
    """Group parameters into buckets of about ``max_elements``, each padded to a multiple of ``parts``.

    The order is that of the backward pass (last parameters first), so that the first buckets are complete early and
    their reduction overlaps with the rest of it. ``by_class``: a bucket has parameters of one muP class. Otherwise
    classes share buckets, which are marked vector-like; that is correct for a recipe that treats all classes alike
    (core.train.recipe.tells_classes_apart is false).
    """
    buckets: list[Bucket] = []
    open_: dict[tuple[bool, str, tuple[str, ...], bool], list[tuple[str, int]]] = {}

    def close(key: tuple[bool, str, tuple[str, ...], bool]) -> None:
        start, segments = 0, []
        for name, size in open_.pop(key):
            segments.append(Segment(name, start, size))
            start += size
        buckets.append(Bucket(tuple(segments), -(-start // parts) * parts, *key))

    for name, shard in reversed(list(table.items())):
        key = (shard.decays, shard.mup_class if by_class else VECTOR, shard.sum_over, shard.owner)
        size = math.prod(shard.shape)
        held = open_.get(key, [])
        if max_elements is not None and held and sum(n for _, n in held) + size > max_elements:
            close(key)
        open_.setdefault(key, []).append((name, size))
    for key in list(open_):
        close(key)
    return buckets


@dataclass(frozen=True)
class FlatPiece:
    """A box of a logical tensor in a rank's part of a bucket: elements first .. last - 1 of the part are, in row-major
    order, the box ``box`` of the tensor ``name``."""

    name: str
    first: int
    last: int
    box: Box

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of the box."""
        return tuple(s.stop - s.start for s in self.box)

    @cached_property
    def offset(self) -> tuple[int, ...]:
        """Where the box begins in the tensor."""
        return tuple(s.start for s in self.box)


def flat_pieces(bucket: Bucket, table: Mapping[str, Shard], part: int, parts: int) -> Iterator[FlatPiece]:
    """The boxes of logical tensors that make up part ``part`` of ``parts`` of a bucket, without padding.

    A flat range of a matrix consists of at most three boxes: the rest of a row, whole rows, the beginning of a row.
    """
    size = bucket.size // parts
    begin, end = part * size, (part + 1) * size
    for segment in bucket.segments:
        shard = table[segment.name]
        real = math.prod(s.stop - s.start for s in shard.index)
        if len(shard.whole) == 2 and shard.shape[1] != shard.index[1].stop - shard.index[1].start:
            raise ValueError(f"{segment.name}: padding is along the rows only")
        low = max(begin, segment.start)
        high = min(end, segment.start + min(segment.size, real))
        if low >= high:
            continue
        width = shard.shape[-1] if len(shard.shape) == 2 else 1
        for first, last in _runs(low - segment.start, high - segment.start, width):
            where = segment.start - begin
            yield FlatPiece(segment.name, where + first, where + last, _global_box(shard, first, last))


def owned_pieces(
    buckets: Sequence[Bucket], table: Mapping[str, Shard], part: int, parts: int
) -> list[tuple[int, FlatPiece]]:
    """All boxes in part ``part`` of ``parts`` of the buckets that this rank writes, in the order of ``table``, each
    after the number of its bucket."""
    order = {name: i for i, name in enumerate(table)}
    found = [
        (number, piece)
        for number, bucket in enumerate(buckets)
        if bucket.owner
        for piece in flat_pieces(bucket, table, part, parts)
    ]
    return sorted(found, key=lambda item: (order[item[1].name], item[1].first))


def _runs(first: int, last: int, width: int) -> Iterator[tuple[int, int]]:
    """Cut the range at row borders so that each run is a box."""
    head = min(last, -(-first // width) * width)
    tail = max(head, last // width * width)
    for a, b in ((first, head), (head, tail), (tail, last)):
        if a < b:
            yield a, b


def _global_box(shard: Shard, first: int, last: int) -> Box:
    if len(shard.shape) == 1:
        start = shard.index[0].start
        return (slice(start + first, start + last),)
    width = shard.shape[1]
    row, column = divmod(first, width)
    rows = max(1, (last - first) // width)
    columns = min(last - first, width)
    r, c = shard.index[0].start + row, shard.index[1].start + column
    return (slice(r, r + rows), slice(c, c + columns))
