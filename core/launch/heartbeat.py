"""What each rank is waiting for, in a few bytes that another process can read while this one hangs.

A rank in a collective that never ends cannot answer a question. So before it enters one it writes the operation, the
group and its member ranks into a small file that it has mapped into memory; the launcher reads that file without the
rank's help. One writer, no lock: the record carries its sequence number twice, written before and after the rest, and
a reader that finds them different has met a write half way and looks again.

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

MAX_RANKS_LISTED = 64  # members written down; the count is exact however many there are
_OP, _GROUP = 32, 64  # bytes of the two names

# sequence number, inside (1) or outside (0) a collective, start time; then op, group, count and ranks; then the
# sequence number again. Little endian without padding: writer and reader are one machine, but maybe two Pythons.
_HEAD = struct.Struct("<QId")
_BODY = struct.Struct(f"<{_OP}s{_GROUP}sI{MAX_RANKS_LISTED}I")
_TAIL = struct.Struct("<Q")
_TAIL_AT = _HEAD.size + _BODY.size
RECORD_BYTES = _TAIL_AT + _TAIL.size


class HeartbeatRecord(NamedTuple):
    """One reading. ``inside``: the collective has not ended; otherwise ``op`` is the last one that did, "" if none."""

    sequence: int
    inside: bool
    since: float  # seconds since the epoch, when ``op`` was entered
    op: str
    group: str
    ranks: tuple[int, ...]  # the first MAX_RANKS_LISTED members
    size: int  # how many members there are


class Heartbeat:
    """The writing side: one of these a process, on a file of its own."""

    def __init__(self, path: str | Path) -> None:
        """Create the file at ``path`` (its folder must exist), with no collective in it. OSError if that fails."""
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

    def enter(self, op: str, group: str, ranks: Sequence[int]) -> None:
        """This rank is about to wait for ``ranks``. A collective made of others is one: the outermost is recorded."""
        self._depth += 1
        if self._depth > 1:
            return
        known = self._bodies.get((op, group))
        # A group's tuple is the same object in every call, so that its bytes are made once.
        body = known[1] if known is not None and known[0] is ranks else self._body(op, group, ranks)
        self._sequence += 1
        self._started = time.time()
        # The tail differs from the head until the last write: that is what a reader in between sees.
        _HEAD.pack_into(self._map, 0, self._sequence, 1, self._started)
        self._map[_HEAD.size : _TAIL_AT] = body
        _TAIL.pack_into(self._map, _TAIL_AT, self._sequence)

    def leave(self) -> None:
        """The collective that was entered has ended; RuntimeError when none was."""
        if self._depth == 0:
            raise RuntimeError("leave() without enter()")
        self._depth -= 1
        if self._depth:
            return
        self._sequence += 1
        _HEAD.pack_into(self._map, 0, self._sequence, 0, self._started)
        _TAIL.pack_into(self._map, _TAIL_AT, self._sequence)

    def _body(self, op: str, group: str, ranks: Sequence[int]) -> bytes:
        members = [int(rank) for rank in ranks[:MAX_RANKS_LISTED]]
        padded = members + [0] * (MAX_RANKS_LISTED - len(members))
        body = _BODY.pack(_name(op, _OP), _name(group, _GROUP), len(ranks), *padded)
        if isinstance(ranks, (tuple, range)):  # a list may be changed under us
            self._bodies[op, group] = (ranks, body)
        return body


def read_heartbeat(path: str | Path) -> HeartbeatRecord | None:
    """The record at ``path``, or None: there is no such file, or each of a few looks met a write half way."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        for _ in range(5):
            # Against the order of writing (head, body, tail): equal numbers then enclose one write.
            tail = os.pread(handle, _TAIL.size, _TAIL_AT)
            body = os.pread(handle, _BODY.size, _HEAD.size)
            head = os.pread(handle, _HEAD.size, 0)
            if len(tail) == _TAIL.size and _TAIL.unpack(tail)[0] == _HEAD.unpack(head)[0]:
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
    return Path(log_dir) / f"heartbeat_{rank}.bin"


class Waits:
    """The reading side: how long each of some ranks has been in its present collective.

    Counted on the watcher's own monotonic clock from the first look that met the record, so that neither a clock that
    was set nor a half-written start time can make a wait look long.
    """

    def __init__(self, log_dir: str | Path, ranks: Sequence[int]) -> None:
        self._paths = {rank: heartbeat_path(log_dir, rank) for rank in ranks}
        self._seen: dict[int, tuple[HeartbeatRecord, float]] = {}
        self._looked = time.monotonic()

    def look(self, running: Iterable[int]) -> tuple[int, float]:
        """Read all ranks; (the one of ``running`` that has waited longest, its seconds), (-1, 0.0) when none waits."""
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
        """What one rank waits for, e.g. ``all_reduce over tp (ranks 0 1)``."""
        return _what(self._seen[rank][0])

    def table(self, stacks: Mapping[int, str]) -> list[str]:
        """Who waits where, a line a rank below a heading, as of the last look. ``stacks``: where each rank is in its
        Python code, as far as that is known."""
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
    """Say where this process's heartbeat belongs (None: nowhere). Called once, by what starts the rank."""
    global _path, _opened
    _path, _opened = (None if path is None else Path(path)), None


def open_heartbeat() -> Heartbeat | None:
    """The heartbeat of this process, the same object each time; None when no launcher of ours looks after it."""
    global _opened
    if _opened is None and _path is not None:
        # A file system that cannot map files costs the report on a hang, not the run.
        with contextlib.suppress(OSError, ValueError):
            _opened = Heartbeat(_path)
    return _opened


def _name(text: str, size: int) -> bytes:
    """``text`` in at most ``size`` bytes, whole characters only."""
    return text.encode("utf-8")[:size].decode("utf-8", errors="ignore").encode("utf-8")


def _text(name: bytes) -> str:
    return name.rstrip(b"\0").decode("utf-8", errors="replace")
