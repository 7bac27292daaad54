"""Input files of every form as documents and rows.

No file is kept in memory; every mistake is reported as "file:line: ...", or "file: row n: ..." in a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from telechat_twins.core.data.forms.arrow_rows import dataset_rows, parquet_rows
from telechat_twins.core.data.forms.csv_rows import csv_rows
from telechat_twins.core.data.forms.find import Unchanged, find_inputs, skipped_inputs, total_bytes
from telechat_twins.core.data.forms.formats import CSV, DATASET, JSON, LINES, PARQUET, SUFFIXES, TOKENS, TSV, form_of
from telechat_twins.core.data.forms.json_items import LongItem
from telechat_twins.core.data.forms.json_rows import UnreadLines, UnreadRow, json_rows, parse_row, row_place
from telechat_twins.core.data.forms.long_rows import LINES_BYTES, document_rows
from telechat_twins.core.data.forms.megatron import TokenFile
from telechat_twins.core.data.forms.streams import UTF8, OnBytes, RowAt
from telechat_twins.core.data.forms.texts import Block, text_blocks
from telechat_twins.core.data.forms.wrapped import under_notes
from telechat_twins.core.data.kinds.fields import found_type, refuse_unread
from telechat_twins.core.data.kinds.harmless import HARMLESS
from telechat_twins.core.data.kinds.messages import Reading, unused
from telechat_twins.core.data.kinds.table import KINDS, TEXT, keys_found, mark_keys, refuse_other_use, rows_inside
from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

__all__ = [
    "Block",
    "UnreadLines",
    "UnreadRow",
    "Unchanged",
    "find_inputs",
    "skipped_inputs",
    "total_bytes",
    "under_notes",
]


def read_rows(path: Path, on_bytes: OnBytes | None = None, encoding: str = UTF8) -> Iterator[RowAt]:
    """(where, object) for every row of an input that holds rows. ``encoding`` is that of text; Arrow has its own."""
    form = form_of(path).name
    if form == PARQUET:
        return parquet_rows(path, on_bytes)
    if form == DATASET:
        return dataset_rows(path, on_bytes)
    if form in (CSV, TSV):
        return csv_rows(path, on_bytes, encoding)
    return json_rows(path, on_bytes, encoding)


def input_notes(inputs: Sequence[str | Path], rows: bool = False, encoding: str = UTF8) -> list[str]:
    """What is to be said of inputs before they are read: files that a folder search skips, files whose rows are those
    under a key, and token files whose index does not name every id once. ``rows``: whether only files of rows are
    searched for."""
    files = find_inputs(inputs, rows)
    tokens = (TokenFile(file).note for file in files if form_of(file).name == TOKENS)
    return [*skipped_inputs(inputs, rows), *under_notes(files, encoding), *filter(None, tokens)]


def row_files(inputs: Sequence[str | Path], what: str) -> list[Path]:
    """The inputs that paths name, all of which must hold rows; ``what`` is made of them."""
    files = find_inputs(inputs, rows=True)
    for file in files:
        if not form_of(file).holds_rows:
            kinds = " ".join(suffix for suffix in SUFFIXES if form_of(Path("x" + suffix)).holds_rows)
            raise UserError(
                f"{file}: {what} are read from files of rows ({kinds}, also .gz .zst .xz .bz2; folders of "
                "save_to_disk); pack texts without --sft"
            )
    return files


def read_documents(
    path: Path,
    on_bytes: OnBytes | None = None,
    text_key: str = "text",
    reading: Reading | None = None,
    encoding: str = UTF8,
) -> Iterator[Block]:
    """A document for each row, or the whole of any other file, in blocks cut behind a newline.

    UserError for a row without text under ``text_key``, and for other keys of it that neither ``reading`` ignores nor
    core.data.kinds.table knows as harmless.
    """
    reader = RowReader(text_key, reading if reading is not None else Reading())
    for part in document_parts(path, reader, on_bytes, encoding):
        if isinstance(part, Block):
            if part.empty:
                reader.notice_empty(part.where)
            yield part
            continue
        for row in (part,) if isinstance(part, UnreadRow) else part.rows():
            yield Block(row.where, reader.text(row))


class RowReader:
    """Texts of rows, and in ``reading`` what was noticed on the way.

    Other processes read with a ``fresh`` one each, which the first one takes in again (``absorb``).
    """

    def __init__(self, text_key: str, reading: Reading):
        self.text_key, self.reading = text_key, reading

    def text(self, row: UnreadRow) -> str:
        """The document of a row of JSON; UserError as ``read_documents``."""
        where = row.where
        text = _document(parse_row(row.data, where), where, self.text_key, self.reading)
        if not text:
            self.notice_empty(where)
        return text

    def block(self, row: JsonObject, where: str) -> Block:
        """The document of a parsed row. One without text is noticed in its turn, and not here, where it is read."""
        return Block(where, _document(row, where, self.text_key, self.reading))

    def notice_empty(self, where: str) -> None:
        """Count a document without text."""
        self.reading.notice("texts are empty, and no documents", where)

    def long_blocks(self, found: LongItem, where: str) -> Iterator[Block]:
        """The blocks of a row that is too long to be held."""
        part, first = next(found.parts, ""), True
        for following in found.parts:
            yield Block(where, part, first, last=False)
            part, first = following, False
        others = {**found.others, self.text_key: ""} if found.found else found.others
        _document(others, where, self.text_key, self.reading)
        yield Block(where, part, first)

    def fresh(self) -> RowReader:
        """One with the same options that noticed nothing yet."""
        return RowReader(self.text_key, unused(self.reading))

    def absorb(self, other: RowReader) -> None:
        """Take over what the reader of later rows noticed."""
        self.reading.absorb(other.reading)


def document_parts(
    path: Path,
    reader: RowReader,
    on_bytes: OnBytes | None = None,
    encoding: str = UTF8,
    size: Callable[[], int] = lambda: LINES_BYTES,
) -> Iterator[Block | UnreadRow | UnreadLines]:
    """``read_documents``, but rows of JSON that can be held as they stand, for ``reader`` to read; lines of a .jsonl
    file together, about ``size()`` bytes at a time."""
    if form_of(path).name == TOKENS:
        raise UserError(f"{path}: holds token ids, not text")
    if not form_of(path).holds_rows:
        yield from text_blocks(path, mark_keys(), on_bytes, encoding)
        return
    if form_of(path).name not in (LINES, JSON):
        for where, row in read_rows(path, on_bytes, encoding):
            yield reader.block(row, where)
        return
    for found in document_rows(path, reader.text_key, on_bytes, encoding, size=size):
        if isinstance(found, LongItem):
            yield from reader.long_blocks(found, row_place(path, found.line, found.item))
        elif isinstance(found, UnreadLines):
            yield found
        else:
            yield UnreadRow(path, found.line, found.item, found.data)


def _document(row: JsonObject, where: str, text_key: str, reading: Reading) -> str:
    text = row.get(text_key)
    if not isinstance(text, str):
        if text_key not in row:
            refuse_other_use(row, where, TEXT, reading.ignore)
        found = f"; keys found: {keys_found(row)}" if text_key not in row else f", found {found_type(text)}"
        other = any(key != text_key and isinstance(value, str) for key, value in row.items())
        way = "; another field is named by --text-key" if text is None and other else ""
        raise UserError(f"{where}: expected text in field '{text_key}'{found}{way}{rows_inside(row)}")
    refuse_unread(row, (text_key,), "", where, reading.ignore, HARMLESS, reading.left_out)
    reading.kinds[TEXT] = reading.kinds.get(TEXT, 0) + 1
    return text


def detect_kind(files: Sequence[Path]) -> str:
    """ "text" or "dialogue", by the first row of every file of rows; UserError when both are mixed."""
    kinds: dict[str, Path] = {}
    for file in files:
        kind = "text"
        if form_of(file).holds_rows:
            row: JsonObject = next((row for _, row in read_rows(file)), {})
            kind = "text" if KINDS["text"].marked_by(row) else "dialogue" if row else ""
        if kind:
            kinds.setdefault(kind, file)
    if len(kinds) > 1:
        raise UserError(f"{kinds['dialogue']}: holds dialogues while {kinds['text']} holds text; pack them separately")
    return next(iter(kinds), "text")
