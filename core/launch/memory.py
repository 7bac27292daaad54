"""Largest resident memory of this process."""

from __future__ import annotations

import re
import resource
from contextlib import suppress
from pathlib import Path


def largest_resident() -> int:
    """Bytes of the largest resident set so far, since this program was started.

    Linux counts getrusage's maximum on over fork and exec: a process that a large one starts would begin with its
    parent's. The mark of the process's own memory, VmHWM, does not.
    """
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
