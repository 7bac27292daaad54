"""One rank as `tele` starts it: runs a script and leaves a status file that says how it ended.

    python core/launch/worker.py --status-dir D [options] script.py args...

The launchers (msrun, torchrun) report a failing rank late, in their own words, or not at all; a status file written
by the rank itself is the same for both: `D/status_<rank>.json` with the keys rank, pid, state (running | done |
failed), code, error (one line), user_error, traceback and time. A rank that dies without Python's help (a signal, no
memory left) leaves `running` behind with a process id that no longer lives, which says it too. While the script runs,
`D/heartbeat_<rank>.bin` says which collective the rank waits in (core.launch.heartbeat), and SIGUSR1 makes the rank
write its Python stack to `D/stack_<rank>.txt` and go on.
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
    # Started by file name, Python puts core/launch/ itself first on the path instead of the folder that holds
    # telechat_twins: the checkout, or in a wheel the folder above it.
    sys.path[0] = str(ROOT if (ROOT / "telechat_twins").is_dir() else ROOT.parent)

from telechat_twins.core.errors import UserError  # noqa: E402
from telechat_twins.core.launch.heartbeat import heartbeat_path, place_heartbeat  # noqa: E402
from telechat_twins.core.shown import controls_shown, printable  # noqa: E402
from telechat_twins.core.types import JsonObject  # noqa: E402

SCHEDULER = "scheduler"  # in the place of a rank: msrun's scheduler keeps a status file too
PEER_WAIT_S = (
    150.0  # seconds a rank that failed or was interrupted may wait for the others; above the launcher's own limits
)

_supervised = False


def run_script(main: Callable[[], int | None]) -> int:
    """What a training script ends with: ``raise SystemExit(run_script(main))``.

    Started by hand (raw msrun or torchrun), a UserError becomes one line on stderr and code 2, Ctrl-C code 130. Started
    by `tele`, both are left to the launcher, which speaks for all ranks.
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
    """Record how rank ``rank`` ended (``code`` None: it still runs). The file is replaced in one step."""
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
    return Path(log_dir) / f"status_{rank}.json"


def stack_path(log_dir: str | Path, rank: int) -> Path:
    """Where a rank that was told to end wrote its Python stack; empty otherwise."""
    return Path(log_dir) / f"stack_{rank}.txt"


def read_status(log_dir: str | Path, rank: int | str) -> JsonObject | None:
    """The record of one rank, or None while it has not started."""
    try:
        return json.loads(status_path(log_dir, rank).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when the one that started it dies, even by SIGKILL: no orphans.

    ``parent``: its process id, where it is known; if that one has died before it could be asked, this one dies now.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 is PR_SET_PDEATHSIG
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def die_with_launcher() -> None:
    """Take stdin, a pipe whose other end `tele` alone holds, as the sign that it lives: die when the pipe ends.

    Between `tele` and a rank stands msrun or torchrun. When both die before the rank has asked for its parent's death,
    nothing else would tell it: who its parent was to be, it does not know. The end of a pipe stays to be seen.
    """
    line = os.dup(0)  # not inherited: what this rank starts need not know
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    die_with_parent()

    def watch() -> None:
        with contextlib.suppress(OSError):
            os.read(line, 1)  # nothing is ever written: it returns at the end
        os.kill(os.getpid(), signal.SIGKILL)

    if select.select([line], [], [], 0)[0]:
        watch()
    threading.Thread(target=watch, name="launcher", daemon=True).start()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script as ``__main__`` and record the outcome; returns the exit code of this rank."""
    global _supervised
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--status-dir", type=Path, required=True)
    parser.add_argument("--output-file", help="write output here, not to the inherited streams; {rank} is filled in")
    parser.add_argument("--terminal", action="store_true", help="rank 0's output is shown on a terminal")
    parser.add_argument("--lifeline", action="store_true", help="stdin is a pipe that ends with the launcher")
    parser.add_argument("--no-scheduler", action="store_true", help="as msrun's scheduler, leave: another node has it")
    parser.add_argument("script")
    parser.add_argument("args", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if options.lifeline:
        die_with_launcher()
    else:
        die_with_parent()
    # A job started in the background inherits "ignore SIGINT"; this rank must be able to hear its launcher.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.get("MS_ROLE") == "MS_SCHED":
        return 0 if options.no_scheduler else _serve_as_scheduler(options.status_dir)
    rank = int(os.environ.get("RANK_ID") or os.environ.get("RANK") or 0)
    if options.output_file:
        _redirect(options.output_file.format(rank=rank))
    if options.terminal and rank == 0:
        _pretend_terminal()
    _supervised = True
    # Told to end (by us or by torchrun), the rank first writes where it was, even from inside native code: that shows
    # where it hung, and that it was a victim and not the cause. A script may put its own handler in that one's place
    # (training does, to save first), so the launcher asks by another signal.
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
    """Stay until the other ranks here have ended too, or the launcher ends us.

    msrun and torchrun kill all other ranks as soon as one exits with an error. After Ctrl-C that would cut off a rank
    that is still saving; after a failure the launcher, which has read our status by then, ends the job in better order.
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
    except BaseException as error:  # the rank ends here; whatever it was is reported, not swallowed
        trace = _own_traceback(error)
        print(controls_shown(trace), end="", file=sys.stderr, flush=True)
        return 1, {"message": printable(f"{type(error).__name__}: {error}".splitlines()[0]), "trace": trace}
    return 0, {}


def _own_traceback(error: BaseException) -> str:
    """The traceback without the frames of this file and of runpy, which say nothing about the mistake."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame))


def _redirect(path: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _pretend_terminal() -> None:
    """Let progress bars be drawn: this rank writes to a file, but its launcher copies each byte to a terminal."""
    for stream in (sys.stdout, sys.stderr):
        stream.isatty = lambda: True  # type: ignore[method-assign]


def _serve_as_scheduler(status_dir: Path) -> int:
    """msrun runs the same command once more as the cluster's scheduler, which has no part in the training itself."""
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
