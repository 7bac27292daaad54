"""Options of `tele plan --cost` and `--budget` (core.planner.cost.report)."""

from __future__ import annotations

import argparse

from telechat_twins.core.errors import UserError
from telechat_twins.core.planner.amounts import amount


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options about cost."""
    parser.add_argument(
        "--cost", action="store_true", help="zettaFLOPs of --tokens by the method of FLM-101B's report, and by language"
    )
    parser.add_argument(
        "--languages", nargs="+", metavar="L=SHARE", help="with --cost: shares of the data, e.g. en=53.5 zh=46.5"
    )
    parser.add_argument(
        "--budget", type=amount, metavar="FLOPS", help="tokens that so many FLOPs buy, and compute-optimal sizes"
    )


def check(args: argparse.Namespace) -> None:
    """UserError for options that need another, and for values out of range."""
    if args.languages is not None and not args.cost:
        raise UserError("--languages: belongs to --cost; add it, or leave --languages out")
    if args.cost and args.tokens is None:
        raise UserError("--cost: needs --tokens; give the tokens of the training, e.g. --tokens 3e11")
    if args.budget is not None and not 0.0 < args.budget < 1e40:
        raise UserError(f"--budget: must be above 0 and below 1e40, found {args.budget:g}")
