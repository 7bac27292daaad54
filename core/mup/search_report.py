"""What a search found: a row a trial, the trend of its gradient norm, whether wider was better; csv, json and plots.

Everything is computed from the trials' metrics.jsonl, so that a report can be made anew at any time.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from core.metrics import Row, column, read_metrics
from core.mup.search import DONE, NAMES, Numbers, Trial, result_of
from core.mup.transfer import RULES, value_of
from core.params import count_parameters

QUARTERS = 4  # of the steps after warm-up, whose median gradient norms make the trend
SURE = 3.0  # standard errors by which a wider model must be worse before it is called so


@dataclass(frozen=True)
class Report:
    """One trial. ``loss``: the mean of the last steps; ``trend``: gradient norm of the last quarter after warm-up over
    the first's; ``rising``: every quarter above the one before, the sign that the Tele-FLM report warns of."""

    trial: Trial
    state: str
    reason: str
    steps: int
    loss: float | None
    start: float | None
    trend: float | None
    rising: bool
    seconds: float
    rows: list[Row] = field(repr=False)

    @property
    def rose(self) -> bool:
        """It ended above where it began: diverged, though no number was ever infinite."""
        return self.loss is not None and self.start is not None and self.loss > self.start


@dataclass(frozen=True)
class Wider:
    """Two widths of one combination, step against step in windows after warm-up. ``better``: the share of windows in
    which the wider had the lower mean loss; ``worse``: last steps of windows in which it was worse beyond noise."""

    narrow: int
    wide: int
    windows: int
    better: float
    worse: list[int]


def report_of(trial: Trial, window: int) -> Report:
    """What there is of a trial so far."""
    result = result_of(trial)
    file = trial.folder / "metrics.jsonl"
    rows = read_metrics(file) if file.exists() else []
    losses = [loss for loss in column(rows, "loss") if math.isfinite(loss)]
    norms = [n for n in column(rows[trial.config.optim.warmup_steps :], "grad_norm") if math.isfinite(n)]
    parts = np.array_split(np.array(norms), QUARTERS) if len(norms) >= 2 * QUARTERS else []
    medians = [float(np.median(part)) for part in parts]
    usable = bool(medians) and min(medians) > 0
    return Report(
        trial=trial,
        state=result.state if result else ("begun" if rows else "waiting"),
        reason=result.reason if result else "",
        steps=rows[-1]["step"] if rows else 0,
        loss=statistics.fmean(losses[-window:]) if len(losses) >= window else None,
        start=losses[0] if losses else None,
        trend=medians[-1] / medians[0] if usable else None,
        rising=usable and all(a < b for a, b in zip(medians, medians[1:], strict=False)),
        seconds=sum(row["step_ms"] for row in rows) / 1000,
        rows=rows,
    )


def ordered(reports: Sequence[Report]) -> list[Report]:
    """Whole runs by loss, then those that ended early, then those that have not ended."""
    rank = {DONE: 0, "diverged": 1, "failed": 2, "begun": 3}
    return sorted(reports, key=lambda r: (rank.get(r.state, 4), math.inf if r.loss is None else r.loss))


def varied(trials: Sequence[Trial]) -> list[str]:
    """The hyper-parameters that are not one and the same in all combinations, in the order of NAMES."""
    return [name for name in NAMES if len({getattr(trial.numbers, name) for trial in trials}) > 1]


def judge_widths(reports: Sequence[Report], window: int) -> dict[Numbers, list[Wider]]:
    """Neighbouring widths of every combination of which at least two widths are whole runs.

    Both saw the same batches, so their losses are compared in pairs: a window is worse when the mean of its differences
    is above SURE standard errors. The errors count the drift inside a window as noise, which errs on the side of calm.
    """
    found: dict[Numbers, list[Wider]] = {}
    for numbers in dict.fromkeys(report.trial.numbers for report in reports):
        whole = [r for r in reports if r.trial.numbers == numbers and r.state == DONE]
        whole.sort(key=lambda r: r.trial.width)
        if len(whole) > 1:
            found[numbers] = [_wider(a, b, window) for a, b in zip(whole, whole[1:], strict=False)]
    return found


def _wider(narrow: Report, wide: Report, window: int) -> Wider:
    first = narrow.trial.config.optim.warmup_steps
    apart = np.array(column(wide.rows, "loss")) - np.array(column(narrow.rows, "loss"))
    ends = range(first + window, len(apart) + 1, window)
    better, worse = 0, []
    for end in ends:
        part = apart[end - window : end]
        mean, error = float(np.mean(part)), float(np.std(part, ddof=1) / math.sqrt(window))
        better += mean < 0
        if mean > SURE * error:
            worse.append(end)
    return Wider(narrow.trial.width, wide.trial.width, len(ends), better / max(1, len(ends)), worse)


def describe(reports: Sequence[Report], widths: dict[Numbers, list[Wider]], window: int) -> str:
    """The table for people, best first, and what is said of widths."""
    names = varied([report.trial for report in reports])
    titles = ["width", *names, "loss", "gradient norm", "minutes", ""]
    rows = [titles, *(_cells(report, names) for report in ordered(reports))]
    sizes = [max(len(row[i]) for row in rows) for i in range(len(titles))]
    lines = ["  ".join(cell.rjust(n) for cell, n in zip(row, sizes, strict=True)).rstrip() for row in rows]
    lines.append(
        f"loss: mean of the last {window} steps; gradient norm: last quarter after warm-up over the first, "
        "rising: every quarter above the one before"
    )
    for numbers, pairs in widths.items():
        holds = not any(pair.worse for pair in pairs)
        lines += ["", f"wider is better ({numbers.label}): {'holds' if holds else 'DOES NOT HOLD'}"]
        for pair in pairs:
            said = f"worse beyond noise in the windows up to step {', '.join(map(str, pair.worse))}"
            share = f"better in {pair.better:.0%} of {pair.windows} windows of {window} steps"
            ending = said if pair.worse else "never worse beyond noise"
            lines.append(f"  {pair.narrow} -> {pair.wide}: {share}; {ending}")
    return "\n".join(lines)


def _cells(report: Report, names: Sequence[str]) -> list[str]:
    numbers = (getattr(report.trial.numbers, name) for name in names)
    loss = "-" if report.loss is None else f"{report.loss:.4f}"
    trend = "-" if report.trend is None else f"x {report.trend:.2f}" + (" rising" if report.rising else "")
    said = "" if report.state == DONE else f"{report.state} at step {report.steps}"
    if report.rose:
        said = f"{said or 'ended'} above its start"
    said = f"{said}: {report.reason}" if report.reason else said
    shown = ("config's" if value is None else f"{value:.4g}" for value in numbers)
    return [str(report.trial.width), *shown, loss, trend, f"{report.seconds / 60:.1f}", said]


def to_json(reports: Sequence[Report], widths: dict[Numbers, list[Wider]], window: int) -> dict[str, Any]:
    """What results.json holds."""
    return {
        "window": window,
        "trials": [_record(report) for report in ordered(reports)],
        "wider is better": [
            {"numbers": numbers.label, **vars(pair), "holds": not pair.worse}
            for numbers, pairs in widths.items()
            for pair in pairs
        ],
    }


def _record(report: Report) -> dict[str, Any]:
    """One trial as plain values: the numbers at its own width too."""
    trial = report.trial
    model, optim = trial.config.model, trial.config.optim
    return {
        "trial": trial.name,
        "state": report.state,
        "reason": report.reason,
        "width": trial.width,
        "parameters": count_parameters(model),
        **{name: getattr(trial.numbers, name) for name in NAMES},
        "at this width": {rule.option: value_of(rule, model, optim) for rule in RULES},
        "steps": report.steps,
        "loss": report.loss,
        "first loss": report.start,
        "gradient norm trend": report.trend,
        "gradient norm rising": report.rising,
        "seconds": round(report.seconds, 1),
    }


def results_csv(reports: Sequence[Report]) -> str:
    """A line a trial, best first."""
    text = io.StringIO()
    records = [{k: v for k, v in _record(r).items() if k != "at this width"} for r in ordered(reports)]
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def loss_tables(reports: Sequence[Report], window: int) -> dict[str, str]:
    """losses.csv, as `tele mup predict` takes it, of a combination with at least two whole widths; losses-LABEL.csv
    where there are several such combinations."""
    made = {}
    for numbers in judge_widths(reports, window):
        whole = [r for r in reports if r.trial.numbers == numbers and r.state == DONE and r.loss is not None]
        lines = [f"# {numbers.label}: mean loss of the last {window} steps", "width,parameters,loss,step"]
        for report in sorted(whole, key=lambda r: r.trial.width):
            millions = count_parameters(report.trial.config.model) / 1e6
            lines.append(f"{report.trial.width},{millions:.6g},{report.loss:.6f},{report.steps}")
        made[numbers.label] = "\n".join(lines) + "\n"
    if len(made) == 1:
        return {"losses.csv": next(iter(made.values()))}
    return {f"losses-{label}.csv": text for label, text in made.items()}


def plot(reports: Sequence[Report], window: int, out: Path) -> list[Path]:
    """losses.png; hyperparameters.png where some were varied; widths.png where there are several."""
    import matplotlib

    matplotlib.use("Agg")

    shown = [report for report in ordered(reports) if len(report.rows) >= window]
    if not shown:
        return []
    made = [_plot_losses(shown, window, out / "losses.png")]
    names = [*varied([report.trial for report in shown]), *["width"] * (len({r.trial.width for r in shown}) > 1)]
    ended = [report for report in shown if report.state == DONE and report.loss is not None]
    if names and ended:
        made.append(_plot_numbers(ended, names, out / "hyperparameters.png"))
    if any(judge_widths(shown, window).values()):
        made.append(_plot_widths(shown, window, out / "widths.png"))
    return made


def _smooth(rows: Sequence[Row], window: int) -> tuple[list[int], np.ndarray]:
    """Steps and the mean loss of the ``window`` steps up to each."""
    sums = np.cumsum([0.0, *column(rows, "loss")])
    return [row["step"] for row in rows[window - 1 :]], (sums[window:] - sums[:-window]) / window


def _plot_losses(reports: Sequence[Report], window: int, path: Path) -> Path:
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 8), layout="constrained")
    for index, report in enumerate(reports):
        style = {"color": pyplot.get_cmap("viridis")(index / len(reports)), "linewidth": 1.2}
        steps, losses = _smooth(report.rows, window)
        upper.plot(steps, losses, label=report.trial.name if index < 12 else None, **style)
        lower.plot([row["step"] for row in report.rows], column(report.rows, "grad_norm"), **style)
    upper.set_ylabel(f"loss (mean of {window} steps)")
    lower.set_ylabel("gradient norm\n(before clipping)")
    lower.set_yscale("log")
    lower.set_xlabel("step")
    upper.legend(fontsize=7, title="best first" if len(reports) > 1 else None)
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _plot_numbers(reports: Sequence[Report], names: Sequence[str], path: Path) -> Path:
    """Loss over each varied number: a point a trial, a line through the best at each value."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(names), sharey=True, figsize=(3.6 * len(names), 4), layout="constrained", squeeze=False
    )
    for axis, name in zip(axes[0], names, strict=True):
        pairs = [
            (float(value), report.loss)
            for report in reports
            if (value := report.trial.width if name == "width" else getattr(report.trial.numbers, name)) is not None
            and report.loss is not None
        ]
        best = {value: min(loss for v, loss in pairs if v == value) for value, _ in pairs}
        axis.plot([v for v, _ in pairs], [loss for _, loss in pairs], "o", alpha=0.6)
        axis.plot(*zip(*sorted(best.items()), strict=True), "-", color="C0", alpha=0.6)
        axis.set_xlabel(name)
        if min(best) > 0:
            axis.set_xscale("log")
        axis.set_xticks(sorted(best), [f"{value:g}" for value in sorted(best)])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _plot_widths(reports: Sequence[Report], window: int, path: Path) -> Path:
    """Every width's loss, and how far it lies below that of the narrowest, of each combination."""
    from matplotlib import pyplot

    combinations = list(judge_widths(reports, window))
    figure, axes = pyplot.subplots(
        2, len(combinations), sharex=True, figsize=(6 * len(combinations), 7), layout="constrained", squeeze=False
    )
    for place, numbers in enumerate(combinations):
        upper, lower = axes[0][place], axes[1][place]
        whole = [r for r in reports if r.trial.numbers == numbers and r.state == DONE]
        whole.sort(key=lambda r: r.trial.width)
        narrowest = _smooth(whole[0].rows, window)[1]
        for index, report in enumerate(whole):
            steps, losses = _smooth(report.rows, window)
            style = {"color": pyplot.get_cmap("viridis")(index / len(whole)), "label": f"width {report.trial.width}"}
            upper.plot(steps, losses, **style)
            lower.plot(steps, losses - narrowest, **style)
        upper.set_title(numbers.label, fontsize=9)
        upper.set_ylabel(f"loss (mean of {window} steps)")
        lower.set_ylabel("minus that of the narrowest")
        lower.set_xlabel("step")
        upper.legend(fontsize=8)
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
