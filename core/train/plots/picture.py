"""PNG and SVG of runs laid side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.files.pictures import save_picture
from telechat_twins.core.train.metrics import running_mean
from telechat_twins.core.train.plots.fonts import any_script
from telechat_twins.core.train.plots.series import Curve, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Paul Tol's bright scheme, told apart by colour-blind readers; dashes tell later curves apart.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#7f7f7f", "#222255")
SMOOTH_FROM, FEW = 250, 30  # points of a curve
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))


def draw(panels: Sequence[Panel], title: str, x_label: str, marks: Mapping[float, str], paths: Sequence[Path]) -> None:
    """Draw all panels below one another into each of ``paths``, in the format of its suffix."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    any_script()

    heights = [2.0 if number == 0 else 1.2 for number in range(len(panels))]
    figure, axes = pyplot.subplots(
        len(panels),
        1,
        sharex=True,
        squeeze=False,
        figsize=(9, 1.6 * sum(heights) + 1),
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    labels = list(dict.fromkeys(curve.label for panel in panels for curve in panel.curves))
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for curve in panel.curves:
            _draw_curve(axis, curve, labels.index(curve.label))
        _scale(axis, panel)
        for x, text in marks.items():
            axis.axvline(x, color="0.5", linewidth=0.9, linestyle=":")
            if panel is panels[0]:
                axis.text(x, 0.98, f" {text}", transform=axis.get_xaxis_transform(), va="top", fontsize=8, color="0.35")
    axes[0, 0].legend(fontsize=9)
    axes[0, 0].set_title(title)
    axes[-1, 0].set_xlabel(x_label)
    for path in paths:
        save_picture(figure, path, 120)
    pyplot.close(figure)


def _draw_curve(axis: Axes, curve: Curve, number: int) -> None:
    """Run number ``number`` in its colour; of a long one single steps are faint, around a running mean."""
    colour, style = COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]
    if len(curve.x) < SMOOTH_FROM:
        few = "o" if len(curve.x) <= FEW else ""
        axis.plot(curve.x, curve.y, label=curve.label, color=colour, linestyle=style, marker=few, markersize=3)
        return
    axis.plot(curve.x, curve.y, color=colour, alpha=0.25, linewidth=0.7)
    mean = running_mean(curve.y, len(curve.y) // 50)
    axis.plot(curve.x, mean, label=curve.label, color=colour, linestyle=style, linewidth=1.6)


def _scale(axis: Axes, panel: Panel) -> None:
    axis.set_ylabel(panel.title.replace(" (", "\n(").replace(" from ", "\nfrom "), fontsize=9)
    axis.grid(alpha=0.3)
    values = [abs(y) for curve in panel.curves for y in curve.y if not math.isnan(y)]
    positive = [value for value in values if value > 0]
    wide = len(positive) == len(values) and positive and max(positive) > 50 * min(positive)
    if positive and (panel.logarithmic or wide):
        axis.set_yscale("log")
