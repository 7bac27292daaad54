"""Atomic creation of files and folders: they appear complete or not at all.

A folder is written beside its final place under a hidden name, synced to disk, and then renamed. Hidden names are not
read, so an interrupted write never leaves an incomplete result under its final name. Their prefix tells what may be
done with them:

    .tmp-tele-NAME-HOST-PID.START   being written by that process; deleted when the process is gone
    .gone-tele-X                    being deleted; any later command continues the deletion
    .old-tele-NAME                  replaced, on a file system that cannot exchange two names. A kill may have left the
                                    only version there, so it is read and restored where NAME is missing
"""

from __future__ import annotations

import ctypes
import errno
import glob
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from telechat_twins.core.errors import UserError

# Distinctive, since stale ones are deleted: folders of other programs must never match.
_BUILDING, _REPLACED, _GONE = ".tmp-tele-", ".old-tele-", ".gone-tele-"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# EEXIST: the path has a file where it needs a folder. EISDIR: it is a folder, and a file is written.
_NO_ENTRY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG)

# Whether a writer on another machine still lives cannot be found out here; after a day it is taken to be gone.
_FOREIGN_STALE_SECONDS = 24 * 3600
_PID = re.compile("[0-9]{1,9}")

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


@contextmanager
def new_folder(path: Path, needed: Callable[[], int] | None = None) -> Iterator[Path]:
    """Yield an empty hidden folder beside ``path``. On a clean exit it becomes ``path``, else it is removed.

    An existing ``path`` is replaced only after the new one is complete on disk. ``needed`` returns the bytes of the
    whole folder; it is called when the disk is full. Raises UserError, naming the path, for a full disk or a path that
    cannot be written.
    """
    path = Path(path)
    building = None
    try:
        building = start_building(path)
        yield building
        publish(building, path)
    except OSError as error:
        if building:
            shutil.rmtree(building, ignore_errors=True)
        if message := _mended(error, path, needed):
            raise UserError(message) from None
        raise
    except BaseException:
        if building:
            shutil.rmtree(building, ignore_errors=True)
        raise


def start_building(path: Path) -> Path:
    """An empty hidden folder beside ``path`` (beside the target of a link), to be published or removed by the caller.

    Creates the folders above it and removes what dead writers left there. OSError if one cannot be created.
    """
    path = _placed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean_stale(path.parent)
    building = _hidden(path)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    return building


def publish(building: Path, path: Path) -> None:
    """Sync a folder from ``start_building`` and rename it to ``path``; a former ``path`` is replaced and removed.

    At every moment, ``standing(path)`` is a complete folder, the former or the new one.
    """
    path = _placed(path)
    sync_tree(building)
    if not os.path.lexists(path):
        building.rename(path)
    elif _exchange(building, path):
        _remove_all([_take_away(building)])
    else:
        _replace_in_two_steps(building, path)
    sync(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a hidden path beside ``path`` for a new file. On a clean exit it is synced and becomes ``path``, else it is
    removed, as are files left by killed writers of the same path. OSErrors propagate; one that names no file, as of a
    write, then names ``path``."""
    beside = _hidden(path)
    for left in path.parent.glob(f"{_BUILDING}{glob.escape(path.name)}-*"):
        with suppress(OSError):
            if left != beside and _is_stale(left):
                left.unlink()
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(beside)):
            error.filename = str(path)
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a small text file atomically, synced to disk; UserError if it cannot be written."""
    try:
        with new_file(path) as beside:
            beside.write_text(text, encoding="utf-8")
    except OSError as error:
        if message := _mended(error, path, lambda: len(text)):
            raise UserError(message) from None
        raise


def writable_file(path: str | Path, option: str) -> None:
    """Check, before long work, that ``path`` can be written, and create its folder. UserError names ``option``."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = _hidden(path)
        probe.touch()
        probe.unlink()
    except OSError as error:
        in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "there is a file in place of its folder" if in_the_way else error.strerror
        raise UserError(f"{option} {path}: cannot be written ({reason}); give another path") from None
    if path.is_dir():
        raise UserError(f"{option} {path}: must be a file, found a folder; give the name of a file")


def remove_folder(path: Path) -> None:
    """Delete a folder, hidden first, so that a half-deleted one is never found under its name, nor restored."""
    shutil.rmtree(_take_away(path))


def standing(path: Path) -> Path:
    """``path``, or, after a crash between the two renames of a replacement, the hidden former version of it."""
    hidden = path.with_name(f"{_REPLACED}{path.name}") if path.name else path
    return hidden if not path.exists() and _is_whole(hidden) else path


def clean_stale(parent: Path) -> None:
    """Remove what dead writers left in ``parent``; restore a folder whose replacement was never completed."""
    doomed = []
    for entry in sorted(parent.iterdir()):
        with suppress(OSError):
            if entry.name.startswith(_GONE):
                doomed.append(entry)
            elif entry.name.startswith(_REPLACED):
                kept = parent / entry.name.removeprefix(_REPLACED)
                if os.path.lexists(kept) or not _is_whole(entry):
                    doomed.append(_take_away(entry))
                else:
                    entry.rename(kept)
            elif entry.name.startswith(_BUILDING) and _is_stale(entry):
                doomed.append(_take_away(entry))
    _remove_all(doomed)


def process_mark(pid: int | None = None) -> str:
    """Identity ``PID.START`` of a living process (default: this one). START, its start in clock ticks since boot, tells
    it from a later process with the same id, and does not depend on a clock that may be set."""
    pid = os.getpid() if pid is None else pid
    return f"{pid}.{_start(pid)}"


def mark_lives(mark: str) -> bool:
    """Whether the process of a ``process_mark`` of this machine lives; for a bare number, any process with that id."""
    import psutil  # here, since a tenth of a second of its own is much for those who write a file

    number, _, start = mark.partition(".")
    # Marks are also read from file names, so the number may be anything.
    return (
        bool(_PID.fullmatch(number)) and psutil.pid_exists(int(number)) and (not start or start == _start(int(number)))
    )


def sync(path: Path) -> None:
    """Force a file's bytes or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Force every file and folder under ``folder`` to disk, and the folder itself last."""
    for entry in folder.iterdir():
        sync_tree(entry) if entry.is_dir() else sync(entry)
    sync(folder)


def _placed(path: Path) -> Path:
    """The path at which a folder is written: the target of a link, so that the link is kept and its disk is used."""
    return path.resolve() if path.is_symlink() else path.absolute()


def _hidden(path: Path) -> Path:
    return path.with_name(f"{_BUILDING}{path.name}-{socket.gethostname()}-{process_mark()}")


def _start(pid: int) -> str:
    """Start of a process in clock ticks since boot; "" if it is gone or there is no /proc."""
    try:
        # The command's name, in parentheses, may contain anything; the start is the 20th field after it.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_stale(building: Path) -> bool:
    """Whether the writer of a hidden file or folder is gone."""
    place, _, mark = building.name.removeprefix(_BUILDING).rpartition("-")
    if not _PID.fullmatch(mark.partition(".")[0]):
        return False
    if place.endswith(f"-{socket.gethostname()}"):
        return not mark_lives(mark)
    return time.time() - building.stat().st_mtime > _FOREIGN_STALE_SECONDS


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names atomically; False, with nothing changed, where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return call(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0


def _replace_in_two_steps(new: Path, path: Path) -> None:
    old = path.with_name(f"{_REPLACED}{path.name}")
    if os.path.lexists(old):
        _remove_all([_take_away(old)])
    for last in (False, False, True):
        path.rename(old)
        try:
            new.rename(path)
            break
        except OSError as error:
            # Between the two renames a process that cleans up here may have assumed a crash and restored the old one.
            if last or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                if not os.path.lexists(path):
                    old.rename(path)
                raise
    _remove_all([_take_away(old)])


def _take_away(path: Path) -> Path:
    """Rename to a name that marks it for deletion, and return that."""
    gone = path.with_name(f"{_GONE}{uuid.uuid4().hex}")
    path.rename(gone)
    return gone


def _remove_all(paths: list[Path]) -> None:
    """Delete hidden files and folders. What cannot be deleted stays hidden, and the next writer tries again."""
    for path in paths:
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _is_whole(folder: Path) -> bool:
    """Whether a replaced folder has all files that its own manifest lists. Earlier versions of this program used the
    same prefix for folders that they were deleting."""
    described = [folder / name for name in ("manifest.json", "meta.json") if (folder / name).is_file()]
    if not described:
        return folder.is_dir() and not folder.name.startswith(f"{_REPLACED}step-")
    try:
        files = json.loads(described[0].read_text(encoding="utf-8"))["files"]
        return all((folder / n).stat().st_size == f.get("size", f.get("bytes")) for n, f in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _mended(error: OSError, path: Path, needed: Callable[[], int] | None) -> str | None:
    """Message for an error that the user can fix; None for any other."""
    if error.errno in _NO_ENTRY:
        return f"{path}: cannot be written ({error.strerror}); choose another path or change its permissions"
    if error.errno not in _NO_SPACE:
        return None
    free = shutil.disk_usage(path.parent).free
    wants = f"it needs {show_bytes(needed())}, " if needed else ""
    reason = "a file-size limit was exceeded" if error.errno == errno.EFBIG else "the disk is full"
    return (
        f"{path}: {reason} while saving; {wants}{show_bytes(free)} are free; nothing was replaced; "
        "free some space or choose another path"
    )


def show_bytes(count: int) -> str:
    """A number of bytes as text for users: 999 B, 1.5 kB, 453.1 GB."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 1000 or unit == "PB":
            break
        value /= 1000
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
