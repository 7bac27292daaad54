"""Estimate parameters, memory and arithmetic of training a model, on one device or on each rank of a layout.

No weights are created. Memory per device in bytes (without overhead of allocator, workspace and framework); P is the
number of parameters on the rank, n the number of ranks that divide optimizer states (dp x cp with ZeRO-1, else 1):
  fp32 masters     4 P / n                   (8 P / n in fp64)
  weights          2 P in bf16 and fp16; 4 P where n > 1; else the masters are the weights
  gradients        4 P, summed in fp32       (8 P in fp64)
  AdamW m and v    8 P / n                   (16 P / n in fp64)
  activations      graphs * tokens * a * L * layer + tokens * 3 * 4 V / tp. A layer keeps for its backward: inputs
                   (split over tp with sequence parallelism) and outputs of two norms (4 E), queries and attention
                   output (2 H D / tp), keys and values (2 K D / tp), gate, up, silu and product (4 F / tp), and H S
                   probabilities, unless attention is fused or runs on a ring. Logits, their gradient and one working
                   copy are fp32 (8 bytes in fp64). ``graphs``: micro-batches that the pipeline schedule keeps alive
  recompute full   keeps E values per layer and token, and one whole layer at a time; selective drops the probabilities
a is the width of the compute dtype in bytes: 4 in fp32, 2 in bf16, fp16 and amp, 8 in fp64.

Arithmetic: 6 floating-point operations per token and matrix entry (2 forward, 4 backward; the embedding is a look-up
and does not count), plus causal attention with 6 H D S per layer and token.
"""

from __future__ import annotations

import argparse

from telechat_twins.core.commands.plan import time, training, validate
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import PRECISIONS

RECOMPUTE = ("none", "selective", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="PRESET", help="a preset, e.g. telechat2-7b")
    what.add_argument(
        "--config", metavar="F", help="YAML or name of a run, whose model, layout, lengths and precision are used"
    )
    what.add_argument(
        "--validate", action="store_true", help="forecast published runs, and print the errors (docs/planning.md)"
    )
    parser.add_argument(
        "--growth",
        metavar="G",
        help="growth schedule (file or bundled name) for that run: estimate each stage, and the savings",
    )
    parser.add_argument("--layout", metavar="TEXT", help="layout, e.g. tp8.pp8.dp8: estimate each pipeline rank")
    parser.add_argument("--seq-len", type=int, metavar="S", help="tokens per sample (default: the model's max_seqlen)")
    parser.add_argument("--micro-batch", type=int, metavar="B", help="samples per forward pass (default 1)")
    parser.add_argument(
        "--micro-batches", type=int, metavar="M", help="forward passes per step and rank (default: pp x virtual)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="default bf16")
    parser.add_argument("--recompute", choices=RECOMPUTE, help="default none")
    parser.add_argument("--fused-attention", action="store_true", help="attention keeps no probabilities")
    time.add_arguments(parser)
    validate.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    for name in ("seq_len", "micro_batch", "micro_batches"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, found {value}")
    time.check(args)
    if args.validate:
        return validate.run(args)
    if args.growth is not None:
        from telechat_twins.core.commands.plan import growth

        return growth.run(args)
    return training.run(args)
