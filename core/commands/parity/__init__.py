"""``tele parity``: compares both backends on one config, on one device and in layouts, against bounds.

With an action it works with records of single runs, which may have been taken on different machines.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from telechat_twins.core.commands.parity import options
from telechat_twins.core.errors import UserError

# Of each action, a module beside this one, its options and summary.
ACTIONS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "record": (options.record_arguments, "record what some training steps compute, in a small folder"),
    "compare": (
        options.compare_arguments,
        "judge two records, two runs or two forward results; exit 1 on a broken bound",
    ),
    "locate": (options.locate_arguments, "name the first wrong operator of two records, and replay it"),
    "envelope": (options.envelope_arguments, "measure how far an equal device's loss and gradient norm may drift"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the comparison of both backends, and the actions with their own options."""
    options.both_arguments(parser)
    actions = parser.add_subparsers(dest="action", metavar="{" + ",".join(ACTIONS) + "}")
    for name, (arguments, summary) in ACTIONS.items():
        arguments(actions.add_parser(name, help=summary))


def run(args: argparse.Namespace) -> int:
    """The exit code of the action, or of the comparison of both backends."""
    # Only what is run is imported: all of it takes half a second.
    action = getattr(args, "action", None)
    if action == "record":
        from telechat_twins.core.commands.parity.record import run as run_action
    elif action == "compare":
        from telechat_twins.core.commands.parity.compare import run as run_action
    elif action == "locate":
        from telechat_twins.core.commands.parity.locate import run as run_action
    elif action == "envelope":
        from telechat_twins.core.commands.parity.envelope import run as run_action
    else:
        if args.config is None:  # the parser does not require it, since an action may stand in its place
            raise UserError(
                "the following arguments are required: --config, e.g. `tele parity --config telechat2-tiny`; see "
                "`tele parity --help`"
            )
        options.check_both(args)
        if args.growth is None:
            from telechat_twins.core.commands.parity.both import run as run_action
        else:
            from telechat_twins.core.commands.parity.growth import run as run_action
    return run_action(args)
