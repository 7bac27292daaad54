"""Exception for errors that the user can fix."""

import errno
import re

from telechat_twins.core.shown import message_line


class UserError(Exception):
    """An error in the user's input: one line with the field or file, what must hold, what was found and what to do.

    The command line prints it to stderr and exits with code 2. Any other exception is a bug of this program (exit 1).
    Whatever the message quotes from untrusted files, it is one printable line of bounded length, and it names paths
    inside the working folder from there (core.shown).
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(message_line(message))


_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file-size limit"}


def disk_full(error: BaseException) -> str | None:
    """Message for an error of writing to a disk without room, None for any other. A library in Rust (safetensors) says
    the system's number in its text only."""
    said = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    number = error.errno if isinstance(error, OSError) else int(said[1]) if said else None
    if number not in _FULL:
        return None
    path = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else "output"
    reason = f"{_FULL[number]} was exceeded" if number == errno.EFBIG else _FULL[number]
    return f"{path}: cannot be written ({reason}); free some space or choose another path"


def tells_of_full_disk(message: str) -> bool:
    """Whether an error's message, perhaps of another process, says that there is no room to write."""
    return any(reason in message for reason in _FULL.values())
