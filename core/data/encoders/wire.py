"""Tasks as bytes, for another process: a line of JSON that tells the parts, and behind it their texts and data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from telechat_twins.core.data.encoders.tasks import Part, TableRow, Task
from telechat_twins.core.data.forms.json_rows import UnreadLines, UnreadRow

_UTF8 = "utf-8", "surrogatepass"  # what cannot be encoded is refused where it is tokenized


def to_bytes(task: Task) -> bytes:
    """Lines that a file has are told by their place."""
    heads: list[tuple[object, ...]] = []
    bodies: list[bytes] = []
    for part in task:
        body: bytes | None
        if isinstance(part, Part):
            body = part.text.encode(*_UTF8)
            heads.append((len(body), part.where, part.first, part.last))
        elif isinstance(part, TableRow):
            body = part.data
            heads.append((len(body), part.where))
        elif isinstance(part, UnreadRow):
            body = part.data
            heads.append((len(body), str(part.path), part.line, part.item))
        else:
            body = part.light().data or b""
            heads.append((len(body), str(part.path), part.line, part.offset, part.size))
        bodies.append(body)
    return b"".join((json.dumps(heads).encode(), b"\n", *bodies))


def from_bytes(data: bytes) -> Task:
    """The task of which ``to_bytes`` made ``data``."""
    return list(_parts(data))


def _parts(data: bytes) -> Iterator[Part | UnreadRow | UnreadLines | TableRow]:
    at = data.index(b"\n") + 1
    for count, name, *facts in json.loads(data[: at - 1]):
        body = data[at : at + count]
        at += count
        if not facts:
            yield TableRow(name, body)
        elif len(facts) == 3:
            line, offset, size = facts
            yield UnreadLines(Path(name), line, offset, size, body or None)
        elif isinstance(facts[0], bool):
            yield Part(name, body.decode(*_UTF8), *facts)
        else:
            line, item = facts
            yield UnreadRow(Path(name), line, item, body)
