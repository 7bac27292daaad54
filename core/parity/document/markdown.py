"""Markdown of a parity report: verdict, facts, the bounds of every section, tables and notes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from telechat_twins.core.parity.bounds import Bound
from telechat_twins.core.parity.document.model import Cell, Document
from telechat_twins.core.shown import printable

BOUNDS_HEAD = "| | quantity | measured | limit | where the limit comes from |\n|---|---|---|---|---|"
MOST_ROWS = 200  # of a section or table: report.json and report.html have more


def to_markdown(document: Document) -> str:
    """The report; of a long section all broken bounds and the first others."""
    lines = [f"# {document.title}", "", f"**{printable(document.verdict)}**", ""]
    lines += [printable(f"- {name}: {value}") for name, value in document.facts.items()]
    for section in document.sections:
        lines += ["", f"## {printable(section.title)}", "", BOUNDS_HEAD, *_section(section.bounds)]
    for table in document.tables:
        lines += ["", f"## {table.title}", "", *([table.note, ""] if table.note else [])]
        lines += [table_row(table.head), "|" + "---|" * len(table.head)]
        lines += [table_row([_shown(cell) for cell in row]) for row in table.rows[:MOST_ROWS]]
        if len(table.rows) > MOST_ROWS:
            lines += ["", f"{len(table.rows) - MOST_ROWS:,} more rows are in report.json."]
    if document.notes:
        lines += ["", "## Notes", "", *(printable(f"- {note}") for note in document.notes)]
    lines += ["", "## Versions", "", *(printable(f"- {name}: {value}") for name, value in document.versions.items())]
    return "\n".join(lines) + "\n"


def bound_line(bound: Bound) -> str:
    """A row of the table of bounds."""
    mark = "ok" if bound.holds else "**BROKEN**"
    return table_row([mark, bound.what, f"{bound.value:.3g}", f"{bound.limit:.3g}", bound.source])


def table_row(values: Sequence[str]) -> str:
    """A row of a table; a bar inside a cell is escaped."""
    return "| " + " | ".join(printable(value, None).replace("|", "\\|") for value in values) + " |"


def _section(bounds: Sequence[Bound]) -> Iterator[str]:
    ordered = sorted(bounds, key=lambda bound: bound.holds)
    most = max(MOST_ROWS, sum(not bound.holds for bound in bounds))
    shown = {id(bound) for bound in ordered[:most]}
    yield from (bound_line(bound) for bound in bounds if id(bound) in shown)
    if len(bounds) > most:
        yield f"\n{len(bounds) - most:,} more bounds hold; report.json has them."


def _shown(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell:.3g}" if isinstance(cell, float) else f"{cell:,}"
