"""Tools for muP (maximal update parametrisation), which derives settings of wide models from narrow ones.

transfer   transfer hyper-parameters of a narrow model to another width, as a table and as a run's YAML
check      check that activations keep their size over widths in training; fails when a rule of muP is broken
search     train many small models with several hyper-parameters and widths, resumable; tables and plots
predict    predict the loss of a wide model from those of narrower ones
"""

from __future__ import annotations

import argparse

from telechat_twins.core.commands.mup import check, predict, search, transfer

ACTIONS = {
    "transfer": (transfer, "transfer hyper-parameters to another width"),
    "check": (check, "check that activations keep their size over widths; exit 1 when a rule of muP is broken"),
    "search": (search, "train many small models with several hyper-parameters and widths, resumable"),
    "predict": (predict, "fit a loss law to small models and forecast larger ones"),
}
EXAMPLES = """\
examples:
  tele mup transfer --config teleflm-mup --width 256 8192
  tele mup check --backend pt --config teleflm-tiny --out check
  tele mup search --backend pt teleflm-tiny --out runs/search
  tele mup predict losses.csv --hold-out 3 --out forecast
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The actions of ``tele mup``, each with its own options."""
    parser.epilog = EXAMPLES
    actions = parser.add_subparsers(dest="action", required=True, metavar="{" + ",".join(ACTIONS) + "}")
    for name, (module, summary) in ACTIONS.items():
        module.add_arguments(actions.add_parser(name, help=summary))


def run(args: argparse.Namespace) -> int:
    """The chosen action's exit code."""
    return ACTIONS[args.action][0].run(args)
