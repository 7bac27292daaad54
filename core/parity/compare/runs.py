"""Comparison of two runs step by step, from their rows of metrics, and of a record's trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from telechat_twins.core.parity.bounds import (
    FULL,
    TraceReport,
    compare_low_precision_traces,
    compare_traces,
)
from telechat_twins.core.parity.document.model import Document, Section
from telechat_twins.core.parity.document.versions import own_versions
from telechat_twins.core.parity.traces import loss_plot, trace_plot
from telechat_twins.core.train.metrics import Row

LABELS = {"a": "A", "b": "B", "reference": "reference"}
MEASURED_ONLY = (
    "loss and gradient norm of the steps are measured, not judged: runs of {} need a --reference of higher precision "
    "or an --envelope"
)


def judge_traces(rows: Mapping[str, Sequence[Row]], precisions: Mapping[str, str]) -> tuple[TraceReport, list[str]]:
    """The comparison of rows "a" and "b", with "reference" if given, over the steps that all have, and notes of what
    was left out or not judged. ``precisions``: of "a" and "b"."""
    steps = set.intersection(*({row["step"] for row in held} for held in rows.values()))
    common = {name: [row for row in held if row["step"] in steps] for name, held in rows.items()}
    notes = [
        f"{LABELS[name]} has {len(held)} steps of which {len(common[name])} are compared"
        for name, held in rows.items()
        if len(common[name]) < len(held)
    ]
    if not steps:
        return compare_traces(common["a"], common["b"]), notes
    a, b, exact = common["a"], common["b"], common.get("reference")
    low = [p for p in precisions.values() if p not in FULL]
    if not low:
        coarsest = "fp32" if "fp32" in precisions.values() else "fp64"
        return compare_traces(a, b, exact, coarsest), notes
    report = compare_low_precision_traces(a, b, exact) if exact is not None else compare_traces(a, b)
    if exact is None or len(set(precisions.values())) > 1:
        # Only schedule and tokens: in 16 bits runs need not agree step by step, nor runs of two precisions.
        report = TraceReport(report.steps, report.loss, report.grad_norm, report.bounds[:1])
        notes.append(MEASURED_ONLY.format(" and ".join(dict.fromkeys(precisions.values()))))
    return report, notes


def run_document(
    rows: Mapping[str, Sequence[Row]], facts: dict[str, str], report: TraceReport, notes: list[str]
) -> Document:
    """The report of two run folders."""
    plots = []
    if report.steps:
        plots = [loss_plot({LABELS[name]: held for name, held in rows.items()}), trace_plot(report)]
    sections = [Section("trace", report.bounds)]
    return Document("runs", "Parity of runs", facts, own_versions(), sections, [], plots, notes)
