"""Plots of a search: losses of all trials, loss over each hyper-parameter, and comparison of widths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from telechat_twins.core.files.pictures import save_picture
from telechat_twins.core.mup.search import DONE, Numbers
from telechat_twins.core.mup.search_report import TrialReport, ordered, over_seeds, varied, whole_widths
from telechat_twins.core.train.metrics import Row, column

CROWDED = 5  # labels of more ticks are rotated, so that they do not overlap


def plot(reports: Sequence[TrialReport], window: int, out: Path) -> list[Path]:
    """Write losses.png, hyperparameters.png if some were varied, and widths.png if there are several. Curves are means
    over seeds."""
    import matplotlib

    matplotlib.use("Agg")

    shown = [report for report in ordered(over_seeds(reports, window)) if len(report.rows) >= window]
    if not shown:
        return []
    made = [_plot_losses(shown, window, out / "losses.png")]
    names = [*varied([report.trial for report in shown]), *["width"] * (len({r.trial.width for r in shown}) > 1)]
    ended = [report for report in shown if report.state == DONE and report.loss is not None]
    if names and ended:
        made.append(_plot_numbers(ended, names, out / "hyperparameters.png"))
    widths = whole_widths(shown, window)
    if widths:
        made.append(_plot_widths(widths, window, out / "widths.png"))
    return made


def _smooth(rows: Sequence[Row], window: int) -> tuple[list[int], np.ndarray]:
    """Steps and the mean loss of the ``window`` steps up to each."""
    sums = np.cumsum([0.0, *column(rows, "loss")])
    return [row["step"] for row in rows[window - 1 :]], (sums[window:] - sums[:-window]) / window


def _plot_losses(reports: Sequence[TrialReport], window: int, path: Path) -> Path:
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 8), layout="constrained")
    for index, report in enumerate(reports):
        style = {"color": pyplot.get_cmap("viridis")(index / len(reports)), "linewidth": 1.2}
        steps, losses = _smooth(report.rows, window)
        upper.plot(steps, losses, label=report.trial.place if index < 12 else None, **style)
        lower.plot([row["step"] for row in report.rows], column(report.rows, "grad_norm"), **style)
    upper.set_ylabel(f"loss (mean of {window} steps)")
    lower.set_ylabel("gradient norm\n(before clipping)")
    lower.set_yscale("log")
    lower.set_xlabel("step")
    upper.legend(fontsize=7, title="best first" if len(reports) > 1 else None)
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    save_picture(figure, path, 110)
    pyplot.close(figure)
    return path


def _plot_numbers(reports: Sequence[TrialReport], names: Sequence[str], path: Path) -> Path:
    """Loss over each varied hyper-parameter: a point for each trial, and a line through the best mean over seeds at
    each value."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(names), sharey=True, figsize=(3.6 * len(names), 4), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        best: dict[float, float] = {}
        points = []
        for report in reports:
            value = report.trial.width if name == "width" else getattr(report.trial.numbers, name)
            if value is not None and report.loss is not None:
                best[value] = min(report.loss, best.get(value, report.loss))
                points += [(value, part.loss) for part in report.seeds if part.loss is not None]
        axis.plot([value for value, _ in points], [loss for _, loss in points], "o", alpha=0.6)
        axis.plot(*zip(*sorted(best.items()), strict=True), "-", color="C0", alpha=0.6)
        axis.set_xlabel(name)
        if min(best) > 0:
            axis.set_xscale("log")
        axis.set_xticks(sorted(best), [f"{value:g}" for value in sorted(best)], rotation=45 * (len(best) > CROWDED))
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss")
    save_picture(figure, path, 110)
    pyplot.close(figure)
    return path


def _plot_widths(widths: dict[Numbers, list[TrialReport]], window: int, path: Path) -> Path:
    """For each combination, the loss at every width, and its difference from that of the narrowest."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(widths), sharex=True, figsize=(6 * len(widths), 7), layout="constrained", squeeze=False
    )
    for place, (numbers, whole) in enumerate(widths.items()):
        upper, lower = axes[0][place], axes[1][place]
        narrowest = _smooth(whole[0].rows, window)[1]
        for index, report in enumerate(whole):
            steps, losses = _smooth(report.rows, window)
            style = {"color": pyplot.get_cmap("viridis")(index / len(whole)), "label": f"width {report.trial.width}"}
            upper.plot(steps, losses, **style)
            lower.plot(steps, losses - narrowest, **style)
        if len(widths) > 1:
            upper.set_title(numbers.label, fontsize=9)
        upper.set_ylabel(f"loss (mean of {window} steps)")
        lower.set_ylabel("minus that of the narrowest")
        lower.set_xlabel("step")
        upper.legend(fontsize=8)
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
    save_picture(figure, path, 110)
    pyplot.close(figure)
    return path
