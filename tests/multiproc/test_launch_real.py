"""Real launches through msrun and torchrun: output, failures, hangs, Ctrl-C, and never a process left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from telechat_twins.core.launch.worker import relayed_path

ROOT = Path(__file__).resolve().parents[2]

# One script for both launchers. It joins the cluster only where the case needs it: that costs seconds.
SCRIPT = """
import os, pathlib, sys, time
rank = int(os.environ.get("RANK_ID") or os.environ["RANK"])
case = sys.argv[1]
if case == "good":
    print(f"rank {rank} of the good case, args {sys.argv[2:]}")
    print("[WARNING] ME(1:2,MainProcess):2026-01-01-00:00:00 [x.py:1] framework chatter")
    sys.stderr.write("bar 1\\rbar 2\\rbar 3\\n")
elif case == "raises":
    here = pathlib.Path(__file__).parent
    (here / f"there_{rank}").touch()
    if rank == 1:
        while len(list(here.glob("there_*"))) < 4:
            time.sleep(0.05)
        raise RuntimeError("planted failure in rank 1")
    time.sleep(600)
elif case == "user_error":
    from telechat_twins.core.errors import UserError
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
        time.sleep(2 - 0.6 * rank)  # the last one leaves long after the launchers have seen the first one's exit code
        print("saved", flush=True)
        raise SystemExit(130)
elif case == "leaves":  # with more to do than the launcher's patience, beside others that want the processor
    import atexit, subprocess
    def tidy():
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        end = time.process_time() + 1.5
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
        while time.process_time() < end:
            pass
        [other.kill() for other in others]
        if sys.argv[3] == "hangs":
            time.sleep(600)
    atexit.register(tidy)
elif case == "deaf":
    import signal
    print("waiting", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(600)
elif case == "hangs":
    import signal
    from telechat_twins.core.launch.heartbeat import open_heartbeat
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # training takes SIGTERM for itself, to save first
    heartbeat = open_heartbeat()
    for step in range(3):
        heartbeat.enter("all_gather", "dp", (0, 2))
        heartbeat.leave()
    def all_reduce():
        heartbeat.enter("all_reduce", "tp", (0, 1, 2))
        time.sleep(600)
    def read_data():
        print("waiting", flush=True)
        time.sleep(600)
    if rank == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    read_data() if rank == 1 else all_reduce()
elif case == "meets":
    import mindspore, numpy
    from mindspore.communication import init
    init()
    total = mindspore.ops.AllReduce()(mindspore.Tensor(numpy.array([rank + 1.0], numpy.float32)))
    print("sum", total.asnumpy(), flush=True)
elif case == "wait":
    print("waiting", flush=True)
    time.sleep(600)
"""


class Launched:
    """`launch` run by another process, as `tele` runs it, with every process below it remembered.

    ``before``: code that this process runs first, with ``core.launch.launcher`` imported as ``launching``.
    """

    def __init__(
        self,
        folder: Path,
        backend: str,
        case: str,
        nproc: int = 2,
        text: str = SCRIPT,
        before: str = "",
        **arguments: Any,
    ) -> None:
        script = folder / "script.py"
        script.write_text(text)
        arguments = {"timeout": 120, "script": str(script), **arguments}
        positional = (backend, [case, "--flag", "a b"], nproc, str(folder / "logs"))
        code = f"import sys\nimport telechat_twins.core.launch.launcher as launching\n{before}\n"
        code += f"sys.exit(launching.launch(*{positional!r}, **{arguments!r}))"
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=pipe, stderr=pipe)
        self.folder, self.nproc = folder, nproc
        self.node = arguments.get("node_rank", 0)
        self.logs = folder / (f"logs-node{self.node}" if self.node else "logs")
        self.known: dict[int, psutil.Process] = {}

    def look(self) -> None:
        for parent in [psutil.Process(self.process.pid), *self.known.values()]:
            try:
                self.known.update({p.pid: p for p in parent.children(recursive=True)})
            except psutil.Error:
                continue

    def wait_for_output(self, text: str, seconds: float = 60, ranks: Sequence[int] | None = None) -> None:
        deadline = time.monotonic() + seconds
        ranks = ranks or range(self.node * self.nproc, (self.node + 1) * self.nproc)
        logs = [self.logs / f"worker_{rank}.log" for rank in ranks]
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
    log = (tmp_path / "logs" / "worker_1.log").read_text()
    assert "rank 1 of the good case" in log
    # MindSpore's retries are explained where they are: at the head of each log, and nowhere else.
    assert (backend == "ms") == ("are no fault" in log.splitlines()[0]) and b"are no fault" not in out
    assert run.left_over() == []


def test_failing_rank_is_shown_first_while_others_hang(backend: str, tmp_path: Path) -> None:
    run = Launched(tmp_path, backend, "raises", nproc=4)
    started = time.monotonic()
    code, out, err = run.finish()
    assert code == 1
    assert err.startswith("rank 1 failed:\nTraceback (most recent call last):"), err
    assert "planted failure in rank 1" in err and "worker.py" not in err
    for rank in (0, 2, 3):
        stack = (tmp_path / "logs" / f"stack_{rank}.txt").read_text()
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


@pytest.mark.parametrize("nproc", [1, 2])
def test_ranks_do_not_wait_for_a_scheduler_that_is_dead(nproc: int, tmp_path: Path) -> None:
    """A single rank joins through it as well."""
    pytest.importorskip("mindspore")
    run = Launched(tmp_path, "ms", "wait", nproc=nproc)
    run.wait_for_output("waiting")
    status = tmp_path / "logs" / "status_scheduler.json"
    while not status.exists():
        time.sleep(0.05)
    os.kill(json.loads(status.read_text())["pid"], signal.SIGKILL)
    code, out, err = run.finish()
    assert code == 1 and "msrun's scheduler, through which the ranks meet, has failed" in err, err
    assert run.left_over() == []


@pytest.mark.parametrize(("number", "case"), [(signal.SIGINT, "saves"), (signal.SIGTERM, "wait")])
def test_interrupt_ends_everything(backend: str, number: int, case: str, tmp_path: Path) -> None:
    run = Launched(tmp_path, backend, case, nproc=3)
    run.wait_for_output("waiting")
    os.kill(run.process.pid, number)
    code, out, err = run.finish()
    assert code == 130, err
    assert "Traceback" not in err
    assert relayed_path(tmp_path / "logs").read_text() == signal.Signals(number).name
    if case == "saves":
        assert b"saved" in out, "an interrupted rank may finish what it is doing"
        for rank in range(3):
            assert "saved" in (tmp_path / "logs" / f"worker_{rank}.log").read_text(), "whoever leaves first"
    assert run.left_over() == []


@pytest.mark.parametrize("hangs", [False, True])
def test_ranks_that_wait_for_the_processor_may_take_long_to_end(hangs: bool, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    text = SCRIPT.replace("sys.argv[3]", repr("hangs" if hangs else "ends"))
    run = Launched(tmp_path, "pt", "leaves", nproc=1, text=text, before="launching.EXIT_GRACE_S = 3.0")
    code, out, err = run.finish()
    assert code == 0 and ("their processes did not end" in err) == hangs, err
    assert run.left_over() == []


def test_a_collective_that_never_ends_is_reported(backend: str, tmp_path: Path) -> None:
    run = Launched(tmp_path, backend, "hangs", nproc=4, collective_timeout=2.0)
    run.wait_for_output("waiting", ranks=[1])
    started = time.monotonic()
    code, out, err = run.finish()
    assert code == 1
    assert time.monotonic() - started < 20
    assert re.match(r"tele: rank [02] has waited 2 s in all_reduce over tp \(ranks 0 1 2\); who waits where:\n", err), (
        err
    )
    rows = [line.split(None, 2) for line in err.splitlines()[1:6]]
    assert [row[0] for row in rows] == ["rank", "0", "1", "2", "3"]
    assert 2.0 <= max(float(rows[1][1]), float(rows[3][1])) < 8.0
    for _, _, text in (rows[1], rows[3]):
        assert re.match(r"all_reduce over tp \(ranks 0 1 2\) +script.py:\d+ all_reduce < script.py:\d+ <module>", text)
    assert rows[2][1] == "-"
    assert re.match(
        r"not in a collective \(last: all_gather over dp \(ranks 0 2\)\) +script.py:\d+ read_data < ", rows[2][2]
    )
    # A process that cannot even write its stack says so much by its state.
    assert re.match(r"not in a collective \(last: .*\) +no answer \(process: stopped\)", rows[4][2])
    assert f"more than --timeout 2, ending all processes; stacks: {tmp_path}/logs/stack_<rank>.txt" in err
    assert run.left_over() == []


TAKEN = """
import socket
taken, reserve = socket.create_server(("127.0.0.1", 0)), launching.bind
def bind(host, port):
    launching.bind = reserve
    return taken.dup()
launching.bind = bind
"""


def test_a_port_that_was_taken_is_replaced(tmp_path: Path) -> None:
    """msrun's port may go to another program between its choice and its use: a second start, with another port."""
    pytest.importorskip("mindspore")
    run = Launched(tmp_path, "ms", "meets", before=TAKEN)
    code, out, err = run.finish()
    assert code == 0, err
    assert "starting once more" in err and b"sum [3.]" in out
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


def test_ranks_that_do_not_hear_the_interrupt_are_ended(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    run = Launched(tmp_path, "pt", "deaf", before="launching.NO_ANSWER_S = 2.0")
    run.wait_for_output("waiting")
    time.sleep(0.5)  # until the signals are ignored
    os.kill(run.process.pid, signal.SIGINT)
    started = time.monotonic()
    code, out, err = run.finish()
    assert code == 130 and "no rank has answered for 2 s" in err, err
    assert time.monotonic() - started < 15
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
