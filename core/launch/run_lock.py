"""One writer at a time: a lock on a folder for as long as a run or a command writes into it.

The lock is flock(2) on a small file, which the system gives up with the process that holds it, however that one ends.
The file holds a line that says who has it, for the one who is turned away:

    {"host": "node1", "pid": 4711, "mark": "4711.190331", "since": 1764374523.2, "command": "tele train ..."}

A launcher locks its folder of logs, so several machines with a folder each do not meet; rank 0 of a run locks the run's
folder, by whatever means it was started; a command locks its --out. A file system without locks (NFS mounted with
nolock, some cluster file systems) is said to be one, and what is left of the protection there is the line.
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
RELEASE_WAIT_S = 5.0  # seconds that a process which was killed may take to be gone; its lock is waited for that long

_NO_LOCKS = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL, errno.EBADF)
_MAX_NOTE_BYTES = 4096


@contextmanager
def hold_folder(folder: str | Path, what: str = "", name: str = NAME, patience: float = 0.0) -> Iterator[None]:
    """Keep every other holder out of ``folder``, which is made if need be, until the block ends.

    ``what``: what a message calls the folder, e.g. "--out runs/first" (default: its path). UserError when another has
    it for ``patience`` seconds more, naming its host, its process and since when. OSError when the folder or the file
    cannot be made.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = _acquire(folder / name, what or str(folder), time.monotonic() + patience)
    with _released(folder / name, lock):
        yield


@contextmanager
def hold_place(path: str | Path, what: str = "") -> Iterator[None]:
    """hold_folder for a folder that is made beside its place and then put there: the lock lies beside it, too.

    First of all what a killed command left there is put in order (core.files.atomic.clean_stale). UserError also where
    the place cannot be written.
    """
    what = what or str(path)
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(path.with_name(f".lock-tele-{path.name}"), what, 0.0)
    except OSError as error:
        raise UserError(f"{what}: cannot be written ({error.strerror}); choose another place") from None
    with _released(path.with_name(f".lock-tele-{path.name}"), lock):
        clean_stale(path.parent)
        yield


def require_free(folder: str | Path, what: str = "", name: str = NAME, patience: float = 0.0) -> None:
    """UserError as of hold_folder when another holds ``folder`` now; it need not exist."""
    if (Path(folder) / name).exists():
        with hold_folder(folder, what, name, patience):
            pass


@contextmanager
def _released(path: Path, handle: int) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(OSError):
            # Only ours: the folder may have been removed and made anew meanwhile.
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
            _say(f"note: {what}: this file system has no locks ({error.strerror}); let nothing else write there")
        try:
            if not os.path.samestat(os.stat(path), os.fstat(handle)):
                raise FileNotFoundError  # its holder removed the file between our two calls
        except FileNotFoundError:
            os.close(handle)
            continue
        left = _read(handle)
        if left and left["host"] == socket.gethostname() and not locks and mark_lives(left["mark"]):
            os.close(handle)
            raise UserError(_refusal(what, left))
        if left and left["host"] != socket.gethostname():
            # Killed there, or alive and locking for its own machine only (local_lock of NFS): it cannot be told.
            _say(f"note: {what}: {_who(left)} left its mark; if it still runs, end it: two must not write here")
        note = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "mark": process_mark(),
            "since": time.time(),
            "command": shlex.join(sys.argv)[:1000],
        }
        with suppress(OSError):  # a full disk costs the name, not the lock
            os.ftruncate(handle, 0)
            os.pwrite(handle, (json.dumps(note) + "\n").encode(), 0)
        return handle


def _read(handle: int) -> JsonObject | None:
    """The line in the file, or None where there is none (yet)."""
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
    who = "another process" if note is None else _who(note)
    return f"{what}: {who} writes there; wait for it, end it, or give another folder"


def _who(note: JsonObject) -> str:
    try:
        since = datetime.fromtimestamp(note["since"]).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        since = "an unknown time"
    return f"process {note['pid']} on host {note['host']} (since {since})"


def _say(text: str) -> None:
    print(f"tele: {text}", file=sys.stderr)
