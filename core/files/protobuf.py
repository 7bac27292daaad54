"""Reader of protobuf messages without the protobuf package, whose import breaks a later import of MindSpore."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

_VARINT, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5  # wire types


Bytes = TypeVar("Bytes", bytes, memoryview)


def fields(data: Bytes) -> Iterator[tuple[int, int | Bytes]]:
    """(field number, value) in the order of the bytes: a whole number, or bytes of a string, message or float.

    The bytes of a memoryview are memoryviews: nothing is copied. ValueError for bytes that are not a message.
    """
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        sizes = {_EIGHT: 8, _FOUR: 4}
        if kind == _BYTES:
            size, place = _varint(data, place)
        elif kind in sizes:
            size = sizes[kind]
        else:
            raise ValueError(f"wire type {kind} at byte {place}")
        if place + size > len(data):
            raise ValueError(f"field {number} ends beyond the message")
        yield number, data[place : place + size]
        place += size


def varints(data: bytes | memoryview) -> list[int]:
    """The whole numbers of a packed repeated field."""
    numbers, place = [], 0
    while place < len(data):
        number, place = _varint(data, place)
        numbers.append(number)
    return numbers


def _varint(data: bytes | memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(data) and shift < 70:  # ten bytes at most
        value |= (data[place] & 0x7F) << shift
        place, more = place + 1, data[place] & 0x80
        if not more:
            return value, place
        shift += 7
    raise ValueError("a number ends beyond the message, or is longer than ten bytes")
