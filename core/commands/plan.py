"""Estimate parameters, memory and arithmetic of training a model on one device. No weights are made.

Memory, per device, in bytes (an estimate: allocator, workspace and framework overhead come on top):
  fp32 masters     4 P                       (8 P in fp64)
  compute copy     2 P in bf16 and fp16      (fp32 and amp compute with the masters)
  gradients        4 P, summed in fp32       (8 P in fp64)
  AdamW m and v    8 P                       (16 P in fp64)
  activations      tokens * (a * L * layer + 3 * 4 V). A layer keeps for its backward: inputs and outputs of two
                   norms (4 E), queries and attention output (2 H D), keys and values (2 K D), gate, up, silu and
                   product (4 F), and H S probabilities unless a fused attention serves. Logits, their gradient and
                   one working copy are fp32 (8 bytes in fp64)
  recompute full   keeps E values a layer and token, and one whole layer at a time; selective drops the probabilities
a is the width of the compute type: 4 fp32, 2 bf16, fp16 and amp, 8 fp64.

Arithmetic: 6 floating-point operations a token and matrix entry (2 forward, 4 backward; the embedding is a look-up and
does not count), plus causal attention, 6 H D S a layer and token.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from core.config import PRECISIONS, ModelConfig, load_model_config
from core.errors import UserError
from core.metrics import flops_per_token
from core.params import parameter_table

RECOMPUTE = ("none", "selective", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PRESET", help="a preset, e.g. telechat2-7b")
    parser.add_argument("--seq-len", type=int, metavar="S", help="tokens a sample (default: the model's max_seqlen)")
    parser.add_argument("--micro-batch", type=int, default=1, metavar="B", help="samples a forward pass (default 1)")
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS, help="default bf16")
    parser.add_argument("--recompute", default="none", choices=RECOMPUTE, help="default none")
    parser.add_argument("--fused-attention", action="store_true", help="attention keeps no probabilities")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    config = load_model_config(args.model)
    seq_len = config.max_seqlen if args.seq_len is None else args.seq_len
    for name, value in (("--seq-len", seq_len), ("--micro-batch", args.micro_batch)):
        if value < 1:
            raise UserError(f"{name}: must be at least 1, found {value}")
    plan = estimate(config, seq_len, args.micro_batch, args.precision, args.recompute, args.fused_attention)
    print(json.dumps(plan, indent=1) if args.json else _text(args.model, plan))
    return 0


def estimate(
    config: ModelConfig,
    seq_len: int,
    micro_batch: int = 1,
    precision: str = "bf16",
    recompute: str = "none",
    fused_attention: bool = False,
) -> dict[str, Any]:
    """Parameters by class, bytes by use and floating-point operations per token; formulas: top of this file."""
    by_class: dict[str, int] = {}
    for spec in parameter_table(config).values():
        by_class[spec.kind] = by_class.get(spec.kind, 0) + spec.size
    total = sum(by_class.values())
    E, F, V, L = config.hidden_size, config.ffn_hidden_size, config.vocab_size, config.num_layers
    HD, KD = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    master = 8 if precision == "fp64" else 4
    width = {"fp32": 4, "fp64": 8}.get(precision, 2)
    tokens = seq_len * micro_batch

    linear = 4 * E + 2 * HD + 2 * KD + 4 * F
    probabilities = 0 if fused_attention else config.num_heads * seq_len
    whole_layer = linear + probabilities
    if recompute == "full":
        kept = L * E + whole_layer
    elif recompute == "selective":
        kept = L * linear + probabilities
    else:
        kept = L * whole_layer
    memory = {
        "masters": master * total,
        "compute_copy": 2 * total if precision in ("bf16", "fp16") else 0,
        "gradients": master * total,
        "optimizer": 2 * master * total,
        "activations": tokens * (width * kept + 3 * max(master, 4) * V),
    }
    matmul = 6 * (by_class["matrix"] + by_class["head"])
    arithmetic = flops_per_token(config, seq_len, causal=True)
    return {
        "estimate": True,
        "settings": {
            "seq_len": seq_len,
            "micro_batch": micro_batch,
            "precision": precision,
            "recompute": recompute,
            "fused_attention": fused_attention,
        },
        "parameters": {**by_class, "total": total},
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "flops_per_token": {"matrices": matmul, "attention": arithmetic - matmul, "total": arithmetic},
    }


def _text(name: str, plan: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in plan["settings"].items())
    lines = [f"{name}: estimate for one device, {settings}", "", "parameters"]
    lines += [f"  {kind:<14}{count:>18,}" for kind, count in plan["parameters"].items()]
    lines += ["", "memory while training"]
    lines += [f"  {use:<14}{size / 2**30:>14.3f} GiB" for use, size in plan["memory_bytes"].items()]
    lines += ["", "floating-point operations per token, forward and backward"]
    lines += [f"  {part:<14}{count:>18.4g}" for part, count in plan["flops_per_token"].items()]
    return "\n".join(lines)
