"""Options of `tele plan` that concern time, and the forecast of one run."""

from __future__ import annotations

import argparse
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.planner.amounts import amount

# Options that plan a run.
_OF_A_PLAN = (
    "growth",
    "layout",
    "global_batch",
    "seq_len",
    "micro_batch",
    "micro_batches",
    "precision",
    "recompute",
    "fused_attention",
    "machine",
    "recompute_lists",
    "search",
    "cost",
    "budget",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--machine`` and the options that need it."""
    parser.add_argument(
        "--machine", metavar="M", help="forecast the step's time on this machine: a bundled name or a YAML file"
    )
    parser.add_argument(
        "--tokens",
        type=amount,
        metavar="N",
        help="with --machine: days and energy for so many tokens, e.g. 2e12 or 2T; with --cost: what they cost",
    )
    parser.add_argument("--trace", metavar="FILE", help="with --machine: write the simulated step as a Chrome trace")
    parser.add_argument("--timeline", metavar="FILE", help="with --machine: draw the simulated step (.png)")


def check(args: argparse.Namespace) -> None:
    """UserError for options that need another, and for values out of range."""
    owned = {"fit": "validate", "plot": "validate", "backend": "calibrate", "out": "calibrate"}
    for name, needed in owned.items():
        if getattr(args, name) not in (None, False) and not getattr(args, needed):
            raise UserError(f"--{name}: belongs to --{needed}; add it, or leave --{name} out")
    alone = next((name for name in ("validate", "calibrate") if getattr(args, name)), None)
    for name in _OF_A_PLAN if alone else ():
        if getattr(args, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')}: has no meaning with --{alone}; leave it out")
    for name in ("tokens", "trace", "timeline", "budget") if args.growth is not None else ():
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name}: is for a run of one size, and --growth has several with tokens of their own; leave it out, "
                "or plan that size without --growth"
            )
    for name in ("tokens", "trace", "timeline"):
        if getattr(args, name) is not None and args.machine is None and not (name == "tokens" and args.cost):
            raise UserError(f"--{name}: needs --machine; name the machine to forecast, e.g. --machine atlas-800t-a2")
    if args.tokens is not None and not 0 < args.tokens < 1e18:
        raise UserError(f"--tokens: must be above 0 and below 1e18, found {args.tokens:g}")
    for name in ("trace", "timeline", "plot"):
        path = getattr(args, name)
        if path is not None:
            from telechat_twins.core.files.atomic import writable_file

            writable_file(path, f"--{name}")
            if name != "trace" and Path(path).suffix != ".png":
                raise UserError(f"--{name}: must end in .png, found {path}")
