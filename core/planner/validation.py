"""Forecasts of published runs as a table and a picture: `tele plan --validate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from telechat_twins.core.files.pictures import save_picture
from telechat_twins.core.planner.fit import FAMILIES, Fit
from telechat_twins.core.planner.machine import load_machine
from telechat_twins.core.planner.published import Forecast

_MARKS = {"fit": "o", "held-out": "s"}
_COLOURS = {"910b": "#e45756", "ampere": "#4c78a8", "hopper": "#54a24b"}


def table(forecasts: Sequence[Forecast]) -> list[str]:
    """A Markdown table of published and predicted tokens/s of a device."""
    lines = [
        "| run | machine | layout | use | published | predicted | error | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in forecasts:
        run = one.run
        lines.append(
            f"| {run.name} | {run.machine} | `{run.layout}` | {run.use} | {one.measured:,.1f} | {one.predicted:,.1f} | "
            f"{one.error:+.1%} | {one.detail.mfu:.1%} |"
        )
    return lines


def fit_lines(found: Fit) -> list[str]:
    """What a fit found, beside what the machine files hold."""
    about = FAMILIES[found.family]
    stored = load_machine(about.machines[0]).efficiency
    values = ", ".join(f"{name} {value:g} (stored {getattr(stored, name):g})" for name, value in found.values.items())
    faster, slower = found.interval
    return [
        f"{found.family} ({', '.join(about.machines)}): {values}; faster {faster:.3f} (stored {stored.faster:g}), "
        f"slower {slower:.3f} (stored {stored.slower:g}); fitted on {len(found.fitted)} runs, tested on "
        f"{len(found.held_out)}"
    ]


def draw(path: Path, forecasts: Sequence[Forecast]) -> None:
    """Draw predicted against published throughput, and the errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    family = {name: key for key, about in FAMILIES.items() for name in about.machines}
    low = min(one.measured for one in forecasts) / 1.5
    high = max(one.measured for one in forecasts) * 1.5
    left.plot([low, high], [low, high], color="black", linewidth=0.8)
    left.fill_between([low, high], [0.88 * low, 0.88 * high], [1.12 * low, 1.12 * high], color="#dddddd")
    seen: set[tuple[str, str]] = set()
    for one in forecasts:
        kind = family[one.run.machine], one.run.use
        label = None if kind in seen else f"{kind[0]}, {kind[1]}"
        seen.add(kind)
        face = "none" if one.run.use == "fit" else _COLOURS[kind[0]]
        left.plot(
            one.measured,
            one.predicted,
            _MARKS[one.run.use],
            color=_COLOURS[kind[0]],
            markerfacecolor=face,
            label=label,
        )
    left.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    left.set(xlabel="published tokens/s of a device", ylabel="predicted; band: 12 %")
    left.legend(frameon=False)
    names = [one.run.name for one in forecasts]
    errors = [100.0 * one.error for one in forecasts]
    colours = [_COLOURS[family[one.run.machine]] for one in forecasts]
    for place, (error, colour, one) in enumerate(zip(errors, colours, forecasts, strict=True)):
        right.barh(place, error, color="none" if one.run.use == "fit" else colour, edgecolor=colour)
    right.axvspan(-12, 12, color="#dddddd", zorder=0)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.invert_yaxis()
    right.set_xlabel("error of the predicted throughput in %; open bars were fitted")
    save_picture(figure, path, 110)
