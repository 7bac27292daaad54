"""`tele plan` of several layouts: one table, a line a layout."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from telechat_twins.core.commands.plan.training import Given, forecast_work
from telechat_twins.core.errors import UserError
from telechat_twins.core.parallel.layout import Layout, parse_layout
from telechat_twins.core.planner.memory.estimate import estimate
from telechat_twins.core.types import JsonObject

_OF_ONE_LAYOUT = ("trace", "timeline", "cost", "budget")


def run(args: argparse.Namespace, names: list[str]) -> int:
    """Print memory, and with ``--machine`` time, of the layouts ``names``; 1 where none fits on a device.

    UserError where none is possible, and for options of one layout.
    """
    for option in _OF_ONE_LAYOUT:
        if getattr(args, option) not in (None, False):
            raise UserError(f"--{option}: is for a plan of one layout; leave it out, or give one --layout")
    given = Given.of(args)
    if args.machine is not None and given.run is not None:
        from telechat_twins.core.planner.time.report import require_forecast

        require_forecast(args.config, given.run.lora, given.run.train.freeze, given.run.preference)
    rows = [_row(args, given, parse_layout(name)) for name in names]
    if all("illegal" in row for row in rows):
        reasons = "; ".join(f"{row['layout']}: {row['illegal']}" for row in rows)
        raise UserError(f"--layout: none of them is possible; {reasons}")
    if args.json:
        print(json.dumps({"layouts": rows}, indent=1))
    else:
        print("\n".join(_text(args, rows)))
    return 0 if any("illegal" not in row and row.get("fits", True) for row in rows) else 1


def _row(args: argparse.Namespace, given: Given, layout: Layout) -> JsonObject:
    """A layout's figures; of one that does not fit model or batch, the reason (``illegal``)."""
    row: JsonObject = {"layout": layout.name, "devices": layout.world}
    try:
        settings = given.settings(args, layout)
    except UserError as error:
        return {**row, "illegal": str(error)}
    fused = args.fused_attention or args.machine is not None  # as the time is forecast
    plan = estimate(given.model, layout=layout, fused_attention=fused, **settings)
    micro_batch, micro_batches = settings.get("micro_batch", 1), settings.get("micro_batches", layout.stages)
    row |= {
        "micro_batch": micro_batch,
        "micro_batches": micro_batches,
        "global_batch": micro_batch * micro_batches * layout.dp,
        "memory_bytes": plan["memory_bytes"]["total"],
        "bubble": plan["bubble"],
    }
    return row if args.machine is None else row | _time(args, given, layout, settings, row["memory_bytes"])


def _time(args: argparse.Namespace, given: Given, layout: Layout, settings: JsonObject, needed: float) -> JsonObject:
    from telechat_twins.core.planner.machine import load_machine
    from telechat_twins.core.planner.time.report import report
    from telechat_twins.core.planner.time.step import step_time

    machine, work = load_machine(args.machine), forecast_work(given.run, layout, settings)
    step = step_time(given.model, layout, work, machine)
    found = report(given.model, layout, work, machine, step, args.tokens, needed)
    names = ("seconds", "interval", "tokens_per_s", "tokens_per_s_per_device", "mfu", "bubble", "exposed_seconds")
    budget = {"budget": found["budget"]} if args.tokens is not None else {}
    memory = {name: found["memory"][name] for name in ("device_bytes", "usable_bytes", "fits")}
    return {**{name: found[name] for name in names}, **memory, **budget}


def _text(args: argparse.Namespace, rows: list[JsonObject]) -> list[str]:
    """The table, and below it the reasons of layouts that are not legal, and what the figures depend on."""
    timed = args.machine is not None
    titles = ["layout", "devices", "batch", "micro", "GiB", "bubble"]
    titles += ["s a step", "tokens/s", "a device", "MFU", "waits"] if timed else []
    titles += ["days"] if args.tokens is not None else []
    titles += ["fits"] if timed else []
    table = [titles, *(_cells(row, timed) for row in rows if "illegal" not in row)]
    widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
    lines = [f"{Path(args.model or args.config).stem}" + (f" on {args.machine}" if timed else ""), ""]
    for cells in table:
        first, *rest = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        lines.append("  ".join([cells[0].ljust(len(first)), *rest]).rstrip())
    lines += [f"{row['layout']} is not possible: {row['illegal']}" for row in rows if "illegal" in row]
    lines += ["", "GiB: the fullest rank" + (", attention fused" if timed else "") + "; batch: sequences a step"]
    if timed:
        lines[-1] += "; waits: for transfers, share of the step; tightly: less free than --search keeps"
    if len({row["global_batch"] for row in rows if "illegal" not in row}) > 1:
        lines.append("the batch is not the same everywhere; --global-batch sets one for all")
    return lines


def _cells(row: JsonObject, timed: bool) -> list[str]:
    cells = [row["layout"], f"{row['devices']:,}", f"{row['global_batch']:,}", f"{row['micro_batch']}"]
    gib = row["memory_bytes"] / 2**30
    cells += [f"{gib:,.1f}" if gib >= 1.0 else f"{gib:.3f}", f"{row['bubble']:.1%}"]
    if not timed:
        return cells
    waits = sum(row["exposed_seconds"].values()) / row["seconds"]
    cells += [f"{row['seconds']:.4g}", f"{row['tokens_per_s']:,.0f}", f"{row['tokens_per_s_per_device']:,.1f}"]
    cells += [f"{row['mfu']:.1%}", f"{waits:.1%}"]
    cells += [f"{row['budget']['days']:,.1f}"] if "budget" in row else []
    over = (row["memory_bytes"] - row["device_bytes"]) / 2**30
    tight = row["memory_bytes"] > row["usable_bytes"]
    return [*cells, f"no, {over:,.1f} GiB over" if not row["fits"] else "tightly" if tight else "yes"]
