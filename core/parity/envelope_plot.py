"""The plot of a drift envelope, with runs laid into it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from telechat_twins.core.files.pictures import save_picture
from telechat_twins.core.parity.envelope import COLUMNS, Envelope
from telechat_twins.core.train.metrics import Row, column

TITLES = {"loss": "loss", "grad_norm": "gradient norm"}
SMALLEST = 1e-9  # a difference of zero has no place on a logarithmic axis


def plot_envelope(
    envelope: Envelope, runs: Mapping[str, Sequence[Row]], path: Path, fixed: float | None = None
) -> Path:
    """Relative distances from the centre on a logarithmic axis, a panel for the loss and one for the gradient norm.

    The envelope is the shaded part below its limit. ``fixed``: a limit to draw for comparison, e.g. 0.02. The legend
    stands above the panels, where it covers no line.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(COLUMNS), 1, sharex=True, figsize=(9, 8), layout="constrained")
    for axis, key in zip(axes, COLUMNS, strict=True):
        limits = [x if math.isfinite(x) else math.nan for x in envelope.limits[key]]
        axis.fill_between(
            envelope.steps, SMALLEST, limits, color="0.85", label=f"envelope, K = {envelope.runs}", linewidth=0
        )
        for number, (label, rows) in enumerate(runs.items()):
            pairs = zip(column(rows, key), envelope.centre[key], strict=True)
            apart = [max(SMALLEST, abs(a - b) / abs(b)) for a, b in pairs]
            axis.plot(envelope.steps, apart, color=f"C{number}", linewidth=1.2, label=label)
        if fixed is not None:
            axis.axhline(fixed, color="black", linestyle=":", linewidth=1.0, label=f"{fixed:.0%}")
        axis.set_yscale("log")
        axis.set_ylim(bottom=SMALLEST)
        axis.set_ylabel(f"{TITLES[key]}: relative distance")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    save_picture(figure, path, 110)
    pyplot.close(figure)
    return path
