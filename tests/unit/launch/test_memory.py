"""Resident memory of a process: its largest, and what is given back."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

from telechat_twins.core.launch.memory import ask_large_pages, largest_resident, return_freed
from tests.support.pages import asked_for_large_pages, needs_large_pages


def test_a_process_does_not_begin_with_its_parents_memory() -> None:
    held = bytearray(300 << 20)
    held[::4096] = b"\1" * len(held[::4096])
    program = "from telechat_twins.core.launch.memory import largest_resident; print(largest_resident())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 200 << 20 < 300 << 20 <= largest_resident()


def test_what_small_arrays_took_is_given_back() -> None:
    """Of 1 MB each, which glibc keeps; in a process of its own, whose heap has nothing else."""
    code = """
import os
from telechat_twins.core.launch.memory import return_freed
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
big = bytearray(30 << 20); del big  # from now on such arrays lie in the heap
arrays = [bytearray(1 << 20) for _ in range(40)]; del arrays
held = resident()
return_freed()
print(held - resident())
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if getattr(ctypes.CDLL(None), "malloc_trim", None) is None:
        return_freed()  # of no effect, and no error
    else:
        assert int(child.stdout) > 20 << 20


@needs_large_pages
def test_large_pages_are_asked_for_under_whole_ones_alone() -> None:
    page, room = 2 << 20, mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    first = -(-start // page) * page
    ask_large_pages(first + 1, 2 * page - 2)
    assert not any(asked_for_large_pages(first + n * page) for n in range(6))
    ask_large_pages(first + page - 5, 2 * page + 10)
    assert [asked_for_large_pages(first + n * page) for n in range(6)] == [False, True, True, False, False, False]
