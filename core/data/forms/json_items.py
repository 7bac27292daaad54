"""Splitting a .json file into its objects without parsing it and without keeping it in memory."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_LINE

BLOCK_BYTES = 1 << 20

_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')
_VISIBLE = re.compile(rb"[^ \t\r\n]")
_SPACE = b" \t\r\n"


class Item(NamedTuple):
    """One object: the offset of its first byte in the file, that byte's line, its number (from 1), its bytes."""

    offset: int
    line: int
    item: int
    data: bytes


def json_items(file: IO[bytes], path: Path, limit: int = MAX_LINE) -> Iterator[Item]:
    """The elements of a JSON list, or JSON objects that follow one another with nothing but space between them.

    The elements are not parsed, so each must be judged by a parser. UserError for a file that is neither, for a list or
    an object that does not end, for text behind the list, and for an element of more than ``limit`` bytes.
    """
    yield from _Splitter(file, path, limit).items()


class _Splitter:
    """What of the file lies in memory: ``held``, whose byte at ``begin`` is the file's byte at ``offset``."""

    def __init__(self, file: IO[bytes], path: Path, limit: int):
        self.file, self.path, self.limit = file, path, limit
        self.held = b""
        self.begin = self.offset = 0
        self.line = 1

    def items(self) -> Iterator[Item]:
        while len(self.held) < len(codecs.BOM_UTF8) and self._more():
            pass
        if self.held.startswith(codecs.BOM_UTF8):
            self._drop(len(codecs.BOM_UTF8))
        opening = self._next_byte()
        if opening == b"[":
            self._drop(1)
            yield from self._listed()
        elif opening == b"{":
            yield from self._one_after_another()
        elif opening:
            raise self._wrong("not JSON rows; expected a list of objects, or objects")

    def _listed(self) -> Iterator[Item]:
        number, closed = 0, self._next_byte() == b"]"
        if closed:
            self._drop(1)
        while not closed:
            number += 1
            self._next_byte()  # so that the line is the element's own
            size = self._size(b",]", number)
            end = self.begin + size
            data, closed = self.held[self.begin : end].rstrip(_SPACE), self.held[end : end + 1] == b"]"
            if not data:
                raise self._wrong(f"item {number}: a value is missing in the list")
            yield Item(self.offset, self.line, number, data)
            self._drop(size + 1)
        if self._next_byte():
            raise self._wrong("text behind the end of the list; expected one list")

    def _one_after_another(self) -> Iterator[Item]:
        number = 0
        while opening := self._next_byte():
            number += 1
            if opening != b"{":
                raise self._wrong("expected an object, which begins with a brace")
            size = self._size(b"}", number) + 1
            yield Item(self.offset, self.line, number, self.held[self.begin : self.begin + size])
            self._drop(size)

    def _size(self, closing: bytes, number: int) -> int:
        """How far from ``begin`` the first of ``closing`` is that lies outside of all brackets and strings opened."""
        depth = -1 if closing == b"}" else 0  # the element's own brace is one of them
        scanned, inside = 0, False
        while True:
            found = (_INSIDE if inside else _OUTSIDE).search(self.held, self.begin + scanned)
            if found is None:
                scanned = max(scanned, len(self.held) - self.begin)
                if not self._more():
                    raise self._wrong(f"item {number}: the file ends before it does")
                continue
            byte = found[0]
            scanned = found.end() - self.begin
            if byte == b"\\":
                scanned += 1  # the escaped character, which may be in the next block
            elif byte == b'"':
                inside = not inside
            elif depth == 0 and byte in closing:
                if scanned - 1 > self.limit:
                    break
                return scanned - 1
            elif byte in b"[{":
                depth += 1
            elif byte in b"]}":
                depth -= 1
        raise self._too_long()

    def _next_byte(self) -> bytes:
        """The next byte that is not white space, to which ``begin`` moves; nothing at the end of the file."""
        while True:
            found = _VISIBLE.search(self.held, self.begin)
            self._drop((found.start() if found else len(self.held)) - self.begin)
            if found or not self._more():
                return found[0] if found else b""

    def _drop(self, count: int) -> None:
        self.line += self.held.count(b"\n", self.begin, self.begin + count)
        self.offset += count
        self.begin += count

    def _more(self) -> bool:
        if len(self.held) - self.begin > self.limit:
            raise self._too_long()
        chunk = self.file.read(BLOCK_BYTES)
        self.held, self.begin = self.held[self.begin :] + chunk, 0
        return bool(chunk)

    def _too_long(self) -> UserError:
        return self._wrong(f"a row of more than {self.limit} bytes; split it into several rows")

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self.path}:{self.line}: {what}")
