"""loss.png of a run that goes on: drawn by a process of its own, at low priority and growing intervals.

python -m telechat_twins.core.train.watch.refresh RUN '{"9001": "16 x 32768 tokens"}'
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from telechat_twins.core.files import IMPORT_ROOT
from telechat_twins.core.launch.worker import die_with_parent
from telechat_twins.core.train.metrics import plot_losses, read_metrics

FIRST_S, SHARE = 30.0, 60  # the first picture, and the pause after one in multiples of the time that it took
LEAVE_S = 5.0


class PlotRefresher:
    """Starts a drawing process now and then. ``look`` is called after each step, and costs two readings of a clock."""

    def __init__(self, out: Path, marks: Mapping[int, str]) -> None:
        self._out, self._marks = out, marks
        self._process: subprocess.Popen[bytes] | None = None
        self._began = time.monotonic()
        self._next = self._began + FIRST_S

    def look(self) -> None:
        """Start a drawing if one is due."""
        now = time.monotonic()
        if now < self._next:
            return
        if self._process is not None:
            if self._process.poll() is None:
                self._next = now + 1.0
                return
            self._process = None
            self._next = now + max(FIRST_S, SHARE * (now - self._began))
            return
        self._began, self._next = now, now + 1.0
        command = [sys.executable, "-m", "telechat_twins.core.train.watch.refresh"]
        command += [str(self._out), json.dumps(dict(self._marks)), str(os.getpid())]
        path = os.pathsep.join(filter(None, (str(IMPORT_ROOT), os.environ.get("PYTHONPATH"))))
        # Variables of the launcher, by which the process would take itself for a rank, do not matter to a drawing.
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        with contextlib.suppress(OSError):  # no memory for a process: the picture then comes at the end
            null = subprocess.DEVNULL
            self._process = subprocess.Popen(command, env=env, stdin=null, stdout=null, stderr=null)

    def close(self) -> None:
        """Wait for a drawing that is under way, briefly, then end it."""
        if self._process is None:
            return
        try:
            self._process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(argv: Sequence[str]) -> int:
    """Draw once; the arguments are the run's folder, the marks as JSON and the process id of the run."""
    die_with_parent(int(argv[2]))
    os.nice(19)
    out = Path(argv[0])
    if rows := read_metrics(out):
        marks = {int(step): text for step, text in json.loads(argv[1]).items()}
        plot_losses({out.name: rows}, out / "loss.png", f"Training: {out.name}", marks)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
