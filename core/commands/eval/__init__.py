"""Evaluation of models.

teacher    P(true) of propositions and multiple choices with a class token (eFLM): accuracy, log loss, calibration
"""

from __future__ import annotations

import argparse

from telechat_twins.core.commands.eval import teacher

ACTIONS = {"teacher": (teacher, "P(true) of propositions and multiple choices: accuracy, log loss, calibration")}
EXAMPLES = """\
examples:
  tele eval teacher --backend pt --checkpoint runs/first propositions.jsonl --out results.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions of ``tele eval``, each with its own options."""
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(dest="action", required=True, metavar="{" + ",".join(ACTIONS) + "}")
    for name, (module, summary) in ACTIONS.items():
        module.add_arguments(actions.add_parser(name, help=summary))


def run(args: argparse.Namespace) -> int:
    """The chosen action's exit code."""
    return ACTIONS[args.action][0].run(args)
