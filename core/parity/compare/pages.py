"""The report of a comparison of two records."""

from __future__ import annotations

from collections.abc import Mapping

from telechat_twins.core.backends import TITLES
from telechat_twins.core.parity.bounds import Bound, TraceReport
from telechat_twins.core.parity.compare.records import PARAMETER_KINDS, Comparison, Measured
from telechat_twins.core.parity.document.model import Curve, Document, Plot, Section
from telechat_twins.core.parity.document.versions import own_versions
from telechat_twins.core.parity.record.format import KINDS, Record
from telechat_twins.core.parity.traces import loss_plot, trace_plot
from telechat_twins.core.types import JsonObject

KIND_TITLES = {
    "activation": "activations",
    "activation_grad": "gradients of activations",
    "gradient": "gradients of weights",
    "weight_before": "weights before the step",
    "weight_after": "changes of weights",
    "moment1": "first moments",
    "moment2": "second moments",
}
LABELS = {"a": "A", "b": "B", "reference": "reference"}
ALIKE = 4.0  # errors within this factor
LISTED = 50  # names of quantities that a note lists


def to_document(
    records: Mapping[str, Record], compared: Comparison, trace: TraceReport | None, trace_notes: list[str]
) -> Document:
    """``records``: by "a", "b" and "reference"."""
    sections = [Section("names and shapes", _name_bounds(records, compared))]
    several = len({row.step for row in compared.quantities}) > 1
    for kind in KINDS:
        rows = [row for row in compared.quantities if row.kind == kind]
        if rows:
            sections.append(Section(KIND_TITLES[kind], [_bound(row, several, compared.reference) for row in rows]))
    if trace is not None and trace.bounds:
        sections.append(Section("trace", trace.bounds))
    facts = {LABELS[name]: describe(record) for name, record in records.items()}
    facts["judge"] = {
        "reference": "the reference record",
        "a": "A, which is float64",
        "b": "B, which is float64",
        None: "none: the distance of A and B from each other",
    }[compared.reference]
    if (first := compared.first_broken) is not None:
        facts["first beyond its bound"] = f"{first.key}, in execution order"
    plots = list(filter(None, (_order_plot(compared, kind) for kind in ("activation", "activation_grad", "gradient"))))
    if trace is not None and trace.steps:
        runs = {f"{LABELS[name]}: {TITLES[r.header.backend]}": r.trace for name, r in records.items()}
        plots += [loss_plot(runs), trace_plot(trace)]
    versions = own_versions()
    for name, record in records.items():
        versions |= {f"{LABELS[name]}: {package}": version for package, version in record.header.versions.items()}
    notes = [*_notes(records, compared), *trace_notes]
    return Document("records", "Parity of records", facts, versions, sections, [], plots, notes)


def describe(record: Record) -> str:
    """One line: what was recorded, and where."""
    header = record.header
    steps = header.steps if len(header.steps) <= 5 else [*header.steps[:4], "...", header.steps[-1]]
    return (
        f"{TITLES[header.backend]}, {header.precision}, layout {header.layout} on {header.device}; steps "
        f"{', '.join(map(str, steps))} of {header.rows} x {header.seq_len} tokens; weights "
        f"{header.digests['weights'][:12]}, batch {header.digests['batch'][:12]} ({record.path})"
    )


def details(compared: Comparison, trace: TraceReport | None) -> JsonObject:
    """Keys of report.json of this kind of report."""
    found: JsonObject = {
        "reference": compared.reference,
        "quantities": [_plain(row) for row in compared.quantities],
        "missing": compared.missing,
        "shapes": compared.shapes,
        "settings": compared.configs,
    }
    if trace is not None:
        found["trace"] = {"steps": trace.steps, "loss": trace.loss, "grad_norm": trace.grad_norm}
    return found


def _plain(row: Measured) -> JsonObject:
    """A row of report.json; its source is in the bound."""
    return {name: value for name, value in vars(row).items() if name != "source"} | {"holds": row.holds}


def _bound(row: Measured, several: bool, reference: str | None) -> Bound:
    whose = "A and B apart" if reference is None else LABELS[row.side]
    what = f"{row.name}{f' at step {row.step}' if several else ''}, {row.measure} of {whose}"
    if reference is None:
        what = f"{row.name}{f' at step {row.step}' if several else ''}, {row.measure}, A to B"
    return Bound(what, row.value, row.limit, row.source, key=f"{row.name}.step{row.step}")


def _lacking(compared: Comparison, records: Mapping[str, Record], name: str) -> list[str]:
    """Names of weights that a record lacks although it has others of their kind and step."""
    held = {(q.kind, q.step) for q in records[name].quantities.values()}
    other = records["b" if name == "a" else "a"].quantities
    return [
        key
        for key in compared.missing[name]
        if other[key].kind in PARAMETER_KINDS and (other[key].kind, other[key].step) in held
    ]


def _name_bounds(records: Mapping[str, Record], compared: Comparison) -> list[Bound]:
    lacking = {name: _lacking(compared, records, name) for name in ("a", "b")}
    total = sum(map(len, lacking.values()))
    listed = "; ".join(f"{LABELS[name]} lacks {', '.join(keys[:5])}" for name, keys in lacking.items() if keys)
    return [
        Bound(
            "weights that one record lacks",
            float(total),
            0.0,
            listed or "both must have the same weights, gradients and moments",
            key="lacking",
        ),
        Bound(
            "shapes that differ",
            float(len(compared.shapes)),
            0.0,
            ", ".join(compared.shapes[:5]) or "shapes are those of whole tensors, whatever the layout",
            key="shapes",
        ),
    ]


def _notes(records: Mapping[str, Record], compared: Comparison) -> list[str]:
    found = []
    for name in ("a", "b"):
        if keys := compared.missing[name]:
            more = f" and {len(keys) - LISTED} more" if len(keys) > LISTED else ""
            found.append(f"{LABELS[name]} lacks {len(keys)} quantities: {', '.join(keys[:LISTED])}{more}")
    found += [f"the runs' settings differ: {text}" for text in compared.configs[:LISTED]]
    found += [*compared.notes, *_both_alike(compared)]
    return found + [f"{LABELS[name]}: {note}" for name, record in records.items() for note in record.header.notes]


def _both_alike(compared: Comparison) -> list[str]:
    """A note when both records are beyond their ceilings by about as much."""
    alike = [
        row.key
        for row in compared.quantities
        if len(row.errors) == 2
        and all(row.errors[name] > row.limits[name] for name in row.errors)
        and max(row.errors.values()) < ALIKE * min(row.errors.values())
    ]
    if not alike:
        return []
    return [
        f"{len(alike)} quantities, first {alike[0]}, are beyond their ceilings in both records by about as much: both "
        "are wrong in the same way, or the model magnifies rounding more than those that ceilings were measured on; "
        "record with other initial weights or data, where only the first of the two stays"
    ]


def _order_plot(compared: Comparison, kind: str) -> Plot | None:
    """Errors of one kind in execution order, with the limit of each."""
    rows = [row for row in compared.quantities if row.kind == kind]
    if len(rows) < 3:
        return None
    places = [float(place) for place in range(1, len(rows) + 1)]
    names = list(rows[0].errors)
    labels = {"a": "A", "b": "B", "apart": "A to B"}
    curves = [Curve(labels[name], places, [row.errors[name] for row in rows], dots=True) for name in names]
    curves += [Curve("limit", places, [min(row.limits.values()) for row in rows])]
    title = f"{KIND_TITLES[kind].capitalize()}: relative distances in the order of execution"
    return Plot(title, "place in the order, step after step", "relative distance", curves, logarithmic=True)
