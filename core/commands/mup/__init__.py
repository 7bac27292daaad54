"""What small widths say about large ones: muP (maximal update parametrisation) from search to forecast.

transfer   hyper-parameters of a narrow model at another width, as a table and as a run's YAML
check      whether activations keep their size over widths in training: red when a rule of muP is broken
search     many small models over hyper-parameters and widths, one after another, resumable; tables and plots
predict    the loss of a large width from those of small ones
"""

from __future__ import annotations

import argparse

from telechat_twins.core.commands.mup import check, predict, search, transfer

ACTIONS = {
    "transfer": (transfer, "carry hyper-parameters over to another width"),
    "check": (check, "whether activations keep their size over widths; exit 1 when a rule of muP is broken"),
    "search": (search, "train many small models over hyper-parameters and widths, resumable"),
    "predict": (predict, "fit a loss law to small models, forecast larger ones"),
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
