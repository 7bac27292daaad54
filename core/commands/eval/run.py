"""`tele eval` on the tasks of lm-evaluation-harness, with one backend or both."""

from __future__ import annotations

import argparse
from pathlib import Path

from telechat_twins.core.commands.options import add_harness_arguments, launch_evaluation, load_model
from telechat_twins.core.errors import UserError
from telechat_twins.core.eval.harness import plan_tasks, require_harness
from telechat_twins.core.eval.presets import PRESETS
from telechat_twins.core.eval.session import check_options, evaluate

DESCRIPTION = """\
Scores of a model on tasks of lm-evaluation-harness, computed by the engine: contexts that several requests share are
computed once. Results go to --out: results.json, results.md, items.jsonl (every answer). An interrupted evaluation
continues with the same command.
"""
EXAMPLES = """\
examples:
  tele eval --backend pt --checkpoint runs/first --tasks arc_challenge,hellaswag --out scores
  tele eval --backend ms --checkpoint TeleFLM-52B --tasks open-llm --data datasets --out scores
  tele eval --backends ms pt --checkpoint model --tasks mmlu --limit 100 --out scores
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele eval``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    presets = ", ".join(PRESETS)
    parser.add_argument("--tasks", nargs="+", required=True, metavar="T", help=f"tasks, or presets: {presets}")
    parser.add_argument("--include", nargs="+", default=[], metavar="DIR", help="folders of further task files")
    parser.add_argument(
        "--shots", type=int, metavar="N", help="examples in the prompt (default: the preset's or task's)"
    )
    add_harness_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 0; UserError for options, tasks, data and a model that do not go together."""
    names = check_options(args)
    if args.shots is not None and args.shots < 0:
        raise UserError(f"--shots: must be at least 0, found {args.shots}")
    require_harness()
    plans = plan_tasks(args.tasks, args.shots)
    include = [Path(folder) for folder in args.include]
    return evaluate(args, names, plans, include, load_model, launch_evaluation)
