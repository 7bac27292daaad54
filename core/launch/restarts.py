"""Restarts of a launch that has died (``tele train --restarts N``): count, back-off, and what is not worth a retry.

A launch that ended with code 0, by Ctrl-C (130), because of the user's mistake (2) or because training stopped itself
(3) is final. Everything else, a killed rank, a lost machine, a hang, a failure inside the framework, may be over at the
next try. On several nodes each launcher restarts by itself: all of them learn that the job has ended, with one code
(core.launch.nodes), wait the same time, and meet again at the same address.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.launch.worker import STOPPED

ATTEMPT = "TELE_ATTEMPT"  # in the environment of the ranks: restarts before this start
FINAL = (0, 2, STOPPED, 130)  # exit codes after which nothing is started again
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 300.0
BEGINNING = "the beginning, since there is no checkpoint"


@dataclass(frozen=True)
class Restarts:
    """Policy: at most ``count`` starts after the first, with a pause before each that doubles.

    ``progress``: the step of the latest checkpoint that the run can go on from, 0 while that is what it began with,
    ``origin``. A start that saved a later one sets the pause back, but not the count: a machine that dies every hour
    needs a person, not a loop.
    """

    count: int
    progress: Callable[[], int]
    first_pause_s: float = FIRST_PAUSE_S
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    sleep: Callable[[float], None] = time.sleep
    origin: str = BEGINNING

    def run(self, start: Callable[[int], int]) -> int:
        """``start(attempt)`` until it ends with a final code or ``count`` is used up; its last code.

        attempt: 0 for the first start. KeyboardInterrupt during a pause returns 130.
        """
        pause, reached = self.first_pause_s, self.progress()
        for attempt in range(self.count + 1):
            code = start(attempt)
            if code in FINAL:
                return code
            now = self.progress()
            if attempt == self.count:
                break
            if now > reached:
                pause, reached = self.first_pause_s, now
            where = f"the checkpoint of step {now}" if now else self.origin
            self.say(
                f"tele: restart {attempt + 1} of {self.count} in {pause:.0f} s, from {where} (the launch ended with "
                f"code {code})"
            )
            try:
                self.sleep(pause)
            except KeyboardInterrupt:
                return 130
            pause = min(2 * pause, LONGEST_PAUSE_S)
        if self.count:
            self.say(f"tele: {self.count} restarts are used up; the latest checkpoint is of step {now}")
        return code


def launch_with_restarts(
    start: Callable[[str | None], int],
    count: int,
    resume: str | None,
    logs: Path,
    latest_save: Callable[[], tuple[int, int]],
) -> int:
    """``start(resume)``, and after each death again, up to ``count`` times; the exit code for the user.

    resume: of the first start, None, "auto" or a folder. Later ones go on from the run's own latest checkpoint; from
    the folder as long as none has been saved since: what the run's folder held before may lie beyond the step that it
    was put back to. ``latest_save``: core.checkpoint.retention.latest_save of the run. ``logs``: this node's, of which
    each start keeps its own.
    """
    folder = None if resume in (None, "auto") else resume
    before = latest_save()

    def progress() -> int:
        now = latest_save()
        return 0 if folder is not None and now == before else now[0]

    def attempt_once(attempt: int) -> int:
        os.environ[ATTEMPT] = str(attempt)
        if attempt == 0:
            return start(resume)
        set_aside(logs, attempt - 1)
        return start(folder if folder is not None and not progress() else "auto")

    policy = Restarts(count, progress, FIRST_PAUSE_S, origin=BEGINNING if folder is None else folder)
    try:
        code = policy.run(attempt_once)
    finally:
        os.environ.pop(ATTEMPT, None)
    return 1 if code == STOPPED else code


def restarts_before() -> int:
    """Restarts of the launch before this process's start; 0 without --restarts."""
    text = os.environ.get(ATTEMPT, "0")
    return int(text) if text.isdecimal() and len(text) < 7 else 0


def set_aside(logs: Path, attempt: int) -> None:
    """Move what start number ``attempt`` (from 0) has left in its folder of logs to ``attempt-N`` in it, where the next
    start does not clear it."""
    kept = logs / f"attempt-{attempt}"
    kept.mkdir(parents=True, exist_ok=True)
    for path in logs.iterdir():
        if path.is_file() and not path.name.startswith("."):
            os.replace(path, kept / path.name)
