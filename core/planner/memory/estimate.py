"""Memory and operation estimates of a training run, per pipeline rank."""

from __future__ import annotations

import math
from collections.abc import Collection

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.model.lora import LoraConfig, lora_table
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
    lora: LoraConfig | None = None,
    constants: Collection[str] = (),
) -> JsonObject:
    """Parameters by class, bytes by use and floating-point operations per token.

    ``memory_bytes`` is that of the pipeline rank that needs the most, ``ranks`` that of each. ``_memory`` has the
    formulas. ``lora`` adds adapters; ``constants`` are the logical names of what is not trained
    (core.train.trainable.constant_names): held in the compute dtype, without gradients and optimizer state.
    """
    layout = layout or Layout()
    micro_batches = micro_batches or layout.stages
    by_class: dict[str, int] = {}
    whole = parameter_table(config) | ({} if lora is None else lora_table(config, lora))
    frozen = frozenset(constants)
    for spec in whole.values():
        by_class[spec.kind] = by_class.get(spec.kind, 0) + spec.size
    total = sum(by_class.values())
    settings = seq_len, micro_batch, micro_batches, precision, recompute, fused_attention
    ranks = [_memory(config, layout, rank, *settings, lora, frozen) for rank in range(layout.pp)]
    memory = max(ranks, key=lambda rank: sum(rank["memory_bytes"].values()))["memory_bytes"]
    matmul = 6 * (by_class["matrix"] + by_class.get("head", by_class["embedding"]))
    attention = flops_per_token(config, seq_len, causal=True) - matmul
    # A frozen matrix has no gradient of its own: two products in place of three. An adapter has all three.
    matmul += 6 * by_class.get("adapter", 0)
    matmul -= 2 * sum(whole[name].size for name in frozen if whole[name].kind in ("matrix", "head"))
    trained = {"trained": total - sum(whole[name].size for name in frozen)} if frozen else {}
    return {
        "estimate": True,
        "settings": {
            "seq_len": seq_len,
            "micro_batch": micro_batch,
            "precision": precision,
            "recompute": recompute,
            "fused_attention": fused_attention,
            "layout": layout.name,
            **({"lora": f"rank {lora.rank} on {' '.join(lora.targets)}"} if lora is not None else {}),
        },
        "parameters": {**by_class, "total": total, **trained},
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "ranks": ranks,
        "bubble": bubble_formula(layout.schedule, layout.pp, layout.virtual, micro_batches),
        "flops_per_token": {"matrices": matmul, "attention": attention, "total": matmul + attention},
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
    lora: LoraConfig | None,
    constants: frozenset[str],
) -> JsonObject:
    """Parameters, layers and bytes by use of pipeline rank ``rank``."""
    table: dict[str, Shard] = {}
    for chunk in range(layout.virtual):
        table |= chunk_table(config, layout, Coord(rank, 0, 0, 0), chunk, lora)
    held = sum(math.prod(shard.shape) for shard in table.values())
    trained = sum(math.prod(shard.shape) for name, shard in table.items() if name not in constants)
    layers = len({name.split(".")[1] for name in table if name.startswith("layers.")})
    E, F, V = config.hidden_size, config.ffn_hidden_size, padded_rows(config.vocab_size, layout.tp)
    HD, KD = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tp, spread = layout.tp, layout.tp if layout.sequence_parallel else 1
    parts = layout.dp * layout.cp if layout.zero1 else 1
    master = 8 if precision == "fp64" else 4
    width = {"fp32": 4, "fp64": 8}.get(precision, 2)
    tokens = seq_len * micro_batch // layout.cp

    linear = 2 * E // spread + 2 * E + (2 * HD + 2 * KD + 4 * F) // tp - _unkept(config, table, constants, tp)
    if lora is not None and lora.dropout:
        linear += (2 * E + (HD + F) // tp) // 4  # a byte an element: which of the adapters' inputs are kept
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
        "masters": master * trained // parts,
        "compute_copy": 2 * trained if half else master * trained if parts > 1 else 0,
        **({"frozen": _frozen_bytes(table, constants, precision, width)} if constants else {}),
        "gradients": master * trained,
        "optimizer": 2 * master * trained // parts,
        "activations": int(tokens * (width * kept + logits)),
    }
    return {"pipeline_rank": rank, "layers": layers, "graphs": graphs, "parameters": held, "memory_bytes": memory}


def _frozen_bytes(table: dict[str, Shard], constants: frozenset[str], precision: str, width: int) -> int:
    """Matrices are in the dtype that products are computed in; with amp everything else is float32."""
    wide = 4 if precision == "amp" else width
    held = ((name, shard) for name, shard in table.items() if name in constants)
    return sum(
        math.prod(shard.shape) * (wide if len(shard.shape) == 1 or name == "embed.weight" else width)
        for name, shard in held
    )


def _unkept(config: ModelConfig, table: dict[str, Shard], constants: frozenset[str], tp: int) -> int:
    """Elements a token and layer that no gradient of a weight needs: the inputs of linears that are frozen and have no
    adapter, a mean over the layers held. The attention's output is kept for the attention itself."""
    sizes = {("q", "k", "v"): config.hidden_size, ("gate", "up"): config.hidden_size}
    sizes[("down",)] = config.ffn_hidden_size // tp
    readers = {module: modules for modules in sizes for module in modules}
    blocks = [name.split(".") for name in table if name.startswith("layers.")]
    needed = {
        (parts[1], readers[parts[-2]])
        for parts in blocks
        if parts[-2] in readers and parts[-1] != "bias" and ".".join(parts) not in constants
    }
    layers = max(1, len({parts[1] for parts in blocks}))
    return sum(sizes.values()) - sum(sizes[modules] for _, modules in needed) // layers
