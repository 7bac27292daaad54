"""`tele mup predict`: predicts the loss of a wide model from those of narrower ones."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import writable_file, write_text
from telechat_twins.core.files.pictures import save_picture
from telechat_twins.core.mup.loss_prediction import LEAST_POINTS, LEVEL, Fit, Forecast, fit_law, forecast, weaknesses
from telechat_twins.core.mup.loss_table import LossTable, read_loss_table
from telechat_twins.core.types import JsonObject

DESCRIPTION = """\
Fit L = a * C^b + c to the losses of small models and forecast those of larger ones.

Train the same model at four or more widths, with the same depth, the same data in the same order, the same batch, and
hyper-parameters transferred by muP. Take all losses at the same step, preferably averaged over some steps around it,
since the scatter of a single step becomes an error of the fit. Write them into a table:

  losses.csv                      losses.yaml
  width,parameters,loss           step: 20000
  128,8.53,3.9181                 parameters: [8.53, 21.56, 39.09, 61.12, 87.65]
  256,21.56,3.6054                loss: [3.9181, 3.6054, 3.4431, 3.3542, null]
  ...

C is `parameters`, in millions, or `width` without that column; a `step` must be the same in all rows. A row without a
loss is forecast. --hold-out N leaves the N largest measured models out of the fit and compares the forecast with them,
a test to pass before relying on a forecast. A new measurement lies in the interval with 95 % probability if the law
holds and runs scatter as the fitted ones do (Student's t, covariance of the fit plus residual variance, linearised).
Reasons to distrust a fit are listed below the table. The law does not apply to a model that was grown from a smaller
one, since it was not trained at its width from the start.
"""
EXAMPLES = """\
examples:
  tele mup predict losses.csv
  tele mup predict losses.csv --hold-out 3 --out forecast
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele mup predict``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument("table", metavar="TABLE", help=".csv or .yaml: sizes and losses at one step")
    parser.add_argument(
        "--hold-out",
        type=int,
        metavar="N",
        help="largest measured models to forecast instead of fit (1; 0 if the table has rows without a loss)",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="write prediction.json and prediction.png here")


def run(args: argparse.Namespace) -> int:
    """Fit the law, forecast and print; with ``--out`` also write the results."""
    if args.out:
        for name in ("prediction.json", "prediction.png"):
            writable_file(args.out / name, "--out")
    table = read_loss_table(args.table)
    hold_out = args.hold_out if args.hold_out is not None else 0 if None in table.losses else 1
    fit, forecasts, poor = predict(table, hold_out, args.table)
    print(describe(table, fit, forecasts, poor))
    if args.out:
        report = to_json(table, fit, forecasts, poor)
        write_text(args.out / "prediction.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
        plot(table, fit, forecasts, poor, args.out / "prediction.png")
        print(f"wrote {args.out / 'prediction.json'} and prediction.png")
    return 0


def predict(table: LossTable, hold_out: int, name: str) -> tuple[Fit, list[Forecast], list[str]]:
    """The fit without the ``hold_out`` largest measured models; forecasts of these and of rows without a loss, in order
    of size; and reasons to distrust them. ``name``: the table's name in messages. UserError for too few points.
    """
    if hold_out < 0:
        raise UserError(f"--hold-out: must be at least 0, found {hold_out}")
    measured = table.measured
    fitted, held = measured[: len(measured) - hold_out], measured[max(len(measured) - hold_out, 0) :]
    if len(measured) < LEAST_POINTS:
        raise UserError(
            f"{name}: must have at least {LEAST_POINTS} losses for a fit, found {len(measured)}; train more widths"
        )
    if len(fitted) < LEAST_POINTS:
        most = len(measured) - LEAST_POINTS
        raise UserError(
            f"--hold-out {hold_out}: must leave at least {LEAST_POINTS} of {len(measured)} losses in {name} for the "
            f"fit, leaves {max(len(measured) - hold_out, 0)}; hold out at most {most}"
        )
    sizes, losses = [size for size, _ in fitted], [loss for _, loss in fitted]
    try:
        fit = fit_law(sizes, losses)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    asked = [(size, None) for size, loss in zip(table.sizes, table.losses, strict=True) if loss is None]
    forecasts = [forecast(fit, size, loss) for size, loss in sorted([*held, *asked], key=lambda pair: pair[0])]
    return fit, forecasts, weaknesses(fit, sizes, losses)


def describe(table: LossTable, fit: Fit, forecasts: list[Forecast], poor: list[str]) -> str:
    """Text report of the fit and its forecasts."""
    step = f" at step {table.step}" if table.step is not None else ""
    lines = [
        f"{table.title}{step}: L = a * C^b + c over {fit.points} models, C = {_measure(table)}, "
        f"{fit.smallest:g} to {fit.largest:g}",
        f"  a  {fit.a:9.4f}  sd {fit.a_sd:.4f}",
        f"  b  {fit.b:9.4f}  sd {fit.b_sd:.4f}",
        f"  c  {fit.c:9.4f}  sd {fit.c_sd:.4f}   the loss of an infinitely wide model",
        f"  residual sd {fit.residual_sd:.4f}",
    ]
    if forecasts:
        titles = ("width", table.measure, "x fitted", "forecast", f"{LEVEL:.0%} interval", "measured", "error", "")
        rows = [titles, *(_row(table, fit, one) for one in forecasts)]
        if table.widths is None:
            rows = [row[1:] for row in rows]
        sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines.append("")
        lines += ["  ".join(t.rjust(n) for t, n in zip(row, sizes, strict=True)).rstrip() for row in rows]
    lines.append("")
    lines += [f"poor fit: {reason}" for reason in poor] or ["no weakness of the fit was found"]
    return "\n".join(lines)


def _row(table: LossTable, fit: Fit, one: Forecast) -> tuple[str, ...]:
    width = f"{table.widths[table.sizes.index(one.size)]:g}" if table.widths else ""
    law = (f"{one.predicted:.4f}", f"{one.low:.4f} to {one.high:.4f}")
    seen = ("-", "-", "")
    if one.measured is not None:
        seen = (f"{one.measured:.4f}", f"{one.error:+.2%}", "" if one.inside else "outside the interval")
    return (width, f"{one.size:g}", f"{one.size / fit.largest:.2f}", *law, *seen)


def _measure(table: LossTable) -> str:
    return "parameters in millions" if table.measure == "parameters" else table.measure


def to_json(table: LossTable, fit: Fit, forecasts: list[Forecast], poor: list[str]) -> JsonObject:
    """The contents of prediction.json."""
    names = ("a", "b", "c", "a_sd", "b_sd", "c_sd", "residual_sd", "points", "smallest", "largest")
    rows = [
        {
            "size": one.size,
            "predicted": one.predicted,
            "low": one.low,
            "high": one.high,
            "measured": one.measured,
            "error": one.error,
            "inside": one.inside,
        }
        for one in forecasts
    ]
    return {
        "law": "loss = a * size**b + c",
        "title": table.title,
        "size": table.measure,
        "unit": "millions" if table.measure == "parameters" else "channels",
        "step": table.step,
        "fit": {name: getattr(fit, name) for name in names},
        "interval": f"prediction, level {LEVEL}, Student t of {fit.points - 3} degrees of freedom, linearised",
        "forecasts": rows,
        "poor": poor,
        "fitted": [{"size": size, "loss": loss} for size, loss in table.measured if size <= fit.largest],
    }


def plot(table: LossTable, fit: Fit, forecasts: list[Forecast], poor: list[str], path: Path) -> Path:
    """Loss over size, size on a logarithmic axis: the law, its interval, fitted and held-out points."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot, ticker

    sizes = np.geomspace(table.sizes[0] / 1.15, table.sizes[-1] * 1.15, 200)
    band = [forecast(fit, float(size)) for size in sizes]
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    axis.fill_between(
        sizes, [p.low for p in band], [p.high for p in band], color="C0", alpha=0.15, label=f"{LEVEL:.0%} interval"
    )
    axis.plot(sizes, [p.predicted for p in band], color="C0", label=f"{fit.a:.3f} C^({fit.b:.3f}) + {fit.c:.3f}")
    fitted = [(size, loss) for size, loss in table.measured if size <= fit.largest]
    axis.plot(*zip(*fitted, strict=True), "o", color="C0", label="fitted")
    held = [(p.size, p.measured) for p in forecasts if p.measured is not None]
    if held:
        axis.plot(*zip(*held, strict=True), "*", color="C3", markersize=12, label="held out")
    asked = [(p.size, p.predicted) for p in forecasts if p.measured is None]
    if asked:
        axis.plot(*zip(*asked, strict=True), "D", color="C1", markerfacecolor="none", label="forecast")
    shown = [loss for _, loss in [*fitted, *held, *asked]]
    margin = 0.15 * (max(shown) - min(shown)) or 0.1
    # Limit the axis, so that the wide interval of a poor fit does not flatten the points.
    axis.set_ylim(min(shown) - 2 * margin, max(shown) + 2 * margin)
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda size, _: f"{size:g}"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.set_xlabel(_measure(table))
    axis.set_ylabel("loss" + (f" at step {table.step}" if table.step is not None else ""))
    axis.set_title(table.title + (" (poor fit)" if poor else ""))
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    save_picture(figure, path, 120)
    pyplot.close(figure)
    return path
