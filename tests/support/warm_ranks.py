"""Ranks that stay: launches of several ranks, done one after another by the processes of one launch.

    warm_ranks.py BACKEND FOLDER      one rank; started by core.launch.launcher

To start two ranks that do nothing takes 10 (MindSpore) or 6 (PyTorch) seconds of processor time, for the imports of
each, of the launcher and of msrun's scheduler; the steps of a test's tiny model take one or two. Tests whose subject is
what the ranks compute may therefore share them (tests.support.launching). The groups between ranks stand
until the end; all else begins anew with each script. What launches, failures and ends are like is tested with
processes of their own, in tests/multiproc/test_launch_real.py and beside it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from telechat_twins.core.backends import load
from telechat_twins.core.launch import worker
from telechat_twins.core.launch.launcher import launch
from telechat_twins.core.launch.world import launched_world

ROOT = Path(__file__).resolve().parents[2]
POLL_S = 0.02
MOST = 8  # ranks that a pool keeps; each holds about half a gigabyte
STARTED_S = 120.0  # for the first script of some ranks, beside what it takes itself


@dataclass
class WarmRanks:
    """``world`` ranks of ``backend``, started with the first script that is asked of them."""

    backend: str
    world: int
    folder: Path
    asked: int = 0
    process: subprocess.Popen[bytes] | None = None

    def run(self, script: str, args: Sequence[str], logs: Path, limit_s: float) -> tuple[int, dict[str, Any]]:
        """Exit code and outcome of ``script``, those of the first rank that failed; logs and statuses are in ``logs``.

        After a failure the ranks, of which some may wait for others, are ended; the next script has new ones. Raises
        AssertionError where they end by themselves or need more than ``limit_s`` seconds.
        """
        if self.process is None:
            self._start()
        for rank in range(self.world):
            worker.status_path(logs, rank).unlink(missing_ok=True)
        job = {"script": script, "args": list(args), "logs": str(logs), "cwd": os.getcwd()}
        _write(self.folder / f"{self.asked}.json", job)
        self.asked += 1
        found = self._outcomes(logs, limit_s + STARTED_S)
        failed = [status for status in found if status["code"]]
        if not failed:
            return 0, {}
        self.end()
        first = min(failed, key=lambda status: status["time"])
        return first["code"], {"message": first["error"], "trace": first["traceback"]}

    def end(self, kill: bool = True) -> None:
        """Let the ranks leave, or kill them."""
        if self.process is None:
            return
        if kill:
            self.process.kill()  # and with it its ranks, which hold a pipe of it
        else:
            _write(self.folder / f"{self.asked}.json", {})
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.process.kill()
        self.process.wait()
        self.process = None

    def _start(self) -> None:
        self.asked = 0
        while self.folder.exists():
            self.folder = self.folder.with_name(f"{self.folder.name}-again")
        self.folder.mkdir(parents=True)
        command = [sys.executable, "-m", "tests.support.warm_ranks", self.backend, str(self.folder), str(self.world)]
        with open(self.folder / "launch.log", "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def _outcomes(self, logs: Path, limit_s: float) -> list[dict[str, Any]]:
        """The statuses of all ranks, or of those that ended before one failed."""
        deadline = time.monotonic() + limit_s
        while True:
            found = [s for rank in range(self.world) if (s := worker.read_status(logs, rank)) and s["code"] is not None]
            if len(found) == self.world or any(status["code"] for status in found):
                return found
            assert self.process is not None
            ended = self.process.poll() is not None
            if ended or time.monotonic() > deadline:
                self.end()
                said = (self.folder / "launch.log").read_text()
                raise AssertionError(f"{'the ranks ended' if ended else 'not done in time'}; {self.folder}: {said}")
            time.sleep(POLL_S)


@dataclass
class Pool:
    """Warm ranks by backend and number, until the block ends; those not used for longest make room for others."""

    folder: Path
    ranks: dict[tuple[str, int], WarmRanks] = field(default_factory=dict)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for ranks in self.ranks.values():
            ranks.end(kill=False)

    def of(self, backend: str, world: int) -> WarmRanks:
        key = backend, world
        found = self.ranks.pop(key, None) or WarmRanks(backend, world, self.folder / f"{backend}-{world}")
        for other in list(self.ranks.values()):
            if world + sum(kept.world for kept in self.ranks.values() if kept.process is not None) > MOST:
                other.end(kill=False)
        self.ranks[key] = found  # in the order of use
        return found


def _write(path: Path, value: dict[str, Any]) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(value), encoding="utf-8")
    os.replace(beside, path)


def _jobs(folder: Path) -> Iterator[dict[str, Any]]:
    for number in itertools.count():
        path = folder / f"{number}.json"
        while not path.exists():
            time.sleep(POLL_S)
        if not (job := json.loads(path.read_text(encoding="utf-8"))):
            return
        yield job


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Standard output and error, also of native code, in the file of the launch that is carried out."""
    kept = [os.dup(number) for number in (1, 2)]
    worker._redirect(str(path))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, handle in zip((1, 2), kept, strict=True):
            os.dup2(handle, number)
            os.close(handle)


def serve(backend: str, folder: Path) -> int:
    """One rank: every script that is asked for."""
    mesh = load(backend, "mesh")
    leave: Callable[[], None] = mesh.leave
    mesh.leave = lambda: None  # type: ignore[attr-defined]  # the groups serve the next script
    rank, own = launched_world()[0], sys.argv
    for job in _jobs(folder):
        logs = Path(job["logs"])
        os.chdir(job["cwd"])
        sys.argv = [job["script"], *job["args"]]
        with _output_to(logs / f"worker_{rank}.log"):
            worker.write_status(logs, rank, None)
            code, outcome = worker._run(job["script"])
        worker.write_status(logs, rank, code, **outcome)
        gc.collect()
    sys.argv = own
    leave()
    return 0


def _launch(backend: str, folder: str, world: str) -> int:
    worker.die_with_parent()
    return launch(backend, [backend, folder], int(world), Path(folder) / "logs", script=__file__)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        raise SystemExit(_launch(*sys.argv[1:]))
    raise SystemExit(serve(sys.argv[1], Path(sys.argv[2])))
