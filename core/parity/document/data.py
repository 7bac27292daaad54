"""report.json: what every kind of parity report has, with stable keys; docs/parity-report.md has the schema."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from telechat_twins.core.files.atomic import write_text
from telechat_twins.core.parity.bounds import Bound
from telechat_twins.core.parity.document.model import Document
from telechat_twins.core.types import JsonObject

FORMAT, VERSION = "telechat-twins parity report", 1


def to_data(document: Document, details: JsonObject | None = None) -> JsonObject:
    """The document as JSON values, and ``details``, keys that only this kind of report has.

    Numbers that are not finite become the texts "nan", "inf" and "-inf", since JSON has none.
    """
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
    try:
        json.dumps(data, allow_nan=False)
    except ValueError:
        return {name: _finite(value) for name, value in data.items()}
    return data


def keyed(document: Document) -> list[tuple[str, str, Bound]]:
    """(key, section, bound) of every bound. A key is "SECTION/BOUND", unique in the report: a second bound of the same
    key gets the suffix "-2"."""
    seen: dict[str, int] = {}
    found = []
    for section, bound in document.bounds():
        key = f"{slug(section)}/{bound.key}"
        seen[key] = seen.get(key, 0) + 1
        found.append((key if seen[key] == 1 else f"{key}-{seen[key]}", section, bound))
    return found


def slug(text: str) -> str:
    """``text`` in lower case; every run of characters other than letters, digits, dots and underscores is a hyphen."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-")


def write_data(data: JsonObject, path: Path) -> None:
    """Write report.json: a line a key, and in lists a line an item, so that two files can be compared line by line."""
    lines = [f"{json.dumps(name)}: {_lines(value)}" for name, value in data.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def _lines(value: object) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, allow_nan=False)
    encode = json.JSONEncoder(allow_nan=False).encode  # json.dumps makes an encoder for each of thousands of items
    return "[\n " + ",\n ".join(map(encode, value)) + "\n]"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
