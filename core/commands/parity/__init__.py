"""``tele parity``: compares both backends on one config, on one device and in layouts, against bounds.

With an action it works with records of single runs, which may have been taken on different machines.
"""

from __future__ import annotations

import argparse
from types import ModuleType

from telechat_twins.core.commands.parity import both, compare, envelope, growth, locate, record
from telechat_twins.core.errors import UserError

# Of each action its module and summary.
ACTIONS: dict[str, tuple[ModuleType, str]] = {
    "record": (record, "record what some training steps compute, in a small folder"),
    "compare": (compare, "judge two records, two runs or two forward results; exit 1 on a broken bound"),
    "locate": (locate, "name the first wrong operator of two records, and replay it"),
    "envelope": (envelope, "measure how far an equal device's loss and gradient norm may drift"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the comparison of both backends, and the actions with their own options."""
    both.add_arguments(parser)
    actions = parser.add_subparsers(dest="action", metavar="{" + ",".join(ACTIONS) + "}")
    for name, (module, summary) in ACTIONS.items():
        module.add_arguments(actions.add_parser(name, help=summary))


def run(args: argparse.Namespace) -> int:
    """The exit code of the action, or of the comparison of both backends."""
    if (action := getattr(args, "action", None)) is not None:
        code: int = ACTIONS[action][0].run(args)
        return code
    if args.config is None:  # the parser does not require it, since an action may stand in its place
        raise UserError("the following arguments are required: --config; see `tele parity --help`")
    both.check(args)
    return both.run(args) if args.growth is None else growth.run(args)
