"""Strict JSON parser for untrusted input: bounds depth, count and digits, and rejects what parsers disagree about.

Code that uses the result can rely on this: no number is infinite or has thousands of digits, no object has a key twice,
no string has an unpaired surrogate, and the tree is small enough to walk and to write out again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import NoReturn

from telechat_twins.core.files.foreign import JSON_STRING
from telechat_twins.core.types import JsonObject

MAX_DEPTH = 64  # of nested lists and objects; a tool's schema has about a dozen
MAX_PARTS = 20_000  # lists, objects and strings, keys included; a chat message has five
MAX_DIGITS = 32  # of a whole number; 2**64 has 20
MAX_FLOAT_DIGITS = 400  # after the decimal point; 5e-324 written out has 324

_BRACKET = re.compile(rb"[\[{\]}]")
_DIGITS = re.compile(rb"[0-9]{%d,}" % (MAX_DIGITS + 1))
_EXPONENT = re.compile(rb"[eE][+]?0*[1-9][0-9]{2}")  # 100 or more: perhaps beyond the largest float
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse(raw: bytes | bytearray, longest: int | None = None) -> object:
    """The value of UTF-8 JSON text. ValueError, with a short reason, when it is not JSON or exceeds a bound.

    ``longest``: the bound on a string, in characters.
    """
    # A Python function called for every number takes seconds for a long list; it is needed only if one may overflow.
    number = _number if _check_size(raw, longest) else None
    text = raw.decode("utf-8")
    try:
        found = json.loads(text, parse_constant=_constant, parse_float=number, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    # A surrogate can only come from an escape, since UTF-8 has none.
    if _ESCAPED_SURROGATE.search(text) and not all(map(_whole, _strings(found))):
        place, string = next((place, s) for place, s in _placed_strings(found) if not _whole(s))
        at = next(n for n, letter in enumerate(string) if "\ud800" <= letter <= "\udfff")
        raise HalfCharacter(place, f"has half of a surrogate pair (U+{ord(string[at]):04X} at character {at})")
    return found


class HalfCharacter(ValueError):
    """A string with an unpaired surrogate, which UTF-8 cannot encode; ``place``: its path, e.g. messages[0].content."""

    def __init__(self, place: str, fault: str) -> None:
        super().__init__(f"{place}: {fault}" if place else fault)
        self.place = place


class LongString(ValueError):
    """A string that is longer than the bound; ``least``: characters that it has at least."""

    def __init__(self, least: int) -> None:
        super().__init__(f"a string of {least} characters or more")
        self.least = least


def _check_size(raw: bytes | bytearray, longest: int | None) -> bool:
    """Check the bounds on the raw bytes, before anything is decoded or built. Returns whether some number may be out of
    range."""
    depth = parts = at = 0
    large = False
    while at < len(raw):
        quote = raw.find(b'"', at)
        quote = len(raw) if quote < 0 else quote
        opened = raw.count(b"[", at, quote) + raw.count(b"{", at, quote)
        parts += opened + (quote < len(raw))
        if parts > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} strings, lists and objects")
        _check_digits(raw, at, quote)
        large = large or _EXPONENT.search(raw, at, quote) is not None
        if opened or depth:
            for sign in _BRACKET.finditer(raw, at, quote):
                depth += 1 if sign[0] in b"[{" else -1
                if depth > MAX_DEPTH:
                    raise ValueError(f"nested too deeply: more than {MAX_DEPTH} levels of lists and objects")
        at, size = _string_at(raw, quote)
        # UTF-8 has up to 4 bytes a character, and escapes have 12 for one outside the 16-bit range.
        if longest is not None and size > 4 * longest:
            least = size // (12 if raw.find(b"\\", quote, at) >= 0 else 4)
            if least > longest:
                raise LongString(least)
    return large


def _check_digits(raw: bytes | bytearray, begin: int, end: int) -> None:
    """ValueError for a number with too many digits in a part outside of strings; a fraction may have more digits."""
    for run in _DIGITS.finditer(raw, begin, end):
        digits = run.end() - run.start()
        if digits > MAX_FLOAT_DIGITS or run.start() == 0 or raw[run.start() - 1] != ord("."):
            raise ValueError(f"a number has {digits} digits, at most {MAX_DIGITS} are allowed")


def _string_at(raw: bytes | bytearray, quote: int) -> tuple[int, int]:
    """The position after the string that begins at ``quote``, and its size in bytes."""
    end = raw.find(b'"', quote + 1)
    if end < 0:
        return len(raw), 0
    if raw[end - 1] != ord("\\"):
        return end + 1, end - quote - 1
    match = JSON_STRING.match(raw, quote)  # a string with escapes needs the slower regular expression
    assert match is not None
    return match.end(), match.end() - quote - 2


def _constant(name: str) -> NoReturn:
    raise ValueError(f"not valid JSON: {name} is not a JSON number")


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]}{'...' * (len(text) > 20)} is out of range")
    return value


def _object(pairs: list[tuple[str, object]]) -> JsonObject:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {ascii(twice[:60])} appears twice in one object")
    return made


def _whole(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _strings(found: object) -> Iterator[str]:
    return (string for _, string in _walk([("", found)], named=False))


def _placed_strings(found: object) -> Iterator[tuple[str, str]]:
    return _walk([("", found)], named=True)


def _walk(stack: list[tuple[str, object]], named: bool) -> Iterator[tuple[str, str]]:
    """Every string, keys included, with its place if ``named``."""
    while stack:
        place, value = stack.pop()
        if isinstance(value, str):
            yield place, value
        elif isinstance(value, list):
            stack += [(f"{place}[{n}]" if named else "", one) for n, one in enumerate(value)]
        elif isinstance(value, dict):
            for key, one in value.items():
                yield place, key
                stack.append((f"{place}.{key}".lstrip(".") if named else "", one))
