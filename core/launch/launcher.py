"""One thin launcher over msrun and torchrun: live output of rank 0, the failing rank's traceback first, no orphans.

Both launchers start `core/launch/worker.py` once per rank, which runs the backend's train.py and writes
`LOG_DIR/status_<rank>.json`; each rank's output goes to `LOG_DIR/worker_<rank>.log`. So one loop here serves both:
show what rank 0 writes, watch the status files, the heartbeats and the processes, and end everything that was started.
A rank that had to be ended leaves its Python stack in `LOG_DIR/stack_<rank>.txt`, the launcher's own words are in
`LOG_DIR/launcher.log`. Ranks are global ones. Of a job on several machines each node runs one of these launchers, which
watches its own ranks and hears of the others' end over `core.launch.nodes`.
"""

from __future__ import annotations

import importlib.util
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.command import (
    FRAMEWORK,
    SCRIPTS,
    TORCHRUN_LOGS,
    LaunchPlan,
    check_nodes,
    check_port,
    command,
    environment,
)
from telechat_twins.core.launch.heartbeat import Waits
from telechat_twins.core.launch.nodes import RENDEZVOUS_S, Nodes, Word, bind, meet
from telechat_twins.core.launch.processes import Deaths, ProcessTree, lives, signals_as_interrupt
from telechat_twins.core.launch.run_lock import hold_folder
from telechat_twins.core.launch.screen import Screen, last_lines
from telechat_twins.core.launch.worker import SCHEDULER, read_status, stack_path
from telechat_twins.core.types import JsonObject

# Seconds a rank may be inside one collective. Below the 10 minutes after which NCCL's own watchdog ends a rank without
# saying who waits for whom, and above any wait that a healthy run has (a slow file system at a checkpoint).
COLLECTIVE_TIMEOUT_S = 540.0

POLL_S = 0.1  # seconds between two looks at logs, status files, heartbeats and processes
EXIT_GRACE_S = (
    20.0  # seconds the rank processes may take to end after the script has finished (MindSpore's take about 3)
)
SCHEDULER_START_S = 60.0  # seconds after the first rank's status in which msrun's scheduler must have written its own
LAUNCHER_EXIT_S = 1.0  # seconds the launcher may take after that; msrun's scheduler takes more, with nothing left to do
SAVE_GRACE_S = (
    120.0  # seconds the ranks have, after Ctrl-C, to finish their step and save; a second Ctrl-C ends that wait
)
NO_ANSWER_S = (
    45.0  # seconds of these, if no rank answers at all, or for the others once one has left: they may wait for it
)
STACK_DUMP_S = 2.0  # seconds for the ranks to write down where they are
NODE_REPORT_S = 1.0  # seconds to hear whether another node failed first
SETTLE_S = 0.2  # seconds after a first sign of failure, for what may have caused it to show
DEATH_LAG_S = 0.3  # seconds by which a death is taken to be earlier than it was noticed


def launch(
    backend: str,
    script_args: Sequence[str],
    nproc: int = 1,
    log_dir: str | Path = "logs",
    timeout: float | None = None,
    script: str | Path | None = None,
    *,
    nnodes: int = 1,
    node_rank: int = 0,
    master: str | None = None,
    collective_timeout: float = COLLECTIVE_TIMEOUT_S,
    instead: Callable[[], None] | None = None,
) -> int:
    """Run ``script`` (default: the backend's train.py) in ``nproc`` processes and wait for the end.

    backend: "ms" (msrun) or "pt" (torchrun). Returns 0; 1 when a rank failed, ``timeout`` seconds passed, or a rank was
    inside one collective for ``collective_timeout`` seconds (0: no limit; stderr says who waits where); 2 when the
    failing rank met a UserError (its one line is on stderr); 130 after Ctrl-C or SIGTERM. When this function returns,
    no process it started is left.

    ``instead`` is called many times a second in place of showing what rank 0 writes, which stays in its log.

    Several machines: each calls this with the same ``nnodes``, ``nproc`` and ``master`` ("host:port" of node 0, where
    port + 1 is used too) and its own ``node_rank``. They wait for one another, then hold nnodes * nproc ranks; when the
    job ends on one, it ends on all with the same code. Logs of node n > 0 go to ``<log_dir>-node<n>``, so that the
    folder may be shared.

    Two launches with the same folder of logs exclude one another (core.launch.run_lock).

    Raises UserError when the backend is not installed, the nodes do not fit together, or another launch is there.
    """
    if importlib.util.find_spec(FRAMEWORK[backend]) is None:
        raise UserError(f"backend {backend}: {FRAMEWORK[backend]} is not installed here; see `tele doctor`")
    host, port = check_nodes(nproc, nnodes, node_rank, master)
    folder = Path(f"{log_dir}-node{node_rank}" if node_rank else log_dir).resolve()
    path = Path(script or SCRIPTS[backend]).resolve()
    plan = LaunchPlan(backend, path, tuple(script_args), nproc, folder, nnodes, node_rank, host, port)
    env = environment(plan)
    limits = LaunchLimits(timeout, collective_timeout)
    # Before anything there is touched: the logs of a run that goes on are its own.
    with signals_as_interrupt(), hold_folder(folder):
        try:
            check_port(plan)
            facts = {"--nproc": nproc, "--backend": backend}
            nodes = meet(node_rank, nnodes, host, port, facts, min(RENDEZVOUS_S, timeout or RENDEZVOUS_S))
        except KeyboardInterrupt:
            return 130
        with nodes:
            try:
                return _run(plan, env, nodes, limits, instead)
            except _PortTaken:
                print("tele: the port chosen for msrun was taken meanwhile; starting once more", file=sys.stderr)
                return _run(plan, env, nodes, limits, instead, again=True)
            finally:
                shutil.rmtree(folder / TORCHRUN_LOGS, ignore_errors=True)


@dataclass(frozen=True)
class LaunchLimits:
    """Seconds the whole job may take (None: any), and one collective (0: any)."""

    job_s: float | None
    collective_s: float


class _PortTaken(Exception):
    """Another program took the port between our choice and its use; no rank has got beyond waiting for the others."""


@dataclass
class _Running:
    """One start of the job, with everything that watches it."""

    plan: LaunchPlan
    nodes: Nodes
    processes: ProcessTree
    screen: Screen
    waits: Waits
    deaths: Deaths = field(default_factory=Deaths)

    def statuses(self) -> list[JsonObject | None]:
        return [read_status(self.plan.folder, rank) for rank in self.plan.ranks]


def _run(
    plan: LaunchPlan,
    env: dict[str, str],
    nodes: Nodes,
    limits: LaunchLimits,
    instead: Callable[[], None] | None,
    again: bool = False,
) -> int:
    folder = plan.folder
    for pattern in ("status_*", "worker_*.log", "stack_*.txt", "heartbeat_*.bin", "scheduler.log"):
        for old in folder.glob(pattern):
            old.unlink()
    # Kept bound for as long as the job runs, so that the system gives the port to nobody else.
    reserved = bind(plan.host, 0) if plan.backend == "ms" and not plan.port else None
    port = reserved.getsockname()[1] if reserved else plan.port
    try:
        with (
            open(folder / "launcher.log", "wb") as output,
            signals_as_interrupt(),
            ProcessTree(command(plan, port), env, output) as processes,
        ):
            screen = Screen(folder / f"worker_{plan.ranks[0]}.log", instead)
            run = _Running(plan, nodes, processes, screen, Waits(folder, plan.ranks))
            try:
                return _watch(run, limits, again)
            except KeyboardInterrupt:
                nodes.end(130, "interrupted")
                _interrupt(run)
                return 130
    finally:
        if reserved:
            reserved.close()


def _watch(run: _Running, limits: LaunchLimits, again: bool) -> int:
    """Look at everything that was started until the job has ended; its exit code.

    Each look asks the causes in this order: a failed rank explains a lost launcher, a hang and the end of the time.
    """
    started = time.monotonic()
    scheduler, leaving = _Scheduler(run), _Leaving(run)
    while True:
        news = run.screen.read()  # before the status files: what rank 0 writes because another died is held back
        statuses = run.statuses()
        launcher_code = run.processes.launcher.poll()
        run.processes.look()
        code = _failed_here(run, statuses, news)
        if code is None and (word := run.nodes.look()) is not None:
            code = _ended_elsewhere(run, word, news)
        if code is None:
            run.screen.show(news)
            if all(s is not None and s["state"] == "done" for s in statuses):
                code = leaving.ended(statuses, launcher_code)
            elif launcher_code is not None:
                code = _give_up(run, "launcher.log", f"the launcher ended with code {launcher_code}")
            elif scheduler.failed():
                code = _scheduler_lost(run, again)
        if code is None:
            code = _out_of_time(run, statuses, limits, started)
        if code is not None:
            return code
        time.sleep(POLL_S)


def _failed_here(run: _Running, statuses: list[JsonObject | None], news: bytes) -> int | None:
    """Report the first rank of this node that failed; None while none has."""
    folder = run.plan.folder
    for status in statuses:
        if status is not None:
            run.deaths.watch(status["pid"])
    if _first_failure(statuses, run.deaths, folder) is None:
        return None
    time.sleep(SETTLE_S)
    statuses = run.statuses()
    failed = _first_failure(statuses, run.deaths, folder)
    return None if failed is None else _report(run, failed, statuses, news)


class _Leaving:
    """The end of a job whose ranks here all say "done": since when, and whether their processes are gone."""

    def __init__(self, run: _Running) -> None:
        self.run = run
        self.finished: float | None = None  # when every node had said so
        self.gone: float | None = None  # when the processes of this node had ended

    def ended(self, statuses: list[JsonObject | None], launcher_code: int | None) -> int | None:
        """0 once the launcher may be left; None while it may still serve the other nodes' ranks."""
        run, now = self.run, time.monotonic()
        if self.gone is None and all(s is not None and run.deaths.when(s["pid"]) for s in statuses):
            self.gone = now
        run.nodes.done()
        self.finished = self.finished or (now if run.nodes.finished else None)
        if self.finished is None:
            return None
        settled = max(self.finished, self.gone or now)
        if launcher_code is None and now - settled <= LAUNCHER_EXIT_S and now - self.finished <= EXIT_GRACE_S:
            return None
        run.screen.show(run.screen.read(), last=True)
        # Every rank has written "done", so the result stands; a launcher that disagrees is reported, not hidden.
        if launcher_code or self.gone is None:
            what = f"their launcher ended with code {launcher_code}" if launcher_code else "did not leave"
            print(f"tele: all ranks finished, but {what}; logs: {run.plan.folder}", file=sys.stderr)
        return 0


def _scheduler_lost(run: _Running, again: bool) -> int:
    """End a job whose scheduler has failed; _PortTaken where another start may help."""
    if b"Address already in use" not in _bytes(run.plan.folder / "scheduler.log"):
        return _give_up(run, "scheduler.log", "msrun's scheduler, through which the ranks meet, has failed")
    if not again and run.plan.nnodes == 1:
        raise _PortTaken
    return _give_up(run, None, f"msrun's port {run.plan.port or ''} was taken by another program")


def _out_of_time(run: _Running, statuses: list[JsonObject | None], limits: LaunchLimits, started: float) -> int | None:
    """End a job in which one collective, or the whole, has taken longer than its limit; None otherwise."""
    rank, waited = run.waits.look([s["rank"] for s in statuses if s is not None and s["state"] == "running"])
    if 0 < limits.collective_s < waited:
        return _hang(run, rank, waited, limits.collective_s)
    if limits.job_s is None or time.monotonic() - started <= limits.job_s:
        return None
    run.nodes.end(1, f"not finished after {limits.job_s:.0f} s")
    lines = [f"tele: not finished after {limits.job_s:.0f} s; who waits where:", *run.waits.table(_ask_where(run))]
    print("\n".join(lines), file=sys.stderr)
    print(f"tele: ending all processes; stacks: {run.plan.folder}/stack_<rank>.txt", file=sys.stderr)
    return 1


class _Scheduler:
    """msrun's scheduler on node 0: when it fails before the ranks have, they wait for it for many minutes."""

    def __init__(self, run: _Running) -> None:
        # A single rank waits for it as well, when it joins.
        self.run = run if run.plan.backend == "ms" and not run.plan.node_rank else None
        self.since: float | None = None

    def failed(self) -> bool:
        """It has been found failed or dead for a second, in which a failing rank would have been found first; or it has
        not begun long after the ranks have."""
        if self.run is None:
            return False
        status, patience = read_status(self.run.plan.folder, SCHEDULER), 1.0
        if status is None:  # it writes one before anything else, as a rank does
            patience = SCHEDULER_START_S
            if not any(self.run.statuses()):
                return False
        else:
            self.run.deaths.watch(status["pid"])
            if status["state"] == "done" or (status["state"] == "running" and not self.run.deaths.when(status["pid"])):
                self.since = None
                return False
        self.since = self.since or time.monotonic()
        return time.monotonic() - self.since > patience


def _first_failure(statuses: list[JsonObject | None], deaths: Deaths, folder: Path) -> JsonObject | None:
    """The rank that failed first, or None: by the time in its file, or of its death while the file says "running".

    Order matters: when one rank is gone, the others soon fail too, on a lost connection or ended by their launcher. A
    dying process closes its connections before it is seen to be dead, so that the others' errors may be the older ones.
    Key ``when`` of the result is the time that was compared.
    """
    failures = []
    for status in statuses:
        if status is not None and status["state"] == "running" and deaths.when(status["pid"]):
            status = read_status(folder, status["rank"])  # its last word may be newer than our reading of it
        if status is None or status["state"] == "done":
            continue
        died = deaths.when(status["pid"])
        when = status["time"] if status["state"] == "failed" else died - DEATH_LAG_S if died is not None else None
        if when is not None:
            stack = stack_path(folder, status["rank"])
            told_to_end = stack.exists() and stack.stat().st_size > 0
            failures.append((told_to_end, when, status["rank"], status))
    if not failures:
        return None
    _, when, _, first = min(failures, key=lambda failure: failure[:3])
    return {**first, "when": when}


def _report(run: _Running, failed: JsonObject, statuses: list[JsonObject | None], news: bytes) -> int:
    folder, screen = run.plan.folder, run.screen
    rank, trace, here = failed["rank"], failed.get("traceback") or "", run.plan.ranks[0]
    seen = rank == here and screen.instead is None  # all that it wrote has been shown
    if failed["user_error"]:
        why, code = failed["error"], 2
    elif failed["state"] == "running":
        why, code = f"rank {rank} was killed or crashed (no Python error)", 1
    else:
        why, code = f"rank {rank} failed: {failed['error']}", failed["code"] if failed["code"] in (2, 130) else 1
    run.nodes.end(code, why, failed["when"])
    if rank == here:
        screen.show(news + screen.read(), last=True)
    else:
        screen.show(news.split(b"Traceback (most recent call last)")[0], last=True)
    word = run.nodes.look(NODE_REPORT_S)
    if word is not None and word.when < failed["when"]:
        # What happened here is then most likely a lost connection to the node that failed.
        print(f"tele: node {word.node} failed first: {word.why}", file=sys.stderr)
    if failed["user_error"]:
        print(f"tele: {why}", file=sys.stderr)
        return code
    _ask_where(run)
    if failed["state"] == "running":
        if not seen and (last := last_lines(folder / f"worker_{rank}.log")):
            print(last, file=sys.stderr)
        print(f"tele: {why}; logs: {folder}", file=sys.stderr)
        return code
    if trace and not (seen and trace.encode() in screen.shown):
        print(f"rank {rank} failed:\n{trace}", file=sys.stderr)
    elif not trace and not seen and (last := last_lines(folder / f"worker_{rank}.log")):
        # A script that ended itself has said why, in a line: the one below. What led to it stands in its log.
        print(last, file=sys.stderr)
    for other in statuses:
        # Ranks that stop together stop with the same words.
        if other is not None and other["state"] == "failed" and other["error"] != failed["error"]:
            print(f"rank {other['rank']} failed after it: {other['error']}", file=sys.stderr)
    if word is not None and word.when >= failed["when"]:
        print(f"tele: node {word.node} failed after it: {word.why}", file=sys.stderr)
    print(f"tele: {why}; logs: {folder}", file=sys.stderr)
    return code


def _ended_elsewhere(run: _Running, word: Word, news: bytes) -> int:
    """Another node ended the job: leave as it did, and say why."""
    run.screen.show(news.split(b"Traceback (most recent call last)")[0], last=word.code != 130)
    if word.code == 130:
        print(f"tele: node {word.node} was interrupted; ending here too", file=sys.stderr)
        _interrupt(run)
        return 130
    run.waits.look(run.plan.ranks)
    where = _ask_where(run)
    if word.hang:
        lines = [f"tele: node {run.plan.node_rank}: who waits where:", *run.waits.table(where)]
        print("\n".join(lines), file=sys.stderr)
    print(f"tele: node {word.node} ended the job: {word.why}; logs: {run.plan.folder}", file=sys.stderr)
    return word.code


def _hang(run: _Running, rank: int, waited: float, limit: float) -> int:
    what = f"rank {rank} has waited {waited:.0f} s in {run.waits.describe(rank)}"
    run.nodes.end(1, what, hang=True)
    where = _ask_where(run)
    run.screen.show(run.screen.read(), last=True)
    print("\n".join([f"tele: {what}; who waits where:", *run.waits.table(where)]), file=sys.stderr)
    print(
        f"tele: more than --timeout {limit:g}, ending all processes; stacks: {run.plan.folder}/stack_<rank>.txt",
        file=sys.stderr,
    )
    return 1


def _give_up(run: _Running, log: str | None, why: str) -> int:
    run.nodes.end(1, why)
    run.screen.show(run.screen.read(), last=True)
    if log is not None and (last := last_lines(run.plan.folder / log, 40)):
        print(last, file=sys.stderr)
    print(f"tele: {why}; logs: {run.plan.folder}", file=sys.stderr)
    return 1


def _own(run: _Running) -> dict[int, psutil.Process]:
    """This node's rank processes that live, by rank."""
    alive = {process.pid: process for process in run.processes.alive()}
    return {s["rank"]: alive[s["pid"]] for s in run.statuses() if s is not None and s["pid"] in alive}


def _ask_where(run: _Running) -> dict[int, str]:
    """Have every living rank write its stack to its file, even from inside native code; the top of each, by rank."""
    asked = _own(run)
    for process in asked.values():
        with suppress(psutil.Error):
            process.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + STACK_DUMP_S
    paths = {rank: stack_path(run.plan.folder, rank) for rank in asked}
    while time.monotonic() < deadline and any(lives(asked[rank]) and not _bytes(paths[rank]) for rank in asked):
        time.sleep(POLL_S / 2)
    time.sleep(POLL_S / 2)  # for the rest of what they are writing
    tops = {rank: _top(_bytes(path).decode(errors="replace")) for rank, path in paths.items()}
    return {rank: top or f"no answer (process: {_state(asked[rank])})" for rank, top in tops.items()}


def _state(process: psutil.Process) -> str:
    try:
        return process.status()
    except psutil.Error:
        return "gone"


def _top(stack: str, frames: int = 3) -> str:
    """The innermost frames of faulthandler's newest dump, e.g. ``ops.py:7 wait < model.py:30 forward``, or ""."""
    found = []
    for line in stack.rpartition("Current thread")[2].splitlines()[1:]:
        if not line.startswith('  File "') or "<frozen runpy>" in line:
            break
        file, _, rest = line.removeprefix('  File "').rpartition('", line ')
        number, _, name = rest.partition(" in ")
        found.append(f"{Path(file).name}:{number} {name}")
    return " < ".join(found[:frames])


def _interrupt(run: _Running) -> None:
    """Pass Ctrl-C on to the ranks and let them leave, as training does after its step and a checkpoint."""
    screen, own = run.screen, _own(run)
    logs = [run.plan.folder / f"worker_{rank}.log" for rank in own]
    written = [_size(log) for log in logs]
    for process in own.values():
        with suppress(psutil.Error):
            process.send_signal(signal.SIGINT)
    try:
        started = time.monotonic()
        deadline, heard = started + SAVE_GRACE_S, False
        while time.monotonic() < deadline and any(lives(p) for p in own.values()):
            screen.show(screen.read())
            if any(s is not None and s["state"] != "running" for s in run.statuses()):
                deadline, heard = min(deadline, time.monotonic() + NO_ANSWER_S), True
            # A rank that means to save says so at once. One that hangs in native code does not even hear us.
            heard = heard or [_size(log) for log in logs] != written
            if not heard and time.monotonic() > started + NO_ANSWER_S:
                print(f"tele: no rank has answered for {NO_ANSWER_S:.0f} s, ending all processes", file=sys.stderr)
                break
            time.sleep(POLL_S)
        screen.show(screen.read(), last=True)
    except KeyboardInterrupt:
        print("tele: interrupted again, ending all processes now", file=sys.stderr)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
