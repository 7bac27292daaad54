"""Documents of JSON rows that are too long to be held: the text is decoded in parts while the file is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from telechat_twins.core.data.forms.json_items import Item, LongItem, Splitter
from telechat_twins.core.data.forms.json_rows import RawRow, UnreadLines, is_spread, row_place
from telechat_twins.core.data.forms.streams import UTF8, OnBytes, lies_so, not_utf8, open_stream
from telechat_twins.core.data.forms.wrapped import rows_under
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.foreign import MAX_LINE, parse_value
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

LINES_BYTES = 1 << 20
PART_BYTES = 1 << 20  # of an escaped text that are decoded at a time
_MOST = 4 * PART_BYTES  # after which a text without a line break is cut elsewhere
_ESCAPE = re.compile(rb"\\(?:(u[dD][89abAB][0-9a-fA-F]{2})|u[0-9a-fA-F]{4}|.)", re.DOTALL)
_RUN = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)


def document_rows(
    path: Path,
    text_key: str,
    on_bytes: OnBytes | None = None,
    encoding: str = UTF8,
    limit: int = MAX_LINE,
    size: Callable[[], int] = lambda: LINES_BYTES,
) -> Iterator[RawRow | UnreadLines | LongItem]:
    """The rows of a JSON file, unparsed; those of more than ``limit`` bytes with the text of ``text_key`` in parts.

    Lines come together, about ``size()`` bytes at a time. A part ends behind a line break where there is one within
    4 MiB. Each long row must be consumed before the next.
    """
    spread, under = is_spread(path, encoding), rows_under(path, encoding)
    with open_stream(path, on_bytes, encoding) as file:
        if spread:
            splitter = Splitter(file, path, limit, under)
            splitter.long = lambda number: _long(splitter, number, number, text_key)
            for item in splitter.items():
                yield RawRow(item.offset, item.line, item.item, item.data) if isinstance(item, Item) else item
            return
        number, offset = 1, 0
        while data := file.read(min(size(), limit)):
            begun = data[data.rfind(b"\n") + 1 :]
            rest = file.readline(limit + 1 - len(begun)) if begun else b""
            long = len(begun) + len(rest) > limit
            data = data[: len(data) - len(begun)] if long else data + rest
            if data:
                yield UnreadLines(path, number, offset if lies_so(path, encoding) else None, len(data), data)
            number += data.count(b"\n")
            offset += len(data)
            if long:
                line = _Line(file, begun + rest)
                yield from _long_line(line, path, number, text_key, limit)
                number += 1
                offset += line.size


class _Line:
    """The rest of one line as a file, of which ``begun`` was read already."""

    def __init__(self, file: IO[bytes], begun: bytes):
        self._file, self._begun = file, begun
        self.size = len(begun)  # of what was read of it

    def read(self, size: int) -> bytes:
        if self._begun:
            data, self._begun = self._begun, b""
            self._ended = data.endswith(b"\n")
            return data
        data = b"" if self._ended else self._file.readline(size)
        self.size += len(data)
        self._ended = self._ended or not data or data.endswith(b"\n")
        return data


def _long_line(line: _Line, path: Path, number: int, text_key: str, limit: int) -> Iterator[LongItem]:
    splitter = Splitter(line, path, limit)  # type: ignore[arg-type]
    splitter.line = number
    opening = splitter.next_byte()
    if opening != b"{":
        raise splitter.wrong("expected a JSON object, which begins with a brace")
    item = _long(splitter, 0, 1, text_key)
    yield item
    for _ in item.parts:
        pass
    if splitter.next_byte():
        raise UserError(f"{path}:{number}: not valid JSON (more behind the object of this line)")


def _long(splitter: Splitter, item: int, number: int, text_key: str) -> LongItem:
    if splitter.next_byte() != b"{":
        raise splitter.wrong(f"item {number}: expected an object, which begins with a brace")
    others: JsonObject = {}
    found = LongItem(splitter.line, item, iter(()), others)
    found.parts = _members(splitter, number, text_key, row_place(splitter.path, splitter.line, item), found)
    return found


def _members(splitter: Splitter, number: int, text_key: str, where: str, item: LongItem) -> Iterator[str]:
    """The parts of the text; other members, which must fit into the limit, are added to ``item``."""
    splitter.drop(1)
    after = splitter.next_byte()
    while after != b"}":
        if after != b'"':
            raise UserError(f"{where}: not valid JSON (expected a key in line {splitter.line})")
        splitter.drop(1)
        key = "".join(_string(splitter, where))
        if splitter.next_byte() != b":":
            raise UserError(f"{where}: not valid JSON (expected a colon in line {splitter.line})")
        splitter.drop(1)
        if key in item.others or (key == text_key and item.found):
            raise UserError(f"{where}: not valid JSON (key {shown(key)} appears twice)")
        if splitter.next_byte() == b'"' and key == text_key:
            item.found = True
            splitter.drop(1)
            yield from _string(splitter, where)
        else:
            item.others[key] = _value(_taken(splitter, b",}", number), where)
        after = splitter.next_byte()
        if after not in (b",", b"}"):
            raise UserError(f"{where}: not valid JSON (expected a comma or a brace in line {splitter.line})")
        if after == b",":
            splitter.drop(1)
            after = splitter.next_byte()
            after = b"," if after == b"}" else after  # a comma before the brace is not JSON
    splitter.drop(1)


def _taken(splitter: Splitter, closing: bytes, number: int) -> bytes:
    """What stands in front of the first of ``closing``, at which the splitter then stands."""
    size = splitter.size(closing, number)
    data = splitter.held[splitter.begin : splitter.begin + size]
    splitter.drop(size)
    return data


def _value(data: bytes, where: str, most: int = MAX_LINE) -> object:
    try:
        return parse_value(data.strip(), most)
    except UnicodeDecodeError:
        raise UserError(f"{where}: {not_utf8(b'')}") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({getattr(error, 'msg', error)})") from None


def _string(splitter: Splitter, where: str) -> Iterator[str]:
    """The text up to the quotation mark that ends it, behind which the splitter then stands."""
    scanned = 0  # bytes behind splitter.begin that are of the text
    while True:
        held, begin = splitter.held, splitter.begin
        end = _RUN.match(held, begin + scanned, begin + scanned + PART_BYTES).end()  # type: ignore[union-attr]
        more, scanned = end > begin + scanned, end - begin
        ended = held[end : end + 1] == b'"'
        cut = scanned if ended else 0
        if not ended and scanned >= PART_BYTES:
            cut = _behind_break(held, begin, end) or (_other_place(held, begin, end) if scanned >= _MOST else 0)
        if cut or ended:
            text = _value(b'"' + held[begin : begin + cut] + b'"', where, 3 * _MOST)
            splitter.drop(cut)
            scanned -= cut
            assert isinstance(text, str)
            yield text
        elif not more and not splitter.more(3 * _MOST):
            raise UserError(f"{where}: not valid JSON (the file ends inside a text)")
        if ended:
            splitter.drop(1)
            return


def _behind_break(held: bytes, begin: int, end: int) -> int:
    """How far the last line break (an escape, and not the letter behind an escaped backslash) ends; 0 without one."""
    place = held.rfind(b"\\n", begin, end)
    while place >= 0:
        before = held[begin:place]
        if (len(before) - len(before.rstrip(b"\\"))) % 2 == 0:
            return place + 2 - begin
        place = held.rfind(b"\\n", begin, place)
    return 0


def _other_place(held: bytes, begin: int, end: int) -> int:
    """How far a text without line breaks can be cut off: not inside of an escape, a pair of them, or a character."""
    place, behind_high, last = 0, -1, begin
    for match in _ESCAPE.finditer(held, begin, end):
        if match.start() != behind_high:
            place = match.start()
        behind_high = match.end() if match[1] else -1  # the first half of a pair, whose second half must follow
        last = match.end()
    if end - last > 8 and last != behind_high:
        place = end - 4
        while held[place] & 0xC0 == 0x80:
            place -= 1
    return max(0, place - begin)
