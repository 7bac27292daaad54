"""The parity report: verdict first, then each bound with its source, the worst gradients, the traces and their plot,
and a row for every layout."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from telechat_twins.core.backends import TITLES
from telechat_twins.core.parity.bounds import (
    STRICT_STEPS,
    BatchReport,
    Bound,
    Judged,
    TraceReport,
)
from telechat_twins.core.parity.layouts import LayoutReport, TensorError
from telechat_twins.core.train.metrics import Row, column
from telechat_twins.core.types import JsonObject

WORST_SHOWN = 10


@dataclass(frozen=True)
class ParityReport:
    """``facts``: what was run, for the head of the report."""

    facts: dict[str, str]
    batch: BatchReport
    trace: TraceReport | None = None
    layouts: list[LayoutReport] = field(default_factory=list)

    def bounds(self) -> list[Bound]:
        return self.own_bounds() + self.layout_bounds()

    def own_bounds(self) -> list[Bound]:
        """Those of the backends themselves."""
        return self.batch.bounds() + (self.trace.bounds if self.trace else [])

    def layout_bounds(self, worst_only: bool = False) -> list[Bound]:
        """Those of every layout, or of each the one nearest to its limit."""
        return [
            replace(bound, what=f"{row.layout}, {TITLES[row.backend]}: {bound.what}")
            for row in self.layouts
            for bound in ([row.worst] if worst_only else row.bounds)
        ]

    @property
    def broken(self) -> list[Bound]:
        return [bound for bound in self.bounds() if not bound.holds]

    @property
    def verdict(self) -> str:
        broken, total = self.broken, len(self.bounds())
        if not broken:
            return f"EQUAL: all {total} bounds hold"
        return f"NOT EQUAL: {len(broken)} of {total} bounds broken: {'; '.join(b.what for b in broken)}"


def to_markdown(report: ParityReport, plot: str | None = None) -> str:
    """The report as Markdown; ``plot`` is the picture's file name beside it."""
    lines = ["# Parity report", "", f"**{report.verdict}**", ""]
    lines += [f"- {name}: {value}" for name, value in report.facts.items()]
    lines += [
        "",
        "## Bounds",
        "",
        "| | quantity | measured | limit | where the limit comes from |",
        "|---|---|---|---|---|",
    ]
    lines += [_bound_line(bound) for bound in report.own_bounds()]
    if report.layouts:
        lines += ["", "## Layouts, against one device", "", *_layout_table(report.layouts)]
    lines += ["", "## One batch, against a float64 run", "", "Relative Frobenius errors.", ""]
    lines += _table(report.batch.quantities)
    lines += [f"- {problem}" for problem in report.batch.names]
    shown = report.batch.gradients[:WORST_SHOWN]
    lines += ["", f"## Worst {len(shown)} of {len(report.batch.gradients)} gradients by share of their limit", ""]
    lines += _table(shown)
    if report.trace is not None and report.trace.steps:
        lines += ["", f"## {len(report.trace.steps)} training steps", ""] + _trace_table(report.trace)
        if plot:
            lines += ["", f"![losses of both backends and their difference]({plot})"]
    return "\n".join(lines) + "\n"


def _bound_line(bound: Bound) -> str:
    mark = "ok" if bound.holds else "**BROKEN**"
    return f"| {mark} | {bound.what} | {bound.value:.3g} | {bound.limit:.3g} | {bound.source} |"


def _layout_table(rows: Sequence[LayoutReport]) -> list[str]:
    """A row a layout and backend, and below it every broken bound and everything that was not judged."""
    head = ["", "layout", "backend", "loss", "gradient norm", "worst gradient", "worst change of a weight"]
    head += ["nearest to its limit", "of it", "bytes sent a step", "live graphs", "seconds"]
    lines = [
        "Relative distances: from one device of the same backend, and from float64. Live graphs: by pipeline rank.",
        "",
        _cells(head),
        "|" + "---|" * len(head),
    ]
    for row in rows:
        worst = row.worst
        share = f"{worst.value / worst.limit:.0%}" if worst.limit else f"{worst.value:g}"
        cells = ["ok" if not row.broken else "**BROKEN**", row.layout, TITLES[row.backend]]
        cells += [f"{apart:.1e}, {error:.1e}" for apart, error in row.errors.values()]
        cells += [_farthest(row.gradients), _farthest(row.weights), worst.what, share]
        cells += [f"{row.sent}", " ".join(str(n) for n in row.live), f"{max(row.seconds):.1f}"]
        lines.append(_cells(cells))
    broken = [(row, bound) for row in rows for bound in row.broken]
    if broken:
        lines += ["", "| | quantity | measured | limit | where the limit comes from |", "|---|---|---|---|---|"]
        lines += [_bound_line(replace(b, what=f"{row.layout}, {TITLES[row.backend]}: {b.what}")) for row, b in broken]
    notes = [f"- {row.layout}, {TITLES[row.backend]}: {note}" for row in rows for note in row.notes]
    return lines + ([""] + notes if notes else [])


def _farthest(tensors: Sequence[TensorError]) -> str:
    if not tensors:
        return "-"
    apart, error = (max(tensors, key=lambda t: (math.isnan(getattr(t, k)), getattr(t, k))) for k in ("apart", "error"))
    return f"{apart.apart:.1e}, {error.error:.1e} (`{error.name}`)"


def _table(rows: Sequence[Judged]) -> list[str]:
    if not rows:
        return ["(none)"]
    backends = list(rows[0].errors)
    head = ["", *(f"{TITLES[b]} error" for b in backends), *(f"{TITLES[b]} max abs" for b in backends)]
    head += ["between the two"] if len(backends) == 2 else []
    lines = [_cells([*head, "of its limit"]), "|" + "---|" * (len(head) + 1)]
    for row in rows:
        cells = [f"`{row.name}`" if "." in row.name else row.name]
        cells += [f"{row.errors[b]:.2e}" for b in backends]
        cells += [f"{row.max_abs[b]:.2e}" if b in row.max_abs else "" for b in backends]
        cells += [f"{row.apart:.2e}"] if row.apart is not None else []
        lines.append(_cells([*cells, f"{row.margin:.0%}" if math.isfinite(row.margin) else "BROKEN"]))
    return lines


def _trace_table(trace: TraceReport) -> list[str]:
    """Largest differences in the ranges a reader asks for: the first steps, and everything."""
    lines = [
        "Relative differences between the two backends.",
        "",
        "| steps | loss, largest | loss, last | gradient norm, largest |",
        "|---|---|---|---|",
    ]
    total = len(trace.steps)
    for stop in sorted({min(n, total) for n in (1, 10, 50, 200, total)}):
        lines.append(
            f"| {trace.steps[0]} to {trace.steps[stop - 1]} | {max(trace.loss[:stop]):.2e} "
            f"| {trace.loss[stop - 1]:.2e} | {max(trace.grad_norm[:stop]):.2e} |"
        )
    return lines


def _cells(values: Sequence[str]) -> str:
    return "| " + " | ".join(values) + " |"


def to_json(report: ParityReport) -> JsonObject:
    """Everything measured, all gradients and all steps; numbers that are not finite become text."""
    data: JsonObject = {
        "verdict": report.verdict,
        "equal": not report.broken,
        "facts": report.facts,
        "bounds": [{**asdict(bound), "holds": bound.holds} for bound in report.bounds()],
        "batch": asdict(report.batch),
        "layouts": [asdict(row) for row in report.layouts],
    }
    if report.trace is not None:
        data["trace"] = {"steps": report.trace.steps, "loss": report.trace.loss, "grad_norm": report.trace.grad_norm}
    return {name: _finite(value) for name, value in data.items()}


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_report(report: ParityReport, out: Path, runs: Mapping[str, Sequence[Row]] | None = None) -> Path:
    """Write report.md, report.json and, with the ``runs`` of a trace, traces.png into ``out``; returns report.md."""
    out.mkdir(parents=True, exist_ok=True)
    plot = None
    if runs and report.trace is not None and report.trace.steps:
        plot = plot_traces(runs, report.trace, out / "traces.png").name
    (out / "report.json").write_text(json.dumps(to_json(report), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    path = out / "report.md"
    path.write_text(to_markdown(report, plot), encoding="utf-8")
    return path


def plot_traces(runs: Mapping[str, Sequence[Row]], trace: TraceReport, path: Path) -> Path:
    """Two panels: the loss curves laid over each other, and the relative differences on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 7), layout="constrained")
    styles = [
        {"color": "C0", "linewidth": 3, "alpha": 0.5},
        {"color": "C1", "linewidth": 1.5, "linestyle": (0, (4, 3))},
        {"color": "black", "linewidth": 0.7, "linestyle": ":"},  # the judge
    ]
    for style, (label, rows) in zip(styles, runs.items(), strict=False):
        upper.plot([row["step"] for row in rows], column(rows, "loss"), label=label, **style)
    upper.set_ylabel("loss (nats per token)")
    upper.set_title("The same training in two frameworks")
    upper.legend()
    smallest = 1e-9  # equal to the last digit has no place on a logarithmic axis; draw it at the bottom
    lower.semilogy(trace.steps, [max(v, smallest) for v in trace.loss], color="C2", label="loss")
    lower.semilogy(
        trace.steps, [max(v, smallest) for v in trace.grad_norm], color="C4", alpha=0.6, label="gradient norm"
    )
    last = trace.steps[min(len(trace.steps), STRICT_STEPS) - 1]
    for name, color in (("gradient norm", "C4"), ("loss", "C2")):
        for bound in trace.bounds:
            if bound.what.startswith(f"{name}, steps"):
                lower.hlines(
                    bound.limit,
                    trace.steps[0],
                    last,
                    color=color,
                    linestyle=":",
                    label=f"limit of {name}, {bound.limit:.2g}",
                )
    lower.set_ylabel("relative difference")
    lower.set_xlabel("step")
    lower.legend()
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def summary(report: ParityReport) -> str:
    """Verdict, one line a bound and one line a layout, for the terminal."""
    bounds = [*report.own_bounds(), *report.layout_bounds(worst_only=True)]
    width = max(len(bound.what) for bound in bounds)
    lines = [report.verdict]
    for bound in bounds:
        mark = "ok    " if bound.holds else "BROKEN"
        lines.append(f"  {mark}  {bound.what:<{width}}  {bound.value:9.2e}  limit {bound.limit:.2e}")
    return "\n".join(lines)
