"""Communication volume of a layout: bytes per rank and collective in one optimizer step, in closed form.

The count is the same as that of the collectives themselves: for each (operation, group or link name), the number of
calls and the bytes of the tensors that this rank passed in. ``wire_bytes`` converts them to the bytes that a ring
algorithm sends. Recomputation (which repeats the calls of a block's forward) and the few host numbers of ``agree`` are
not included.

Shapes: B samples of a micro-batch, s places of a context rank (S_pad / cp), n = s * ulysses places of a ring rank,
E hidden, H and K heads and kv heads of a tensor rank, D head dim. Sums over ranks are sent in float32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.precision import PRECISION
from telechat_twins.core.parallel.layout import Layout, sequence_multiple
from telechat_twins.core.parallel.schedule import actions
from telechat_twins.core.parallel.sharding import Shard, chunk_table, plan_buckets

Traffic = dict[tuple[str, str], list[int]]


class TrafficCounter(Traffic):
    """Messages of this process, counted where they are sent, in the form of ``Traffic``."""

    def add(self, op: str, group: str, payload: int) -> None:
        """Count one call with ``payload`` bytes."""
        row = self.setdefault((op, group), [0, 0])
        row[0] += 1
        row[1] += payload

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.clear()


_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Widths:
    """Bytes an element, by role (core.model.precision.Precision)."""

    weight: int
    compute: int
    residual: int
    stat: int
    master: int

    @classmethod
    def of(cls, precision: str) -> Widths:
        names = PRECISION[precision]
        return cls(*(_BYTES[getattr(names, role)] for role in ("weight", "compute", "residual", "stat", "master")))


def wire_bytes(op: str, size: int, payload: int) -> float:
    """Bytes that a rank sends when ``size`` ranks run ``op`` by a ring algorithm and each passes in ``payload`` bytes.

    A shift or a send sends its payload once. ValueError for an operation without a formula.
    """
    if size == 1:
        return 0.0
    shares = {
        "all_reduce": 2 * (size - 1) / size,
        "reduce_scatter": (size - 1) / size,
        "all_to_all": (size - 1) / size,
        "all_gather": size - 1,
        "shift": 1,
        "send": 1,
    }
    if op not in shares:
        raise ValueError(f"no wire formula for {op!r}; there are: {', '.join(shares)}")
    return float(shares[op] * payload)


def tensor_bytes(layout: Layout, elements: int, width: int) -> Traffic:
    """Traffic of half a block, forward and backward: the gather after a norm, and the sum of a row-parallel product.

    ``elements`` = B * s * E of the residual stream before it is split over tp, ``width`` bytes each.
    """
    if layout.tp == 1:
        return {}
    wide = max(width, 4) * elements
    if not layout.sequence_parallel:
        return {("all_reduce", "tp"): [2, 2 * wide]}
    return {("all_gather", "tp"): [2, 2 * width * elements // layout.tp], ("reduce_scatter", "tp"): [2, 2 * wide]}


def ulysses_bytes(layout: Layout, places: int, heads: int, kv_heads: int, width: int) -> Traffic:
    """Traffic of Ulysses in one attention, forward and backward: q, k, v and the output are each exchanged once in each
    direction; kv heads are repeated where there are fewer than ranks. ``places`` = B * s * D."""
    if layout.ulysses == 1:
        return {}
    once = places * (2 * heads + 2 * _repeated(kv_heads, layout.ulysses)) * width
    return {("all_to_all", "ulysses"): [8, 2 * once]}


def ring_bytes(ring: int, elements: int, width: int) -> Traffic:
    """Traffic of ring attention, forward and backward. ``elements`` = 2 * B * n * K * D, keys and values in one
    message, passed on R-1 times in each direction; in the backward, R times, also the float32 sums of gradients."""
    if ring == 1:
        return {}
    sums = max(width, 4)
    return {("shift", "ring"): [3 * ring - 2, elements * (2 * (ring - 1) * width + ring * sums)]}


def gather_bytes(ring: int, elements: int, width: int) -> Traffic:
    """Traffic of the method "allgather": ``elements`` passed in once, and the gradients of all ranks' keys summed."""
    if ring == 1:
        return {}
    return {
        ("all_gather", "ring"): [1, elements * width],
        ("reduce_scatter", "ring"): [1, ring * elements * max(width, 4)],
    }


def ends_bytes(layout: Layout, positions: int, hidden: int, widths: Widths, first: bool, last: bool) -> Traffic:
    """Traffic of the embedding (``first``) and of the final norm and loss (``last``) of a stage, forward and backward.

    ``positions`` = B * s. The loss reduces the largest logit of each position and then two sums.
    """
    total: Traffic = {}
    if layout.tp == 1:
        return total
    for here, width in ((first, widths.weight), (last, widths.compute)):
        elements, wide = positions * hidden, max(width, 4)
        if here and layout.sequence_parallel:
            _add(total, {("all_gather", "tp"): [1, elements * width // layout.tp]})
            _add(total, {("reduce_scatter", "tp"): [1, elements * wide]})
        elif here:
            _add(total, {("all_reduce", "tp"): [1, elements * wide]})
    if last:
        _add(total, {("all_reduce", "tp"): [2, 3 * positions * widths.stat]})
    return total


def pipeline_bytes(layout: Layout, micro_batches: int, pipeline_rank: int, message: int) -> Traffic:
    """Traffic of one pipeline rank in a step: activations sent on and gradients sent back, ``message`` bytes each."""
    total: Traffic = {}
    for kind, _, chunk in actions(layout.schedule, layout.pp, layout.virtual, micro_batches, pipeline_rank):
        stage = chunk * layout.pp + pipeline_rank
        if kind == "F" and stage < layout.stages - 1:
            _add(total, {("send", "forward_out"): [1, message]})
        if kind == "B" and stage > 0:
            _add(total, {("send", "backward_out"): [1, message]})
    return total


def gradient_bytes(layout: Layout, table: dict[str, Shard], widths: Widths, by_class: bool = False) -> Traffic:
    """Traffic of the gradient sums and, with ZeRO-1, of the gather of updated weights, in one step over all buckets."""
    replicas = layout.dp * layout.cp
    parts = replicas if layout.zero1 else 1
    limit = int(layout.bucket_mb * 2**20 / 4) if replicas > 1 else None
    total: Traffic = {}
    for bucket in plan_buckets(table, parts, limit, by_class):
        for axis in bucket.sum_over:
            _add(total, {("all_reduce", axis): [1, bucket.size * widths.master]})
        if replicas > 1 and layout.zero1:
            _add(total, {("reduce_scatter", "replicas"): [1, bucket.size * widths.master]})
            _add(total, {("all_gather", "replicas"): [1, bucket.size // parts * widths.weight]})
        elif replicas > 1:
            _add(total, {("all_reduce", "replicas"): [1, bucket.size * widths.master]})
    return total


def expected_traffic(
    config: ModelConfig,
    layout: Layout,
    *,
    seq_len: int,
    micro_batch: int,
    micro_batches: int,
    rank: int,
    precision: str = "fp32",
    method: str = "ring",
    by_class: bool = False,
) -> Traffic:
    """(operation, group) -> [calls, bytes] of ``rank`` in one optimizer step without recomputation.

    ``micro_batches`` of ``micro_batch`` samples of ``seq_len`` tokens a data-parallel rank; ``method`` of
    core.parallel.sequence.Visibility, "ring" or "allgather", where the ring has more than one rank. ``by_class``: as in
    core.parallel.sharding.plan_buckets.
    """
    widths, coord = Widths.of(precision), layout.coord(rank)
    padded = seq_len + -seq_len % sequence_multiple(layout)
    positions = micro_batch * padded // layout.cp
    heads, kv_heads = config.num_heads // layout.tp, max(config.num_kv_heads // layout.tp, 1)
    # After Ulysses a rank has that many more places and that many fewer heads.
    kv_here = _repeated(kv_heads, layout.ulysses) // layout.ulysses
    keys = 2 * positions * layout.ulysses * kv_here * config.head_dim

    block: Traffic = {}
    for _ in range(2):
        _add(block, tensor_bytes(layout, positions * config.hidden_size, widths.compute))
    _add(block, ulysses_bytes(layout, positions * config.head_dim, heads, kv_heads, widths.compute))
    meet = gather_bytes if method == "allgather" else ring_bytes
    _add(block, meet(layout.ring, keys, widths.compute))

    total: Traffic = {}
    table: dict[str, Shard] = {}
    for chunk in range(layout.virtual):
        stage = chunk * layout.pp + coord.pp
        here = chunk_table(config, layout, coord, chunk)
        layers = len({name.split(".")[1] for name in here if name.startswith("layers.")})
        _add(total, block, layers * micro_batches)
        ends = ends_bytes(layout, positions, config.hidden_size, widths, stage == 0, stage == layout.stages - 1)
        _add(total, ends, micro_batches)
        table |= here
    stream = positions // (layout.tp if layout.sequence_parallel else 1) * config.hidden_size
    _add(total, pipeline_bytes(layout, micro_batches, coord.pp, stream * widths.residual))
    _add(total, gradient_bytes(layout, table, widths, by_class))
    return total


def _repeated(kv_heads: int, ulysses: int) -> int:
    """kv heads that are sent: at least one for each rank."""
    return kv_heads if kv_heads % ulysses == 0 else ulysses


def _add(total: Traffic, more: Traffic, times: int = 1) -> None:
    for key, (calls, payload) in more.items():
        row = total.setdefault(key, [0, 0])
        row[0] += calls * times
        row[1] += payload * times
