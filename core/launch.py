"""One thin launcher over msrun and torchrun: live output of rank 0, the failing rank's traceback first, no orphans.

Both launchers start `core/worker.py` once per rank, which runs the backend's train.py and writes
`LOG_DIR/status_<rank>.json`; each rank's output goes to `LOG_DIR/worker_<rank>.log`. So one loop here serves both:
show what rank 0 writes, watch the status files and the processes, and end everything that was started.
A rank that had to be ended leaves its Python stack in `LOG_DIR/stack_<rank>.txt`, the launcher's own words are in
`LOG_DIR/launcher.log`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from core.errors import UserError
from core.processes import Deaths, Job, lives, signals_as_interrupt
from core.worker import ROOT, read_status, stack_path

SCRIPTS = {"ms": ROOT / "telechat_ms" / "train.py", "pt": ROOT / "pt_reference" / "train.py"}
FRAMEWORK = {"ms": "mindspore", "pt": "torch"}

POLL = 0.1  # seconds between two looks at logs, status files and processes
LEAVE = 20.0  # seconds the rank processes may take to end after the script has finished (MindSpore's take about 3)
LINGER = 1.0  # seconds the launcher may take after that; msrun's scheduler takes more, with nothing left to do
SAVE = 120.0  # seconds the ranks have, after Ctrl-C, to finish their step and save; a second Ctrl-C ends that wait


def launch(
    backend: str,
    script_args: Sequence[str],
    nproc: int = 1,
    log_dir: str | Path = "logs",
    timeout: float | None = None,
    script: str | Path | None = None,
) -> int:
    """Run ``script`` (default: the backend's train.py) in ``nproc`` processes and wait for the end.

    backend: "ms" (msrun) or "pt" (torchrun). Returns 0; 1 when a rank failed or ``timeout`` seconds passed; 2 when the
    failing rank met a UserError (its one line is on stderr); 130 after Ctrl-C or SIGTERM. When this function returns,
    no process it started is left. Raises UserError when the backend is not installed.
    """
    if importlib.util.find_spec(FRAMEWORK[backend]) is None:
        raise UserError(f"backend {backend}: {FRAMEWORK[backend]} is not installed here; see `tele doctor`")
    folder = Path(log_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("status_*.json"), *folder.glob("worker_*.log"), *folder.glob("stack_*.txt")):
        old.unlink()
    command = _command(backend, Path(script or SCRIPTS[backend]).resolve(), list(script_args), nproc, folder)
    with (
        open(folder / "launcher.log", "wb") as output,
        signals_as_interrupt(),
        Job(command, _environment(backend, nproc), output) as job,
    ):
        screen = _Screen(folder / "worker_0.log")
        try:
            return _watch(job, folder, nproc, timeout, screen)
        except KeyboardInterrupt:
            _interrupt(job, _pids(folder, nproc), screen)
            return 130


def _command(backend: str, script: Path, args: list[str], nproc: int, folder: Path) -> list[str]:
    worker = [str(ROOT / "core" / "worker.py"), "--status-dir", str(folder)]
    if sys.stdout.isatty():
        worker.append("--terminal")
    if backend == "ms":
        launcher = [sys.executable, "-m", "mindspore.parallel.cluster.run"]  # what the `msrun` command itself calls
        launcher += [f"--worker_num={nproc}", f"--local_worker_num={nproc}", f"--master_port={_free_port()}"]
        # msrun would start a `tail` per worker; a number no worker has switches that off, this file does the showing
        launcher += [f"--log_dir={folder}", "--join=True", f"--tail_worker_log={nproc}"]
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
        worker += ["--output-file", str(folder / "worker_{rank}.log")]
    return [*launcher, *worker, str(script), *args]


def _environment(backend: str, nproc: int) -> dict[str, str]:
    env = dict(os.environ)
    beside = Path(sys.executable).parent
    if backend == "ms" and not (beside / "python").exists():
        raise UserError(f"msrun starts `python`, and {beside} has none; use a virtual environment")
    env["PATH"] = os.pathsep.join([str(beside), env.get("PATH", "")])
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONFAULTHANDLER"] = "1"  # a crash in native code leaves the Python stack in the rank's log
    size = shutil.get_terminal_size()  # progress bars write to a file there and cannot ask
    env["COLUMNS"], env["LINES"] = str(size.columns), str(size.lines)
    if backend == "ms":
        # Measured: without it every small operator on the CPU waits about 4 ms for a spinning OpenMP thread.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if nproc > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    return env


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _interrupt(job: Job, ranks: list[int], screen: _Screen) -> None:
    """Pass Ctrl-C on to the ranks and let them leave, as training does after its step and a checkpoint."""
    leaving = [p for p in job.alive() if p.pid in ranks]
    for process in leaving:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGINT)
    try:
        deadline = time.monotonic() + SAVE
        while time.monotonic() < deadline and any(lives(p) for p in leaving):
            screen.show(screen.read())
            time.sleep(POLL)
        screen.show(screen.read(), last=True)
    except KeyboardInterrupt:
        print("tele: interrupted again, ending all processes now", file=sys.stderr)


def _watch(job: Job, folder: Path, nproc: int, timeout: float | None, screen: _Screen) -> int:
    started = time.monotonic()
    finished = gone = None
    deaths = Deaths()
    while True:
        news = screen.read()  # before the status files: what rank 0 writes because another died is then held back
        statuses = [read_status(folder, rank) for rank in range(nproc)]
        launcher_code = job.launcher.poll()
        job.look()
        for status in statuses:
            if status is not None:
                deaths.watch(status["pid"])
        failed = _first_failure(statuses, deaths, folder)
        if failed is not None:
            return _report(failed, statuses, folder, screen, news)
        screen.show(news)
        now = time.monotonic()
        if all(s is not None and s["state"] == "done" for s in statuses):
            finished = finished or now
            if gone is None and all(s is not None and deaths.when(s["pid"]) for s in statuses):
                gone = now
            # Every rank has said "done", so the result stands; a launcher that disagrees is told, not hidden.
            if launcher_code is not None or now - (gone or now) > LINGER or now - finished > LEAVE:
                screen.show(screen.read(), last=True)
                if launcher_code or gone is None:
                    what = f"their launcher ended with code {launcher_code}" if launcher_code else "did not leave"
                    print(f"tele: all ranks finished, but {what}; logs: {folder}", file=sys.stderr)
                return 0
        elif launcher_code is not None:
            screen.show(screen.read(), last=True)
            print(_tail(folder / "launcher.log"), file=sys.stderr)
            print(f"tele: the launcher ended with code {launcher_code}; logs: {folder}", file=sys.stderr)
            return 1
        if timeout is not None and now - started > timeout:
            print(f"tele: not finished after {timeout:.0f} s, ending all processes; logs: {folder}", file=sys.stderr)
            print(f"tele: where each rank was: {folder}/stack_<rank>.txt", file=sys.stderr)
            return 1
        time.sleep(POLL)


def _first_failure(statuses: list[dict[str, Any] | None], deaths: Deaths, folder: Path) -> dict[str, Any] | None:
    """The rank that failed first, or None: by the time in its file, or of its death while the file says "running".

    Order matters: when one rank is gone, the others soon fail too, on a lost connection or ended by their launcher.
    """
    failures = []
    for status in statuses:
        if status is not None and status["state"] == "running" and deaths.when(status["pid"]):
            status = read_status(folder, status["rank"])  # its last word may be newer than our reading of it
        if status is None or status["state"] == "done":
            continue
        when = status["time"] if status["state"] == "failed" else deaths.when(status["pid"])
        if when is not None:
            stack = stack_path(folder, status["rank"])
            told_to_end = stack.exists() and stack.stat().st_size > 0
            failures.append((told_to_end, when, status["rank"], status))
    return min(failures)[-1] if failures else None


def _report(
    failed: dict[str, Any], statuses: list[dict[str, Any] | None], folder: Path, screen: _Screen, news: bytes
) -> int:
    rank, trace = failed["rank"], failed["traceback"]
    if rank == 0:
        screen.show(news + screen.read(), last=True)
    else:
        screen.show(news.split(b"Traceback (most recent call last)")[0], last=True)
    if failed["user_error"]:
        print(f"tele: {failed['error']}", file=sys.stderr)
        return 2
    if failed["state"] == "running":
        print(_tail(folder / f"worker_{rank}.log"), file=sys.stderr)
        print(f"tele: rank {rank} was killed or crashed (no Python error); logs: {folder}", file=sys.stderr)
        return 1
    if rank != 0 or trace.encode() not in screen.shown:
        print(f"rank {rank} failed:\n{trace or _tail(folder / f'worker_{rank}.log')}", file=sys.stderr)
    for other in statuses:
        if other is not None and other["state"] == "failed" and other["rank"] != rank:
            print(f"rank {other['rank']} failed after it: {other['error']}", file=sys.stderr)
    print(f"tele: rank {rank} failed: {failed['error']}; logs: {folder}", file=sys.stderr)
    return failed["code"] if failed["code"] in (2, 130) else 1


def _pids(folder: Path, nproc: int) -> list[int]:
    return [s["pid"] for s in (read_status(folder, rank) for rank in range(nproc)) if s is not None]


def _tail(path: Path, lines: int = 40) -> str:
    if not path.exists():
        return ""
    text = path.read_bytes()[-50_000:]
    kept = [line for line in text.splitlines() if not _NOISE.match(line)][-lines:]
    return b"\n".join(kept).decode("utf-8", errors="replace")


# MindSpore's own log lines, e.g. "[WARNING] ME(6411:1397,MainProcess):2026-...": kept in the files, not on the screen.
_NOISE = re.compile(rb"\[(DEBUG|INFO|WARNING)\] [A-Z_]+\(\d+[,:]")


class _Screen:
    """Rank 0's log on our terminal, byte for byte (carriage returns too), less MindSpore's warnings."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.offset = 0
        self.held = b""
        self.shown = b""  # the last bytes shown, to know whether a traceback has been seen

    def read(self) -> bytes:
        """New bytes of the log since the last call."""
        if not self.log.exists():
            return b""
        with open(self.log, "rb") as source:
            source.seek(self.offset)
            news = source.read()
        self.offset += len(news)
        return news

    def show(self, news: bytes, last: bool = False) -> None:
        """Write what may be shown: a line that starts with "[" waits for its end, since it may be noise."""
        text, self.held = self.held + news, b""
        out = []
        for piece in re.split(rb"(?<=[\r\n])", text):
            if piece[:1] == b"[" and piece[-1:] not in (b"\r", b"\n") and not last:
                self.held = piece
            elif not _NOISE.match(piece):
                out.append(piece)
        shown = b"".join(out)
        if not shown:
            return
        self.shown = (self.shown + shown)[-100_000:]
        target = getattr(sys.stdout, "buffer", None)
        if target is not None:
            sys.stdout.flush()
            target.write(shown)
        else:
            sys.stdout.write(shown.decode("utf-8", errors="replace"))
        sys.stdout.flush()
