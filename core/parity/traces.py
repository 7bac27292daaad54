"""Plots of two training runs laid over each other, and of their relative differences step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.files.pictures import save_picture
from telechat_twins.core.parity.bounds import STRICT_STEPS, Bound, TraceReport
from telechat_twins.core.parity.document.model import Curve, Limit, Plot
from telechat_twins.core.train.metrics import Row, column

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"loss": "loss", "grad_norm": "gradient norm"}


def loss_plot(runs: Mapping[str, Sequence[Row]]) -> Plot:
    """Losses of every run over steps."""
    curves = [Curve(label, [float(row["step"]) for row in rows], column(rows, "loss")) for label, rows in runs.items()]
    return Plot("Loss of each run", "step", "loss (nats per token)", curves)


def trace_plot(trace: TraceReport) -> Plot:
    """Relative differences of loss and gradient norm over steps, with their limits."""
    steps = [float(step) for step in trace.steps]
    curves = [Curve(NAMES["loss"], steps, trace.loss), Curve(NAMES["grad_norm"], steps, trace.grad_norm)]
    last = steps[min(len(steps), STRICT_STEPS) - 1]
    limits = [
        Limit(f"limit of {NAMES[key]}, {bound.limit:.2g}", bound.limit, steps[0], last)
        for key, bound in _limits(trace).items()
    ]
    return Plot("Relative difference, step by step", "step", "relative difference", curves, limits, logarithmic=True)


def _limits(trace: TraceReport) -> dict[str, Bound]:
    """The bound of each column that has one."""
    found = {bound.key: bound for bound in trace.bounds}
    return {key: found[f"trace.{key}"] for key in NAMES if f"trace.{key}" in found}


def plot_traces(runs: Mapping[str, Sequence[Row]], trace: TraceReport, path: Path) -> Path:
    """Draw ``trace_figure`` into a PNG file; returns its path."""
    from matplotlib import pyplot

    figure = trace_figure(runs, trace)
    save_picture(figure, path, 120)
    pyplot.close(figure)
    return path


def trace_figure(runs: Mapping[str, Sequence[Row]], trace: TraceReport) -> Figure:
    """Two panels: the loss curves laid over each other, and the relative differences on a logarithmic axis.

    The legends stand above the panels, where they cover neither a curve nor a limit.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 7.6), layout="constrained")
    styles = [
        {"color": "C0", "linewidth": 3, "alpha": 0.5},
        {"color": "C1", "linewidth": 1.5, "linestyle": (0, (4, 3))},
        {"color": "black", "linewidth": 0.7, "linestyle": ":"},  # the judge
    ]
    for style, (label, rows) in zip(styles, runs.items(), strict=False):
        upper.plot([row["step"] for row in rows], column(rows, "loss"), label=label, **style)
    upper.set_ylabel("loss (nats per token)")
    last = trace.steps[min(len(trace.steps), STRICT_STEPS) - 1]
    limits = _limits(trace)
    for key, color in (("loss", "C2"), ("grad_norm", "C4")):
        _draw_differences(lower, trace.steps, getattr(trace, key), NAMES[key], color)
        if key in limits:
            limit = limits[key].limit
            label = f"limit of {NAMES[key]}, {limit:.2g}"
            lower.hlines(limit, trace.steps[0], last, color=color, linestyle=":", label=label)
    lower.set_ylabel("relative difference")
    lower.set_xlabel("step")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
        axis.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False)
    figure.suptitle("The same training in two frameworks")
    return figure


def _draw_differences(axis: Axes, steps: Sequence[int], values: Sequence[float], name: str, color: str) -> None:
    """One curve of differences. An exact zero has no place on a logarithmic axis: there the curve has a gap, and the
    step a mark on the lower edge."""
    drawn = [value if value > 0 else math.nan for value in values]
    axis.semilogy(steps, drawn, color=color, marker=".", markersize=3, linewidth=1.2, label=name)
    equal = [step for step, value in zip(steps, values, strict=True) if value == 0.0]
    if equal:
        label = f"{name} exactly equal ({len(equal)} steps)"
        edge = axis.get_xaxis_transform()  # x in steps, y from 0, the lower edge, to 1
        axis.plot(equal, [0.012] * len(equal), "|", color=color, markersize=6, transform=edge, label=label)
