"""`tele grow`: a trained model made larger without changing what it computes."""

from __future__ import annotations

import argparse
import dataclasses
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
from telechat_twins.core.schema import set_dotted
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from tqdm import tqdm

    from telechat_twins.convert.growth.plan import GrowthPlan

DESCRIPTION = """\
Make a larger model of a checkpoint, optimizer state included, that computes the same function; training goes on from it
in either backend, at any layout. Width, ffn, heads, kv heads and depth may grow in one step.

Methods:
  masked  new weights are random; what they make is multiplied by c, which training takes from 0 to 1 in --anneal-steps
          steps. c is part of the model until it is 1; then the model is a plain larger one.
  zero    no masks: new weights that would be seen are zero. Norms go on counting the channels that were there.
Old weights, m and v stay as they are; new entries of m and v are zero, and their bias correction starts with their own
first update. Tensors pass in bands of rows, so memory does not grow with the model; SRC is only read; DST appears
complete or not at all.

The target names the sizes: a preset, a YAML file with a model (or a run with one), or --set on the model of SRC. The
head size stays what it is; where hidden_size / num_heads is another number, give head_dim. Multipliers of embeddings
and logits stay too, whatever the target says, unless --multipliers fold moves the change into the weights.
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
    parser.add_argument("target_folder", metavar="DST", type=Path, help="folder to make")
    parser.add_argument("--target", metavar="F", help="preset or YAML file with the sizes to grow to")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="change of the target (without --target: of the model of SRC), e.g. hidden_size=256",
    )
    parser.add_argument("--method", choices=METHODS, default="masked", help="how the function is kept (masked)")
    parser.add_argument(
        "--anneal-steps", type=int, default=1000, metavar="N", help="training steps until c is 1 (masked; default 1000)"
    )
    parser.add_argument(
        "--depth",
        default="insert",
        metavar="HOW",
        help="insert: copies spread evenly, each behind its original (default); stack: copies on top; or for every "
        "block of the target the block it continues or copies, e.g. 0,0,1,2 (-1: random weights)",
    )
    parser.add_argument("--fresh-layers", action="store_true", help="new blocks get random weights and not copies")
    parser.add_argument(
        "--multipliers",
        choices=("keep", "fold"),
        default="keep",
        help="input_mult and logit_mult: keep those of SRC (default), or take the target's and rescale weights",
    )
    parser.add_argument("--grow-head-dim", action="store_true", help="allow a larger head size, a multiple of the old")
    parser.add_argument("--seed", type=int, default=0, help="of the new random weights (0)")
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
            "--target: name the sizes to grow to (a preset or a YAML file), or give --set, e.g. num_layers=8"
        )
    tree: JsonObject
    if args.target is not None:
        tree = {"preset": args.target}
    else:
        own = ("growth", "norm_divisor", "vocab_tokens")
        tree = {name: value for name, value in dataclasses.asdict(source).items() if name not in own}
    for assignment in args.set:
        set_dotted(tree, assignment)
    return load_model_config(tree, "target")


def _refuse_release(source: str) -> None:
    path = Path(source)
    if (path / "config.json").is_file():
        raise UserError(
            f"{path}: is a released folder; make a checkpoint of it first: tele convert --from hf --to canonical"
        )


def _check_target(source: Path, target: Path) -> None:
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{target}: SRC and DST lie in one another; choose a DST outside {source}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not empty; choose another DST")


def _print_cost(plan: GrowthPlan, read: Callable[..., np.ndarray], before: int, after: int) -> None:
    """Bytes, and seconds on this machine from the rate of making one second's worth of tensors and hashing it."""
    import hashlib

    from telechat_twins.convert.growth.weights import grow_weights

    started, count = time.perf_counter(), 0
    for piece in grow_weights(plan, read):
        hashlib.sha256(piece.array.data)
        count += piece.array.nbytes
        if time.perf_counter() - started > 1.0:
            break
    # Everything read is hashed once, everything written made and hashed once.
    seconds = timedelta(seconds=round((after + before / 2) * (time.perf_counter() - started) / count))
    print(f"writes {show_bytes(after)} from {show_bytes(before)}, in about {seconds} on this machine")


def _bar(title: str, total: int) -> tqdm:
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr, disable=None, dynamic_ncols=True)
