"""`tele grow`: makes a larger model of a trained one, which computes the same function."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import show_bytes
from telechat_twins.core.launch.run_lock import hold_place
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.model.growth import METHODS
from telechat_twins.core.near import near_path
from telechat_twins.core.schema import set_all
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from tqdm import tqdm

    from telechat_twins.convert.growth.plan import GrowthPlan

DESCRIPTION = """\
Grow a checkpoint, optimizer state included, into a larger model that computes the same function. Training continues
from it in either backend, at any layout. Width, ffn, heads, kv heads and depth may grow in one step.

Methods:
  masked  new weights are random, and their outputs are multiplied by c, which rises from 0 to 1 in --anneal-steps steps
          of training. c is part of the model until it reaches 1; then the model is an ordinary larger one.
  zero    no masks: new weights that would affect outputs are zero. Norms keep dividing by the old number of channels.
Old weights, m and v are unchanged. New entries of m and v are zero, and their bias correction starts with their own
first update. Tensors are processed in bands of rows, so memory does not grow with the model. SRC is not modified, and
DST appears complete or not at all.

The target gives the sizes: a preset, a YAML file of a model or a run, or --set changes of SRC's model. The head size is
kept; if hidden_size / num_heads differs from it, give head_dim. The multipliers of embeddings and logits are kept, too,
unless --multipliers fold takes the target's and rescales the weights.
"""
STATE_BYTES = 12  # float32 weights, m and v
EXAMPLES = """\
examples:
  tele grow runs/small runs/grown --target teleflm-tiny-3x --anneal-steps 200
  tele grow runs/small runs/grown --set num_layers=8 ffn_hidden_size=512 --method zero --depth stack
  tele grow runs/small runs/grown --set num_layers=6 --depth 0,0,1,2,3,3
  tele grow flm-16b grown --target flm-51b --plan

and then (--init in place of --resume where SRC was a released model, without an optimizer)
  tele train --backend ms --config C --set model=runs/grown/assets/model.yaml --resume runs/grown --out runs/large
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("source", metavar="SRC", help="checkpoint or run; with --plan also a preset or a model's YAML")
    parser.add_argument("target_folder", metavar="DST", type=Path, help="folder to create")
    parser.add_argument("--target", metavar="F", help="preset or YAML file with the sizes to grow to")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change of the target's sizes (without --target: of SRC's), e.g. hidden_size=256",
    )
    parser.add_argument("--method", choices=METHODS, default="masked", help="how the function is preserved (masked)")
    parser.add_argument(
        "--anneal-steps", type=int, default=1000, metavar="N", help="masked: training steps until c is 1 (1000)"
    )
    parser.add_argument(
        "--depth",
        default="insert",
        metavar="HOW",
        help="insert: copies spread evenly, each after its original (default); stack: copies on top; or the source "
        "block of each target block, e.g. 0,0,1,2 (-1: random weights)",
    )
    parser.add_argument("--fresh-layers", action="store_true", help="new blocks get random weights instead of copies")
    parser.add_argument(
        "--multipliers",
        choices=("keep", "fold"),
        default="keep",
        help="input_mult and logit_mult: keep those of SRC (default), or take the target's and rescale weights",
    )
    parser.add_argument("--grow-head-dim", action="store_true", help="allow a larger head size, a multiple of the old")
    parser.add_argument("--seed", type=int, default=0, help="seed of new random weights (0)")
    parser.add_argument("--plan", action="store_true", help="print sizes, bytes and time; write nothing")


def run(args: argparse.Namespace) -> int:
    from telechat_twins.convert.growth.files import grow_checkpoint, grown_bytes, plan_checkpoint
    from telechat_twins.convert.growth.plan import Options, plan_growth
    from telechat_twins.convert.growth.report import describe
    from telechat_twins.convert.growth.schedule import parse_depth
    from telechat_twins.core.model.params import count_parameters

    if args.anneal_steps < 1:
        raise UserError(f"--anneal-steps: must be at least 1, found {args.anneal_steps}")
    if args.seed < 0:
        raise UserError(f"--seed: must be at least 0, found {args.seed}")
    options = Options(
        method=args.method,
        anneal_steps=args.anneal_steps,
        depth=parse_depth(args.depth),
        fresh_layers=args.fresh_layers,
        multipliers=args.multipliers,
        grow_head_dim=args.grow_head_dim,
        seed=args.seed,
    )
    if args.plan and not Path(args.source).is_dir():
        if os.sep in args.source and not Path(args.source).exists():
            raise UserError(
                f"{args.source}: no such folder; give a checkpoint, a run, a preset or a model's YAML"
                f"{near_path(args.source)}"
            )
        source = load_model_config(args.source, "SRC")
        plan = plan_growth(source, _target(args, source), options)
        print(describe(plan))
        before, after = (STATE_BYTES * count_parameters(config) for config in (source, plan.config))
        _print_cost(plan, lambda name, box: np.zeros([span.stop - span.start for span in box], "f4"), before, after)
        return 0
    from telechat_twins.convert.source import checkpoint_config
    from telechat_twins.core.checkpoint.read import open_checkpoint

    _refuse_release(args.source)
    checkpoint = open_checkpoint(args.source, verify=False)
    if "adapter" in checkpoint.model:
        raise UserError(
            f"{checkpoint.path}: is an adapter, not a model; grow its base, merged with it if you like (tele merge)"
        )
    plan = plan_checkpoint(checkpoint, _target(args, checkpoint_config(checkpoint)), options)
    total = sum(grown_bytes(checkpoint, plan))
    print(describe(plan))
    if args.plan:
        _print_cost(plan, lambda name, box: checkpoint.read("weights", name, box), checkpoint.nbytes, total)
        return 0
    started = time.monotonic()
    with hold_place(args.target_folder):
        _check_target(checkpoint.path, args.target_folder)
        with _bar("growing", total) as bar:
            grow_checkpoint(checkpoint, args.target_folder, plan, on_bytes=bar.update)
    seconds = time.monotonic() - started
    rate = show_bytes(int((total + checkpoint.nbytes) / max(seconds, 1e-9)))
    print(f"wrote {args.target_folder}: {show_bytes(total)} of tensors in {seconds:.1f} s (read and written {rate}/s)")
    print(_next_command(args.target_folder, checkpoint.trainer is not None))
    return 0


def _next_command(grown: Path, resumable: bool) -> str:
    """How training goes on: with the optimizer of a run, or, from the weights of a release, with a new one."""
    how = "--resume" if resumable else "--init"
    return f"train it with --set model={grown / 'assets' / 'model.yaml'} {how} {grown}"


def _target(args: argparse.Namespace, source: ModelConfig) -> ModelConfig:
    """The model to grow to."""
    if args.target is None and not args.set:
        raise UserError(
            "--target: the sizes to grow to are required; give a preset or a YAML file, or --set, e.g. num_layers=8"
        )
    tree: JsonObject
    if args.target is not None:
        tree = {"preset": args.target}
    else:
        own = ("growth", "norm_divisor", "vocab_tokens")
        tree = {name: value for name, value in dataclasses.asdict(source).items() if name not in own}
    set_all(tree, args.set)
    return load_model_config(tree, "target")


def _refuse_release(source: str) -> None:
    path = Path(source)
    if (path / "config.json").is_file():
        raise UserError(
            f"{path}: must be a canonical checkpoint, found a released folder; convert it first: "
            "tele convert --from hf --to canonical"
        )


def _check_target(source: Path, target: Path) -> None:
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{target}: DST must not contain SRC or lie inside it; choose a DST outside {source}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: DST must be new or empty, found files; choose another DST")


def _print_cost(plan: GrowthPlan, read: Callable[..., np.ndarray], before: int, after: int) -> None:
    """Print bytes and an estimate of the time, from the rate of growing and hashing tensors for one second."""
    import hashlib

    from telechat_twins.convert.growth.weights import grow_weights

    started, count = time.perf_counter(), 0
    for piece in grow_weights(plan, read):
        hashlib.sha256(piece.array.data)
        count += piece.array.nbytes
        if time.perf_counter() - started > 1.0:
            break
    # What is read is hashed once; what is written is computed and hashed once.
    seconds = timedelta(seconds=round((after + before / 2) * (time.perf_counter() - started) / count))
    print(f"writes {show_bytes(after)} from {show_bytes(before)}, in about {seconds} on this machine")


def _bar(title: str, total: int) -> tqdm:
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=None, dynamic_ncols=True)
