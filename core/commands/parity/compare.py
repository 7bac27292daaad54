"""``tele parity compare``: judges two records, two runs or two forward results, from their files only."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import writable_file
from telechat_twins.core.parity.bounds import TraceReport
from telechat_twins.core.parity.compare.dumps import dump_document, judge_dumps, read_dump
from telechat_twins.core.parity.compare.inputs import Kind, common_kind
from telechat_twins.core.parity.compare.pages import details, to_document
from telechat_twins.core.parity.compare.records import compare_records
from telechat_twins.core.parity.compare.runs import checked, judge_traces, run_document
from telechat_twins.core.parity.document.model import Document, share
from telechat_twins.core.parity.document.write import write_document
from telechat_twins.core.parity.record.read import open_record
from telechat_twins.core.shown import printable
from telechat_twins.core.train.metrics import read_metrics
from telechat_twins.core.types import JsonObject

if TYPE_CHECKING:
    from telechat_twins.core.parity.envelope import Envelope

SHOWN = 12  # bounds on the terminal; the report has all


@dataclass(frozen=True)
class Result:
    """A report and what only this kind of report holds in report.json."""

    document: Document
    details: JsonObject


def run(args: argparse.Namespace) -> int:
    """Compare, write the report, print its verdict; 1 when a bound is broken."""
    paths = {"a": args.one, "b": args.other} | ({} if args.reference is None else {"reference": args.reference})
    kind: Kind = common_kind(list(paths.values()))
    writable_file(Path(args.out) / "report.md", "--out")
    if args.junit is not None:
        writable_file(args.junit, "--junit")
    judges = {"records": _records, "runs": _runs, "forward": _forward}
    with _uncollected():
        result = judges[kind](paths, args)
        write_document(result.document, Path(args.out), args.junit, result.details)
    print(summary(result.document))
    print(f"report: {Path(args.out) / 'report.html'}")
    if kind == "records" and result.document.broken:
        reference = [] if args.reference is None else ["--reference", args.reference]
        words = ["tele", "parity", "locate", args.one, args.other, *reference]
        print(printable(f"go on with {shlex.join(words)}"))
    return 1 if result.document.broken else 0


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for cycles, a tenth of the time: of the many small objects none is given up before the end."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _records(paths: dict[str, str], args: argparse.Namespace) -> Result:
    records = {name: open_record(path) for name, path in paths.items()}
    compared = compare_records(records["a"], records["b"], records.get("reference"))
    precisions = {name: records[name].header.precision for name in ("a", "b")}
    envelope = _envelope(args)
    trace: TraceReport | None = None
    notes: list[str] = []
    if all(record.trace for record in records.values()):
        trace, notes = judge_traces({n: checked(r.trace, r.path) for n, r in records.items()}, precisions, envelope)
    return Result(to_document(records, compared, trace, notes), details(compared, trace))


def _runs(paths: dict[str, str], args: argparse.Namespace) -> Result:
    rows = {name: checked(read_metrics(path), path) for name, path in paths.items()}
    for name, path in paths.items():
        if not rows[name]:
            raise UserError(f"{path}: must have at least one step, found none; wait for the run's first step")
    trace, notes = judge_traces(rows, {name: args.precision for name in ("a", "b")}, _envelope(args))
    facts = {name.upper() if len(name) == 1 else name: f"{len(rows[name])} steps ({paths[name]})" for name in paths}
    document = run_document(rows, facts | {"precision": args.precision}, trace, notes)
    return Result(document, {"trace": {"steps": trace.steps, "loss": trace.loss, "grad_norm": trace.grad_norm}})


def _envelope(args: argparse.Namespace) -> Envelope | None:
    if args.envelope is None:
        return None
    from telechat_twins.core.parity.envelope import read_envelope  # it can also measure one: half a second of imports

    return read_envelope(args.envelope)


def _forward(paths: dict[str, str], args: argparse.Namespace) -> Result:
    if args.envelope is not None:
        raise UserError("--envelope: judges records and runs; outputs of `tele forward` have no steps, leave it out")
    dumps = {name: read_dump(path) for name, path in paths.items()}
    report, sections = judge_dumps(dumps, args.precision)
    facts = {name.upper() if len(name) == 1 else name: path for name, path in paths.items()}
    document = dump_document(facts | {"precision": args.precision}, report, sections)
    return Result(document, {"batch": dataclasses.asdict(report)})


def summary(document: Document) -> str:
    """Verdict, facts, the broken bounds in their order and the nearest others, and what was not judged."""
    bounds = list(document.bounds())
    broken = [pair for pair in bounds if not pair[1].holds][:SHOWN]
    nearest = sorted((pair for pair in bounds if pair[1].holds), key=lambda pair: -share(pair[1]))
    shown = [(printable(f"{s}: {b.what}"), b) for s, b in [*broken, *nearest[: max(3, SHOWN - len(broken))]]]
    width = min(90, max(len(what) for what, _ in shown))
    lines = [document.verdict, *(f"  {name}: {value}" for name, value in document.facts.items()), ""]
    for what, bound in shown:
        mark = "ok    " if bound.holds else "BROKEN"
        lines.append(f"  {mark}  {what:<{width}}  {bound.value:9.2e}  limit {bound.limit:.2e}")
    if len(bounds) > len(shown):
        lines.append(f"  and {len(bounds) - len(shown):,} more bounds, in the report")
    lines += [f"note: {note}" for note in document.notes[:SHOWN]]
    return "\n".join(printable(line) for line in lines)
