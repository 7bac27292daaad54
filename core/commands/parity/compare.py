"""``tele parity compare``: judges two records, two runs or two forward results, from their files only."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import writable_file
from telechat_twins.core.model.config import PRECISIONS
from telechat_twins.core.parity.bounds import Bound, TraceReport
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

DESCRIPTION = """\
Compare two records of `tele parity record`, two run folders (metrics.jsonl) or two outputs of `tele forward`. Backends,
layouts, precisions and devices may differ; weights and batch must not. No framework is needed.

Exit code 0 when all bounds hold, 1 when one is broken, 2 when the input is wrong.
"""
EXAMPLES = """\
examples:
  tele parity compare records/npu records/gpu --reference records/fp64
      every quantity against a float64 record
  tele parity compare runs/npu runs/gpu --envelope envelope.json --junit parity.xml
      two long runs, judged by the band in which equal devices stay
  tele parity compare npu.safetensors gpu.safetensors --reference fp64.safetensors
"""
SHOWN = 12  # bounds on the terminal; the report has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele parity compare``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("one", metavar="A", help="a record, a run folder, or an output of `tele forward`")
    parser.add_argument("other", metavar="B", help="another of the same kind")
    parser.add_argument("--reference", metavar="R", help="a third, of higher precision (fp64), that judges both")
    parser.add_argument(
        "--envelope",
        metavar="E",
        help="file of `tele parity envelope`: judges loss and gradient norm of every step of long traces",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="of run folders and outputs of `tele forward` (fp32); a record holds its own",
    )
    parser.add_argument("--out", default="compare", metavar="DIR", help="folder for the report (compare)")
    parser.add_argument("--junit", metavar="FILE", help="also write JUnit XML, a test case for every bound")


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
    result = judges[kind](paths, args)
    write_document(result.document, Path(args.out), args.junit, result.details)
    print(summary(result.document))
    print(f"report: {Path(args.out) / 'report.html'}")
    if kind == "records" and result.document.broken:
        reference = [] if args.reference is None else ["--reference", args.reference]
        words = ["tele", "parity", "locate", args.one, args.other, *reference]
        print(printable(f"go on with {shlex.join(words)}"))
    return 1 if result.document.broken else 0


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
    bounds = [dataclasses.replace(bound, what=f"{section}: {bound.what}") for section, bound in document.bounds()]
    broken = [bound for bound in bounds if not bound.holds][:SHOWN]
    nearest = sorted((bound for bound in bounds if bound.holds), key=lambda bound: -share(bound))
    shown: list[Bound] = [*broken, *nearest[: max(3, SHOWN - len(broken))]]
    width = min(90, max(len(printable(bound.what)) for bound in shown))
    lines = [document.verdict, *(f"  {name}: {value}" for name, value in document.facts.items()), ""]
    for bound in shown:
        mark = "ok    " if bound.holds else "BROKEN"
        lines.append(f"  {mark}  {bound.what:<{width}}  {bound.value:9.2e}  limit {bound.limit:.2e}")
    if len(bounds) > len(shown):
        lines.append(f"  and {len(bounds) - len(shown):,} more bounds, in the report")
    lines += [f"note: {note}" for note in document.notes[:SHOWN]]
    return "\n".join(printable(line) for line in lines)
