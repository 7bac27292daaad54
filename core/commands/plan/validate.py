"""`tele plan --validate`: forecasts of published runs beside what was measured, and the fit of the efficiencies."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from telechat_twins.core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``--validate``."""
    parser.add_argument(
        "--fit", action="store_true", help="with --validate: fit the efficiencies of the machine files again (a minute)"
    )
    parser.add_argument("--plot", metavar="FILE", help="with --validate: draw predicted against published (.png)")


def run(args: argparse.Namespace) -> int:
    """Print the table, and with ``--fit`` what a new fit finds."""
    from telechat_twins.core.planner.fit import FAMILIES, fit
    from telechat_twins.core.planner.published import forecast, published_runs
    from telechat_twins.core.planner.validation import draw, fit_lines, table

    if args.fit and args.json:
        raise UserError("--fit: is printed as text only; leave --json out")
    forecasts = [forecast(run) for run in published_runs()]
    if args.plot is not None:
        draw(Path(args.plot), forecasts)
    if args.json:
        rows = [
            {
                "name": one.run.name,
                "use": one.run.use,
                "published": one.measured,
                "predicted": one.predicted,
                "error": one.error,
                "source": one.run.source,
                "assumed": one.run.assumed,
            }
            for one in forecasts
        ]
        print(json.dumps({"runs": rows}, indent=1))
        return 0
    print("\n".join(table(forecasts)))
    if args.fit:
        print("\n".join(["", *(line for family in FAMILIES for line in fit_lines(fit(family)))]))
    return 0
