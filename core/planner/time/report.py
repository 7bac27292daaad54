"""The forecast of a step as `tele plan` reports it: JSON and text."""

from __future__ import annotations

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.model.flops import flops_per_token
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.planner.machine import Machine
from telechat_twins.core.planner.memory.estimate import FRAGMENTATION
from telechat_twins.core.planner.search.question import RESERVE_GIB, usable_bytes
from telechat_twins.core.planner.search.report import counted
from telechat_twins.core.planner.time.step import StepTime
from telechat_twins.core.planner.time.work import Work
from telechat_twins.core.types import JsonObject

_DAY = 86400.0


def require_forecast(run: object, lora: object, freeze: object, preference: object) -> None:
    """UserError for a run whose step the forecast does not describe."""
    for name, found in (("lora", lora), ("train.freeze", freeze), ("preference", preference)):
        if found:
            raise UserError(
                f"--machine: forecasts steps that train all weights on next tokens, but {run} has {name}; "
                f"leave --machine out, or plan the run without {name}"
            )


def report(
    model: ModelConfig,
    layout: Layout,
    work: Work,
    machine: Machine,
    step: StepTime,
    tokens: float | None,
    needed: float,
) -> JsonObject:
    """The forecast as JSON. ``tokens``: budget that days and energy are for, or None; ``needed``: bytes of the fullest
    rank, with fused attention."""
    devices = layout.world
    found: JsonObject = {
        "machine": machine.name,
        "devices": devices,
        "nodes": -(-devices // machine.devices_per_node),
        "seconds": step.seconds,
        "interval": [step.low, step.high],
        "tokens_per_step": work.tokens(layout.dp),
        "tokens_per_s": step.tokens_per_s,
        "tokens_per_s_per_device": step.tokens_per_s_per_device,
        "tflops_per_device": step.tflops,
        "peak_tflops": step.peak_tflops,
        "peak_source": machine.peak_source(work.precision),
        "mfu": step.mfu,
        "model_flops_per_token": flops_per_token(model, work.seq_len),
        "bubble": step.bubble,
        "exposed_seconds": dict(step.exposed),
        "breakdown_seconds": dict(step.breakdown),
        "assumes": machine.efficiency.source,
        "memory": {
            "needed_bytes": needed,
            "device_bytes": machine.memory_bytes,
            "usable_bytes": usable_bytes(machine, None),
            "fits": fits(machine, needed),
        },
        "recompute": work.recompute,
    }
    if tokens is not None:
        seconds = tokens / step.tokens_per_s
        found["budget"] = {
            "tokens": tokens,
            "days": seconds / _DAY,
            "interval_days": [seconds / _DAY * bound / step.seconds for bound in (step.low, step.high)],
            "device_hours": seconds * devices / 3600.0,
            "megawatt_hours": seconds * devices * machine.power.value / 3.6e9,
            "power_source": machine.power.source,
        }
    return found


def fits(machine: Machine, needed: float) -> bool:
    """Whether a rank that needs ``needed`` bytes fits on a device."""
    return needed <= machine.memory_bytes


def _memory_line(found: JsonObject, recompute: str) -> str:
    needed, there = found["needed_bytes"] / 2**30, found["device_bytes"] / 2**30
    if found["fits"]:
        line = f"  memory: the fullest rank needs {needed:,.1f} of the device's {there:,.1f} GiB, attention fused"
        if found["needed_bytes"] <= found["usable_bytes"]:
            return line
        return (
            f"{line}; TIGHT: --search stays below {found['usable_bytes'] / 2**30:,.1f}, with {RESERVE_GIB:g} GiB for "
            f"communicators and driver and {FRAGMENTATION:.0%} for fragmentation"
        )
    again = "" if recompute == "full" else "recompute (--recompute full), "
    return (
        f"  DOES NOT FIT: the fullest rank needs {needed:,.1f} GiB, attention fused, and the device has {there:,.1f}; "
        f"divide more (tp, pp), {again}or let --search choose"
    )


def describe(found: JsonObject, title: str) -> list[str]:
    """The forecast as lines of text."""
    low, high = found["interval"]
    total = found["seconds"]
    rate = found["tflops_per_device"]
    digits = 1 if rate >= 1.0 else 3  # a processor has a hundredth of a TFLOP/s
    lines = [
        "",
        f"time of a step on {counted(found['devices'], 'device')} of {title}: {total:.4g} s, between {low:.4g} and "
        f"{high:.4g} s",
        f"  {found['tokens_per_s']:,.0f} tokens/s, {found['tokens_per_s_per_device']:,.1f} on each device; "
        f"{rate:.{digits}f} model TFLOP/s a device, MFU {found['mfu']:.1%} of {found['peak_tflops']:g}",
        "  both count attention's whole square, as published ones do: "
        f"{found['model_flops_per_token']:.4g} operations a token",
        _memory_line(found["memory"], found["recompute"]),
        f"  pipeline bubble {found['bubble']:.1%}; waiting for transfers: "
        + ", ".join(f"{axis} {seconds / total:.1%}" for axis, seconds in found["exposed_seconds"].items()),
        "  the busiest pipeline rank's time:",
    ]
    lines += [
        f"    {name:<14}{seconds:>12.4g} s {seconds / total:>7.1%}"
        for name, seconds in found["breakdown_seconds"].items()
        if seconds > 5e-4 * total
    ]
    if "budget" in found:
        budget = found["budget"]
        low, high = budget["interval_days"]
        lines.append(
            f"  {budget['tokens']:.4g} tokens: {budget['days']:,.1f} days, between {low:,.1f} and {high:,.1f}; "
            f"{budget['device_hours']:,.0f} device hours, {budget['megawatt_hours']:,.1f} MWh"
        )
    lines += [f"  peak: {found['peak_source']}", f"  efficiencies: {found['assumes']}"]
    return lines
