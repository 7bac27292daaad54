"""`tele plan --growth`: estimates of memory and arithmetic for every stage of a growth schedule."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from telechat_twins.convert.growth.schedule import Stage

_STATE_BYTES = 12  # of a checkpoint per parameter: fp32 masters, m and v
# Options of `tele plan` that every stage of a schedule sets itself.
_OF_THE_STAGES = ("layout", "seq_len", "micro_batch", "micro_batches", "precision", "recompute", "recompute_lists")


def run(args: argparse.Namespace) -> int:
    from telechat_twins.convert.growth.schedule import cost, load_schedule
    from telechat_twins.core.parallel.layout import check_layout
    from telechat_twins.core.planner.memory.estimate import estimate

    if args.config is None:
        raise UserError("--growth: requires --config; give the run that the schedule belongs to")
    for name in _OF_THE_STAGES:
        if getattr(args, name) is not None:
            raise UserError(
                f"--{name.replace('_', '-')}: cannot be combined with --growth, whose stages have their own; change "
                f"{args.config} or the stages of {args.growth}"
            )
    stages = load_schedule(args.growth, args.config)
    rows, needed = [], []  # bytes of the fullest rank of each stage; attention is fused, as the time is forecast
    for stage in stages:
        config = stage.config
        check_layout(config.parallel, config.model, global_batch=config.train.global_batch)
        plan, fused = (
            estimate(
                config.model,
                config.data.seq_len,
                config.train.micro_batch,
                config.train.precision,
                config.train.recompute,
                fusing,
                layout=config.parallel,
                micro_batches=max(1, config.train.global_batch // (config.parallel.dp * config.train.micro_batch)),
            )
            for fusing in (args.fused_attention, True)
        )
        needed.append(fused["memory_bytes"]["total"])
        rows.append(
            {
                "name": stage.name,
                "parameters": stage.parameters,
                "layout": config.parallel.name,
                "devices": config.parallel.world,
                "steps": [stage.begin, stage.end],
                "tokens": stage.tokens,
                "flops": 6.0 * stage.parameters * stage.tokens,
                "device_bytes": plan["memory_bytes"]["total"],
                "memory_bytes": {use: size for use, size in plan["memory_bytes"].items() if use != "total"},
                "checkpoint_bytes": _STATE_BYTES * stage.parameters,
            }
        )
    arithmetic = cost(stages)
    report: JsonObject = {
        "stages": rows,
        "flops": arithmetic.by_parameters,
        "flops_from_scratch": arithmetic.scratch_by_parameters,
        "flops_saved": arithmetic.saved,
        "products_saved": 1.0 - arithmetic.by_products / arithmetic.scratch_by_products,
    }
    if args.machine is not None:
        report["time"] = _time(args.machine, stages, needed)
    print(json.dumps(report, indent=1) if args.json else _text(report, stages))
    return 0


def _time(name: str, stages: list[Stage], needed: list[float]) -> JsonObject:
    """Days, device hours and energy of every stage, and of the last size trained on all tokens in its layout.

    ``needed``: bytes of the fullest rank of each stage.
    """
    from telechat_twins.core.planner.machine import load_machine
    from telechat_twins.core.planner.time.report import fits
    from telechat_twins.core.planner.time.step import step_time
    from telechat_twins.core.planner.time.work import work_of
    from telechat_twins.core.train.recipe import tells_classes_apart

    machine = load_machine(name)

    def taken(stage: Stage, tokens: float) -> JsonObject:
        config = stage.config
        work = work_of(config, tells_classes_apart(config.optim))
        step = step_time(config.model, config.parallel, work, machine)
        seconds, devices = tokens / step.tokens_per_s, config.parallel.world
        return {
            "seconds_a_step": step.seconds,
            "tokens_per_s_per_device": step.tokens_per_s_per_device,
            "mfu": step.mfu,
            "days": seconds / 86400.0,
            "device_hours": seconds * devices / 3600.0,
            "megawatt_hours": seconds * devices * machine.power.value / 3.6e9,
        }

    rows = [
        {"name": stage.name, **taken(stage, stage.tokens), "needed_bytes": size, "fits": fits(machine, size)}
        for stage, size in zip(stages, needed, strict=True)
    ]
    scratch = taken(stages[-1], sum(stage.tokens for stage in stages))
    sums = {unit: sum(row[unit] for row in rows) for unit in ("days", "device_hours", "megawatt_hours")}
    saved = 1.0 - sums["device_hours"] / scratch["device_hours"]
    return {
        "machine": machine.title,
        "stages": rows,
        "grown": sums,
        "from_scratch": scratch,
        "device_hours_saved": saved,
        "device_bytes": machine.memory_bytes,
    }


def _time_lines(found: JsonObject) -> list[str]:
    row = "{:>12}{:>14}{:>10}{:>8}{:>10}{:>15}{:>10}"
    titles = ("stage", "s a step", "tok/s/dev", "MFU", "days", "device hours", "MWh")
    lines = ["", f"time on nodes of {found['machine']}", row.format(*titles)]
    for name, one in [*((r["name"], r) for r in found["stages"]), ("from scratch", found["from_scratch"])]:
        lines.append(
            row.format(
                name,
                f"{one['seconds_a_step']:.4g}",
                f"{one['tokens_per_s_per_device']:,.0f}",
                f"{one['mfu']:.1%}",
                f"{one['days']:,.2f}",
                f"{one['device_hours']:,.0f}",
                f"{one['megawatt_hours']:,.1f}",
            )
        )
    grown = found["grown"]
    lines.append(
        f"grown: {grown['days']:,.1f} days, {grown['device_hours']:,.0f} device hours, "
        f"{grown['megawatt_hours']:,.1f} MWh; of the last size's device hours on all tokens "
        f"{found['device_hours_saved']:.1%} saved, {1 / (1 - found['device_hours_saved']):.2f} times less. "
        "Restarts and growth itself are not counted."
    )
    there = found["device_bytes"] / 2**30
    lines += [
        f"stage {row['name']} DOES NOT FIT: its fullest rank needs {row['needed_bytes'] / 2**30:,.1f} GiB, attention "
        f"fused, and the device has {there:,.1f}; divide its model more, or set train.recompute"
        for row in found["stages"]
        if not row["fits"]
    ]
    return lines


def _text(report: JsonObject, stages: list[Stage]) -> str:
    from telechat_twins.convert.growth.report import describe

    titles = ("stage", "parameters", "layout", "devices", "steps", "tokens", "FLOPs", "a device", "checkpoint")
    rows = [titles]
    for stage in report["stages"]:
        rows.append(
            (
                stage["name"],
                f"{stage['parameters']:,}",
                stage["layout"],
                f"{stage['devices']}",
                f"{stage['steps'][0] + 1:,} to {stage['steps'][1]:,}",
                f"{stage['tokens'] / 1e9:,.2f} B",
                f"{stage['flops']:.3g}",
                f"{stage['device_bytes'] / 2**30:.1f} GiB",
                f"{stage['checkpoint_bytes'] / 1e9:,.1f} GB",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [
        "",
        f"FLOPs (6 x parameters x tokens): {report['flops']:.4g}; the last size on all tokens "
        f"{report['flops_from_scratch']:.4g}: {report['flops_saved']:.1%} saved, "
        f"{1 / (1 - report['flops_saved']):.2f} times less. Products alone, attention included: "
        f"{report['products_saved']:.1%} saved.",
        "Memory per device: that of the fullest rank; see `tele plan --help`. Checkpoint: masters, m and v.",
    ]
    if "time" in report:
        lines += _time_lines(report["time"])
    for before, stage in zip(stages, stages[1:], strict=False):
        assert stage.plan is not None
        lines += ["", f"growth from {before.name} to {stage.name}, at step {stage.begin:,}", describe(stage.plan)]
    return "\n".join(lines)
