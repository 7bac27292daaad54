"""Files and folders that appear complete or not at all.

A folder is written beside its final place under a hidden name, synced to disk, then renamed. Nothing under a hidden
name (leading dot) is ever read, so an interrupted write leaves no half-made result behind a readable name.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from core.errors import UserError

# Distinctive, because stale ones are cleaned up: folders of other programs must never match.
_BUILDING, _REPLACED = ".tmp-tele-", ".old-tele-"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# EEXIST: a file lies where the path has a folder.
_NO_ENTRY = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)

# A folder left by another machine cannot be asked whether its writer still lives; after a day it is not.
_FOREIGN_STALE_SECONDS = 24 * 3600


@contextmanager
def new_folder(path: Path, needed: Callable[[], int] | None = None) -> Iterator[Path]:
    """Yield an empty hidden folder beside ``path``; on a clean exit it becomes ``path``, else it is removed.

    An existing ``path`` is replaced only after the new one is complete on disk. ``needed`` is asked for the number of
    bytes the whole folder takes if the disk turns out to be full. Raises UserError, naming the path, for a full disk
    or a place that cannot be written.
    """
    path = Path(path).absolute()
    building = path.parent / f"{_BUILDING}{path.name}-{socket.gethostname()}-{os.getpid()}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_stale(path.parent)
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        yield building
        sync_tree(building)
        _swap(building, path)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        if message := _mended(error, path, needed):
            raise UserError(message) from None
        raise
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace the small file ``path`` in one atomic step, synced to disk; UserError if it cannot be written."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        if message := _mended(error, path, lambda: len(text)):
            raise UserError(message) from None
        raise


def writable_file(path: str | Path, option: str) -> None:
    """Before long work: UserError, naming ``option``, unless a file can be written at ``path``. Makes its folder."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}-{os.getpid()}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        in_the_way = isinstance(error, (FileExistsError, NotADirectoryError))
        reason = "a file lies where its folder should be" if in_the_way else error.strerror
        raise UserError(f"{option} {path}: cannot be written ({reason})") from None
    if path.is_dir():
        raise UserError(f"{option} {path}: is a folder; give a file")


def remove_folder(path: Path) -> None:
    """Delete a folder by hiding it first, so that a half-deleted one is never found under its name."""
    hidden = path.with_name(f"{_REPLACED}{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def standing(path: Path) -> Path:
    """``path``, or the version it was about to replace when a crash fell between the two renames of a replacement."""
    hidden = path.with_name(f"{_REPLACED}{path.name}")
    return hidden if not path.exists() and hidden.is_dir() else path


def clean_stale(parent: Path) -> None:
    """Remove what dead writers left in ``parent``; bring back a folder whose replacement never arrived."""
    for old in parent.glob(f"{_REPLACED}*"):
        kept = parent / old.name.removeprefix(_REPLACED)
        with suppress(OSError):
            shutil.rmtree(old) if kept.exists() else old.rename(kept)
    for building in parent.glob(f"{_BUILDING}*"):
        host, _, pid = building.name.removeprefix(_BUILDING).rpartition("-")
        if not pid.isdigit():
            continue
        with suppress(OSError):
            if host.endswith(f"-{socket.gethostname()}"):
                stale = not psutil.pid_exists(int(pid))
            else:
                stale = time.time() - building.stat().st_mtime > _FOREIGN_STALE_SECONDS
            if stale:
                shutil.rmtree(building)


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


def _swap(new: Path, path: Path) -> None:
    old = path.with_name(f"{_REPLACED}{path.name}")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _mended(error: OSError, path: Path, needed: Callable[[], int] | None) -> str | None:
    """The line for a mistake the user can mend, or None."""
    if error.errno in _NO_ENTRY:
        return f"{path}: cannot be written ({error.strerror}); choose another place or change its permissions"
    if error.errno not in _NO_SPACE:
        return None
    free = shutil.disk_usage(path.parent).free
    wants = f"it needs {show_bytes(needed())}, " if needed else ""
    reason = "a file-size limit was hit" if error.errno == errno.EFBIG else "the disk is full"
    return (
        f"{path}: {reason} while saving; {wants}{show_bytes(free)} are free; nothing was replaced; "
        "free some space or choose another place"
    )


def show_bytes(count: int) -> str:
    """``count`` bytes for people: 999 B, 1.5 kB, 453.1 GB."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if value < 1000 or unit == "PB":
            break
        value /= 1000
    return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
