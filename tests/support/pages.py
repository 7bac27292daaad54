"""Pages of this process's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

needs_large_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a system without large pages"
)


def asked_for_large_pages(address: int) -> bool:
    """Whether the mapping that holds ``address`` is advised to have large pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            low, high = (int(side, 16) for side in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return "hg" in rest.split()
    return False
