"""JUnit XML of a parity report: one test suite a section, one test case a bound."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from xml.etree import ElementTree

from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.parity.document.data import keyed, slug
from telechat_twins.core.parity.document.model import Document
from telechat_twins.core.shown import printable

_LONGEST = 300  # characters of a name


def to_junit(document: Document) -> str:
    """The XML text. A test case's ``classname`` is "parity.KIND.SECTION" and its ``name`` the bound's key without the
    section, both the same in every run, so that a server can follow a bound over time."""
    found, broken = keyed(document), document.broken
    root = ElementTree.Element(
        "testsuites", name=f"tele parity: {document.kind}", tests=str(len(found)), failures=str(len(broken)), errors="0"
    )
    for title, group in groupby(found, key=lambda item: item[1]):
        bounds = list(group)
        failures = sum(not bound.holds for _, _, bound in bounds)
        suite = ElementTree.SubElement(
            root, "testsuite", name=_text(title), tests=str(len(bounds)), failures=str(failures), errors="0", time="0"
        )
        for key, _, bound in bounds:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=_text(f"parity.{document.kind}.{slug(title)}"),
                name=_text(key.partition("/")[2]),
                time="0",
            )
            measured = f"{bound.what}: {bound.value:.6g}, limit {bound.limit:.6g} ({bound.source})"
            if bound.holds:
                ElementTree.SubElement(case, "system-out").text = _text(measured, None)
            else:
                failure = ElementTree.SubElement(
                    case, "failure", type="bound", message=_text(f"{bound.value:.3g} exceeds {bound.limit:.3g}")
                )
                failure.text = _text(measured, None)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def write_junit(document: Document, path: str | Path) -> None:
    """Write the XML file. UserError when it cannot be written."""
    write_text(Path(path), '<?xml version="1.0" encoding="utf-8"?>\n' + to_junit(document))


def _text(text: str, longest: int | None = _LONGEST) -> str:
    """One printable line: XML has no way to write most control characters, and names come from other machines."""
    return printable(text, None)[:longest]
