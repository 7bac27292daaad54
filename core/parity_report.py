"""The parity report: verdict first, then each bound with its source, the worst gradients, the traces and their plot."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.backends import TITLES
from core.metrics import Row, column
from core.parity import STRICT_STEPS, BatchReport, Bound, Judged, TraceReport

WORST_SHOWN = 10


@dataclass(frozen=True)
class ParityReport:
    """``facts``: what was run, for the head of the report."""

    facts: dict[str, str]
    batch: BatchReport
    trace: TraceReport | None = None

    def bounds(self) -> list[Bound]:
        return self.batch.bounds() + (self.trace.bounds if self.trace else [])

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
    for bound in report.bounds():
        mark = "ok" if bound.holds else "**BROKEN**"
        lines.append(f"| {mark} | {bound.what} | {bound.value:.3g} | {bound.limit:.3g} | {bound.source} |")
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


def to_json(report: ParityReport) -> dict[str, Any]:
    """Everything measured, all gradients and all steps; numbers that are not finite become text."""
    data: dict[str, Any] = {
        "verdict": report.verdict,
        "equal": not report.broken,
        "facts": report.facts,
        "bounds": [{**asdict(bound), "holds": bound.holds} for bound in report.bounds()],
        "batch": asdict(report.batch),
    }
    if report.trace is not None:
        data["trace"] = {"steps": report.trace.steps, "loss": report.trace.loss, "grad_norm": report.trace.grad_norm}
    return _finite(data)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
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
