"""Comparison of two runs step by step, from their rows of metrics, and of a record's trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.parity.bounds import (
    FULL,
    TraceReport,
    compare_low_precision_traces,
    compare_traces,
)
from telechat_twins.core.parity.document.model import Document, Section
from telechat_twins.core.parity.document.versions import own_versions
from telechat_twins.core.parity.traces import loss_plot, trace_plot
from telechat_twins.core.shown import shown
from telechat_twins.core.train.metrics import Row

if TYPE_CHECKING:
    from telechat_twins.core.parity.envelope import Envelope

LABELS = {"a": "A", "b": "B", "reference": "reference"}
MEASURED, SCHEDULED = ("loss", "grad_norm"), ("lr", "matrix_lr", "tokens")
LARGEST = 1e300  # beyond it differences overflow; a loss that is not finite is null
LEAST_STEPS = 10  # fewer distances have no root mean square to speak of
MEASURED_ONLY = (
    "loss and gradient norm of the steps are measured, not judged: runs of {} need a --reference of higher precision "
    "or an --envelope"
)


def checked(rows: Sequence[Row], path: object) -> list[Row]:
    """The columns of rows of metrics that are compared, from a file that may come from anywhere.

    UserError, naming file, step and key, for steps that do not rise and for values other than numbers and null. A
    null learning rate or number of tokens counts as absent.
    """
    found: list[Row] = []
    for row in rows:
        if type(row["step"]) is not int or row["step"] <= (found[-1]["step"] if found else 0):
            raise UserError(
                f"{path}: steps must be whole numbers that rise, found {shown(row['step'])}; remove the line, or "
                "resume the run, which drops rows that it makes again"
            )
        kept: Row = {"step": row["step"]}
        for key in (*MEASURED, *SCHEDULED):
            value = row.get(key)
            if value is not None and (type(value) not in (int, float) or abs(value) > LARGEST):
                raise UserError(f"{path}: step {row['step']}: {key} must be a number or null, found {shown(value)}")
            if value is not None or key in MEASURED:
                kept[key] = value
        found.append(kept)
    return found


def judge_traces(
    rows: Mapping[str, Sequence[Row]], precisions: Mapping[str, str], envelope: Envelope | None = None
) -> tuple[TraceReport, list[str]]:
    """The comparison of rows "a" and "b", with "reference" if given, over the steps that all have, and notes of what
    was left out or not judged. ``precisions``: of "a" and "b". ``envelope``: the band in which equal devices stay,
    which then judges every step in place of the fixed limits.

    UserError when the envelope is of another precision.
    """
    steps = set.intersection(*({row["step"] for row in held} for held in rows.values()))
    common = {name: [row for row in held if row["step"] in steps] for name, held in rows.items()}
    notes = [
        f"{LABELS[name]} has {len(held)} steps of which {len(common[name])} are compared"
        for name, held in rows.items()
        if len(common[name]) < len(held)
    ]
    a, b, exact = common["a"], common["b"], common.get("reference")
    if not steps:
        return compare_traces(a, b), notes
    if envelope is not None:
        return _by_envelope(a, b, precisions, envelope), notes
    if all(precision in FULL for precision in precisions.values()):
        coarsest = "fp32" if "fp32" in precisions.values() else "fp64"
        return compare_traces(a, b, exact, coarsest), notes
    if exact is None or len(set(precisions.values())) > 1 or len(a) < LEAST_STEPS:
        # Only schedule and tokens: in 16 bits runs need not agree step by step, nor runs of two precisions.
        if len(a) >= LEAST_STEPS:
            notes.append(MEASURED_ONLY.format(" and ".join(dict.fromkeys(precisions.values()))))
        return _schedule_only(compare_traces(a, b)), notes
    return compare_low_precision_traces(a, b, exact), notes


def _schedule_only(report: TraceReport) -> TraceReport:
    return TraceReport(report.steps, report.loss, report.grad_norm, report.bounds[:1])


def _by_envelope(a: Sequence[Row], b: Sequence[Row], precisions: Mapping[str, str], envelope: Envelope) -> TraceReport:
    found = set(precisions.values())
    if found != {envelope.precision}:
        raise UserError(
            f"--envelope: must be of the precision that is compared, {' and '.join(sorted(found))}, found "
            f"{envelope.precision}; measure it with --set train.precision={min(found)}"
        )
    report = _schedule_only(compare_traces(a, b))
    bounds = [*report.bounds, *envelope.bounds(a, against=b)]
    return TraceReport(report.steps, report.loss, report.grad_norm, bounds)


def run_document(
    rows: Mapping[str, Sequence[Row]], facts: dict[str, str], report: TraceReport, notes: list[str]
) -> Document:
    """The report of two run folders."""
    plots = []
    if report.steps:
        plots = [loss_plot({LABELS[name]: held for name, held in rows.items()}), trace_plot(report)]
    sections = [Section("trace", report.bounds)]
    return Document("runs", "Parity of runs", facts, own_versions(), sections, [], plots, notes)
