"""Rank process: runs the training script and records its outcome in a status file.

    python core/launch/worker.py --status-dir D [options] script.py args...

msrun and torchrun report a failing rank late, each in its own format, or not at all. So the rank itself writes
`D/status_<rank>.json`, the same for both, with the keys rank, pid, state (running | done | failed), code, error (one
line), user_error, traceback and time. A rank that is killed (by a signal, or out of memory) leaves the state `running`
with the id of a process that no longer exists, from which the launcher sees that it died. While the script runs,
`D/heartbeat_<rank>.bin` shows the collective the rank waits in (core.launch.heartbeat), and on SIGUSR1 the rank writes
its Python stack to `D/stack_<rank>.txt` and goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import faulthandler
import json
import os
import runpy
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # A script started by its file name has its own folder first on sys.path. Put the folder that holds telechat_twins
    # there instead: the checkout, or, installed from a wheel, the folder above.
    sys.path[0] = str(ROOT if (ROOT / "telechat_twins").is_dir() else ROOT.parent)

from telechat_twins.core.errors import UserError, disk_full  # noqa: E402
from telechat_twins.core.launch.heartbeat import heartbeat_path, place_heartbeat  # noqa: E402
from telechat_twins.core.shown import controls_shown, escape_unencodable, printable  # noqa: E402
from telechat_twins.core.types import JsonObject  # noqa: E402

SCHEDULER = "scheduler"  # in the place of a rank number: msrun's scheduler writes a status file too
PEER_WAIT_S = 150.0  # a failed or interrupted rank waits this long for the others; above the launcher's own limits

STOPPED = 3  # code in a status file, and of a launch that asks for it: training ended itself on purpose

# First line of a log of msrun's; in the form of MindSpore's own lines, which core.launch.screen leaves in the file.
MEETING = (
    "[INFO] TELE({pid},launch): until all processes have met, MindSpore repeats below 'Topology build timed out., "
    "retry', 'Failed to connect to the meta server' and the like; they are no fault and stop within seconds"
)

_supervised = False
_folder: Path | None = None  # of the status files of this rank's launch


class SelfEnded(SystemExit):
    """End of a script on purpose, with its message: another start would end in the same way. Exit code 1."""


def run_script(main: Callable[[], int | None]) -> int:
    """Exit code of a training script, for ``raise SystemExit(run_script(main))`` at its end.

    Under plain msrun or torchrun, a UserError becomes one line on stderr and code 2, and Ctrl-C code 130. Under `tele`
    both propagate to this module, and the launcher prints one message for all ranks.
    """
    try:
        return main() or 0
    except UserError as error:
        if _supervised:
            raise
        print(f"tele: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if _supervised:
            raise
        return 130


def write_status(
    log_dir: str | Path,
    rank: int | str,
    code: int | None,
    message: str = "",
    *,
    user_error: bool = False,
    trace: str = "",
) -> None:
    """Write the status file of ``rank``: its exit ``code``, or None while it runs. The file is replaced atomically."""
    state = "running" if code is None else "done" if code == 0 else "failed"
    record = {
        "rank": rank,
        "pid": os.getpid(),
        "state": state,
        "code": code,
        "error": message,
        "user_error": user_error,
        "traceback": trace,
        "time": time.time(),
    }
    path = status_path(log_dir, rank)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record), encoding="utf-8")
    os.replace(beside, path)


def status_path(log_dir: str | Path, rank: int | str) -> Path:
    """File of what a rank says of its end (``read_status``)."""
    return Path(log_dir) / f"status_{rank}.json"


def stack_path(log_dir: str | Path, rank: int) -> Path:
    """File of the Python stack that a rank writes on SIGTERM and SIGUSR1; empty before the first of them."""
    return Path(log_dir) / f"stack_{rank}.txt"


def relayed_path(log_dir: str | Path) -> Path:
    """File with the name of the signal that a launcher passes on to its ranks as SIGINT."""
    return Path(log_dir) / "signal"


def relayed_signal() -> int | None:
    """The signal that the launcher of this rank has passed on as SIGINT; None where it has not, or there is none."""
    if _folder is None:
        return None
    try:
        return signal.Signals[relayed_path(_folder).read_text(encoding="utf-8")]
    except (OSError, KeyError, UnicodeDecodeError):
        return None


def read_status(log_dir: str | Path, rank: int | str) -> JsonObject | None:
    """The status of one rank; None before it has started."""
    try:
        return json.loads(status_path(log_dir, rank).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def die_with_parent(parent: int | None = None) -> None:
    """Have Linux kill this process when its parent dies, even by SIGKILL, so that no orphan is left.

    ``parent``: the parent's process id, where known. If it has died before this call, this process ends at once.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_launcher() -> None:
    """End this process when `tele` does: stdin is a pipe whose other end only `tele` holds, so it then reaches its end.

    ``die_with_parent`` alone leaves a gap: the parent is msrun or torchrun, and when that dies before the rank has made
    its call, the rank has another parent already and is never signalled. The end of a pipe cannot be missed.
    """
    line = os.dup(0)  # a dup is not inherited by the processes that this rank starts
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    die_with_parent()

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(line, 1)  # nothing is ever written, so this returns when the pipe is closed
        os.kill(os.getpid(), signal.SIGKILL)

    if select.select([line], [], [], 0)[0]:
        watch()
    threading.Thread(target=watch, name="launcher", daemon=True).start()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script as ``__main__`` and record the outcome; returns the exit code of this rank."""
    global _supervised, _folder
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--status-dir", type=Path, required=True)
    parser.add_argument("--output-file", help="file for stdout and stderr, with {rank} in its name; default: inherited")
    parser.add_argument("--terminal", action="store_true", help="rank 0's output is shown on a terminal")
    parser.add_argument("--lifeline", action="store_true", help="stdin is a pipe that closes when the launcher ends")
    parser.add_argument("--no-scheduler", action="store_true", help="exit at once as msrun's scheduler: node 0 runs it")
    parser.add_argument("script")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if options.lifeline:
        die_with_launcher()
    else:
        die_with_parent()
    # A shell starts background jobs with SIGINT ignored; this rank must react to it, since the launcher sends it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("MS_ROLE"):
        print(MEETING.format(pid=os.getpid()), flush=True)
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        return 0 if options.no_scheduler else _serve_as_scheduler(options.status_dir)
    rank = int(os.environ.get("RANK_ID") or os.environ.get("RANK") or 0)
    if options.output_file:
        file = Path(options.output_file)
        _redirect(file.with_name(file.name.replace("{rank}", str(rank))))  # the folder's name may hold anything
    escape_unencodable()
    if options.terminal and rank == 0:
        _pretend_terminal()
    _supervised, _folder = True, options.status_dir
    # On SIGTERM (from the launcher or torchrun) the rank first writes its stack, even from inside native code: that
    # shows where it hung, and that it was ended from outside rather than by an error of its own. Training replaces this
    # handler by its own, in order to save first, so the launcher asks for stacks by SIGUSR1.
    stack = open(stack_path(options.status_dir, rank), "w")  # noqa: SIM115
    faulthandler.register(signal.SIGTERM, stack, chain=True)
    faulthandler.register(signal.SIGUSR1, stack)
    place_heartbeat(heartbeat_path(options.status_dir, rank))
    write_status(options.status_dir, rank, None)
    sys.argv = [options.script, *options.args]
    code, outcome = _run(options.script)
    write_status(options.status_dir, rank, code, **outcome)
    if code:
        _wait_for_the_others(options.status_dir, rank)
    return code


def _wait_for_the_others(status_dir: Path, rank: int) -> None:
    """Wait until the other ranks of this node have ended too, or the launcher ends this one.

    msrun and torchrun kill all other ranks as soon as one exits with an error. After Ctrl-C that would interrupt a rank
    that is still saving. After a failure the launcher has read our status and ends the other ranks itself, in order.
    """
    deadline = time.monotonic() + PEER_WAIT_S
    while time.monotonic() < deadline:
        others = [path for path in status_dir.glob("status_*.json") if path != status_path(status_dir, rank)]
        states = [read_status(status_dir, path.stem.removeprefix("status_")) for path in others]
        if not any(s is not None and s["rank"] != SCHEDULER and s["state"] == "running" for s in states):
            return
        time.sleep(0.05)


def _run(script: str) -> tuple[int, JsonObject]:
    try:
        runpy.run_path(script, run_name="__main__")
    except SelfEnded as stop:
        print(stop.code, file=sys.stderr)
        return STOPPED, {"message": str(stop.code)}
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1, {"message": stop.code}
        code = stop.code or 0
        return code, {"message": f"the script exited with code {code}" if code else ""}
    except UserError as error:
        return 2, {"message": str(error), "user_error": True}
    except KeyboardInterrupt:
        return 130, {"message": "interrupted"}
    except BaseException as error:  # the rank ends here: every error is reported in its status file
        if (full := disk_full(error)) is not None:
            return 2, {"message": full, "user_error": True}
        trace = _own_traceback(error)
        print(controls_shown(trace), end="", file=sys.stderr, flush=True)
        return 1, {"message": printable(f"{type(error).__name__}: {error}".splitlines()[0]), "trace": trace}
    return 0, {}


def _own_traceback(error: BaseException) -> str:
    """The traceback without the frames of this file and of runpy, which are the same for every error."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame))


def _redirect(path: Path) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _pretend_terminal() -> None:
    """Make isatty true, so that progress bars are drawn: the launcher copies this rank's log to a terminal."""
    for stream in (sys.stdout, sys.stderr):
        stream.isatty = lambda: True  # type: ignore[method-assign]


def _serve_as_scheduler(status_dir: Path) -> int:
    """Run as msrun's scheduler: msrun starts the ranks' command once more for it. It takes no part in the training."""
    import importlib

    write_status(status_dir, SCHEDULER, None)
    try:
        importlib.import_module("mindspore.communication").init()  # returns when the workers have left
    except Exception as error:
        write_status(status_dir, SCHEDULER, 1, f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    write_status(status_dir, SCHEDULER, 0)
    return 0


if __name__ == "__main__":
    from telechat_twins.core.launch.worker import (
        main as run_worker,  # the module the script's own imports see, not this __main__ copy
    )

    raise SystemExit(run_worker())
