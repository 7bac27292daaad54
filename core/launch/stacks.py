"""Python stacks of the ranks, which each writes to its stack file on SIGUSR1 (core.launch.worker)."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from telechat_twins.core.launch.processes import lives
from telechat_twins.core.launch.worker import stack_path

STACK_DUMP_S = 2.0  # for all ranks to write their stacks
POLL_S = 0.05  # between two checks for them


def dump_stacks(folder: Path, ranks: Mapping[int, psutil.Process]) -> dict[int, str]:
    """The innermost frames of each rank's stack, by rank; for a rank that does not answer, the state of its process.

    faulthandler writes a stack from inside the signal handler, so a rank answers even while it is in native code.
    """
    for process in ranks.values():
        with suppress(psutil.Error):
            process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + STACK_DUMP_S
    paths = {rank: stack_path(folder, rank) for rank in ranks}
    while time.monotonic() < deadline and any(lives(ranks[rank]) and not read_bytes(paths[rank]) for rank in ranks):
        time.sleep(POLL_S)
    time.sleep(POLL_S)  # a stack is written line by line: let the last one be completed
    tops = {rank: innermost_frames(read_bytes(path).decode(errors="replace")) for rank, path in paths.items()}
    return {rank: top or f"no answer (process: {_state(ranks[rank])})" for rank, top in tops.items()}


def innermost_frames(stack: str, frames: int = 3) -> str:
    """The innermost frames of faulthandler's newest dump, e.g. ``ops.py:7 wait < model.py:30 forward``, or ""."""
    found = []
    for line in stack.rpartition("Current thread")[2].splitlines()[1:]:
        if not line.startswith('  File "') or "<frozen runpy>" in line:
            break
        file, _, rest = line.removeprefix('  File "').rpartition('", line ')
        number, _, name = rest.partition(" in ")
        found.append(f"{Path(file).name}:{number} {name}")
    return " < ".join(found[:frames])


def read_bytes(path: Path) -> bytes:
    """The contents of a file; empty when it does not exist."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _state(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.Error:
        return "gone"
