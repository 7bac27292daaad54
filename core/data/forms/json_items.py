"""Splitting a .json file into its objects without parsing it and without keeping it in memory."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from telechat_twins.core.data.forms.streams import marked, not_utf8
from telechat_twins.core.data.kinds.harmless import HARMLESS_OF_FILE
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_LINE, parse_value
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

BLOCK_BYTES = 1 << 20

_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')
_VISIBLE = re.compile(rb"[^ \t\r\n]")
_SPACE = b" \t\r\n"
_KEY = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


class Item(NamedTuple):
    """One object: the offset of its first byte in the file, that byte's line, its number (from 1), its bytes."""

    offset: int
    line: int
    item: int
    data: bytes


@dataclass
class LongItem:
    """An object too large to be held: the parts of its text, and its other members, known once the parts are consumed.

    ``found``: whether it has the text at all, by then.
    """

    line: int
    item: int
    parts: Iterator[str]
    others: JsonObject
    found: bool = False


def json_items(file: IO[bytes], path: Path, limit: int = MAX_LINE, under: str | None = None) -> Iterator[Item]:
    """The elements of a JSON list, or JSON objects that follow one another with nothing but space between them.

    ``under``: the file is one object, and the list is under this key of it. The elements are not parsed, so each must
    be judged by a parser. UserError for a file that is neither, for a list or an object that does not end, for text
    behind the list, and for an element of more than ``limit`` bytes.
    """
    for item in Splitter(file, path, limit, under).items():
        assert isinstance(item, Item)  # there is no ``long``
        yield item


class TooLong(UserError):
    """An element of more bytes than the limit; the splitter still stands at its first byte."""


class Splitter:
    """A .json file as it is read.

    ``held`` is what of it lies in memory; its byte at ``begin`` is the file's byte at ``offset``, in line ``line``.
    """

    def __init__(self, file: IO[bytes], path: Path, limit: int, under: str | None = None):
        self.file, self.path, self.limit, self.under = file, path, limit, under
        self.long: Callable[[int], LongItem] | None = None  # makes an element beyond the limit, by its number
        self.held = b""
        self.begin = self.offset = 0
        self.line = 1

    def items(self) -> Iterator[Item | LongItem]:
        """The elements; one beyond the limit is an error, or what ``long`` makes of it."""
        while len(self.held) < len(codecs.BOM_UTF8) and self.more():
            pass
        if self.held.startswith(codecs.BOM_UTF8):
            self.drop(len(codecs.BOM_UTF8))
        opening = self.next_byte()
        if opening == b"[":
            self.drop(1)
            yield from self._listed()
            if self.next_byte():
                raise self.wrong("text behind the end of the list; expected one list")
        elif opening == b"{":
            yield from self._one_after_another() if self.under is None else self._held(self.under)
        elif opening:
            head = self.held[self.begin : self.begin + 4]
            what = not_utf8(head) if marked(head) else "not JSON rows; expected a list of objects, or objects"
            raise self.wrong(what)

    def _listed(self) -> Iterator[Item | LongItem]:
        number, closed = 0, self.next_byte() == b"]"
        if closed:
            self.drop(1)
        while not closed:
            number += 1
            self.next_byte()  # so that the line is the element's own
            try:
                size = self.size(b",]", number)
            except TooLong:
                yield from self._in_parts(number)
                after = self.next_byte()
                if after not in (b",", b"]"):
                    raise self.wrong(f"item {number}: expected a comma or the end of the list behind it") from None
                self.drop(1)
                closed = after == b"]"
                continue
            end = self.begin + size
            data, closed = self.held[self.begin : end].rstrip(_SPACE), self.held[end : end + 1] == b"]"
            if not data:
                raise self.wrong(f"item {number}: a value is missing in the list")
            yield Item(self.offset, self.line, number, data)
            self.drop(size + 1)

    def _held(self, under: str) -> Iterator[Item | LongItem]:
        """The elements of the list under a key of the object at which the file begins, and which is all of it."""
        keys: set[str] = set()
        for key in self.members():
            if key in keys:
                raise self.wrong(f"key {shown(key)} appears twice; remove one")
            keys.add(key)
            if key == under and self.next_byte() == b"[":
                self.drop(1)
                yield from self._listed()
                continue
            size = self.size(b",}", 1)
            try:
                value = parse_value(self.held[self.begin : self.begin + size].rstrip(_SPACE))
            except ValueError:
                raise self.wrong(f"the value of {shown(key)} is not valid JSON") from None
            if key not in HARMLESS_OF_FILE and value not in (None, "", [], {}):
                raise self.wrong(f"{shown(key)} beside the rows under {shown(under)}; write the rows alone, as a list")
            self.drop(size)
        if self.next_byte():
            raise self.wrong(f"text behind the object whose {shown(under)} holds the rows; expected one object")

    def members(self) -> Iterator[str]:
        """The keys of an object; the caller moves behind the value of each before it asks for the next."""
        self.drop(1)
        after = self.next_byte()
        while after != b"}":
            while not (found := _KEY.match(self.held, self.begin)) and self.more():
                pass
            if found is None:
                raise self.wrong("expected a key, a text in quotation marks")
            key = _text(found[0])
            self.drop(len(found[0]))
            if key is None or self.next_byte() != b":":
                raise self.wrong("expected a key with a colon behind it")
            self.drop(1)
            self.next_byte()
            yield key
            after = self.next_byte()
            if after not in (b",", b"}"):
                raise self.wrong(f"expected a comma or a brace behind the value of {shown(key)}")
            if after == b",":
                self.drop(1)
                self.next_byte()
        self.drop(1)

    def _one_after_another(self) -> Iterator[Item | LongItem]:
        number = 0
        while opening := self.next_byte():
            number += 1
            if opening != b"{":
                raise self.wrong("expected an object, which begins with a brace")
            try:
                size = self.size(b"}", number) + 1
            except TooLong:
                yield from self._in_parts(number)
                continue
            yield Item(self.offset, self.line, number, self.held[self.begin : self.begin + size])
            self.drop(size)

    def _in_parts(self, number: int) -> Iterator[LongItem]:
        """An element beyond the limit, behind which the file is read on once all of it is consumed."""
        if self.long is None:
            raise self._too_long()
        item = self.long(number)
        yield item
        for _ in item.parts:
            pass

    def size(self, closing: bytes, number: int) -> int:
        """How far from ``begin`` the first of ``closing`` is that lies outside of all brackets and strings opened."""
        depth = -1 if closing == b"}" else 0  # the element's own brace is one of them
        scanned, inside = 0, False
        while True:
            found = (_INSIDE if inside else _OUTSIDE).search(self.held, self.begin + scanned)
            if found is None:
                scanned = max(scanned, len(self.held) - self.begin)
                if not self.more():
                    raise self.wrong(f"item {number}: the file ends before it does")
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

    def next_byte(self) -> bytes:
        """The next byte that is not white space, to which ``begin`` moves; nothing at the end of the file."""
        while True:
            found = _VISIBLE.search(self.held, self.begin)
            self.drop((found.start() if found else len(self.held)) - self.begin)
            if found or not self.more():
                return found[0] if found else b""

    def drop(self, count: int) -> None:
        self.line += self.held.count(b"\n", self.begin, self.begin + count)
        self.offset += count
        self.begin += count

    def more(self, limit: int | None = None) -> bool:
        """Read on; whether there was anything. TooLong where more than ``limit`` (default: its own) is held already."""
        if len(self.held) - self.begin > (self.limit if limit is None else limit):
            raise self._too_long()
        chunk = self.file.read(BLOCK_BYTES)
        self.held, self.begin = self.held[self.begin :] + chunk, 0
        return bool(chunk)

    def _too_long(self) -> TooLong:
        return TooLong(f"{self.path}:{self.line}: a row of more than {self.limit} bytes; split it into several rows")

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.path}:{self.line}: {what}")


def _text(data: bytes) -> str | None:
    """The text that a JSON string is; None for what is none."""
    try:
        return str(parse_value(data))
    except ValueError:
        return None
