"""Writer of TensorBoard event files: scalars and texts, without dependencies.

Every ready-made writer imports protobuf, and MindSpore 2.9's own protobuf messages refuse to load in a process where
protobuf was imported first. Few kinds of message are all that these need, so they are encoded here. The format:
records of [length u64][masked CRC-32C of length][data][masked CRC-32C of data], each holding one Event (tensorflow's
event.proto and summary.proto).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from telechat_twins.core.train.metrics import Row
from telechat_twins.core.train.track.tags import points


class TensorBoard:
    """Appends one event a step to a new file in ``folder``.

    ``done``: the step a run resumes from. TensorBoard then forgets what an earlier, interrupted process wrote for the
    steps that are made again.
    """

    def __init__(self, folder: str | Path, done: int = 0) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**6}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "ab", buffering=0)  # noqa: SIM115 (lives as long as the run; see close)
        self._write(0, _text(3, "brain.Event:2"))
        if done:
            self._write(done + 1, _message(7, _integer(1, 1)))  # SessionLog with status START

    def step(self, row: Row) -> None:
        """One point per number of the row; what is missing or not finite is left out."""
        summary = b"".join(_message(1, _text(1, tag) + _float(2, value)) for tag, value in points(row).items())
        self._write(row["step"], _message(5, summary))

    def texts(self, step: int, found: Mapping[str, str]) -> None:
        """Texts by tag, for TensorBoard's page of texts."""
        values = [
            _message(1, _text(1, tag) + _message(8, _STRING + _text(8, text)) + _message(9, _TEXT_PAGE))
            for tag, text in found.items()
        ]
        self._write(step, _message(5, b"".join(values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, content: bytes) -> None:
        data = _double(1, time.time()) + _integer(2, step) + content
        length = struct.pack("<Q", len(data))
        # One write a record, so that a reader of a live run never sees half of one.
        self._file.write(length + _masked_crc(length) + data + _masked_crc(data))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


_STRING = _integer(1, 7)  # the data type of a tensor of strings; without a shape it is a single one
_TEXT_PAGE = _message(1, _text(1, "text"))  # metadata: the plugin that shows it


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)  # CRC-32C (Castagnoli), reflected
        table.append(byte)
    return table


_TABLE = _crc_table()


def _crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _masked_crc(data: bytes) -> bytes:
    """CRCs are stored rotated and offset, because a CRC of data that holds its own CRC is weak."""
    crc = _crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
