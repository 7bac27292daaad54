"""Untrusted files: opened only if they are regular files, and parsed only within limits of size and number of values.

Parsing JSON takes up to fifty bytes of memory for each byte of text, so size and number of values are checked before
parsing: a file within the limits is read in well under 200 MB of memory.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

from telechat_twins.core.errors import UserError
from telechat_twins.core.shown import shown
from telechat_twins.core.types import JsonObject

MIB = 1 << 20
MAX_JSON = 32 * MIB  # bytes of a JSON text; the largest index of a released model has 10 MB
MAX_VALUES = 600_000  # brackets, braces and commas in a JSON text, about one for each value
MAX_LINE = 4 * MIB  # bytes of a line of JSON; its text is tokenized as a whole, with up to 50 bytes of memory a byte
MAX_LINE_VALUES = 200_000
MAX_DIGITS = 40  # of a whole number; 2**128 has 39
MAX_DEPTH = 500  # of nested lists and objects: Python's own bound, which libraries move
# A JSON string, complete or without its end. Possessive quantifiers keep no backtracking state for each character.
JSON_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LFS = b"version https://git-lfs.github.com/spec/"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def open_regular(path: str | Path, missing: str = "no such file") -> BinaryIO:
    """Open a regular file for reading. UserError for anything else, such as a pipe or a device, which may never end or
    block forever. ``missing``: the message for a file that does not exist."""
    try:
        # Without O_NONBLOCK, opening a pipe blocks until a writer opens it, too.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise UserError(f"{path}: {missing}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(
            f"{path}: is not a valid file name: it contains a zero byte or a character that cannot be encoded"
        ) from None
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return open(handle, "rb")
    os.close(handle)
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
    raise UserError(f"{path}: cannot be read (it is {kinds.get(stat.S_IFMT(mode), 'a socket')}); expected a file")


def read_file(path: str | Path, limit: int = MAX_JSON, missing: str = "no such file") -> bytes:
    """The bytes of a regular file. UserError if it is missing, not a regular file, unreadable, or above ``limit``."""
    with open_regular(path, missing) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            data = b"" if size > limit else file.read(limit + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if (found := max(size, len(data))) > limit:
        raise UserError(f"{path}: must have at most {limit} bytes, found {found}; it is probably not the expected file")
    refuse_stand_in(data, path)
    return data


def refuse_stand_in(head: bytes, path: str | Path) -> None:
    """UserError where a file that begins with ``head`` is what stands in its place until Git LFS fetches it."""
    if head.startswith(_LFS):
        raise UserError(
            f"{path}: is a pointer of Git LFS, and the file itself was not fetched; run git lfs pull in its folder, or "
            "download the file"
        )


def read_text(path: str | Path, limit: int = MAX_JSON, missing: str = "no such file") -> str:
    """The text of a UTF-8 file (a byte-order mark is dropped); UserError like ``read_file``, and for other bytes."""
    try:
        return read_file(path, limit, missing).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None


def _not_utf8(path: str | Path, error: UnicodeDecodeError) -> UserError:
    line = error.object.count(b"\n", 0, error.start) + 1
    return UserError(f"{path}: is not UTF-8 text (byte {error.start}, line {line}); convert the file")


def load_json(path: Path, what: str, max_bytes: int = MAX_JSON, max_values: int = MAX_VALUES) -> JsonObject:
    """The JSON object in a file; UserError names a file that is missing, damaged, too large, or has a key twice."""
    data = read_file(path, max_bytes, f"no such file; it should hold {what}").removeprefix(codecs.BOM_UTF8)
    try:
        return parse_json(data, max_bytes, max_values)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error) from None
    except ValueError as error:
        raise UserError(f"{path}: damaged, not {what} ({error})") from None


def parse_json(data: bytes, max_bytes: int = MAX_JSON, max_values: int = MAX_VALUES) -> JsonObject:
    """Strictly parsed JSON object; ValueError for any other value and as ``parse_value``."""
    value = parse_value(data, max_bytes, max_values)
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def parse_value(data: bytes, max_bytes: int = MAX_JSON, max_values: int = MAX_VALUES) -> Any:
    """Strictly parsed JSON value. ValueError for a repeated key, excessive nesting, NaN and infinite numbers (1e999),
    whole numbers of more than MAX_DIGITS digits, unpaired surrogates, and a text above the limits."""
    check_size(data, max_bytes, max_values)
    if _deep(data):
        raise ValueError("nested too deeply")
    try:
        value = _STRICT.decode(data.decode("utf-8"))
        if _SURROGATE.search(data):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("an unpaired surrogate escape") from None
    return value


def check_size(data: bytes, max_bytes: int, max_values: int) -> None:
    """ValueError for a JSON text whose parsing would take too much memory, estimated without parsing."""
    if len(data) > max_bytes:
        raise ValueError(f"{len(data)} bytes, above the limit of {max_bytes}")
    # A single character beyond the basic plane makes Python store the whole string with four bytes a character.
    if len(data) > MAX_JSON // 4 and _wide(data):
        raise ValueError(f"{len(data)} bytes with characters of four bytes, above the limit of {MAX_JSON // 4}")
    # Each value takes a byte at least, so most texts need not be counted.
    if len(data) > max_values and (values := sum(map(data.count, (b",", b"[", b"{")))) > max_values:
        raise ValueError(f"about {values} values, above the limit of {max_values}")


def _deep(data: bytes) -> bool:
    """Whether a JSON text within the limits is nested deeper than about MAX_DEPTH; parsing alone would tell only up to
    the recursion limit of the moment. Pairs of brackets are taken away from the inside, a level or two at a time."""
    if data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return False
    left = JSON_STRING.sub(b"", data).translate(None, _NO_BRACKETS)
    for _ in range(MAX_DEPTH):
        shorter = left.replace(b"[]", b"").replace(b"{}", b"")
        if len(shorter) == len(left):  # nothing, or no JSON
            return False
        left = shorter
    return True


def lines(file: IO[bytes], path: str | Path, limit: int = MAX_LINE) -> Iterator[bytes]:
    """The lines of an opened file, line ends included; UserError names a line longer than ``limit`` bytes."""
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise UserError(f"{path}:{number}: the line is longer than {limit} bytes; split it into several rows")
        yield line


def _wide(data: bytes) -> bool:
    """Whether a UTF-8 text has a character beyond the basic plane; only those begin with a byte above 0xEF."""
    return not data.isascii() and data.translate(None, bytes(range(0xF0))) != b""


def _no_duplicates(pairs: list[tuple[str, object]]) -> JsonObject:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"key {shown(name)} appears twice")
            seen.add(name)
    return result


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {shown(text)} is out of range")
    return value


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a whole number has {len(text)} digits, at most {MAX_DIGITS} are allowed")
    return int(text)


# One for all texts: making it takes as long as parsing a short row.
_STRICT = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_float, parse_int=_whole
)
