"""The launcher's parts without a launch: what rank 0 shows, who failed first, what one rank writes down."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.launch import launcher as launching
from telechat_twins.core.launch import processes
from telechat_twins.core.launch.command import LaunchPlan, check_nodes, check_port, command, environment
from telechat_twins.core.launch.heartbeat import Waits
from telechat_twins.core.launch.nodes import Nodes, parse_master
from telechat_twins.core.launch.processes import Deaths, OwnTime, wants_processor
from telechat_twins.core.launch.screen import Screen
from telechat_twins.core.launch.stacks import innermost_frames
from telechat_twins.core.launch.worker import read_status, run_script, status_path, write_status
from tests.house import ROOT

WORKER = str(ROOT / "core" / "launch" / "worker.py")
NOISE = b"[WARNING] ME(6411:1397,MainProcess):2026-11-21-18:03:11.149.000 [a.py:1] chatter\n"
INFO = b"[INFO] DISTRIBUTED(6454,7f4cc27fc6c0,python):2026-11-21-18:03:16 [tcp.cc:313] Start] chatter\n"
ERROR = b"[ERROR] ME(6411:1397,MainProcess):2026-11-21-18:03:11.149.000 [a.py:1] matters\n"


def shown(pieces: list[bytes], tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> bytes:
    screen = Screen(tmp_path / "none.log")
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
    screen = Screen(tmp_path / "none.log")
    screen.show("\r 10%|█".encode())
    assert capfdbinary.readouterr().out == "\r 10%|█".encode()


def test_what_is_called_instead_of_showing(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    looks: list[int] = []
    screen = Screen(tmp_path / "none.log", lambda: looks.append(1))
    screen.show(b"step 1\n")
    screen.show(b"", last=True)
    assert (looks, capfdbinary.readouterr().out, screen.shown) == ([1, 1], b"", b"")


def test_screen_reads_only_what_is_new(tmp_path: Path) -> None:
    log = tmp_path / "worker_0.log"
    screen = Screen(log)
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
    assert first(status(0, "failed", 5.0), running, deaths={11: 5.1}) == 1, "it is noticed late: connections go first"
    assert first(status(0, "failed", 5.0), running, deaths={11: 5.5}) == 0
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


def test_time_of_a_process_that_waits_for_its_turn_is_what_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    now, used, eager = [0.0], {1: 0.0, 2: 0.0}, {1}
    monkeypatch.setattr(processes.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(processes, "wants_processor", lambda pid: pid in eager)

    def times(pid: int) -> SimpleNamespace:
        return SimpleNamespace(user=used[pid], system=0.0)

    both = [SimpleNamespace(pid=pid, cpu_times=lambda pid=pid: times(pid)) for pid in used]
    own = OwnTime()
    assert own.look(both) == 0.0
    now[0], used[1] = 10.0, 0.5  # 1 was starved, 2 slept
    assert own.look(both) == 0.5
    now[0], eager = 13.0, set()  # both slept
    assert own.look(both) == 3.5
    now[0], used[1], eager = 15.0, 4.5, {1}  # two threads of it ran all the time
    assert own.look(both) == 5.5
    now[0], eager = 16.0, {1, 2}  # 1 has ended, and 2 had nothing
    assert own.look(both[1:]) == 5.5


def test_a_process_that_sleeps_does_not_want_the_processor() -> None:
    for code, wants in (("import sys; print(1, flush=True); sys.stdin.read()", False), ("print(1, flush=True)", True)):
        line = [sys.executable, "-c", code + ("" if not wants else "\nwhile True: pass")]
        with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline() == b"1\n"
            time.sleep(0.3)
            assert any(wants_processor(child.pid) for _ in range(20)) == wants
            child.kill()
    assert not wants_processor(child.pid)


def planned(backend: str, folder: Path, nproc: int = 2, **nodes: Any) -> LaunchPlan:
    return LaunchPlan(backend, folder / "s.py", ("--config", "c"), nproc, folder, **nodes)


def test_commands_are_those_of_the_frameworks(tmp_path: Path) -> None:
    ms = command(planned("ms", tmp_path), 1234)
    assert ms[1:5] == ["-m", "mindspore.parallel.cluster.run", "--worker_num=2", "--local_worker_num=2"]
    assert "--master_addr=127.0.0.1" in ms and "--master_port=1234" in ms and "--no-scheduler" not in ms
    assert f"--log_dir={tmp_path}" in ms and "--join=True" in ms
    pt = command(planned("pt", tmp_path), 0)
    assert pt[1:5] == ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    for words in (ms, pt):
        assert words[-3:] == [str(tmp_path / "s.py"), "--config", "c"]
        assert WORKER in words


def test_commands_of_several_nodes(tmp_path: Path) -> None:
    nodes = {"nnodes": 3, "host": "10.0.0.1", "port": 1234}
    ms = [command(planned("ms", tmp_path, node_rank=node, **nodes), 1234) for node in range(3)]
    for node, words in enumerate(ms):
        ours = ["--worker_num=6", "--local_worker_num=2", "--master_addr=10.0.0.1", "--master_port=1234"]
        assert words[3:8] == [*ours, f"--node_rank={node}"]
        assert ("--no-scheduler" in words) == (node > 0), (
            "node 0 has the only scheduler, also where both share a machine"
        )
        assert "--tail_worker_log=6" in words, "no rank has that number"
    pt = command(planned("pt", tmp_path, node_rank=2, **nodes), 1234)
    assert pt[3:8] == [
        *("--nproc-per-node=2", "--nnodes=3", "--node-rank=2"),
        *("--master-addr=10.0.0.1", "--master-port=1234"),
    ]
    assert list(planned("pt", tmp_path, node_rank=2, **nodes).ranks) == [4, 5]


@pytest.mark.parametrize("backend", ["ms", "pt"])
def test_the_frameworks_own_parsers_take_the_commands(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    words = command(planned(backend, tmp_path, node_rank=1, nnodes=3, host="10.0.0.1", port=1234), 1234)
    if backend == "ms":
        from mindspore.parallel.cluster.run import get_args

        monkeypatch.setattr(sys, "argv", words[2:])
        parsed = get_args()
        assert (parsed.worker_num, parsed.local_worker_num, parsed.node_rank) == (6, 2, 1)
        assert (parsed.master_addr, parsed.master_port, parsed.task_script) == ("10.0.0.1", 1234, words[11])
    else:
        from torch.distributed.run import parse_args

        parsed = parse_args(words[3:])
        assert (parsed.nnodes, parsed.nproc_per_node, parsed.node_rank) == ("3", "2", 1)
        assert (parsed.master_addr, parsed.master_port, parsed.rdzv_backend) == ("10.0.0.1", 1234, "static")
        assert parsed.training_script == WORKER


@pytest.mark.parametrize(
    ("nproc", "nnodes", "node_rank", "master", "says"),
    [
        (0, 1, 0, None, "--nproc: must be at least 1, found 0"),
        (1, 0, 0, None, "--nnodes: must be at least 1, found 0"),
        (1, 2, 2, "h:1", "--node-rank: must be from 0 to 1 with --nnodes 2, found 2"),
        (1, 1, 1, None, "--node-rank: must be from 0 to 0 with --nnodes 1, found 1"),
        (1, 2, 0, None, "--master: required with --nnodes 2; give HOST:PORT of node 0"),
        (1, 2, 0, "somewhere", "--master: expected HOST:PORT with a port from 1 to 65534, found 'somewhere'"),
        (1, 2, 0, ":80", "--master: expected HOST:PORT"),
        (1, 2, 0, "h:0", "--master: expected HOST:PORT"),
        (1, 2, 0, "h:65535", "--master: expected HOST:PORT"),
    ],
)
def test_mistakes_in_the_nodes(nproc: int, nnodes: int, node_rank: int, master: str | None, says: str) -> None:
    with pytest.raises(UserError) as caught:
        check_nodes(nproc, nnodes, node_rank, master)
    assert str(caught.value).startswith(says)


def test_the_place_of_node_0() -> None:
    assert parse_master("10.0.0.1:29500") == ("10.0.0.1", 29500)
    assert parse_master("[fe80::1]:1") == ("fe80::1", 1)
    for port in ("0", "65535", "7" * 400, "7" * 5000, "\u00b2", "\u0661\u0662", "+1", ""):
        with pytest.raises(UserError, match="--master: expected HOST:PORT with a port from 1 to 65534") as told:
            parse_master(f"node:{port}")
        assert len(str(told.value)) < 400
    assert check_nodes(8, 1, 0, None) == ("127.0.0.1", 0)


def test_a_port_in_use_is_named_on_node_0(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        plan = planned("pt", tmp_path, nnodes=2, port=port)
        with pytest.raises(UserError, match=f"--master: port {port} is in use on this machine"):
            check_port(plan)
        check_port(dataclasses.replace(plan, node_rank=1))
    check_port(plan)
    with pytest.raises(
        UserError, match=r"--master: 192.0.2.1 is not an address of this machine, which is started as node 0"
    ):
        check_port(dataclasses.replace(plan, backend="ms", host="192.0.2.1"))


def test_environment_of_the_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    env = environment(planned("ms", tmp_path, 1))
    assert (env["OMP_WAIT_POLICY"], env["OMP_NUM_THREADS"]) == ("PASSIVE", "12"), "msrun would leave its rank 1 thread"
    env_pt = environment(planned("pt", tmp_path, 1))
    assert env_pt["OMP_WAIT_POLICY"] == "PASSIVE" and "OMP_NUM_THREADS" not in env_pt
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert "RANK" not in env, "of a launcher around this one"
    threads = [environment(planned("pt", tmp_path, nproc))["OMP_NUM_THREADS"] for nproc in (2, 5, 12, 16)]
    assert threads == ["6", "2", "1", "1"]
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    env = environment(planned("ms", tmp_path, 2))
    assert (env["OMP_WAIT_POLICY"], env["OMP_NUM_THREADS"]) == ("ACTIVE", "3"), "what the user has set stands"


def test_a_missing_framework_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(launching.FRAMEWORK, "ms", "a_framework_that_is_not_there")
    with pytest.raises(UserError, match="backend ms: .* is not installed here; see `tele doctor`"):
        launching.launch("ms", [], log_dir=tmp_path / "logs")


def run_worker(tmp_path: Path, text: str, **env: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    script = tmp_path / "script.py"
    script.write_text(text)
    command = [
        sys.executable,
        WORKER,
        "--status-dir",
        str(tmp_path),
        str(script),
        "--flag",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env}, cwd=tmp_path)
    record = read_status(tmp_path, int(env.get("RANK", 0)))
    assert record is not None
    return done, record


def test_worker_records_success(tmp_path: Path) -> None:
    done, record = run_worker(
        tmp_path, "import sys; import telechat_twins.core.errors; print(__name__, sys.argv[1:])", RANK="3"
    )
    assert (done.returncode, done.stdout) == (0, "__main__ ['--flag']\n")
    assert (record["rank"], record["state"], record["code"]) == (3, "done", 0)


@pytest.mark.parametrize(
    ("text", "code", "message", "user_error"),
    [
        ("raise ValueError('first\\nsecond')", 1, "ValueError: first", False),
        ("from telechat_twins.core.errors import UserError\nraise UserError('a: b; c')", 2, "a: b; c", True),
        ("raise SystemExit(2)", 2, "the script exited with code 2", False),
        ("raise SystemExit('stopped: the loss is nan')", 1, "stopped: the loss is nan", False),
        ("raise KeyboardInterrupt", 130, "interrupted", False),
        (
            "raise OSError(28, 'No space left on device', 'f')",
            2,
            "f: cannot be written (the disk is full); free some space or choose another path",
            True,
        ),
        (
            "raise ValueError('I/O error: File too large (os error 27)')",
            2,
            "output: cannot be written (a file-size limit was exceeded); free some space or choose another path",
            True,
        ),
        (
            "from telechat_twins.core.errors import UserError\n"
            "from telechat_twins.core.launch.worker import run_script\n"
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


def test_a_workers_folder_may_have_braces_in_its_name(tmp_path: Path) -> None:
    """As that of a sweep: `--out 'runs/lr{1e-4}'`."""
    folder = tmp_path / "lr{1e-4} {rank} 学习率"
    folder.mkdir()
    script = tmp_path / "script.py"
    script.write_text("print('hello')")
    options = ["--status-dir", str(folder), "--output-file", str(folder / "worker_{rank}.log")]
    command = [sys.executable, WORKER, *options, str(script)]
    done = subprocess.run(command, env={**os.environ, "RANK": "3"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (folder / "worker_3.log").read_text() == "hello\n"


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
            WORKER,
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


def lifeline(tmp_path: Path, text: str) -> tuple[subprocess.Popen[bytes], int]:
    """A worker whose stdin is a pipe as of a launcher, and the launcher's end of it."""
    script = tmp_path / "script.py"
    script.write_text(text)
    theirs, ours = os.pipe()
    words = [
        sys.executable,
        WORKER,
        "--lifeline",
        "--status-dir",
        str(tmp_path),
        str(script),
    ]
    process = subprocess.Popen(words, stdin=theirs, cwd=tmp_path, stdout=subprocess.PIPE)
    os.close(theirs)
    return process, ours


def test_a_worker_ends_with_its_launcher_whatever_its_parent_does(tmp_path: Path) -> None:
    """Its parent, this process, lives on: a launcher killed before the worker has run at all, and while it runs."""
    process, launcher = lifeline(tmp_path, "open('ran', 'w')\nimport time\ntime.sleep(60)")
    os.close(launcher)
    assert process.wait(30) == -9
    assert not (tmp_path / "ran").exists() and read_status(tmp_path, 0) is None
    text = "import os, sys, time\nassert sys.stdin.read() == ''\nprint('runs', flush=True)\ntime.sleep(60)"
    process, launcher = lifeline(tmp_path, text)
    assert process.stdout is not None and process.stdout.readline() == b"runs\n"
    os.close(launcher)
    assert process.wait(30) == -9


def test_a_worker_finishes_while_its_launcher_lives(tmp_path: Path) -> None:
    process, launcher = lifeline(
        tmp_path, "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''], check=True)"
    )
    assert process.wait(30) == 0
    os.close(launcher)


def test_who_missed_the_death_of_its_parent_dies_at_once() -> None:
    code = (
        "from telechat_twins.core.launch.worker import die_with_parent; import os; die_with_parent({}); print('lives')"
    )
    for parent, wanted in (("os.getppid()", b"lives\n"), ("999999999", b"")):
        done = subprocess.run([sys.executable, "-c", code.format(parent)], cwd=ROOT, capture_output=True)
        assert (done.stdout, done.returncode) == (wanted, 0 if wanted else -9)


def reported(folder: Path, instead: Any = None, **failed: Any) -> int:
    """launch's report on rank 1 of two, which has failed; rank 0 with it, in the same words."""
    run = launching._Running(
        planned("pt", folder),
        Nodes(),
        SimpleNamespace(alive=list),  # type: ignore[arg-type]
        Screen(folder / "worker_0.log", instead),
        Waits(folder, [0, 1]),
    )
    statuses = [status(0, "failed", 2.0), {**status(1, "failed", 1.0), **failed}]
    return launching._report(run, {**statuses[failed.get("rank", 1)], "when": 1.0, **failed}, statuses, b"")


def test_a_rank_without_a_traceback_is_not_told_by_its_whole_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bar = "".join(f"\r{n}%" for n in range(1000))
    for rank in (0, 1):
        lines = [f"line {n} of rank {rank}" for n in range(100)]
        (tmp_path / f"worker_{rank}.log").write_text("\n".join([*lines, bar, "training stopped: x"]) + "\n")
    assert reported(tmp_path, error="training stopped: x") == 1
    out, err = capfd.readouterr()
    told = err.splitlines()
    assert told[0] == f"the last lines of {tmp_path / 'worker_1.log'}:"
    assert told[1:11] == [*(f"line {n} of rank 1" for n in range(92, 100)), "999%", "training stopped: x"]
    assert told[11:] == ["rank 0 failed after it: x", f"tele: rank 1 failed: training stopped: x; logs: {tmp_path}"]
    # Rank 0's own has been shown, all of it.
    assert reported(tmp_path, rank=0, error="x") == 1
    out, err = capfd.readouterr()
    assert out.count("line 99 of rank 0") == 1 and err == f"tele: rank 0 failed: x; logs: {tmp_path}\n"
    # Unless something else was shown in its place.
    assert reported(tmp_path, lambda: None, rank=0, error="x") == 1
    out, err = capfd.readouterr()
    assert (out, err.splitlines()[0]) == ("", f"the last lines of {tmp_path / 'worker_0.log'}:")


def test_ranks_without_room_for_a_status_are_said_to_have_a_full_disk(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reported(tmp_path, state="running", error="") == 1
    assert "rank 1 was killed or crashed" in capfd.readouterr().err
    monkeypatch.setattr(launching.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    assert reported(tmp_path, state="running", error="") == 2
    assert capfd.readouterr().err == f"tele: {tmp_path}: the disk is full; free some space and start again\n"


def test_a_traceback_is_shown_once_and_in_full(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace = "Traceback (most recent call last):\n" + "".join(f"  frame {n}\n" for n in range(50)) + "ValueError: x\n"
    (tmp_path / "worker_1.log").write_text("line\n" + trace)
    (tmp_path / "worker_0.log").write_text("line\n" + trace)
    for rank in (0, 1):
        assert reported(tmp_path, rank=rank, error="ValueError: x", traceback=trace) == 1
        out, err = capfd.readouterr()
        assert (out + err).count("frame 49") == 1


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


def test_the_top_of_a_stack_is_the_newest_dump_of_the_main_thread() -> None:
    dump = (
        "Thread 0x1 (most recent call first):\n"
        '  File "/usr/lib/threading.py", line 5 in wait\n\n'
        "Current thread 0x2 (most recent call first):\n"
        '  File "/a/b/ops.py", line 7 in wait\n'
        '  File "/a/b/model.py", line 30 in forward\n'
        '  File "/a/b/loop.py", line 1 in step\n'
        '  File "/a/b/train.py", line 2 in <module>\n'
        '  File "<frozen runpy>", line 88 in _run_code\n'
    )
    assert innermost_frames(dump) == "ops.py:7 wait < model.py:30 forward < loop.py:1 step"
    assert innermost_frames(dump + dump.replace("line 7", "line 8")).startswith("ops.py:8 wait <")
    assert innermost_frames(dump, frames=9).endswith("train.py:2 <module>"), "what starts the script says nothing"
    assert innermost_frames("") == ""
