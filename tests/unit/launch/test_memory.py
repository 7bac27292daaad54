"""Memory of a process that a larger one starts."""

from __future__ import annotations

import subprocess
import sys

from telechat_twins.core.launch.memory import largest_resident


def test_a_process_does_not_begin_with_its_parents_memory() -> None:
    held = bytearray(300 << 20)
    held[::4096] = b"\1" * len(held[::4096])
    program = "from telechat_twins.core.launch.memory import largest_resident; print(largest_resident())"
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 200 << 20 < 300 << 20 <= largest_resident()
