"""Memory and operation estimates of a training run, per pipeline rank."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.model.lora import LoraConfig, described_ranks, lora_table, ranks_in
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.parallel.layout import Layout, sequence_multiple, stage_layers
from telechat_twins.core.parallel.schedule import bubble_formula, peak_live
from telechat_twins.core.parallel.traffic import Widths
from telechat_twins.core.planner.memory.activations import (
    Kept,
    block_kept,
    block_workspace,
    cast_bytes,
    core_bytes,
    ends_kept,
    input_bytes,
    probability_bytes,
    ring_workspace,
    total,
)
from telechat_twins.core.planner.memory.executor import MINDFORMERS, MINDSPORE, Executor
from telechat_twins.core.planner.memory.frozen import (
    WHOLE,
    Trained,
    first_trained,
    head_by_rows,
    head_kept,
    rows_bytes,
    spared_operations,
    trained_of,
)
from telechat_twins.core.planner.memory.live import live_graphs
from telechat_twins.core.planner.memory.recompute import RecomputeLists
from telechat_twins.core.planner.memory.states import Held, held_by, states_bytes
from telechat_twins.core.types import JsonObject

# Share of the estimate by which allocators exceed it: freed blocks of several sizes are cached and not returned. It is
# stated beside the estimate, not inside it; the search keeps it free.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Work:
    """What a step computes, beside model and layout.

    ``fused``: attention keeps no probabilities; ``lists``: MindFormers' recomputation in place of ``recompute``.
    """

    seq_len: int
    micro_batch: int = 1
    micro_batches: int = 1
    precision: str = "bf16"
    recompute: str = "none"
    fused: bool = True
    executor: Executor = MINDSPORE
    lists: RecomputeLists | None = None


@dataclass(frozen=True)
class RankMemory:
    """Bytes by use on a pipeline rank. ``activations``: kept for backward passes when the most graphs are alive;
    ``workspace``: what the moment of the peak needs beside."""

    layers: int
    graphs: int
    held: Held
    states: dict[str, int]
    activations: int
    workspace: int

    @property
    def uses(self) -> dict[str, int]:
        return {**self.states, "activations": self.activations, "workspace": self.workspace}

    @property
    def total(self) -> int:
        return sum(self.states.values()) + self.activations + self.workspace


def rank_memory(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    work: Work,
    held: Held,
    layers: Sequence[int],
    kept: Sequence[Kept],
    trained: Trained = WHOLE,
) -> RankMemory:
    """The peak of one pipeline rank with ``layers`` blocks in each of its chunks, each of which keeps ``kept``, as far
    as what is ``trained`` needs it. The peak is the largest of three moments: a backward begins, with the most graphs
    alive; it is inside a block; it ends, when a framework that returns its gradients together holds them all
    (``late_gradients``).
    """
    widths = Widths.of(work.precision)
    padded = padded_length(work.seq_len, layout)
    positions = work.micro_batch * padded // layout.cp
    last = rank == layout.pp - 1
    entry = input_bytes(config, layout, widths)
    norm, logits = ends_kept(config, layout, widths, work.executor, last, trained.head, trained.by_rows)
    cast, head_cast = cast_bytes(config, layout, widths, work.executor)
    cast, head_cast = int(cast * trained.cast), head_cast if trained.head else 0
    passed, extra = trained.passed or [0] * len(layers), trained.extra
    chunks = [
        positions * _chunk_kept(work, chunk, rank, range(passed[chunk], count), kept, entry, extra)
        + _cast_blocks(work, count - passed[chunk]) * cast
        for chunk, count in enumerate(layers)
    ]
    if layout.pp > 1:  # a stage's result stays until its gradient arrives
        chunks = [one + positions * entry for one in chunks]
    ends = head_kept(config, head_cast, trained)
    if last:  # the last chunk's graph ends in the head and the loss
        chunks[-1] += positions * (norm + logits - entry * (layout.pp > 1)) + ends
    sets = live_graphs(layout.schedule, layout.pp, layout.virtual, work.micro_batches, rank)
    alive = max(sum(n * size for n, size in zip(one, chunks, strict=True)) for one in sets)

    whole = total(kept) + extra
    again = whole if work.recompute == "full" or work.lists is not None and any(map(any, work.lists.full)) else 0.0
    if work.recompute == "selective" and work.lists is None:
        alive += positions * probability_bytes(kept)  # of the layer whose attention is computed again
    states = states_bytes(held, layout, widths, work.executor)
    head = logits if last else None
    if work.executor.reuses_freed:
        workspace = _workspace_on_cpu(config, layout, work, held, states["buffers"], again, alive, head)
        if trained.by_rows:
            workspace = max(workspace - ends, head_cast + rows_bytes(config, positions, widths, trained.head))
        bucket = min(int(layout.bucket_mb * 2**20), held.trained * widths.master) if layout.dp * layout.cp > 1 else 0
        states["buffers"] = work.executor.library + work.executor.message_copies * bucket
    else:
        workspace = _workspace(config, layout, work, held, again, cast, head)
    messages, tables = 0, padded // layout.cp * config.head_dim * max(widths.stat, 4)
    if work.executor.eager_messages:
        tables *= work.micro_batches
    if work.executor.eager_messages and layout.pp > 1 and rank > 0:
        # Gradients sent back stay until the rank before has used them.
        messages = peak_live(layout.schedule, layout.pp, layout.virtual, work.micro_batches, rank - 1)
    states["buffers"] += int(messages * positions * entry) + tables
    graphs = peak_live(layout.schedule, layout.pp, layout.virtual, work.micro_batches, rank)
    return RankMemory(sum(layers), graphs, held, states, int(alive), int(workspace))


def _workspace(
    config: ModelConfig, layout: Layout, work: Work, held: Held, again: float, cast: int, logits: float | None
) -> float:
    """Bytes beside the activations at the peak. ``again``: bytes a position of a block that is computed again, and
    ``cast`` of its matrices' copies; ``logits``: bytes a position of the head's, None on a rank without it."""
    widths = Widths.of(work.precision)
    positions = work.micro_batch * padded_length(work.seq_len, layout) // layout.cp
    inside = again + block_workspace(config, layout, widths) + ring_workspace(config, layout, widths) - (logits or 0.0)
    largest = held.largest * widths.weight
    within = positions * inside + (cast if again else 0)
    if work.executor.late_gradients:
        # The framework's pool caches the blocks of freed activations. Gradients, of other sizes, find them only in
        # part; they are counted as if they found none.
        return max(within, held.trained / layout.virtual * widths.weight, 0.0)
    return max(0.0 if logits is None else float(largest), within + largest, 0.0)


def _workspace_on_cpu(
    config: ModelConfig,
    layout: Layout,
    work: Work,
    held: Held,
    sums: int,
    again: float,
    alive: float,
    logits: float | None,
) -> float:
    """``_workspace`` where what comes after a backward pass reuses what it freed: ``sums`` over the ranks that share
    weights and, where a pass returns its gradients together, these and the copies that are sent, count only as far as
    they exceed the activations ``alive``."""
    widths, executor = Widths.of(work.precision), work.executor
    positions = work.micro_batch * padded_length(work.seq_len, layout) // layout.cp
    if not executor.late_gradients:
        cast = cast_bytes(config, layout, widths, executor)[0]
        return max(_workspace(config, layout, work, held, again, cast, logits), sums - alive)
    copies = held.trained * widths.master if layout.dp * layout.cp > 1 and layout.zero1 else 0
    after = held.trained * widths.weight + copies + sums
    inside = positions * (again + block_workspace(config, layout, widths) + ring_workspace(config, layout, widths))
    if logits is not None:
        # The head's gradient, which is computed while the logits are there, stays; the logits go.
        head = held.largest * widths.weight
        inside = max(head + positions * config.hidden_size * widths.compute, inside + head - positions * logits)
    return max(inside, after - alive)


def padded_length(seq_len: int, layout: Layout) -> int:
    """Places of a row: ``seq_len`` padded as the layout needs it."""
    return seq_len + -seq_len % sequence_multiple(layout)


def _chunk_kept(
    work: Work, chunk: int, rank: int, layers: range, kept: Sequence[Kept], entry: float, extra: float
) -> float:
    """Bytes a position that a graph of the blocks ``layers`` of a chunk keeps."""
    if work.lists is not None:
        lists, sizes = work.lists, 0.0
        for layer in layers:
            found = lists.kept(chunk, rank, layer, kept)
            sizes += total(found) + extra if found else entry / lists.slices
        return sizes
    if work.recompute == "full":
        return len(layers) * entry
    whole = total(kept) + extra
    return len(layers) * (whole - core_bytes(kept) if work.recompute == "selective" else whole)


def _cast_blocks(work: Work, layers: int) -> int:
    """Blocks of a chunk whose graphs keep casts of their matrices: recomputation makes them again."""
    return 0 if work.recompute == "full" and work.lists is None else layers


def estimate(
    config: ModelConfig,
    seq_len: int,
    micro_batch: int = 1,
    precision: str = "bf16",
    recompute: str = "none",
    fused_attention: bool = False,
    layout: Layout | None = None,
    micro_batches: int | None = None,
    lora: LoraConfig | None = None,
    constants: Collection[str] = (),
    executor: Executor = MINDSPORE,
    lists: RecomputeLists | None = None,
    whole_logits: bool = False,
) -> JsonObject:
    """Parameters by class, bytes by use and floating-point operations per token.

    ``memory_bytes`` is that of the pipeline rank that needs the most, ``ranks`` that of each. ``lora`` adds adapters;
    ``constants`` are the logical names of what is not trained (core.train.trainable.constant_names): held in the
    compute dtype, without gradients and optimizer state. ``lists`` stand in the place of ``recompute``.
    """
    layout = layout or Layout()
    micro_batches = micro_batches or layout.stages
    if lists is not None:
        executor = MINDFORMERS
    work = Work(seq_len, micro_batch, micro_batches, precision, recompute, fused_attention, executor, lists)
    by_class: dict[str, int] = {}
    whole = parameter_table(config) | ({} if lora is None else lora_table(config, lora))
    frozen = frozenset(constants)
    for spec in whole.values():
        by_class[spec.kind] = by_class.get(spec.kind, 0) + spec.size
    parameters = sum(by_class.values())
    ranks = ranks_of(config, layout, work, lora, frozen, whole_logits)
    fullest = max(ranks, key=lambda rank: rank.total)
    matmul: float = 6 * (by_class["matrix"] + by_class.get("head", by_class["embedding"]))
    attention = flops_per_token(config, seq_len, causal=True) - matmul
    if frozen:
        less, attention = spared_operations(config, whole, frozen, attention)
        matmul += 6 * by_class.get("adapter", 0) - less
    trained = {"trained": parameters - sum(whole[name].size for name in frozen)} if frozen else {}
    return {
        "estimate": True,
        "settings": {
            "seq_len": seq_len,
            "micro_batch": micro_batch,
            "precision": precision,
            "recompute": recompute if lists is None else "MindFormers' lists",
            "fused_attention": fused_attention,
            "layout": layout.name,
            **({} if lora is None else {"lora": described_ranks(lora, ranks_in(whole))}),
        },
        "parameters": {**by_class, "total": parameters, **trained},
        "memory_bytes": {**fullest.uses, "total": fullest.total},
        "margin_bytes": int(FRAGMENTATION * fullest.total),
        "ranks": [_described(number, rank) for number, rank in enumerate(ranks)],
        "bubble": bubble_formula(layout.schedule, layout.pp, layout.virtual, micro_batches),
        "flops_per_token": {"matrices": matmul, "attention": attention, "total": matmul + attention},
    }


def ranks_of(
    config: ModelConfig,
    layout: Layout,
    work: Work,
    lora: LoraConfig | None = None,
    constants: frozenset[str] = frozenset(),
    whole_logits: bool = False,
) -> list[RankMemory]:
    """The peak of every pipeline rank. ``whole_logits``: the loss is not the plain mean over tokens."""
    widths = Widths.of(work.precision)
    names = parameter_table(config).keys() | ({} if lora is None else lora_table(config, lora)).keys()
    first = first_trained(config, names, constants) if constants else 0
    positions = work.micro_batch * padded_length(work.seq_len, layout) // layout.cp
    rows = head_by_rows(config, layout, constants, work.precision, work.executor, positions, whole_logits)
    kept = block_kept(config, layout, widths, work.executor, work.seq_len, work.fused)
    stages = stage_layers(layout, config)
    found = []
    for rank in range(layout.pp):
        held, table = held_by(config, layout, rank, widths, lora, constants)
        chunks, trained = stages[rank :: layout.pp], WHOLE._replace(by_rows=rows and rank == layout.pp - 1)
        if constants:
            trained = trained_of(config, layout, table, constants, chunks, first, widths, work.executor, lora, rows)
        found.append(rank_memory(config, layout, rank, work, held, [*map(len, chunks)], kept, trained))
    return found


def _described(number: int, rank: RankMemory) -> JsonObject:
    return {
        "pipeline_rank": number,
        "layers": rank.layers,
        "graphs": rank.graphs,
        "parameters": rank.held.parameters,
        "memory_bytes": rank.uses,
    }
