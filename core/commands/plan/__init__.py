"""Estimate parameters, memory and arithmetic of training a model, on one device or on each rank of a layout.

No weights are created. Memory per device in bytes, without the framework's own; P is the number of parameters on the
rank, n the number of ranks that divide optimizer states (dp x cp with ZeRO-1, else 1):
  masters          4 P / n in fp32           (8 P / n in fp64)
  compute_copy     2 P in bf16 and fp16; 4 P in fp32 and amp where n > 1, else the masters are the weights
  gradients        4 P, summed in fp32       (8 P in fp64)
  optimizer        8 P / n, m and v          (16 P / n in fp64)
  buffers          4 P / n: the sums after a reduce-scatter (4 P without ZeRO-1); gradients that the stage before has
                   not used yet; rotary tables of the micro-batches
  activations      what is kept for backward passes when the most micro-batches are alive on the rank. A layer keeps of
                   each position, in the compute dtype: inputs (in the stream's dtype, split over tp with sequence
                   parallelism) and outputs of two norms, 4 E; queries and attention's output, 2 H D / tp; keys and
                   values, 2 K D / tp; gate, up and their product, 3 F / tp; with amp also its matrices once more. A
                   float32 statistic a head and norm. H S / tp probabilities, unless attention is fused or on a ring
  recompute full   keeps the layer's input; selective drops what is inside attention. What `tele train` executes
  workspace        temporaries at the peak: a layer computed again, gradients inside a layer, or, in MindSpore, the
                   gradients that a backward pass returns together
  adapters, freeze  frozen matrices are held in the compute dtype alone, and keep no input; an adapter keeps its product
                   of r, and its input, with dropout a copy and a mask. Blocks before the first trained parameter keep
                   nothing. The float32 loss of a frozen head takes blocks of rows, without the whole logits
  --recompute-lists  lists of operators and layers as MindFormers takes them, for planning only
Beside the sum stands a margin of 5 % for the fragmentation of the allocator.

Arithmetic: 6 floating-point operations per token and matrix entry (2 forward, 4 backward; the embedding is a look-up
and does not count), plus causal attention with 6 H D S per layer and token.
"""

from __future__ import annotations

import argparse

from telechat_twins.core.commands.plan import calibrate, cost, layouts, search, time, training, validate
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import PRECISIONS
from telechat_twins.core.planner.amounts import whole

RECOMPUTE = ("none", "selective", "full")


EPILOG = """\
examples:
  tele plan --model telechat2-115b --layout tp8.pp8.dp8 --seq-len 8192 --recompute full
  tele plan --config telechat2-7b --machine h200-sxm --tokens 1e12
  tele plan --model telechat2-7b --layout tp8,tp4.dp2,pp4.dp2 --machine h200-sxm --global-batch 64
  tele plan --model telechat2-7b --search --machine h200-sxm --devices 8 --global-batch 512"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="PRESET", help="a preset, e.g. telechat2-7b, or the folder of a model")
    what.add_argument(
        "--config", metavar="F", help="YAML or name of a run, whose model, layout, lengths and precision are used"
    )
    what.add_argument(
        "--validate", action="store_true", help="forecast published runs, and print the errors (docs/planning.md)"
    )
    what.add_argument(
        "--calibrate", action="store_true", help="measure this computer for a minute, and write its machine file"
    )
    parser.add_argument(
        "--growth",
        metavar="G",
        help="growth schedule (file or bundled name) for that run: estimate each stage, and the savings",
    )
    parser.add_argument(
        "--layout",
        action="append",
        metavar="TEXT",
        help="layout, e.g. tp8.pp8.dp8: estimate each pipeline rank; several (tp8,tp4.pp2): a table",
    )
    parser.add_argument(
        "--seq-len", type=whole, metavar="S", help="tokens per sample (default: the model's max_seqlen)"
    )
    parser.add_argument(
        "--micro-batch",
        type=whole,
        metavar="B",
        help="samples per forward pass (default 1); with --search the most that are tried (default 16)",
    )
    parser.add_argument(
        "--micro-batches", type=whole, metavar="M", help="forward passes per step and rank (default: pp x virtual)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="default bf16")
    parser.add_argument("--recompute", choices=RECOMPUTE, help="default none")
    parser.add_argument(
        "--recompute-lists",
        metavar="R",
        help="MindFormers' section recompute_config, a YAML file or a bundled name, in place of --recompute",
    )
    parser.add_argument("--fused-attention", action="store_true", help="attention keeps no probabilities")
    time.add_arguments(parser)
    validate.add_arguments(parser)
    calibrate.add_arguments(parser)
    search.add_arguments(parser)
    cost.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    for name in ("seq_len", "micro_batch", "micro_batches", "global_batch"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, found {value}")
    if args.layout is not None:
        args.layout = ",".join(args.layout)
    time.check(args)
    cost.check(args)
    search.check(args)
    if args.validate:
        return validate.run(args)
    if args.calibrate:
        return calibrate.run(args)
    if args.search:
        return search.run(args)
    if args.growth is not None:
        from telechat_twins.core.commands.plan import growth

        return growth.run(args)
    if args.layout is not None:
        names = list(dict.fromkeys(args.layout.split(",")))
        if len(names) > 1:
            return layouts.run(args, names)
        args.layout = names[0]
    return training.run(args)
