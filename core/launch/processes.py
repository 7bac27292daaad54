"""Process tree of a launch: every process it starts is recorded, watched and ended by its id, so that none is left."""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import psutil

from telechat_twins.core.launch.signals import INTERRUPTING
from telechat_twins.core.launch.worker import die_with_parent

POLL_S = 0.05  # between two checks of processes that are ending
SEARCH_S = 0.5  # between two searches for new processes while all goes well
TERM_GRACE_S = 1.5  # between SIGTERM and SIGKILL


class ProcessTree:
    """msrun or torchrun and every process below it, recorded while their parents live: children whose parent has died
    can no longer be found through it."""

    def __init__(self, command: list[str], env: dict[str, str], output: BinaryIO) -> None:
        # msrun and torchrun pass their stdin on to the ranks. Here it is a pipe whose other end only this process has,
        # so it closes when this process ends, however that happens (core.launch.worker.die_with_launcher).
        theirs, self._line = os.pipe()
        try:
            # In a session of its own: the terminal's Ctrl-C then reaches only this process, which ends the ranks in
            # order.
            self.launcher = subprocess.Popen(
                command,
                env=env,
                stdin=theirs,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
            )
        except BaseException:
            os.close(self._line)
            raise
        finally:
            os.close(theirs)
        self.known = {self.launcher.pid: psutil.Process(self.launcher.pid)}
        self._searched = 0.0

    def __enter__(self) -> ProcessTree:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def look(self) -> None:
        """Record the child processes that have appeared, SEARCH_S after the last search or later."""
        if time.monotonic() - self._searched >= SEARCH_S:
            self._search()

    def _search(self) -> None:
        """Record the child processes that have appeared.

        To find the children of one process, the table of all processes of the machine is read (4 ms with 165 of them),
        so those found below another are not asked. While the launcher lives, which comes first, it alone is.
        """
        self._searched = time.monotonic()
        below: set[int] = set()
        for process in list(self.known.values()):
            if process.pid in below:
                continue
            with suppress(psutil.Error):
                found = {child.pid: child for child in process.children(recursive=True)}
                self.known.update(found)
                below.update(found)

    def alive(self) -> list[psutil.Process]:
        self._search()
        return [p for p in self.known.values() if lives(p)]

    def end(self) -> None:
        """Send SIGTERM, and SIGKILL after TERM_GRACE_S, to each process left, by its id. Further Ctrl-C is ignored."""
        if threading.current_thread() is threading.main_thread():
            for number in INTERRUPTING:
                signal.signal(number, signal.SIG_IGN)
        for ask in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
            remaining = self.alive()
            if not remaining:
                break
            for process in remaining:
                with suppress(psutil.Error):
                    ask(process)
            deadline = time.monotonic() + TERM_GRACE_S
            while time.monotonic() < deadline and any(lives(p) for p in remaining):
                self.launcher.poll()
                time.sleep(POLL_S)
        # Closing the pipe also ends a rank that was started too late for ``look`` to find it.
        os.close(self._line)
        self.launcher.wait()


def lives(process: psutil.Process) -> bool:
    """Whether a process still runs; one that has ended and is not collected does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class OwnTime:
    """Seconds that processes have had since the first look, for limits on what they still have to do.

    On a crowded machine a process that ends takes many times as long as on an idle one. Time in which one of them wants
    to run counts only as far as it ran; time in which all of them sleep counts in full, as theirs may be a sleep for
    ever.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._used: dict[int, float] = {}
        self._looked: float | None = None

    def look(self, processes: Iterable[psutil.Process]) -> float:
        """The seconds up to now; of the processes that had least, where they differ."""
        now, used, eager = time.monotonic(), dict[int, float](), []
        for process in processes:
            with suppress(psutil.Error):
                times = process.cpu_times()
                used[process.pid] = times.user + times.system
                if process.pid in self._used and wants_processor(process.pid):
                    eager.append(used[process.pid] - self._used[process.pid])
        if self._looked is not None:
            self.seconds += min([now - self._looked, *eager])
        self._used, self._looked = used, now
        return self.seconds


def wants_processor(pid: int) -> bool:
    """Whether a thread of a process runs or waits for its turn to run."""
    for stat in Path("/proc", str(pid), "task").glob("*/stat"):
        with suppress(OSError):
            # The name, in parentheses, may hold anything.
            if stat.read_bytes().rpartition(b")")[2].split()[:1] == [b"R"]:
                return True
    return False


class Deaths:
    """Times at which the ranks' processes ended, to the millisecond. Polling would be too coarse to tell the first
    process that died from those that failed because of it."""

    def __init__(self) -> None:
        self._times: dict[int, float | None] = {}

    def watch(self, pid: int) -> None:
        if pid not in self._times:
            self._times[pid] = None
            threading.Thread(target=self._wait, args=(pid,), daemon=True).start()

    def when(self, pid: int) -> float | None:
        """Time of death in seconds since the epoch; None while the process lives."""
        return self._times.get(pid)

    def _wait(self, pid: int) -> None:
        try:
            handle = os.pidfd_open(pid)
            try:
                select.select([handle], [], [])  # becomes readable when the process ends, before its parent reaps it
            finally:
                os.close(handle)
        except ProcessLookupError:
            pass
        except OSError:  # a container may forbid pidfd_open
            while psutil.pid_exists(pid) and lives(psutil.Process(pid)):
                time.sleep(POLL_S)
        self._times[pid] = time.time()
