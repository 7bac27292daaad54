"""Rows of JSON files: a strict object a line (.jsonl), or a list of objects, or objects one after another (.json)."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from telechat_twins.core.data.forms.formats import JSON, form_of
from telechat_twins.core.data.forms.json_items import json_items
from telechat_twins.core.data.forms.streams import UTF8, OnBytes, RowAt, not_utf8, open_file, open_stream
from telechat_twins.core.data.forms.wrapped import rows_under
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_LINE, MAX_LINE_VALUES, check_size, lines, parse_value
from telechat_twins.core.types import JsonObject

_HEAD = 64  # bytes of a line that show whether it begins a list


class RawRow(NamedTuple):
    """A row's bytes, where they begin in the stream, their line, and the place in a list (from 1; 0: not in one)."""

    offset: int
    line: int
    item: int
    data: bytes

    def where(self, path: Path) -> str:
        return row_place(path, self.line, self.item)


class UnreadRow(NamedTuple):
    """A row that is parsed where it is used, perhaps in another process."""

    path: Path
    line: int
    item: int
    data: bytes

    @property
    def where(self) -> str:
        return row_place(self.path, self.line, self.item)


class UnreadLines(NamedTuple):
    """Whole lines of a .jsonl file, whose rows are parsed where they are used, perhaps in another process.

    ``line``: the number of the first. ``offset``: where in the file they are, None where they do not lie in it so.
    ``data`` None: to be taken from there, ``size`` bytes.
    """

    path: Path
    line: int
    offset: int | None
    size: int
    data: bytes | None

    def light(self) -> UnreadLines:
        """Without the data, where the file has them."""
        return self if self.offset is None else self._replace(data=None)

    def rows(self) -> Iterator[UnreadRow]:
        """The lines that are not blank; UserError where the file cannot be read, or no longer holds them."""
        data = self._taken() if self.data is None else self.data
        for number, line in enumerate(data.split(b"\n"), self.line):
            if line and not line.isspace():
                yield UnreadRow(self.path, number, 0, line)

    def _taken(self) -> bytes:
        with open_file(self.path) as file:
            try:
                file.seek(self.offset or 0)
                data = file.read(self.size)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read ({error.strerror})") from None
        if len(data) < self.size:
            raise UserError(f"{self.path}: changed while it was read; pack again once it is complete")
        return data


def row_place(path: Path, line: int, item: int) -> str:
    """How messages name a row."""
    return f"{path}:{line}: item {item}" if item else f"{path}:{line}"


def raw_rows(path: Path, on_bytes: OnBytes | None = None, encoding: str = UTF8) -> Iterator[RawRow]:
    """The rows of a file, unparsed: the non-blank lines of a .jsonl file, or what a .json file holds."""
    spread, under = is_spread(path, encoding), rows_under(path, encoding)
    with open_stream(path, on_bytes, encoding) as file:
        if spread:
            for place in json_items(file, path, under=under):
                yield RawRow(place.offset, place.line, place.item, place.data)
            return
        offset = 0
        for number, line in enumerate(lines(file, path), 1):
            if line.strip():
                yield RawRow(offset, number, 0, line)
            offset += len(line)


def is_spread(path: Path, encoding: str = UTF8) -> bool:
    """Whether rows are the items of a list, or objects over several lines: in .json files, and in .jsonl files whose
    first line with text begins a list, or is a brace alone, and thus not a row."""
    if form_of(path).name == JSON:
        return True
    with open_stream(path, None, encoding) as file:
        heads = (line.removeprefix(codecs.BOM_UTF8).strip() for line in iter(lambda: file.readline(_HEAD), b""))
        head = next(filter(None, heads), b"")
    return head.startswith(b"[") or head == b"{"


def json_rows(path: Path, on_bytes: OnBytes | None = None, encoding: str = UTF8) -> Iterator[RowAt]:
    """("file:line", object) for every row of a file."""
    for row in raw_rows(path, on_bytes, encoding):
        where = row.where(path)
        yield where, parse_row(row.data, where)


def parse_row(data: bytes, where: str) -> JsonObject:
    """A JSON object, strictly: no key twice, no number that is none, no unpaired surrogate. UserError otherwise."""
    try:
        check_size(data, MAX_LINE, MAX_LINE_VALUES)
    except ValueError as error:
        raise UserError(f"{where}: a row of {error}; split it into several rows") from None
    try:
        row = parse_value(data.removeprefix(codecs.BOM_UTF8).strip(), MAX_LINE, MAX_LINE_VALUES)
    except UnicodeDecodeError:
        raise UserError(f"{where}: {not_utf8(data)}") from None
    except json.JSONDecodeError as error:
        if b"\0" in data:
            raise UserError(f"{where}: a zero byte, so not UTF-8 text; is it UTF-16? (--encoding utf-16-le)") from None
        line = f"line {error.lineno} of the row, " if error.lineno > 1 else ""
        raise UserError(f"{where}: not valid JSON ({error.msg} at {line}column {error.colno})") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row
