"""Heartbeat file of a rank: the collective it is waiting in, readable by the launcher while the rank hangs.

A rank inside a collective that never ends cannot answer a question. Before it enters one, it therefore writes the
operation, the group and the member ranks into a small memory-mapped file, which the launcher reads without the rank's
help. There is one writer and no lock (a seqlock): the record carries its sequence number twice, written before and
after the rest. A reader that finds the two different has caught a write half way and reads again.

    heartbeat = open_heartbeat()            # None when the process was not started by `tele`
    heartbeat.enter("all_reduce", "tp", group.ranks)
    try: ...                                # the call that may wait for other ranks
    finally: heartbeat.leave()
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

MAX_RANKS_LISTED = 64  # members that are listed; their count is exact even when there are more
_OP, _GROUP = 32, 64  # bytes of the two names

# Sequence number, inside (1) or outside (0) a collective, start time; then op, group, count and ranks; then the
# sequence number again. Little endian without padding: both sides run on one machine, but may be two Python builds.
_HEAD = struct.Struct("<QId")
_BODY = struct.Struct(f"<{_OP}s{_GROUP}sI{MAX_RANKS_LISTED}I")
_TAIL = struct.Struct("<Q")
_TAIL_AT = _HEAD.size + _BODY.size
RECORD_BYTES = _TAIL_AT + _TAIL.size


class HeartbeatRecord(NamedTuple):
    """One reading of a heartbeat file.

    ``inside``: the rank is in the collective ``op``. Otherwise ``op`` is the last one it left, "" before the first.
    """

    sequence: int
    inside: bool
    since: float  # seconds since the epoch, when ``op`` was entered
    op: str
    group: str
    ranks: tuple[int, ...]  # the first MAX_RANKS_LISTED members
    size: int  # number of members


class Heartbeat:
    """Writer of a heartbeat file; a process has one, with a file of its own."""

    def __init__(self, path: str | Path) -> None:
        """Create the file at ``path``, whose folder must exist. OSError if that fails."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.ftruncate(handle, RECORD_BYTES)
            self._map = mmap.mmap(handle, RECORD_BYTES)
        finally:
            os.close(handle)
        self.path = Path(path)
        self._sequence = 0
        self._depth = 0
        self._started = 0.0
        self._bodies: dict[tuple[str, str], tuple[Sequence[int], bytes]] = {}
        self._entered = 0.0
        self.waited_s = 0.0  # inside collectives so far, on the monotonic clock

    def enter(self, op: str, group: str, ranks: Sequence[int]) -> None:
        """Record that this rank enters ``op`` and waits for ``ranks``. Of nested collectives the outermost counts."""
        self._depth += 1
        if self._depth > 1:
            return
        known = self._bodies.get((op, group))
        # A group passes the same tuple in every call, so its bytes are encoded once.
        body = known[1] if known is not None and known[0] is ranks else self._body(op, group, ranks)
        self._sequence += 1
        self._started = time.time()
        self._entered = time.perf_counter()
        # Head first, tail last: between the two writes a reader sees different sequence numbers and reads again.
        _HEAD.pack_into(self._map, 0, self._sequence, 1, self._started)
        self._map[_HEAD.size : _TAIL_AT] = body
        _TAIL.pack_into(self._map, _TAIL_AT, self._sequence)

    def leave(self) -> None:
        """Record that the collective has ended. RuntimeError without a matching ``enter``."""
        if self._depth == 0:
            raise RuntimeError("leave() without enter()")
        self._depth -= 1
        if self._depth:
            return
        self.waited_s += time.perf_counter() - self._entered
        self._sequence += 1
        _HEAD.pack_into(self._map, 0, self._sequence, 0, self._started)
        _TAIL.pack_into(self._map, _TAIL_AT, self._sequence)

    def _body(self, op: str, group: str, ranks: Sequence[int]) -> bytes:
        members = [int(rank) for rank in ranks[:MAX_RANKS_LISTED]]
        padded = members + [0] * (MAX_RANKS_LISTED - len(members))
        body = _BODY.pack(_name(op, _OP), _name(group, _GROUP), len(ranks), *padded)
        if isinstance(ranks, (tuple, range)):  # a list may change between calls
            self._bodies[op, group] = (ranks, body)
        return body


def read_heartbeat(path: str | Path) -> HeartbeatRecord | None:
    """The record at ``path``; None when the file does not exist or every one of five reads caught a write half way."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        for _ in range(5):
            # In the reverse of the order of writing (head, body, tail): with equal numbers the body belongs to them.
            tail = os.pread(handle, _TAIL.size, _TAIL_AT)
            body = os.pread(handle, _BODY.size, _HEAD.size)
            head = os.pread(handle, _HEAD.size, 0)
            # The head is written field by field, its number first: read after the rest of it, the number is that of the
            # newest write whose fields the head may hold.
            first = os.pread(handle, _TAIL.size, 0)
            if len(tail) == _TAIL.size and tail == first == head[: _TAIL.size]:
                return _record(head, body)
        return None
    except OSError:
        return None
    finally:
        os.close(handle)


def _record(head: bytes, body: bytes) -> HeartbeatRecord:
    sequence, inside, since = _HEAD.unpack(head)
    op, group, size, *ranks = _BODY.unpack(body)
    members = tuple(ranks[: min(size, MAX_RANKS_LISTED)])
    return HeartbeatRecord(sequence, bool(inside), since, _text(op), _text(group), members, size)


def heartbeat_path(log_dir: str | Path, rank: int) -> Path:
    """File of a rank's HeartbeatRecord."""
    return Path(log_dir) / f"heartbeat_{rank}.bin"


class Waits:
    """Reader of the heartbeats of several ranks: how long each has been inside its present collective.

    A wait is counted on the reader's own monotonic clock, from the first reading of its record. So a system clock that
    is set meanwhile cannot make a wait look long.
    """

    def __init__(self, log_dir: str | Path, ranks: Sequence[int]) -> None:
        self._paths = {rank: heartbeat_path(log_dir, rank) for rank in ranks}
        self._seen: dict[int, tuple[HeartbeatRecord, float]] = {}
        self._looked = time.monotonic()

    def look(self, running: Iterable[int]) -> tuple[int, float]:
        """Read all ranks. The rank of ``running`` that has waited longest, and its seconds; (-1, 0.0) if none."""
        self._looked = now = time.monotonic()
        for rank, path in self._paths.items():
            record = read_heartbeat(path)
            if record is not None and (rank not in self._seen or self._seen[rank][0].sequence != record.sequence):
                self._seen[rank] = (record, now)
        seen = {rank: self._seen[rank] for rank in running if rank in self._seen}
        waits = [(now - since, rank) for rank, (record, since) in seen.items() if record.inside]
        longest, rank = max(waits, key=lambda wait: (wait[0], -wait[1]), default=(0.0, -1))
        return rank, longest

    def describe(self, rank: int) -> str:
        """The collective of one rank, e.g. ``all_reduce over tp (ranks 0 1)``."""
        return _what(self._seen[rank][0])

    def table(self, stacks: Mapping[int, str]) -> list[str]:
        """Table of the ranks' waits at the last reading: a heading, then a line a rank.

        ``stacks``: the innermost frames of each rank's Python stack, where known.
        """
        now = self._looked
        rows = [("rank", "seconds", "waits in", "at")]
        for rank in self._paths:
            record, since = self._seen.get(rank, (None, now))
            if record is None or not record.op:
                what = "(has entered no collective yet)"
            elif record.inside:
                what = _what(record)
            else:
                what = f"not in a collective (last: {_what(record)})"
            inside = record is not None and record.inside
            rows.append((str(rank), f"{now - since:.1f}" if inside else "-", what, stacks.get(rank, "unknown")))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return [f"{a:>{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}" for a, b, c, d in rows]


def _what(record: HeartbeatRecord) -> str:
    more = " ..." if record.size > len(record.ranks) else ""
    members = f"{'rank' if record.size == 1 else 'ranks'} {' '.join(map(str, record.ranks))}{more}"
    return f"{record.op} over {record.group} ({members})"


_path: Path | None = None
_opened: Heartbeat | None = None


def place_heartbeat(path: str | Path | None) -> None:
    """Set the path of this process's heartbeat (None: it has none). Called once, before the script runs."""
    global _path, _opened
    _path, _opened = (None if path is None else Path(path)), None


def open_heartbeat() -> Heartbeat | None:
    """The heartbeat of this process, one object for all calls; None when the process was not started by `tele`."""
    global _opened
    if _opened is None and _path is not None:
        # On a file system that cannot map files, only the report on a hang is lost; the run goes on.
        with contextlib.suppress(OSError, ValueError):
            _opened = Heartbeat(_path)
    return _opened


def _name(text: str, size: int) -> bytes:
    """``text`` in at most ``size`` bytes, whole characters only."""
    return text.encode("utf-8")[:size].decode("utf-8", errors="ignore").encode("utf-8")


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode("utf-8", errors="replace")
