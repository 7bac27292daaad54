"""The tools of the kill campaign: finding processes, ending them, waiting for moments, naming leftovers."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

from telechat_twins.core.launch.worker import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
HOW = {"-9": signal.SIGKILL, "-15": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
GONE = 20.0  # seconds that processes have to be gone after the one that they belong to
LATE = 1.0  # seconds in which one that was being started may still show itself


class Trial(NamedTuple):
    """One kill and the promises that were found broken after it, each as ``word: what was found``."""

    kind: str
    moment: str
    who: str
    how: str
    faults: list[str]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """`tele` with these words, in a process group of its own."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "telechat_twins.core.cli", *words],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )


def finish(words: list[str], log: Path, seconds: float = 600) -> int:
    """`tele` run to its end; its code."""
    process = start(words, log)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return -1


def family(process: subprocess.Popen[bytes]) -> dict[str, list[psutil.Process]]:
    """The processes of a launch, by what they are: launcher (`tele`), middle (msrun, torchrun), rank, scheduler."""
    found: dict[str, list[psutil.Process]] = {}
    with suppress(psutil.Error):
        found["launcher"] = [psutil.Process(process.pid)]
        for child in found["launcher"][0].children(recursive=True):
            with suppress(psutil.Error):
                words = " ".join(child.cmdline())
                middle = "torch.distributed.run" in words or "mindspore.parallel.cluster.run" in words
                role = child.environ().get("MS_ROLE")
                name = "middle" if middle else "scheduler" if role == "MS_SCHED" else "rank"
                found.setdefault(name, []).append(child)
    return found


def kill(processes: Iterable[psutil.Process], how: str) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.send_signal(HOW[how])


def living(marks: Iterable[str], known: Iterable[psutil.Process] = ()) -> list[psutil.Process]:
    """Processes with one of ``marks`` on their command line, and those known that live still; never this one."""
    found = {p for p in known if _lives(p)}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = " ".join(process.cmdline())
            if process.pid != os.getpid() and any(mark in words for mark in marks) and _lives(process):
                found.add(process)
    return list(found)


def orphans(mark: str, known: Iterable[psutil.Process]) -> list[str]:
    """What still lives of a launch that should be gone, after GONE seconds and once more after LATE; ended then."""
    known = list(known)
    deadline = time.monotonic() + GONE
    while (left := living([mark], known)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if not left:
        time.sleep(LATE)
        left = living([mark], known)
    told = [f"orphan: {_words(process)}" for process in left]
    kill(left, "-9")
    return told


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 300) -> bool:
    """Look at ``condition`` without pause until it holds; False when the process ends, or the time does, before.

    A file that the process replaces or removes between two looks of one condition does not hold yet.
    """

    def holds() -> bool:
        try:
            return condition()
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + seconds
    while not holds():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.0005)
    return True


def shows(folder: Path, prefix: str) -> bool:
    """Whether a name with ``prefix`` is in ``folder`` now."""
    try:
        return any(name.startswith(prefix) for name in os.listdir(folder))
    except OSError:
        return False


def leftovers(folder: Path, allowed: Iterable[str] = ()) -> list[str]:
    """Names in ``folder`` that no finished work leaves: hidden ones and parts of files."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    left = [n for n in names if any(p.startswith(".") for p in n.split("/")) or n.endswith((".part", ".new"))]
    return [f"leftover: {name}" for name in left if name not in set(allowed)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _words(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    except psutil.Error:
        return str(process.pid)
