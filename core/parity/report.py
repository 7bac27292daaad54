"""The report of a comparison of backends: verdict first, then each bound with its source, the worst gradients, the
traces and their plot, and a row for every layout; as Markdown, HTML, JSON and JUnit XML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from telechat_twins.core.backends import TITLES
from telechat_twins.core.parity.bounds import BatchReport, Bound, Judged, TraceReport
from telechat_twins.core.parity.document.data import finite, to_data
from telechat_twins.core.parity.document.markdown import BOUNDS_HEAD, bound_line, table_row
from telechat_twins.core.parity.document.model import Cell, Document, Section, Table, verdict
from telechat_twins.core.parity.document.versions import own_versions
from telechat_twins.core.parity.document.write import write_document
from telechat_twins.core.parity.layouts import LayoutReport, TensorError
from telechat_twins.core.parity.traces import loss_plot, plot_traces, trace_plot
from telechat_twins.core.shown import printable
from telechat_twins.core.train.metrics import Row
from telechat_twins.core.types import JsonObject

WORST_SHOWN = 10


@dataclass(frozen=True)
class ParityReport:
    """``facts``: what was run, for the head of the report. ``further``: comparisons beyond those of `tele parity`."""

    facts: dict[str, str]
    batch: BatchReport
    trace: TraceReport | None = None
    layouts: list[LayoutReport] = field(default_factory=list)
    further: list[Section] = field(default_factory=list)

    def bounds(self) -> list[Bound]:
        return self.own_bounds() + self.layout_bounds() + self.further_bounds()

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

    def further_bounds(self) -> list[Bound]:
        return [
            replace(bound, what=f"{section.title}: {bound.what}")
            for section in self.further
            for bound in section.bounds
        ]

    @property
    def broken(self) -> list[Bound]:
        return [bound for bound in self.bounds() if not bound.holds]

    @property
    def verdict(self) -> str:
        return verdict(self.bounds())


def to_document(report: ParityReport, runs: Mapping[str, Sequence[Row]] | None = None) -> Document:
    """The report in the form that HTML, JSON and JUnit XML are written from; ``runs``: rows of each trace by label."""
    sections = [Section("one batch", report.batch.bounds())]
    if report.trace is not None:
        sections.append(Section("training", report.trace.bounds))
    sections += [Section(f"{row.layout}, {TITLES[row.backend]}", row.bounds) for row in report.layouts]
    tables = [
        _judged_table("One batch, against a float64 run", report.batch.quantities),
        _judged_table("Gradients by share of their limit", report.batch.gradients),
    ]
    plots = []
    if report.trace is not None and report.trace.steps:
        plots = [*([loss_plot(runs)] if runs else []), trace_plot(report.trace)]
    notes = [
        *report.batch.names,
        *(f"{r.layout}, {TITLES[r.backend]}: {note}" for r in report.layouts for note in r.notes),
    ]
    return Document(
        "backends", "Parity of backends", report.facts, own_versions(), sections + report.further, tables, plots, notes
    )


def _judged_table(title: str, rows: Sequence[Judged]) -> Table:
    names = list(rows[0].errors) if rows else []
    head = ["quantity", *(f"{TITLES[b]}, relative error" for b in names), *(f"{TITLES[b]}, largest" for b in names)]
    rows_of: list[list[Cell]] = [
        [row.name, *(row.errors[b] for b in names), *(row.max_abs.get(b, "") for b in names), row.margin]
        for row in rows
    ]
    return Table(title, [*head, "of its limit"], rows_of, "Relative Frobenius errors, and largest single differences.")


def to_markdown(report: ParityReport, plot: str | None = None) -> str:
    """The report as Markdown; ``plot`` is the picture's file name beside it."""
    lines = ["# Parity report", "", f"**{printable(report.verdict)}**", ""]
    lines += [f"- {name}: {value}" for name, value in report.facts.items()]
    lines += [
        "",
        "## Bounds",
        "",
        BOUNDS_HEAD,
    ]
    lines += [bound_line(bound) for bound in [*report.own_bounds(), *report.further_bounds()]]
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


def _layout_table(rows: Sequence[LayoutReport]) -> list[str]:
    """A row a layout and backend, and below it every broken bound and everything that was not judged."""
    head = ["", "layout", "backend", "loss", "gradient norm", "worst gradient", "worst change of a weight"]
    head += ["nearest to its limit", "of it", "bytes sent a step", "live graphs", "seconds"]
    lines = [
        "Relative distances: from one device of the same backend, and from float64. Live graphs: by pipeline rank.",
        "",
        table_row(head),
        "|" + "---|" * len(head),
    ]
    for row in rows:
        worst = row.worst
        share = f"{worst.value / worst.limit:.0%}" if worst.limit else f"{worst.value:g}"
        cells = ["ok" if not row.broken else "**BROKEN**", row.layout, TITLES[row.backend]]
        cells += [f"{apart:.1e}, {error:.1e}" for apart, error in row.errors.values()]
        cells += [_farthest(row.gradients), _farthest(row.weights), worst.what, share]
        cells += [f"{row.sent}", " ".join(str(n) for n in row.live), f"{max(row.seconds):.1f}"]
        lines.append(table_row(cells))
    broken = [(row, bound) for row in rows for bound in row.broken]
    if broken:
        lines += ["", BOUNDS_HEAD]
        lines += [bound_line(replace(b, what=f"{row.layout}, {TITLES[row.backend]}: {b.what}")) for row, b in broken]
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
    lines = [table_row([*head, "of its limit"]), "|" + "---|" * (len(head) + 1)]
    for row in rows:
        cells = [f"`{row.name}`" if "." in row.name else row.name]
        cells += [f"{row.errors[b]:.2e}" for b in backends]
        cells += [f"{row.max_abs[b]:.2e}" if b in row.max_abs else "" for b in backends]
        cells += [f"{row.apart:.2e}"] if row.apart is not None else []
        lines.append(table_row([*cells, f"{row.margin:.0%}" if math.isfinite(row.margin) else "BROKEN"]))
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


def to_json(report: ParityReport, runs: Mapping[str, Sequence[Row]] | None = None) -> JsonObject:
    """Everything measured, all gradients and all steps; numbers that are not finite become text."""
    return finite(to_data(to_document(report, runs), _details(report)))


def _details(report: ParityReport) -> JsonObject:
    details: JsonObject = {"batch": asdict(report.batch), "layouts": [asdict(row) for row in report.layouts]}
    if report.trace is not None:
        trace = report.trace
        details["trace"] = {"steps": trace.steps, "loss": trace.loss, "grad_norm": trace.grad_norm}
    return details


def write_report(
    report: ParityReport, out: Path, runs: Mapping[str, Sequence[Row]] | None = None, junit: str | Path | None = None
) -> Path:
    """Write report.md, report.html, report.json and, with the ``runs`` of a trace, traces.png into ``out``, and JUnit
    XML into the file ``junit``; returns report.md."""
    out.mkdir(parents=True, exist_ok=True)
    plot = None
    if runs and report.trace is not None and report.trace.steps:
        plot = plot_traces(runs, report.trace, out / "traces.png").name
    return write_document(to_document(report, runs), out, junit, _details(report), to_markdown(report, plot))


def summary(report: ParityReport) -> str:
    """Verdict, one line a bound and one line a layout, for the terminal."""
    bounds = [*report.own_bounds(), *report.layout_bounds(worst_only=True), *report.further_bounds()]
    width = max(len(bound.what) for bound in bounds)
    lines = [report.verdict]
    for bound in bounds:
        mark = "ok    " if bound.holds else "BROKEN"
        lines.append(f"  {mark}  {bound.what:<{width}}  {bound.value:9.2e}  limit {bound.limit:.2e}")
    return "\n".join(lines)
