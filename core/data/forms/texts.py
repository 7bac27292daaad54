"""Blocks of text files: a file is one document, read in blocks cut behind a newline."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from telechat_twins.core.data.forms.streams import UTF8, OnBytes, not_utf8, open_stream
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_LINE, MAX_LINE_VALUES, parse_value

BLOCK_BYTES = 1 << 20
_HEAD = 4096  # bytes in which a spread-out list of rows shows itself
_ROWS_BEGIN = re.compile(rb'\[?\s*\{\s*"')


@dataclass(frozen=True)
class Block:
    """Part of a document: ``first`` starts it, ``last`` ends it."""

    where: str
    text: str
    first: bool = True
    last: bool = True

    @property
    def empty(self) -> bool:
        """Whether it is a whole document without text."""
        return self.first and self.last and not self.text


def text_blocks(
    path: Path, row_keys: frozenset[str], on_bytes: OnBytes | None = None, encoding: str = UTF8
) -> Iterator[Block]:
    """The text of a file. UserError for other encodings, zero bytes, and JSON rows with any of ``row_keys``."""
    _refuse_rows(path, row_keys, encoding)
    line = 1
    with open_stream(path, on_bytes, encoding) as file:
        blocks = _byte_blocks(file)
        data = next(blocks, None)
        first = True
        while data is not None:
            following = next(blocks, None)
            try:
                text = data.decode("utf-8-sig" if first else "utf-8")
            except UnicodeDecodeError as error:
                bad = line + data.count(b"\n", 0, error.start)
                raise UserError(f"{path}:{bad}: {not_utf8(data if first else b'')}") from None
            if (zero := data.find(b"\0")) >= 0:
                bad = line + data.count(b"\n", 0, zero)
                raise UserError(f"{path}:{bad}: a zero byte, so not a text; is it UTF-16? (--encoding utf-16-le)")
            yield Block(f"{path}:{line}", text, first, last=following is None)
            line += data.count(b"\n")
            data, first = following, False


def _byte_blocks(file: BinaryIO) -> Iterator[bytes]:
    """About BLOCK_BYTES each, cut behind a newline: there a block encodes exactly as it does inside the whole text."""
    rest = b""
    while chunk := file.read(BLOCK_BYTES):
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


def _refuse_rows(path: Path, keys: frozenset[str], encoding: str) -> None:
    """UserError for a file of JSON rows under the name of a text: a row or list on one line or spread over several."""
    with open_stream(path, None, encoding) as file:
        head = file.read(_HEAD)
    with open_stream(path, None, encoding) as file:
        first = next((line for line in iter(lambda: file.readline(MAX_LINE), b"") if line.strip()), b"")
    head = head.removeprefix(codecs.BOM_UTF8).lstrip()
    first = first.removeprefix(codecs.BOM_UTF8).strip()
    key = re.compile(rb'[{,]\s*"(' + "|".join(sorted(keys)).encode() + rb')"\s*:')
    rows = _ROWS_BEGIN.match(head) is not None and key.search(head) is not None
    if not rows and first.startswith((b"{", b"[{")):
        # The key may stand behind a long value.
        try:
            row = parse_value(first, MAX_LINE, MAX_LINE_VALUES)
        except ValueError:
            return
        row = row[0] if isinstance(row, list) else row
        rows = bool(keys & row.keys())
    if rows:
        raise UserError(
            f"{path}:1: holds JSON rows, and a file of this name is read as one text; name it .jsonl (a row a line) "
            "or .json (a list)"
        )
