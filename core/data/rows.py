"""Input files: which files a path names, their documents and their JSON rows.

No file is kept in memory; every mistake is reported as "file:line: ...".
"""

from __future__ import annotations

import codecs
import glob
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from telechat_twins.core.data.json_items import json_items
from telechat_twins.core.data.packed import is_packed
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_LINE, MAX_LINE_VALUES, check_size, lines, parse_value
from telechat_twins.core.shown import printable
from telechat_twins.core.types import JsonObject

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
JSON_SUFFIX = ".json"
ROW_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines", JSON_SUFFIX)
_COMPRESSED = "is compressed; unpack it first"
_TABLE = "is a table, not text or JSON rows; convert it to .jsonl"
# Never text, whatever their bytes decode to.
_UNREAD = {
    **dict.fromkeys((".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".rar"), _COMPRESSED),
    **dict.fromkeys((".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xlsx", ".xls", ".sqlite", ".db"), _TABLE),
}
_ROW_KEYS = {"text", "dialog", "messages", "conversations", "instruction", "input", "output", "prompt", "query"}
_HEAD = 4096  # bytes in which a spread-out list of rows shows itself
_ROWS_BEGIN = re.compile(rb'\[?\s*\{\s*"')
_ROW_KEY = re.compile(rb'[{,]\s*"(' + "|".join(sorted(_ROW_KEYS)).encode() + rb')"\s*:')
_NAMED = 10  # skipped files that are named; the rest are counted
BLOCK_BYTES = 1 << 20

OnBytes = Callable[[int], object]


def find_inputs(paths: Sequence[str | Path]) -> list[Path]:
    """Files, folders (searched through, by suffix) and globs -> sorted files without repetition.

    The order is that of ``paths``, and by name inside a folder or glob. ``skipped_inputs`` lists what a folder holds
    besides. UserError when one of ``paths`` yields nothing, names a compressed file or a table, or cannot be searched.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = _inside(path)[0]
        else:
            files = [Path(p) for p in sorted(glob.glob(str(given), recursive=True)) if Path(p).is_file()]
        if not files:
            kinds = " ".join(TEXT_SUFFIXES + ROW_SUFFIXES)
            raise UserError(f"{given}: no such file, and no folder or pattern with files in it (folders: {kinds})")
        for file in files:
            if reason := _UNREAD.get(file.suffix.lower()):
                raise UserError(f"{file}: {reason}")
        found.update(dict.fromkeys(files))
    return list(found)


def skipped_inputs(paths: Sequence[str | Path]) -> list[str]:
    """A line for each folder of ``paths`` with files that ``find_inputs`` does not take: how many and which."""
    notes = []
    for path in map(Path, paths):
        if not path.is_dir():
            continue
        taken, others, hidden = _inside(path)
        names = ", ".join(str(file.relative_to(path)) for file in others[:_NAMED])
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        parts = [f"{len(others)} of another kind ({names}{more})"] * bool(others)
        parts += [f"{hidden} hidden"] * bool(hidden)
        if parts:
            notes.append(f"skipped in {path}: {', '.join(parts)}; read: {len(taken)}")
    return notes


def _inside(folder: Path) -> tuple[list[Path], list[Path], int]:
    """(files of known suffixes, what else there is, number of hidden files) anywhere under a folder.

    Not searched: links to folders and packed folders, which are among the second, and hidden folders, whose names begin
    with a dot and which count as one file.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be searched ({error.strerror})") from None

    taken: list[Path] = []
    others: list[Path] = []
    hidden = 0
    for root, folders, names in os.walk(folder, onerror=refuse):
        if "meta.json" in names and is_packed(root):
            others.append(Path(root))
            folders.clear()
            continue
        hidden += sum(name.startswith(".") for name in folders + names)
        folders[:] = [name for name in folders if not name.startswith(".")]
        others += [link for link in (Path(root, name) for name in folders) if link.is_symlink()]
        for file in (Path(root, name) for name in names if not name.startswith(".")):
            known = file.suffix.lower() in TEXT_SUFFIXES + ROW_SUFFIXES and file.is_file()
            (taken if known else others).append(file)
    return sorted(taken), sorted(others), hidden


def is_rows(path: Path) -> bool:
    """Whether a file holds JSON objects: one a line, or a list of them."""
    return path.suffix.lower() in ROW_SUFFIXES


def total_bytes(files: Sequence[Path]) -> int:
    return sum(f.stat().st_size for f in files)


def detect_kind(files: Sequence[Path]) -> str:
    """ "text" or "dialogue", by the first row of every file of rows; UserError when both are mixed."""
    kinds: dict[str, Path] = {}
    for file in files:
        kind = "text"
        if is_rows(file):
            row = next((row for _, row in read_rows(file)), {})
            kind = "text" if "text" in row else "dialogue" if row else ""
        if kind:
            kinds.setdefault(kind, file)
    if len(kinds) > 1:
        raise UserError(f"{kinds['dialogue']}: holds dialogues while {kinds['text']} holds text; pack them separately")
    return next(iter(kinds), "text")


class RawRow(NamedTuple):
    """A row's bytes, where they begin in the file, the line, and the place in a list (from 1; 0: a line of its own)."""

    offset: int
    line: int
    item: int
    data: bytes

    def where(self, path: Path) -> str:
        return row_place(path, self.line, self.item)


def row_place(path: Path, line: int, item: int) -> str:
    """How messages name a row."""
    return f"{path}:{line}: item {item}" if item else f"{path}:{line}"


def raw_rows(path: Path, on_bytes: OnBytes | None = None) -> Iterator[RawRow]:
    """The rows of a file, unparsed: the non-blank lines of a jsonl file, or what a .json file holds.

    A .json file is a list of objects, or objects one after another (one a line, or a single one over many lines).
    """
    with open_file(path) as file:
        if path.suffix.lower() == JSON_SUFFIX:
            for place in json_items(file, path):
                if on_bytes:
                    on_bytes(len(place.data))
                yield RawRow(place.offset, place.line, place.item, place.data)
            return
        offset = 0
        for number, line in enumerate(lines(file, path), 1):
            if on_bytes:
                on_bytes(len(line))
            if line.strip():
                yield RawRow(offset, number, 0, line)
            offset += len(line)


def read_rows(path: Path, on_bytes: OnBytes | None = None) -> Iterator[tuple[str, JsonObject]]:
    """("file:line", object) for every row of a file."""
    for row in raw_rows(path, on_bytes):
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
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}); convert the file") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} of the row, " if error.lineno > 1 else ""
        raise UserError(f"{where}: not valid JSON ({error.msg} at {line}column {error.colno})") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


@dataclass(frozen=True)
class Block:
    """Part of a document: ``first`` starts it, ``last`` ends it."""

    where: str
    text: str
    first: bool = True
    last: bool = True


def read_documents(
    path: Path, on_bytes: OnBytes | None = None, text_key: str = "text", left_out: set[str] | None = None
) -> Iterator[Block]:
    """A document for each row, or the whole of any other file, in blocks cut behind a newline.

    ``left_out`` receives the names of a row's other fields.
    """
    if not is_rows(path):
        _refuse_rows(path)
        yield from _text_blocks(path, on_bytes)
        return
    for where, row in read_rows(path, on_bytes):
        text = row.get(text_key)
        if isinstance(text, str):
            if left_out is not None and len(row) > 1:
                left_out.update(key for key in row if key != text_key)
            yield Block(where, text)
        elif {"dialog", "messages", "input", "instruction"} & row.keys():
            raise UserError(f"{where}: a dialogue, not a text; pack dialogues with --sft")
        else:
            raise UserError(f"{where}: expected text in field '{text_key}'; keys found: {keys_found(row)}")


def keys_found(row: JsonObject) -> str:
    """A row's keys for a message."""
    return printable(", ".join(row), 200) or "none"


def _refuse_rows(path: Path) -> None:
    """UserError for a file of JSON rows under the name of a text: a row or list on one line or spread over several."""
    with open_file(path) as file:
        head = file.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        first = next((line for line in iter(lambda: file.readline(MAX_LINE), b"") if line.strip()), b"")
    first = first.removeprefix(codecs.BOM_UTF8).strip()
    rows = _ROWS_BEGIN.match(head) is not None and _ROW_KEY.search(head) is not None
    if not rows and first.startswith((b"{", b"[{")):
        # The key may stand behind a long value.
        try:
            row = parse_value(first, MAX_LINE, MAX_LINE_VALUES)
        except ValueError:
            return
        row = row[0] if isinstance(row, list) else row
        rows = bool(_ROW_KEYS & row.keys())
    if rows:
        raise UserError(
            f"{path}:1: holds JSON rows, and a file of this name is read as one text; name it .jsonl (a row a line) "
            "or .json (a list)"
        )


def _text_blocks(path: Path, on_bytes: OnBytes | None) -> Iterator[Block]:
    line = 1
    with open_file(path) as file:
        blocks = _byte_blocks(file, on_bytes)
        data = next(blocks, None)
        first = True
        while data is not None:
            following = next(blocks, None)
            try:
                text = data.decode("utf-8-sig" if first else "utf-8")
            except UnicodeDecodeError as error:
                bad = line + data.count(b"\n", 0, error.start)
                raise UserError(f"{path}:{bad}: not UTF-8; convert the file") from None
            yield Block(f"{path}:{line}", text, first, last=following is None)
            line += data.count(b"\n")
            data, first = following, False


def _byte_blocks(file: BinaryIO, on_bytes: OnBytes | None) -> Iterator[bytes]:
    """About BLOCK_BYTES each, cut behind a newline: there a block encodes exactly as it does inside the whole text."""
    rest = b""
    while chunk := file.read(BLOCK_BYTES):
        if on_bytes:
            on_bytes(len(chunk))
        rest += chunk
        cut = rest.rfind(b"\n") + 1
        if not cut and len(rest) >= 16 * BLOCK_BYTES:
            cut = len(rest) - 1
            while cut > 1 and rest[cut] & 0xC0 == 0x80:  # not inside a character
                cut -= 1
        if cut:
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def open_file(path: Path) -> BinaryIO:
    """A file opened for reading bytes; UserError if it cannot be."""
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
