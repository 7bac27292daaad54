"""Launcher of distributed jobs on top of msrun and torchrun: live output of rank 0, the cause of a failure first, and
no process left behind.

msrun and torchrun start `core/launch/worker.py` once per rank. It runs the backend's train.py, writes
`LOG_DIR/status_<rank>.json` and sends the rank's output to `LOG_DIR/worker_<rank>.log`, so that one loop serves both
backends: it shows rank 0's output, watches status files, heartbeats and processes, and finally ends everything that was
started. A rank that is ended leaves its Python stack in `LOG_DIR/stack_<rank>.txt`; the output of msrun or torchrun
itself is in `LOG_DIR/launcher.log`. Rank numbers are global. In a job on several machines each node runs one such
launcher, which watches its own ranks and learns from core.launch.nodes when another node ends the job.
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
    node_logs,
)
from telechat_twins.core.launch.heartbeat import Waits
from telechat_twins.core.launch.nodes import RENDEZVOUS_S, JobEnd, Nodes, bind, meet
from telechat_twins.core.launch.processes import Deaths, OwnTime, ProcessTree, lives
from telechat_twins.core.launch.run_lock import hold_folder
from telechat_twins.core.launch.screen import Screen, last_lines
from telechat_twins.core.launch.signals import name_of, signals_as_interrupt
from telechat_twins.core.launch.stacks import dump_stacks, read_bytes
from telechat_twins.core.launch.worker import SCHEDULER, STOPPED, read_status, relayed_path, stack_path
from telechat_twins.core.shown import from_here
from telechat_twins.core.types import JsonObject

# Longest time of a rank in one collective. Below the 10 minutes after which NCCL's own watchdog ends a rank without
# saying who waits for whom, and above any wait that a healthy run has (a slow file system at a checkpoint).
COLLECTIVE_TIMEOUT_S = 540.0

POLL_S = 0.1  # between two looks at logs, status files, heartbeats and processes
# Limits on what processes still have to do are seconds that they have had (OwnTime), since a crowded machine lets them
# wait: EXIT_GRACE_S, SCHEDULER_START_S, SAVE_GRACE_S and NO_ANSWER_S.
EXIT_GRACE_S = 20.0  # for the rank processes to end after the script has finished (MindSpore's take about 3)
LAUNCHER_EXIT_S = 1.0  # for msrun or torchrun to end after them; msrun's scheduler takes longer, without effect
SCHEDULER_START_S = 60.0  # after the first rank's status, for msrun's scheduler to have written its own
SCHEDULER_GRACE_S = 1.0  # between the scheduler's failure and its report: a failing rank is found first in that time
SAVE_GRACE_S = 120.0  # after Ctrl-C, for the ranks to finish their step and save; a second Ctrl-C ends it
NO_ANSWER_S = 45.0  # of these, where no rank shows a reaction, or for the other ranks once one has left
NODE_REPORT_S = 1.0  # to hear whether another node failed first
SETTLE_S = 0.2  # after the first sign of a failure, for the signs of its cause to appear
DEATH_LAG_S = 0.3  # between the death of a process and its detection, at most


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
    stopped: int = 1,
) -> int:
    """Run ``script`` (default: the backend's train.py) in ``nproc`` processes and wait for the end.

    backend: "ms" (msrun) or "pt" (torchrun). Returns 0; 1 when a rank failed, ``timeout`` seconds passed, or a rank was
    inside one collective for ``collective_timeout`` seconds (0: no limit; stderr says who waits where); 2 when the
    failing rank met a UserError (its one line is on stderr); 130 after Ctrl-C or SIGTERM. When this function returns,
    no process it started is left.

    ``stopped``: the code for training that ended itself, which another start would not change. ``instead`` is called
    many times a second in place of showing rank 0's output, which then stays in its log only.

    Several machines: each calls this with the same ``nnodes``, ``nproc`` and ``master`` ("host:port" of node 0, which
    uses port + 1 too) and with its own ``node_rank``. They wait for each other and together run nnodes * nproc ranks.
    When the job ends on one node, it ends on all of them with the same code. Logs of node n > 0 go to
    ``<log_dir>-node<n>``, so ``log_dir`` may lie on a shared file system.

    The log folder is locked (core.launch.run_lock): two launches cannot use it at once.

    Raises UserError when the backend is not installed, the nodes were started with different options, or another launch
    holds the log folder.
    """
    if importlib.util.find_spec(FRAMEWORK[backend]) is None:
        raise UserError(f"backend {backend}: {FRAMEWORK[backend]} is not installed here; see `tele doctor`")
    host, port = check_nodes(nproc, nnodes, node_rank, master)
    folder = node_logs(log_dir, node_rank).resolve()
    path = Path(script or SCRIPTS[backend]).resolve()
    plan = LaunchPlan(backend, path, tuple(script_args), nproc, folder, nnodes, node_rank, host, port)
    env = environment(plan)
    limits = LaunchLimits(timeout, collective_timeout)
    # Locked before any file there is touched: it may hold the logs of a launch that is still running.
    with signals_as_interrupt(), hold_folder(folder):
        try:
            check_port(plan)
            facts = {"--nproc": nproc, "--backend": backend}
            nodes = meet(node_rank, nnodes, host, port, facts, min(RENDEZVOUS_S, timeout or RENDEZVOUS_S))
        except KeyboardInterrupt:
            return 130
        with nodes:
            try:
                code = _run(plan, env, nodes, limits, instead)
            except _PortTaken:
                print("tele: the port chosen for msrun was taken meanwhile; starting once more", file=sys.stderr)
                code = _run(plan, env, nodes, limits, instead, again=True)
            finally:
                shutil.rmtree(folder / TORCHRUN_LOGS, ignore_errors=True)
    return stopped if code == STOPPED else code


@dataclass(frozen=True)
class LaunchLimits:
    """Time limits in seconds: of the whole job (None: no limit) and of one collective (0: no limit)."""

    job_s: float | None
    collective_s: float


class _PortTaken(Exception):
    """Another program took msrun's port between its choice and its use. No rank has begun, so a new start is safe."""


@dataclass
class _Running:
    """One started job: its plan, its processes, and everything that watches them."""

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
    for pattern in ("status_*", "worker_*.log", "stack_*.txt", "heartbeat_*.bin", "scheduler.log", "signal"):
        for old in folder.glob(pattern):
            old.unlink()
    # Kept bound while the job runs, so that the system assigns the port to no other program.
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
            except KeyboardInterrupt as interrupt:
                nodes.end(130, name_of(interrupt))
                _interrupt(run, name_of(interrupt))
                return 130
    finally:
        if reserved:
            reserved.close()


def _watch(run: _Running, limits: LaunchLimits, again: bool) -> int:
    """Poll logs, statuses, nodes and processes until the job has ended; its exit code.

    The checks are in the order of cause and effect: a failed rank may be the reason why the launcher is gone, why other
    ranks hang, or why the time is up, so the rank is looked for first.
    """
    started = time.monotonic()
    scheduler, leaving = _Scheduler(run), _Leaving(run)
    while True:
        # Read before the statuses, shown after them: what rank 0 writes because another rank died is then not shown
        # before the cause.
        news = run.screen.read()
        statuses = run.statuses()
        launcher_code = run.processes.launcher.poll()
        run.processes.look()
        code = _failed_here(run, statuses, news)
        if code is None and (ended := run.nodes.look()) is not None:
            code = _ended_elsewhere(run, ended, news)
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
    """Report the rank of this node that failed first and return the exit code; None while none has failed."""
    folder = run.plan.folder
    for status in statuses:
        if status is not None:
            run.deaths.watch(status["pid"])
    if _first_failure(statuses, run.deaths, folder) is None:
        return None
    # One rank's failure makes the others fail within milliseconds, and theirs may be seen first. Wait a moment, then
    # decide by the recorded times.
    time.sleep(SETTLE_S)
    statuses = run.statuses()
    failed = _first_failure(statuses, run.deaths, folder)
    return None if failed is None else _report(run, failed, statuses, news)


class _Leaving:
    """Orderly end of a job: every rank here has the status "done", and its process, msrun and the other nodes may still
    have to end."""

    def __init__(self, run: _Running) -> None:
        self.run = run
        self.finished: float | None = None  # when the ranks of every node were done
        self.gone: float | None = None  # when the rank processes of this node had ended
        self.own = OwnTime()  # of what is left, since then

    def ended(self, statuses: list[JsonObject | None], launcher_code: int | None) -> int | None:
        """Exit code 0 once msrun or torchrun may be ended; None while it may still serve ranks of other nodes."""
        run, now = self.run, time.monotonic()
        if self.gone is None and all(s is not None and run.deaths.when(s["pid"]) for s in statuses):
            self.gone = now
        run.nodes.done()
        self.finished = self.finished or (now if run.nodes.finished else None)
        if self.finished is None:
            return None
        had = self.own.look(run.processes.alive())
        settled = max(self.finished, self.gone or now)
        if launcher_code is None and now - settled <= LAUNCHER_EXIT_S and had <= EXIT_GRACE_S:
            return None
        run.screen.show(run.screen.read(), last=True)
        # Every rank has reported success, so the job has succeeded. A later error of msrun or torchrun is printed, but
        # does not change the exit code.
        if launcher_code or self.gone is None:
            what = f"their launcher ended with code {launcher_code}" if launcher_code else "their processes did not end"
            _tell(f"tele: all ranks finished, but {what}; logs: {run.plan.folder}")
        return 0


def _scheduler_lost(run: _Running, again: bool) -> int:
    """End a job whose msrun scheduler has failed. Raises _PortTaken where a start on another port may help."""
    if b"Address already in use" not in read_bytes(run.plan.folder / "scheduler.log"):
        return _give_up(run, "scheduler.log", "msrun's scheduler, through which the ranks meet, has failed")
    if not again and run.plan.nnodes == 1:
        raise _PortTaken
    return _give_up(run, None, f"msrun's port {run.plan.port or ''} was taken by another program")


def _out_of_time(run: _Running, statuses: list[JsonObject | None], limits: LaunchLimits, started: float) -> int | None:
    """End a job whose longest collective or whole duration exceeds its limit and return the exit code, else None.

    A rank counts as hung when it has been inside the same collective for longer than the limit. Its heartbeat names
    that collective and the ranks it waits for; a rank that computes, however long, is outside of collectives and never
    counts. The rank reported is the one that has waited longest; the cause is usually a rank of its group that the
    table shows elsewhere.
    """
    rank, waited = run.waits.look([s["rank"] for s in statuses if s is not None and s["state"] == "running"])
    if 0 < limits.collective_s < waited:
        return _hang(run, rank, waited, limits.collective_s)
    if limits.job_s is None or time.monotonic() - started <= limits.job_s:
        return None
    run.nodes.end(1, f"not finished after {limits.job_s:.0f} s")
    lines = [f"tele: not finished after {limits.job_s:.0f} s; who waits where:", *run.waits.table(_stacks(run))]
    print("\n".join(lines), file=sys.stderr)
    _tell(f"tele: ending all processes; stacks: {run.plan.folder}/stack_<rank>.txt")
    return 1


class _Scheduler:
    """Watch over msrun's scheduler on node 0: when it fails at the start, the ranks wait for it for many minutes."""

    def __init__(self, run: _Running) -> None:
        # msrun starts a scheduler, which the ranks join, even for a single rank.
        self.run = run if run.plan.backend == "ms" and not run.plan.node_rank else None
        self.since: float | None = None
        self.own = OwnTime()  # in which it has not started

    def failed(self) -> bool:
        """Whether the scheduler has been failed or dead for SCHEDULER_GRACE_S, in which a rank that failed before it
        would have been found; or has not started SCHEDULER_START_S after the ranks."""
        if self.run is None:
            return False
        status = read_status(self.run.plan.folder, SCHEDULER)
        if status is None:  # not started: it writes its status before anything else, as a rank does
            return any(self.run.statuses()) and self.own.look(self.run.processes.alive()) > SCHEDULER_START_S
        self.run.deaths.watch(status["pid"])
        if status["state"] == "done" or (status["state"] == "running" and not self.run.deaths.when(status["pid"])):
            self.since = None
            return False
        self.since = self.since or time.monotonic()
        return time.monotonic() - self.since > SCHEDULER_GRACE_S


def _first_failure(statuses: list[JsonObject | None], deaths: Deaths, folder: Path) -> JsonObject | None:
    """Status of the rank that failed first, or None. Key ``when`` of the result is the time that was compared.

    When one rank is gone, the others soon fail too: on a lost connection, or ended by their launcher. The first failure
    is therefore the cause. Its time is that in the status file, or the time of death of a process whose status is still
    "running". A dying process closes its connections before its death is detected, so errors of the other ranks may
    carry the older time: DEATH_LAG_S is taken off a time of death. Ranks that wrote a stack on SIGTERM were ended from
    outside and come last.
    """
    failures = []
    for status in statuses:
        if status is not None and status["state"] == "running" and deaths.when(status["pid"]):
            status = read_status(folder, status["rank"])  # it may have written its error just before it died
        if status is None or status["state"] == "done":
            continue
        died = deaths.when(status["pid"])
        when = status["time"] if status["state"] == "failed" else died - DEATH_LAG_S if died is not None else None
        if when is not None:
            stack = stack_path(folder, status["rank"])
            ended_from_outside = stack.exists() and stack.stat().st_size > 0
            failures.append((ended_from_outside, when, status["rank"], status))
    if not failures:
        return None
    _, when, _, first = min(failures, key=lambda failure: failure[:3])
    return {**first, "when": when}


def _report(run: _Running, failed: JsonObject, statuses: list[JsonObject | None], news: bytes) -> int:
    """Print why the job fails, the first failure first, notify the other nodes, and return the exit code."""
    folder, screen = run.plan.folder, run.screen
    rank, trace, here = failed["rank"], failed.get("traceback") or "", run.plan.ranks[0]
    seen = rank == here and screen.instead is None  # its log is on the screen already
    if failed["state"] == "running" and (full := _disk_full(folder)):  # so it could not say what happened
        failed = {**failed, "user_error": True, "error": full}
    if failed["user_error"]:
        why, code = failed["error"], 2
    elif failed["state"] == "running":
        why, code = f"rank {rank} was killed or crashed (no Python error)", 1
    else:
        code = failed["code"] if failed["code"] in (2, STOPPED, 130) else 1
        why = f"rank {rank} failed: {failed['error']}"
    run.nodes.end(code, why, failed["when"])
    if rank == here:
        screen.show(news + screen.read(), last=True)
    else:
        screen.show(news.split(b"Traceback (most recent call last)")[0], last=True)
    ended = run.nodes.look(NODE_REPORT_S)
    if ended is not None and ended.when < failed["when"]:
        # The failure here is then most likely a lost connection to that node.
        _tell(f"tele: node {ended.node} failed first: {ended.why}")
    if failed["user_error"]:
        _tell(f"tele: {why}")
        return code
    _stacks(run)
    if failed["state"] == "running":
        if not seen and (last := last_lines(folder / f"worker_{rank}.log")):
            print(last, file=sys.stderr)
        _tell(f"tele: {why}; logs: {folder}")
        return code
    if trace and not (seen and trace.encode() in screen.shown):
        print(f"rank {rank} failed:\n{trace}", file=sys.stderr)
    elif not trace and not seen and (last := last_lines(folder / f"worker_{rank}.log")):
        # A script that exited by itself has no traceback; the end of its log shows what led to it.
        print(last, file=sys.stderr)
    for other in statuses:
        # Ranks that stop by agreement have the same message: print it once.
        if other is not None and other["state"] == "failed" and other["error"] != failed["error"]:
            print(f"rank {other['rank']} failed after it: {other['error']}", file=sys.stderr)
    if ended is not None and ended.when >= failed["when"]:
        _tell(f"tele: node {ended.node} failed after it: {ended.why}")
    _tell(f"tele: {why}; logs: {folder}")
    return code


def _ended_elsewhere(run: _Running, ended: JobEnd, news: bytes) -> int:
    """End this node's part of a job that another node has ended; the exit code is that node's."""
    run.screen.show(news.split(b"Traceback (most recent call last)")[0], last=ended.code != 130)
    if ended.code == 130:
        _tell(f"tele: node {ended.node} was interrupted; ending here too")
        _interrupt(run, ended.why)
        return 130
    run.waits.look(run.plan.ranks)
    where = _stacks(run)
    if ended.hang:
        lines = [f"tele: node {run.plan.node_rank}: who waits where:", *run.waits.table(where)]
        print("\n".join(lines), file=sys.stderr)
    _tell(f"tele: node {ended.node} ended the job: {ended.why}; logs: {run.plan.folder}")
    return ended.code


def _hang(run: _Running, rank: int, waited: float, limit: float) -> int:
    """Report a hung job with a table of all ranks (collective, seconds, stack), and end it."""
    what = f"rank {rank} has waited {waited:.0f} s in {run.waits.describe(rank)}"
    run.nodes.end(1, what, hang=True)
    where = _stacks(run)
    run.screen.show(run.screen.read(), last=True)
    print("\n".join([f"tele: {what}; who waits where:", *run.waits.table(where)]), file=sys.stderr)
    _tell(f"tele: more than --timeout {limit:g}, ending all processes; stacks: {run.plan.folder}/stack_<rank>.txt")
    return 1


def _disk_full(folder: Path) -> str | None:
    """What to tell a user whose logs have no room: such ranks end without a status, and msrun and torchrun fail."""
    return None if shutil.disk_usage(folder).free else f"{folder}: the disk is full; free some space and start again"


def _give_up(run: _Running, log: str | None, why: str) -> int:
    """End a job that failed outside its ranks; ``log``: the file whose last lines explain it."""
    if full := _disk_full(run.plan.folder):
        run.nodes.end(2, full)
        _tell(f"tele: {full}")
        return 2
    run.nodes.end(1, why)
    run.screen.show(run.screen.read(), last=True)
    if log is not None and (last := last_lines(run.plan.folder / log, 40)):
        print(last, file=sys.stderr)
    _tell(f"tele: {why}; logs: {run.plan.folder}")
    return 1


def _own(run: _Running) -> dict[int, psutil.Process]:
    """The living rank processes of this node, by rank."""
    alive = {process.pid: process for process in run.processes.alive()}
    return {s["rank"]: alive[s["pid"]] for s in run.statuses() if s is not None and s["pid"] in alive}


def _stacks(run: _Running) -> dict[int, str]:
    """The innermost frames of each living rank of this node, by rank."""
    return dump_stacks(run.plan.folder, _own(run))


def _interrupt(run: _Running, name: str) -> None:
    """Pass a signal on to the ranks as Ctrl-C and wait for them to end: training finishes its step and saves first.
    ``name``: of that signal, for what they say."""
    with suppress(OSError):  # a full disk: they say SIGINT
        relayed_path(run.plan.folder).write_text(name, encoding="utf-8")
    screen, own = run.screen, _own(run)
    logs = [run.plan.folder / f"worker_{rank}.log" for rank in own]
    written = [_size(log) for log in logs]
    for process in own.values():
        with suppress(psutil.Error):
            process.send_signal(signal.SIGINT)
    try:
        time_had, deadline, heard = OwnTime(), SAVE_GRACE_S, False
        while (had := time_had.look(own.values())) < deadline and any(lives(p) for p in own.values()):
            screen.show(screen.read())
            if any(s is not None and s["state"] != "running" for s in run.statuses()):
                deadline, heard = min(deadline, had + NO_ANSWER_S), True
            # A rank that is about to save prints a line at once. One that hangs in native code does not react at all,
            # and waiting SAVE_GRACE_S for it would be in vain.
            heard = heard or [_size(log) for log in logs] != written
            if not heard and had > NO_ANSWER_S:
                _tell(f"tele: no rank has answered for {NO_ANSWER_S:.0f} s, ending all processes")
                break
            time.sleep(POLL_S)
        screen.show(screen.read(), last=True)
    except KeyboardInterrupt:
        print("tele: interrupted again, ending all processes now", file=sys.stderr)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _tell(text: str) -> None:
    print(from_here(text), file=sys.stderr)
