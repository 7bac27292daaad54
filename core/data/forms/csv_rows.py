"""Rows of .csv and .tsv files: the first line names the columns, a cell is text."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from telechat_twins.core.data.forms.formats import TSV, form_of
from telechat_twins.core.data.forms.streams import UTF8, OnBytes, RowAt, not_utf8, open_stream
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_LINE, lines
from telechat_twins.core.shown import printable, shown

UNNAMED = "Unnamed: 0"  # what pandas calls the column of its index, whose name it leaves empty


class _Decoded:
    """The lines of a file as text; ``number`` is the last one's, ``begin_row`` tells where a row begins."""

    def __init__(self, data: Iterator[bytes], path: Path):
        self._data, self._path = data, path
        self.number = 0
        self._size = 0

    def begin_row(self) -> None:
        self._size = 0

    def __iter__(self) -> _Decoded:
        return self

    def __next__(self) -> str:
        line = next(self._data)
        self.number += 1
        self._size += len(line)
        if self._size > MAX_LINE:
            raise UserError(
                f"{self._path}:{self.number}: a row of more than {MAX_LINE} bytes; is a quotation mark left open?"
            )
        try:
            return line.decode("utf-8-sig" if self.number == 1 else UTF8)
        except UnicodeDecodeError:
            raise UserError(f"{self._path}:{self.number}: {not_utf8(line)}") from None


def csv_rows(path: Path, on_bytes: OnBytes | None = None, encoding: str = UTF8) -> Iterator[RowAt]:
    """("file:line", row) for every row below the line of names; blank lines are passed over.

    UserError with the line for a wrong number of cells, a quotation mark out of place, and names that are empty (but
    the first, pandas' index) or given twice.
    """
    csv.field_size_limit(MAX_LINE)
    with open_stream(path, on_bytes, encoding) as file:
        text = _Decoded(lines(file, path), path)
        reader = csv.reader(text, delimiter="\t" if form_of(path).name == TSV else ",", strict=True)
        names: list[str] | None = None
        while True:
            text.begin_row()
            where = f"{path}:{text.number + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UserError(
                    f"{path}:{text.number}: not a table ({error}); quote such cells, or write .jsonl"
                ) from None
            if cells is None:
                return
            if not cells:
                continue
            if names is None:
                names = _names(cells, where)
                continue
            if len(cells) != len(names):
                raise UserError(
                    f"{where}: {len(cells)} cells under {len(names)} names; quote cells that hold the separator"
                )
            yield where, dict(zip(names, cells, strict=True))


def _names(cells: list[str], where: str) -> list[str]:
    if cells[0].lstrip().startswith(("{", "[")):
        raise UserError(f"{where}: holds JSON rows, not a table; name it .jsonl (a row a line) or .json (a list)")
    if len(cells) > 1 and all(name.startswith(" ") for name in cells[1:]):
        raise UserError(
            f"{where}: a space behind each separator, which would begin every text and hide its quotation marks; "
            "write the table without them"
        )
    names = [name.strip() for name in cells]
    names[0] = names[0] or UNNAMED
    if len(names) == 1 and any(mark in names[0] for mark in ",;\t"):
        raise UserError(
            f"{where}: one column, named {shown(names[0])}; cells are separated by commas in .csv, by tabs in .tsv"
        )
    for n, name in enumerate(names):
        if not name:
            raise UserError(f"{where}: column {n + 1} has no name; the first line names the columns")
        if name in names[:n]:
            raise UserError(f"{where}: two columns are named '{printable(name, 80)}'; rename one")
    return names
