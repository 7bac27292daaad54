"""Resident memory of this process: how large it was, and giving back what is free."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path

_LARGE_PAGE = 2 << 20  # bytes
_MADV_HUGEPAGE = 14  # of Linux


def largest_resident() -> int:
    """Bytes of the largest resident set so far, since this program was started.

    Linux counts getrusage's maximum on over fork and exec: a process that a large one starts would begin with its
    parent's. The mark of the process's own memory, VmHWM, does not.
    """
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_freed() -> None:
    """Give what the C library holds of freed memory back to the system.

    glibc keeps up to 64 MB at the end of its heap after tensors of 32 MB or less have been freed (M_TRIM_THRESHOLD
    becomes twice the largest of them). Without effect in a C library that has no malloc_trim.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def ask_large_pages(address: int, size: int) -> None:
    """Ask Linux for large pages under the whole ones of ``size`` bytes from ``address`` on, before they are written.

    What is read once a step, such as weights and moments, has more small pages than a processor keeps addresses of, and
    in a virtual machine a missing one is looked up twice. Without effect elsewhere, and where the system has none free.
    """
    first, last = -(-address // _LARGE_PAGE) * _LARGE_PAGE, (address + size) // _LARGE_PAGE * _LARGE_PAGE
    advise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" and last > first else None
    if advise is not None:
        advise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_HUGEPAGE)
