"""One self-contained HTML page of a parity report: verdict, facts, sortable bounds, plots, tables, versions.

The page loads nothing: style, script and pictures are inside it, and its content policy forbids anything else. All
texts are escaped, since names of tensors come from other machines.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.parity.document.data import keyed
from telechat_twins.core.parity.document.model import Cell, Document, Table, share
from telechat_twins.core.parity.document.svg import text, to_figure

MOST_ROWS = 2_000  # of a table: a page of more is slow on a phone; report.json has every bound
_HERE = Path(__file__).parent
_HEAD = ("", "part", "quantity", "measured", "limit", "of limit", "where the limit comes from")


def to_html(document: Document) -> str:
    """The whole page."""
    style, script = (_HERE / name for name in ("page.css", "page.js"))
    code = script.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    title = text(document.title)
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<title>{title}</title>\n<link rel="icon" href="data:,">',
            f"<style>\n{style.read_text(encoding='utf-8')}</style>\n</head>\n<body>",
            f"<h1>{title}</h1>",
            *_body(document),
            f"<script>{code}</script>\n</body>\n</html>\n",
        ]
    )


def write_html(document: Document, path: Path) -> None:
    """Write the page."""
    write_text(path, to_html(document))


def _body(document: Document) -> Iterator[str]:
    mood, sign = ("bad", "\u2717") if document.broken else ("good", "\u2713")
    yield f'<p class="verdict {mood}" id="verdict">{sign} {text(document.verdict)}</p>'
    yield _pairs(document.facts)
    parts = {"bounds": "Bounds", "notes": "Notes" if document.notes else "", "plots": "Plots" if document.plots else ""}
    parts |= {f"table-{number}": table.title for number, table in enumerate(document.tables)}
    links = (f'<a href="#part-{name}">{text(title)}</a>' for name, title in parts.items() if title)
    yield f'<nav>{"".join(links)}<a href="#part-versions">Versions</a></nav>'
    yield '<h2 id="part-bounds">Bounds</h2>'
    yield from _bounds(document)
    if document.notes:
        yield (
            '<h2 id="part-notes">Notes</h2>\n<ul>'
            + "".join(f"<li>{text(note)}</li>" for note in document.notes)
            + "</ul>"
        )
    if document.plots:
        yield '<h2 id="part-plots">Plots</h2>\n<div class="plots">'
        yield from map(to_figure, document.plots)
        yield "</div>"
    for number, table in enumerate(document.tables):
        yield f'<h2 id="part-table-{number}">{text(table.title)}</h2>'
        yield from _table(table)
    yield '<h2 id="part-versions">Versions</h2>'
    yield _pairs(document.versions)


def _pairs(values: dict[str, str]) -> str:
    rows = (f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in values.items())
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _bounds(document: Document) -> Iterator[str]:
    """The table of bounds, broken ones first, in the order of the report; of a very long one the nearest to their
    limits."""
    found = sorted(keyed(document), key=lambda item: item[2].holds)
    if len(found) > MOST_ROWS:
        yield f'<p class="note">The {MOST_ROWS:,} nearest to their limits of {len(found):,}; report.json has all.</p>'
        found = sorted(found, key=lambda item: -share(item[2]))[:MOST_ROWS]
    yield (
        '<div class="bar"><input type="search" id="filter" placeholder="filter by name" aria-label="filter by name">'
        '<label><input type="checkbox" id="only"> broken only</label></div>'
    )
    yield f'<table class="cards" id="bounds">{_head(_HEAD)}<tbody>'
    for key, section, bound in found:
        mark = "\u2713 ok" if bound.holds else "\u2717 BROKEN"
        part = share(bound)
        cells = [
            f'<td data-label="holds" data-v="{int(bound.holds)}"><span class="mark">{mark}</span></td>',
            _cell("part", section),
            _cell("quantity", bound.what),
            _cell("measured", bound.value),
            _cell("limit", bound.limit),
            f'<td class="n" data-label="of limit" data-v="{_sortable(part)}"><span>{_percent(part)}</span></td>',
            f'<td class="source" data-label="source"><span>{text(bound.source)}</span></td>',
        ]
        yield f'<tr data-key="{text(key)}"{"" if bound.holds else " class=broken"}>{"".join(cells)}</tr>'
    yield "</tbody></table>"


def _table(table: Table) -> Iterator[str]:
    if table.note:
        yield f'<p class="note">{text(table.note)}</p>'
    rows = table.rows[:MOST_ROWS]
    if len(rows) < len(table.rows):
        yield f'<p class="note">The first {MOST_ROWS:,} of {len(table.rows):,} rows; report.json has all.</p>'
    yield f'<div class="wide"><table>{_head(table.head)}<tbody>'
    for row in rows:
        yield f"<tr>{''.join(_cell(name, cell) for name, cell in zip(table.head, row, strict=True))}</tr>"
    yield "</tbody></table></div>"


def _head(names: Sequence[str]) -> str:
    cells = (f'<th><button type="button">{text(name) or "holds"}</button></th>' for name in names)
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def _cell(label: str, value: Cell) -> str:
    if isinstance(value, str):
        return f'<td data-label="{text(label)}"><span>{text(value)}</span></td>'
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
    return f'<td class="n" data-label="{text(label)}" data-v="{_sortable(value)}"><span>{shown}</span></td>'


def _sortable(value: float) -> str:
    """A number that the script's ``Number`` reads; nan sorts as the largest."""
    return f"{value!r}" if math.isfinite(value) else ("-Infinity" if value == -math.inf else "Infinity")


def _percent(part: float) -> str:
    return f"{part:.0%}" if part < 10 else ("\u221e" if math.isinf(part) else f"{part:,.0f} x")
