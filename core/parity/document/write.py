"""Writing of a parity report in all its formats."""

from __future__ import annotations

from pathlib import Path

from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.parity.document.data import to_data, write_data
from telechat_twins.core.parity.document.html import write_html
from telechat_twins.core.parity.document.junit import write_junit
from telechat_twins.core.parity.document.markdown import to_markdown
from telechat_twins.core.parity.document.model import Document
from telechat_twins.core.types import JsonObject


def write_document(
    document: Document,
    out: Path,
    junit: str | Path | None = None,
    details: JsonObject | None = None,
    markdown: str | None = None,
) -> Path:
    """Write report.md, report.html and report.json into ``out``, and JUnit XML into the file ``junit``.

    ``details``: keys of report.json that only this kind of report has. ``markdown``: in place of the document's own.
    Returns the path of report.md. UserError when a file cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_html(document, out / "report.html")
    write_data(to_data(document, details), out / "report.json")
    if junit is not None:
        write_junit(document, junit)
    write_text(out / "report.md", to_markdown(document) if markdown is None else markdown)
    return out / "report.md"
