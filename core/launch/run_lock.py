"""Lock on an output folder, held for as long as a run or a command writes into it: one writer at a time.

The lock is flock(2) on a small file, which the kernel releases when the holder's process ends, however it ends. The
file holds one line that describes the holder, for the message to a second writer:

    {"host": "node1", "pid": 4711, "mark": "4711.190331", "since": 1764374523.2, "command": "tele train ..."}

A launcher locks its log folder (nodes of one job have different ones), rank 0 of a run locks the run's folder however
it was started, and a command locks its --out. On a file system without locks (NFS mounted with nolock, some cluster
file systems) a note says so, and the line in the file is the only protection left.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import clean_stale, mark_lives, process_mark
from telechat_twins.core.types import JsonObject

NAME = ".lock"
RELEASE_WAIT_S = 5.0  # a killed process may take this long to be gone and release its lock

_NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EBADF)
_MAX_NOTE_BYTES = 4096


@contextmanager
def hold_folder(folder: str | Path, what: str = "", name: str = NAME, patience: float = 0.0) -> Iterator[None]:
    """Hold the lock on ``folder``, which is created if it does not exist, until the block ends.

    ``what``: the folder's name in messages, e.g. "--out runs/first" (default: its path). UserError, naming the holder's
    host, process and start, when another holds the lock for ``patience`` seconds more. OSError when the folder or the
    file cannot be created.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _acquire(folder / name, what or str(folder), time.monotonic() + patience)
    with _released(folder / name, lock):
        yield


@contextmanager
def hold_place(path: str | Path, what: str = "") -> Iterator[None]:
    """Hold the lock on the folder to be created at ``path``. The folder is built beside ``path`` and renamed
    (core.files.atomic), so the lock file lies beside it, too.

    First removes what killed commands left there (core.files.atomic.clean_stale). UserError as hold_folder, and where
    ``path`` cannot be written.
    """
    what = what or str(path)
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path.with_name(f".lock-tele-{path.name}"), what, 0.0)
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({error.strerror}); choose another path") from None
    with _released(path.with_name(f".lock-tele-{path.name}"), lock):
        clean_stale(path.parent)
        yield


def require_free(folder: str | Path, what: str = "", name: str = NAME, patience: float = 0.0) -> None:
    """Raise hold_folder's UserError when another process holds ``folder``, which need not exist."""
    if (Path(folder) / name).exists():
        with hold_folder(folder, what, name, patience):
            pass


@contextmanager
def _released(path: Path, handle: int) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):
            # Only the file that we locked: the folder may have been removed and created anew meanwhile.
            if os.path.samestat(os.stat(path), os.fstat(handle)):
                path.unlink()
        os.close(handle)


def _acquire(path: Path, what: str, deadline: float) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = True
        except BlockingIOError:
            note = _read(handle)
            os.close(handle)
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            raise UserError(_refusal(what, note)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            locks = False
            _note(f"note: {what}: this file system has no locks ({error.strerror}); let nothing else write there")
        try:
            if not os.path.samestat(os.stat(path), os.fstat(handle)):
                raise FileNotFoundError  # the holder removed the file between open and flock: start again
        except FileNotFoundError:
            os.close(handle)
            continue
        left = _read(handle)
        if left and left["host"] == socket.gethostname() and not locks and mark_lives(left["mark"]):
            os.close(handle)
            raise UserError(_refusal(what, left))
        if left and left["host"] != socket.gethostname():
            # Either it was killed on that machine, or it is alive and NFS's local_lock hides its lock from this one.
            # The two cannot be told apart from here.
            _note(
                f"note: {what}: {_holder(left)} has left its lock file; if that process still runs, end it: "
                "only one may write here"
            )
        note = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "mark": process_mark(),
            "since": time.time(),
            "command": shlex.join(sys.argv)[:1000],
        }
        with suppress(OSError):  # on a full disk the line is missing; the lock holds all the same
            os.ftruncate(handle, 0)
            os.pwrite(handle, (json.dumps(note) + "\n").encode(), 0)
        return handle


def _read(handle: int) -> JsonObject | None:
    """The line in the file; None when there is none, or not yet."""
    try:
        note = json.loads(os.pread(handle, _MAX_NOTE_BYTES, 0))
        return {
            "host": str(note["host"])[:200],
            "pid": int(note["pid"]),
            "mark": str(note["mark"]),
            "since": float(note["since"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refusal(what: str, note: JsonObject | None) -> str:
    holder = "another process" if note is None else _holder(note)
    return f"{what}: {holder} writes there; wait for it, end it, or give another folder"


def _holder(note: JsonObject) -> str:
    try:
        since = datetime.fromtimestamp(note["since"]).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        since = "an unknown time"
    return f"process {note['pid']} on host {note['host']} (since {since})"


def _note(text: str) -> None:
    print(f"tele: {text}", file=sys.stderr)
