"""Real launches through msrun and torchrun: output, failures, hangs, Ctrl-C, and never a process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]

# One script for both launchers. It joins the cluster only where the case needs it: that costs seconds.
SCRIPT = """
import os, sys, time
rank = int(os.environ.get("RANK_ID") or os.environ["RANK"])
case = sys.argv[1]
if case == "good":
    print(f"rank {rank} of the good case, args {sys.argv[2:]}")
    print("[WARNING] ME(1:2,MainProcess):2026-01-01-00:00:00 [x.py:1] framework chatter")
    sys.stderr.write("bar 1\\rbar 2\\rbar 3\\n")
elif case == "raises":
    if rank == 1:
        raise RuntimeError("planted failure in rank 1")
    time.sleep(600)
elif case == "user_error":
    from core.errors import UserError
    if rank == 1:
        raise UserError("train.steps: planted mistake; write another number")
    time.sleep(600)
elif case == "killed":
    if rank == 1:
        print("rank 1 is about to vanish", flush=True)
        os.kill(os.getpid(), 9)
    time.sleep(600)
elif case == "saves":
    try:
        print("waiting", flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        time.sleep(2)
        print("saved", flush=True)
        raise SystemExit(130)
elif case == "wait":
    print("waiting", flush=True)
    time.sleep(600)
"""


class Launched:
    """`launch` run by another process, as `tele` runs it, with every process below it remembered."""

    def __init__(self, folder: Path, backend: str, case: str) -> None:
        script = folder / "script.py"
        script.write_text(SCRIPT)
        code = (
            "import sys; from core.launch import launch; "
            f"sys.exit(launch({backend!r}, [{case!r}, '--flag', 'a b'], 2, {str(folder / 'logs')!r}, timeout=120, "
            f"script={str(script)!r}))"
        )
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe)
        self.folder = folder
        self.known: dict[int, psutil.Process] = {}

    def look(self) -> None:
        for parent in [psutil.Process(self.process.pid), *self.known.values()]:
            try:
                self.known.update({p.pid: p for p in parent.children(recursive=True)})
            except psutil.Error:
                continue

    def wait_for_output(self, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        logs = [self.folder / "logs" / f"worker_{rank}.log" for rank in (0, 1)]
        while time.monotonic() < deadline:
            self.look()
            if all(log.exists() and text in log.read_text() for log in logs):
                return
            time.sleep(0.1)
        raise AssertionError(f"the ranks did not write {text!r}")

    def finish(self) -> tuple[int, bytes, str]:
        while self.process.poll() is None and len(self.known) < 3:
            self.look()
            time.sleep(0.05)
        out, err = self.process.communicate(timeout=90)
        time.sleep(0.2)
        return self.process.returncode, out, err.decode()

    def left_over(self) -> list[str]:
        named = [p for p in psutil.process_iter() if str(self.folder) in " ".join(_words(p))]
        remembered = [p for p in self.known.values() if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        return [str(p) for p in {*named, *remembered}]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="module", params=["pt", "ms"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("torch" if request.param == "pt" else "mindspore")
    return request.param


def test_good_run_streams_rank_zero_only(backend: str, tmp_path: Path) -> None:
    run = Launched(tmp_path, backend, "good")
    code, out, err = run.finish()
    assert code == 0, err
    assert b"rank 0 of the good case, args ['--flag', 'a b']" in out
    assert b"bar 1\rbar 2\rbar 3\n" in out, "a progress bar's carriage returns must pass"
    assert b"rank 1" not in out and b"framework chatter" not in out
    assert "rank 1 of the good case" in (tmp_path / "logs" / "worker_1.log").read_text()
    assert run.left_over() == []


def test_failing_rank_is_shown_first_while_another_hangs(backend: str, tmp_path: Path) -> None:
    run = Launched(tmp_path, backend, "raises")
    started = time.monotonic()
    code, out, err = run.finish()
    assert code == 1
    assert err.startswith("rank 1 failed:\nTraceback (most recent call last):"), err
    assert "planted failure in rank 1" in err and "worker.py" not in err
    stack = (tmp_path / "logs" / "stack_0.txt").read_text()
    assert "script.py" in stack, "a rank that was ended says where it was"
    assert run.left_over() == []
    assert time.monotonic() - started < 40, "rank 0 sleeps for minutes; the failure must end it"


def test_user_error_in_a_rank_is_one_line_and_code_2(backend: str, tmp_path: Path) -> None:
    run = Launched(tmp_path, backend, "user_error")
    code, out, err = run.finish()
    assert (code, err) == (2, "tele: train.steps: planted mistake; write another number\n")
    assert run.left_over() == []


def test_killed_rank_is_named(backend: str, tmp_path: Path) -> None:
    run = Launched(tmp_path, backend, "killed")
    code, out, err = run.finish()
    assert code == 1
    assert "rank 1 is about to vanish" in err and "rank 1 was killed or crashed" in err
    assert run.left_over() == []


@pytest.mark.parametrize(("number", "case"), [(signal.SIGINT, "saves"), (signal.SIGTERM, "wait")])
def test_interrupt_ends_everything(backend: str, number: int, case: str, tmp_path: Path) -> None:
    run = Launched(tmp_path, backend, case)
    run.wait_for_output("waiting")
    os.kill(run.process.pid, number)
    code, out, err = run.finish()
    assert code == 130, err
    assert "Traceback" not in err
    if case == "saves":
        assert b"saved" in out, "an interrupted rank may finish what it is doing"
    assert run.left_over() == []


def test_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    run = Launched(tmp_path, "pt", "saves")
    run.wait_for_output("waiting")
    for _ in range(2):
        os.kill(run.process.pid, signal.SIGINT)
        time.sleep(0.5)
    code, out, err = run.finish()
    assert code == 130 and "ending all processes now" in err
    assert b"saved" not in out
    assert run.left_over() == []


def test_launcher_killed_outright_leaves_no_orphans(backend: str, tmp_path: Path) -> None:
    run = Launched(tmp_path, backend, "wait")
    run.wait_for_output("waiting")
    run.process.kill()
    run.process.communicate()
    deadline = time.monotonic() + 10
    while run.left_over() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert run.left_over() == []
