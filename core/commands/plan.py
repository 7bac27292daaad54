"""Estimate parameters, memory and arithmetic of training a model on one device, or on each rank of a layout.

No weights are made. Memory, per device, in bytes (an estimate: allocator, workspace and framework overhead come on
top); P is what the rank holds, n the ranks that share optimizer states (dp x cp with ZeRO-1, else 1):
  fp32 masters     4 P / n                   (8 P / n in fp64)
  weights          2 P in bf16 and fp16; 4 P where n > 1; else the masters are the weights
  gradients        4 P, summed in fp32       (8 P in fp64)
  AdamW m and v    8 P / n                   (16 P / n in fp64)
  activations      graphs * tokens * a * L * layer + tokens * 3 * 4 V / tp. A layer keeps for its backward: inputs
                   (split over tp with sequence parallelism) and outputs of two norms (4 E), queries and attention
                   output (2 H D / tp), keys and values (2 K D / tp), gate, up, silu and product (4 F / tp), and H S
                   probabilities unless a fused attention or a ring serves. Logits, their gradient and one working copy
                   are fp32 (8 bytes in fp64). ``graphs`` is what the pipeline's schedule keeps alive
  recompute full   keeps E values a layer and token, and one whole layer at a time; selective drops the probabilities
a is the width of the compute type: 4 fp32, 2 bf16, fp16 and amp, 8 fp64.

Arithmetic: 6 floating-point operations a token and matrix entry (2 forward, 4 backward; the embedding is a look-up and
does not count), plus causal attention, 6 H D S a layer and token.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from core.config import PRECISIONS, ModelConfig, load_model_config, load_run_config
from core.errors import UserError
from core.layout import Coord, Layout, check_layout, parse_layout
from core.metrics import flops_per_token
from core.params import parameter_table
from core.schedule import bubble_formula, peak_live
from core.sharding import Shard, chunk_table, padded_rows

RECOMPUTE = ("none", "selective", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="PRESET", help="a preset, e.g. telechat2-7b")
    what.add_argument("--config", metavar="F", help="a run's YAML: its model, layout, lengths and precision")
    parser.add_argument("--growth", metavar="G", help="a growth schedule for that run: every stage, and what is saved")
    parser.add_argument("--layout", metavar="TEXT", help="e.g. tp8.pp8.dp8: what each pipeline rank holds")
    parser.add_argument("--seq-len", type=int, metavar="S", help="tokens a sample (default: the model's max_seqlen)")
    parser.add_argument("--micro-batch", type=int, metavar="B", help="samples a forward pass (default 1)")
    parser.add_argument(
        "--micro-batches", type=int, metavar="M", help="forward passes a step and rank (default: pp x virtual)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="default bf16")
    parser.add_argument("--recompute", choices=RECOMPUTE, help="default none")
    parser.add_argument("--fused-attention", action="store_true", help="attention keeps no probabilities")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    for name in ("seq_len", "micro_batch", "micro_batches"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, found {value}")
    if args.growth is not None:
        from core.commands import plan_growth

        return plan_growth.run(args)
    if args.config:
        run_config = load_run_config(args.config)
        config, layout, train = run_config.model, run_config.parallel, run_config.train
        settings: dict[str, Any] = {
            "seq_len": run_config.data.seq_len,
            "micro_batch": train.micro_batch,
            "micro_batches": max(1, train.global_batch // (layout.dp * train.micro_batch)),
            "precision": train.precision,
            "recompute": train.recompute,
        }
    else:
        config, layout = load_model_config(args.model), Layout()
        settings = {"seq_len": config.max_seqlen}
    if args.layout:
        layout = parse_layout(args.layout)
    names = ("seq_len", "micro_batch", "micro_batches", "precision", "recompute")
    settings |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    check_layout(layout, config)
    plan = estimate(config, layout=layout, fused_attention=args.fused_attention, **settings)
    print(json.dumps(plan, indent=1) if args.json else _text(args.model or args.config, plan))
    return 0


def estimate(
    config: ModelConfig,
    seq_len: int,
    micro_batch: int = 1,
    precision: str = "bf16",
    recompute: str = "none",
    fused_attention: bool = False,
    layout: Layout | None = None,
    micro_batches: int | None = None,
) -> dict[str, Any]:
    """Parameters by class, bytes by use and floating-point operations per token; formulas: top of this file.

    ``memory_bytes`` is that of the fullest rank, ``ranks`` that of every pipeline rank.
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
) -> dict[str, Any]:
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


def _text(name: str, plan: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in plan["settings"].items())
    ranks = plan["ranks"]
    lines = [f"{name}: estimate, {settings}", "", "parameters"]
    lines += [f"  {kind:<14}{count:>18,}" for kind, count in plan["parameters"].items()]
    if plan["settings"]["layout"] != "single":
        lines += ["", f"by pipeline rank (bubble {plan['bubble']:.1%} of the step)"]
        lines += [
            f"  {r['pipeline_rank']:<4}{r['layers']:>4} layers, {r['parameters']:>14,} parameters on a device, "
            f"{r['graphs']:>3} graphs alive, {sum(r['memory_bytes'].values()) / 2**30:>9.3f} GiB"
            for r in ranks
        ]
    lines += ["", "memory while training" + (", the fullest rank" if len(ranks) > 1 else "")]
    lines += [f"  {use:<14}{size / 2**30:>14.3f} GiB" for use, size in plan["memory_bytes"].items()]
    lines += ["", "floating-point operations per token, forward and backward"]
    lines += [f"  {part:<14}{count:>18.4g}" for part, count in plan["flops_per_token"].items()]
    return "\n".join(lines)
