"""Memory and operation estimates of a training run, per pipeline rank."""

from __future__ import annotations

import math

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.parallel.layout import Coord, Layout
from telechat_twins.core.parallel.schedule import bubble_formula, peak_live
from telechat_twins.core.parallel.sharding import Shard, chunk_table, padded_rows
from telechat_twins.core.types import JsonObject


def estimate(
    config: ModelConfig,
    seq_len: int,
    micro_batch: int = 1,
    precision: str = "bf16",
    recompute: str = "none",
    fused_attention: bool = False,
    layout: Layout | None = None,
    micro_batches: int | None = None,
) -> JsonObject:
    """Parameters by class, bytes by use and floating-point operations per token.

    ``memory_bytes`` is that of the pipeline rank that needs the most, ``ranks`` that of each. ``_memory`` has the
    formulas.
    """
    layout = layout or Layout()
    micro_batches = micro_batches or layout.stages
    by_class: dict[str, int] = {}
    for spec in parameter_table(config).values():
        by_class[spec.kind] = by_class.get(spec.kind, 0) + spec.size
    total = sum(by_class.values())
    ranks = [
        _memory(config, layout, rank, seq_len, micro_batch, micro_batches, precision, recompute, fused_attention)
        for rank in range(layout.pp)
    ]
    memory = max(ranks, key=lambda rank: sum(rank["memory_bytes"].values()))["memory_bytes"]
    matmul = 6 * (by_class["matrix"] + by_class.get("head", by_class["embedding"]))
    arithmetic = flops_per_token(config, seq_len, causal=True)
    return {
        "estimate": True,
        "settings": {
            "seq_len": seq_len,
            "micro_batch": micro_batch,
            "precision": precision,
            "recompute": recompute,
            "fused_attention": fused_attention,
            "layout": layout.name,
        },
        "parameters": {**by_class, "total": total},
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "ranks": ranks,
        "bubble": bubble_formula(layout.schedule, layout.pp, layout.virtual, micro_batches),
        "flops_per_token": {"matrices": matmul, "attention": arithmetic - matmul, "total": arithmetic},
    }


def _memory(
    config: ModelConfig,
    layout: Layout,
    rank: int,
    seq_len: int,
    micro_batch: int,
    micro_batches: int,
    precision: str,
    recompute: str,
    fused_attention: bool,
) -> JsonObject:
    """Parameters, layers and bytes by use of pipeline rank ``rank``."""
    table: dict[str, Shard] = {}
    for chunk in range(layout.virtual):
        table |= chunk_table(config, layout, Coord(rank, 0, 0, 0), chunk)
    held = sum(math.prod(shard.shape) for shard in table.values())
    layers = len({name.split(".")[1] for name in table if name.startswith("layers.")})
    E, F, V = config.hidden_size, config.ffn_hidden_size, padded_rows(config.vocab_size, layout.tp)
    HD, KD = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tp, spread = layout.tp, layout.tp if layout.sequence_parallel else 1
    parts = layout.dp * layout.cp if layout.zero1 else 1
    master = 8 if precision == "fp64" else 4
    width = {"fp32": 4, "fp64": 8}.get(precision, 2)
    tokens = seq_len * micro_batch // layout.cp

    linear = 2 * E // spread + 2 * E + (2 * HD + 2 * KD + 4 * F) // tp
    keeps_none = fused_attention or layout.ring > 1
    probabilities = 0 if keeps_none else config.num_heads // tp // layout.ulysses * seq_len * layout.ulysses
    whole_layer = linear + probabilities
    graphs = peak_live(layout.schedule, layout.pp, layout.virtual, micro_batches, rank)
    graph_layers = graphs * layers / layout.virtual
    if recompute == "full":
        kept = graph_layers * E / spread + whole_layer
    elif recompute == "selective":
        kept = graph_layers * linear + probabilities
    else:
        kept = graph_layers * whole_layer
    half = precision in ("bf16", "fp16")
    logits = 3 * max(master, 4) * V if "norm.weight" in table else 0
    memory = {
        "masters": master * held // parts,
        "compute_copy": 2 * held if half else master * held if parts > 1 else 0,
        "gradients": master * held,
        "optimizer": 2 * master * held // parts,
        "activations": int(tokens * (width * kept + logits)),
    }
    return {"pipeline_rank": rank, "layers": layers, "graphs": graphs, "parameters": held, "memory_bytes": memory}
