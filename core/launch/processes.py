"""Processes that a launch starts: remembered, watched, and ended by their ids, so that none is ever left behind."""

from __future__ import annotations

import functools
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

import psutil

from telechat_twins.core.launch.worker import die_with_parent

INTERRUPTING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S = 0.05  # seconds between two looks at processes that are ending
TERM_GRACE_S = 1.5  # seconds between SIGTERM and SIGKILL


@contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal end a launch the way Ctrl-C does (signals exist in the main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, signal.default_int_handler) for number in INTERRUPTING]
    try:
        yield
    finally:
        for number, handler in zip(INTERRUPTING, before, strict=True):
            signal.signal(number, handler)


class ProcessTree:
    """The launcher and every process below it, remembered so that a parent's death does not hide its children."""

    def __init__(self, command: list[str], env: dict[str, str], output: BinaryIO) -> None:
        # msrun and torchrun hand their stdin on to the ranks, and nothing else: a pipe that ends when this process does
        # (core.launch.worker.die_with_launcher). Its other end is not inherited.
        theirs, self._line = os.pipe()
        try:
            # A session of its own: the terminal's Ctrl-C reaches only this process, which then ends the ranks in order.
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

    def __enter__(self) -> ProcessTree:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def look(self) -> None:
        """Remember children that have appeared since the last look."""
        for process in list(self.known.values()):
            with suppress(psutil.Error):
                self.known.update({child.pid: child for child in process.children(recursive=True)})

    def alive(self) -> list[psutil.Process]:
        self.look()
        return [p for p in self.known.values() if lives(p)]

    def end(self) -> None:
        """SIGTERM, a moment, SIGKILL, to each remaining process by its id; a further Ctrl-C cannot cut this short."""
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
        # For a rank that its launcher started in its last moment, and nobody has seen.
        os.close(self._line)
        self.launcher.wait()


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Deaths:
    """When each rank's process ended, to the millisecond; polling would mix up the first one and its victims."""

    def __init__(self) -> None:
        self._times: dict[int, float | None] = {}

    def watch(self, pid: int) -> None:
        if pid not in self._times:
            self._times[pid] = None
            threading.Thread(target=self._wait, args=(pid,), daemon=True).start()

    def when(self, pid: int) -> float | None:
        """Seconds since the epoch, or None while the process lives."""
        return self._times.get(pid)

    def _wait(self, pid: int) -> None:
        try:
            handle = os.pidfd_open(pid)
            try:
                select.select([handle], [], [])  # readable when the process has ended, even before its parent noticed
            finally:
                os.close(handle)
        except ProcessLookupError:
            pass
        except OSError:  # a container may forbid pidfd_open
            while psutil.pid_exists(pid) and lives(psutil.Process(pid)):
                time.sleep(POLL_S)
        self._times[pid] = time.time()
