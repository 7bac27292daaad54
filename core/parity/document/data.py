"""report.json: what every kind of parity report has, with stable keys; docs/parity-report.md has the schema."""

from __future__ import annotations

import json
import math
import re
import uuid
from pathlib import Path

from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.parity.bounds import Bound
from telechat_twins.core.parity.document.model import Document
from telechat_twins.core.types import JsonObject

FORMAT, VERSION = "telechat-twins parity report", 1


def to_data(document: Document, details: JsonObject | None = None) -> JsonObject:
    """The document as values of JSON, and ``details``, keys that only this kind of report has; numbers may be nan."""
    data: JsonObject = {
        "format": FORMAT,
        "version": VERSION,
        "kind": document.kind,
        "verdict": document.verdict,
        "equal": not document.broken,
        "facts": document.facts,
        "versions": document.versions,
        "bounds": [
            {
                "key": key,
                "section": section,
                "what": bound.what,
                "value": bound.value,
                "limit": bound.limit,
                "holds": bound.holds,
                "source": bound.source,
            }
            for key, section, bound in keyed(document)
        ],
        "notes": document.notes,
    }
    data |= details or {}
    return data


def keyed(document: Document) -> list[tuple[str, str, Bound]]:
    """(key, section, bound) of every bound. A key is "SECTION/BOUND", unique in the report: a second bound of the same
    key gets the suffix "-2"."""
    seen: dict[str, int] = {}
    slugs = {section.title: slug(section.title) for section in document.sections}
    found = []
    for section, bound in document.bounds():
        key = f"{slugs[section]}/{bound.key}"
        seen[key] = seen.get(key, 0) + 1
        found.append((key if seen[key] == 1 else f"{key}-{seen[key]}", section, bound))
    return found


def slug(text: str) -> str:
    """``text`` in lower case; every run of characters other than letters, digits, dots and underscores is a hyphen."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-")


def write_data(data: JsonObject, path: Path) -> None:
    """Write report.json: a line a key, and in lists a line an item, so that two files can be compared line by line.

    Numbers that are not finite become the texts "nan", "inf" and "-inf", since JSON has none.
    """
    lines = [f"{json.dumps(name)}: {_lines(value)}" for name, value in data.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def finite(data: JsonObject) -> JsonObject:
    """``data`` with texts in the place of numbers that are not finite."""
    return {name: _finite(value) for name, value in data.items()}


def _lines(value: object) -> str:
    try:
        return _encoded(value)
    except ValueError:
        return _encoded(_finite(value))


def _encoded(value: object) -> str:
    """ValueError for numbers that are not finite."""
    if not isinstance(value, list) or not value:
        return json.dumps(value, allow_nan=False)
    # One call for thousands of items: an item of no other meaning, which becomes a line break, stands between them.
    mark = uuid.uuid4().hex
    text = json.dumps([part for item in value for part in (item, mark)][:-1], allow_nan=False)
    return "[\n " + text[1:-1].replace(f', "{mark}", ', ",\n ") + "\n]"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
