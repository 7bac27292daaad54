"""Cache folder of the compiled operators, and the check that its content can be trusted.

A library runs with the user's rights, so a library that another user could have created or changed is not loaded: the
cache, the folder of a build and the library must belong to this user, must not be symbolic links, and must not be
writable by others. A folder that fails is left alone and replaced by a private one; a note on stderr names both.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAME = "telechat-twins"
_STAND_INS = 10  # predictable names tried before a random one
_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_said: set[str] = set()


def cache_folder() -> Path:
    """The private cache folder: in the user's cache folder, or in the temporary folder if that is not writable.

    Raises OSError if neither is writable.
    """
    bases = [(base, NAME) for base in _homes()] + [(Path(tempfile.gettempdir()), f"{NAME}-{os.geteuid()}")]
    for base, name in bases:
        try:
            for missing in reversed([above for above in (base, *base.parents) if not above.exists()]):
                missing.mkdir(mode=0o700, exist_ok=True)  # parents=True would make those above by the umask
            return _own_folder(base.resolve(), name)
        except OSError:
            continue
    raise OSError(f"{', '.join(str(base) for base, _ in bases)}: not writable, or writable by other users")


def distrust(path: Path, folder: bool) -> str:
    """Why ``path`` must not be loaded, as a clause ("belongs to user 7"); empty if it may be, or does not exist."""
    try:
        found = _status(path)
    except FileNotFoundError:
        return ""
    if stat.S_ISLNK(found.st_mode):
        return "is a symbolic link"
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(found.st_mode):
        return f"is not a {'folder' if folder else 'plain file'}"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, not to user {os.geteuid()}"
    if found.st_mode & _OTHERS:
        return f"can be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    return ""


def make_private(folder: Path) -> None:
    """Create ``folder`` with mode 0700 if missing; an existing one that cannot be trusted is renamed first.

    Its parent is a result of ``cache_folder``. Raises OSError if the folder cannot be trusted even then.
    """
    if why := distrust(folder, folder=True):
        aside = folder.with_name(f"untrusted-{os.getpid()}-{folder.name}")
        say(f"{folder} {why}; it was renamed to {aside.name} and is built anew")
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(folder, aside)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if why := distrust(folder, folder=True):
        raise OSError(f"{folder} {why}")


def say(note: str) -> None:
    """Print a note on stderr, once per process."""
    if note not in _said:
        _said.add(note)
        print(f"note: compiled operators: {note}", file=sys.stderr, flush=True)


def _homes() -> Iterator[Path]:
    """The user's cache folder, if any; a relative XDG_CACHE_HOME is ignored, as the XDG specification requires."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        yield Path(given)
        return
    with contextlib.suppress(RuntimeError):  # neither HOME nor an entry in the user database
        yield Path.home() / ".cache"


def _own_folder(base: Path, name: str) -> Path:
    """``base``/``name``, or a private folder beside it in its place. Raises OSError if neither is possible."""
    if why := _open_to_others(base):
        say(f"{base} is not used: {why}")
        raise PermissionError(why)
    # Every process tries the same names in the same order, so that all use one folder and compile once.
    reason = ""
    for number in range(_STAND_INS):
        folder = base / (f"{name}-{number}" if number else name)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        if not (why := distrust(folder, folder=True)):
            break
        reason = reason or f"{folder} {why}, so nothing is loaded from it"
    else:
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=base))
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    if reason:
        say(f"{reason}; {folder} is used instead")
    return folder


def _open_to_others(folder: Path) -> str:
    """Why other users could replace a folder in ``folder`` (resolved), as a clause; empty if they cannot.

    Write permission on a folder allows renaming its entries, unless it is sticky (temporary folders). The user's
    private group may have it: on systems with such groups, homes are often group-writable.
    """
    # The owner of a folder can rename its entries. The owner of "/" is root, or represents root in a user namespace
    # where root is unmapped.
    trusted = {os.geteuid(), 0, _status(Path("/")).st_uid}
    for above in (folder, *folder.parents):
        found = _status(above)
        if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
            return f"all users can write {above} (mode {stat.S_IMODE(found.st_mode):o})"
        if found.st_mode & stat.S_IWGRP and not found.st_mode & stat.S_ISVTX and not _private_group(found.st_gid):
            return f"group {found.st_gid} can write {above} (mode {stat.S_IMODE(found.st_mode):o})"
        if found.st_uid not in trusted:
            return f"{above} belongs to user {found.st_uid}"
    return ""


def _private_group(gid: int) -> bool:
    """Whether a group is root's, or this user's private one: primary, of the user's name, without other members."""
    if gid == 0:
        return True
    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _status(path: Path) -> os.stat_result:
    return os.lstat(path)
