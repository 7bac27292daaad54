"""The launcher's parts without a launch: what rank 0 shows, who failed first, what one rank writes down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core import launch as launching
from core.errors import UserError
from core.processes import Deaths
from core.worker import read_status, run_script, status_path, write_status
from tests.house import ROOT

NOISE = b"[WARNING] ME(6411:1397,MainProcess):2026-11-21-18:03:11.149.000 [a.py:1] chatter\n"
INFO = b"[INFO] DISTRIBUTED(6454,7f4cc27fc6c0,python):2026-11-21-18:03:16 [tcp.cc:313] Start] chatter\n"
ERROR = b"[ERROR] ME(6411:1397,MainProcess):2026-11-21-18:03:11.149.000 [a.py:1] matters\n"


def shown(pieces: list[bytes], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> bytes:
    screen = launching._Screen(tmp_path / "none.log")
    for piece in pieces:
        screen.show(piece)
    screen.show(b"", last=True)
    return capfdbinary.readouterr().out


def test_screen_drops_framework_chatter_only(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    text = b"step 1\n" + NOISE + b"[10/20] mine\n" + INFO + ERROR + b"[WARNING] mine\nend"
    wanted = b"step 1\n[10/20] mine\n" + ERROR + b"[WARNING] mine\nend"
    assert shown([text], tmp_path, capfdbinary) == wanted
    assert shown([text[i : i + 1] for i in range(len(text))], tmp_path, capfdbinary) == wanted


def test_screen_passes_carriage_returns_at_once(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    screen = launching._Screen(tmp_path / "none.log")
    screen.show("\r 10%|█".encode())
    assert capfdbinary.readouterr().out == "\r 10%|█".encode()


def test_screen_reads_only_what_is_new(tmp_path: Path) -> None:
    log = tmp_path / "worker_0.log"
    screen = launching._Screen(log)
    assert screen.read() == b""
    log.write_bytes(b"one")
    assert screen.read() == b"one"
    log.write_bytes(b"one two")
    assert (screen.read(), screen.read()) == (b" two", b"")


def status(rank: int, state: str, when: float, pid: int = 1) -> dict:
    return {"rank": rank, "state": state, "time": when, "pid": pid, "code": 1, "error": "x", "user_error": False}


class FakeDeaths(Deaths):
    def __init__(self, times: dict[int, float]) -> None:
        super().__init__()
        self._times.update(times)


def test_the_first_to_fail_is_the_culprit(tmp_path: Path) -> None:
    def first(*statuses: dict | None, deaths: dict[int, float] | None = None) -> int | None:
        found = launching._first_failure(list(statuses), FakeDeaths(deaths or {}), tmp_path)
        return None if found is None else found["rank"]

    assert first(None, status(1, "running", 1.0)) is None
    assert first(status(0, "done", 1.0), status(1, "done", 1.0)) is None
    assert first(status(0, "failed", 5.0), status(1, "failed", 4.0)) == 1
    # a rank that died without a word comes before the one that lost its connection to it, and after its cause
    assert read_status(tmp_path, 1) is None
    for rank in (0, 1):
        status_path(tmp_path, rank).write_text(json.dumps(status(rank, "running", 0.0, pid=10 + rank)))
    running = status(1, "running", 0.0, pid=11)
    assert first(status(0, "failed", 5.0), running, deaths={11: 4.9}) == 1
    assert first(status(0, "failed", 5.0), running, deaths={11: 5.1}) == 0
    # ... unless it wrote down that it was told to end
    both = (status(0, "running", 0.0, pid=10), running)
    assert first(*both, deaths={10: 4.0, 11: 4.5}) == 0
    (tmp_path / "stack_0.txt").write_text("Current thread ...")
    assert first(*both, deaths={10: 4.0, 11: 4.5}) == 1
    # its last word counts more than our older reading of the file
    status_path(tmp_path, 1).write_text(json.dumps(status(1, "done", 4.4, pid=11)))
    assert first(None, running, deaths={11: 4.5}) is None


def test_death_is_noticed_though_the_parent_does_not_look() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    deaths = Deaths()
    deaths.watch(child.pid)
    time.sleep(0.1)
    assert deaths.when(child.pid) is None
    child.kill()
    deadline = time.monotonic() + 5
    while deaths.when(child.pid) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert deaths.when(child.pid) is not None
    child.communicate()


def test_commands_are_those_of_the_frameworks(tmp_path: Path) -> None:
    ms = launching._command("ms", tmp_path / "s.py", ["--config", "c"], 2, tmp_path)
    assert ms[1:5] == ["-m", "mindspore.parallel.cluster.run", "--worker_num=2", "--local_worker_num=2"]
    assert f"--log_dir={tmp_path}" in ms and "--join=True" in ms
    pt = launching._command("pt", tmp_path / "s.py", ["--config", "c"], 2, tmp_path)
    assert pt[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command in (ms, pt):
        assert command[-3:] == [str(tmp_path / "s.py"), "--config", "c"]
        assert str(ROOT / "core" / "worker.py") in command


def test_environment_of_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    env = launching._environment("ms", 1)
    assert env["OMP_WAIT_POLICY"] == "PASSIVE" and "OMP_NUM_THREADS" not in env
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert int(launching._environment("pt", 2)["OMP_NUM_THREADS"]) >= 1
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert launching._environment("ms", 1)["OMP_WAIT_POLICY"] == "ACTIVE", "what the user has set stands"


def test_a_missing_framework_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(launching.FRAMEWORK, "ms", "a_framework_that_is_not_there")
    with pytest.raises(UserError, match="backend ms: .* is not installed here; see `tele doctor`"):
        launching.launch("ms", [], log_dir=tmp_path / "logs")


def run_worker(tmp_path: Path, text: str, **env: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    script = tmp_path / "script.py"
    script.write_text(text)
    command = [sys.executable, str(ROOT / "core" / "worker.py"), "--status-dir", str(tmp_path), str(script), "--flag"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, cwd=tmp_path)
    record = read_status(tmp_path, int(env.get("RANK", 0)))
    assert record is not None
    return done, record


def test_worker_records_success(tmp_path: Path) -> None:
    done, record = run_worker(tmp_path, "import sys; import core.errors; print(__name__, sys.argv[1:])", RANK="3")
    assert (done.returncode, done.stdout) == (0, "__main__ ['--flag']\n")
    assert (record["rank"], record["state"], record["code"]) == (3, "done", 0)


@pytest.mark.parametrize(
    ("text", "code", "message", "user_error"),
    [
        ("raise ValueError('first\\nsecond')", 1, "ValueError: first", False),
        ("from core.errors import UserError\nraise UserError('a: b; c')", 2, "a: b; c", True),
        ("raise SystemExit(2)", 2, "the script exited with code 2", False),
        ("raise SystemExit('stopped: the loss is nan')", 1, "stopped: the loss is nan", False),
        ("raise KeyboardInterrupt", 130, "interrupted", False),
        (
            "from core.errors import UserError\nfrom core.worker import run_script\n"
            "def main(): raise UserError('a: b')\nraise SystemExit(run_script(main))",
            2,
            "a: b",
            True,
        ),
    ],
)
def test_worker_records_failure(tmp_path: Path, text: str, code: int, message: str, user_error: bool) -> None:
    done, record = run_worker(tmp_path, text)
    assert done.returncode == code
    assert (record["state"], record["code"], record["error"]) == ("failed", code, message)
    assert record["user_error"] is user_error


def test_worker_keeps_only_the_scripts_own_frames(tmp_path: Path) -> None:
    done, record = run_worker(tmp_path, "def f():\n    raise ValueError('x')\nf()\n")
    assert record["traceback"] == done.stderr
    assert record["traceback"].count("script.py") == 2
    assert "worker.py" not in record["traceback"] and "runpy" not in record["traceback"]


def test_worker_draws_bars_when_its_output_is_shown_on_a_terminal(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.stderr.isatty())")
    for rank, wanted in (("0", "True\n"), ("1", "False\n")):
        command = [
            sys.executable,
            str(ROOT / "core" / "worker.py"),
            "--terminal",
            "--status-dir",
            str(tmp_path),
            str(script),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RANK": rank})
        assert done.stdout == wanted, done.stderr


def test_worker_that_vanishes_leaves_running_behind(tmp_path: Path) -> None:
    done, record = run_worker(tmp_path, "import os; os.kill(os.getpid(), 9)")
    assert done.returncode == -9 and record["state"] == "running"


def test_a_script_started_by_hand_speaks_for_itself(capsys: pytest.CaptureFixture[str]) -> None:
    def mistake() -> int:
        raise UserError("a: b; c")

    def interrupted() -> int:
        raise KeyboardInterrupt

    assert (run_script(lambda: None), run_script(lambda: 3)) == (0, 3)
    assert (run_script(mistake), capsys.readouterr().err) == (2, "tele: a: b; c\n")
    assert run_script(interrupted) == 130


def test_status_file_round_trip(tmp_path: Path) -> None:
    assert read_status(tmp_path, 0) is None
    write_status(tmp_path, 0, None)
    record = read_status(tmp_path, 0)
    assert record is not None and (record["state"], record["pid"]) == ("running", os.getpid())
    write_status(tmp_path, 0, 1, "x", trace="t")
    record = read_status(tmp_path, 0)
    assert record is not None and (record["state"], record["error"], record["traceback"]) == ("failed", "x", "t")
    assert list(tmp_path.iterdir()) == [status_path(tmp_path, 0)]
