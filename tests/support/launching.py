"""Launches of one rank carried out in the process of the test, those of several by ranks that stay.

A launch of one rank costs about 7 (PyTorch) or 9 (MindSpore) seconds of processor time for the launcher, msrun's
scheduler and the imports of each; the few steps of a test's tiny model cost less than one. Tests whose subject is what
a command computes use ``one_rank_here``, where a layout is of the essence with ranks that stay
(tests.support.warm_ranks); how ranks are launched is tested in tests/unit/launch and tests/multiproc.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from telechat_twins.core.launch import launcher, worker
from telechat_twins.core.launch.command import SCRIPTS
from telechat_twins.core.launch.run_lock import hold_folder
from tests.support.warm_ranks import Pool

# Modules that bind the launcher's function when they are imported; the others import it when they are called.
BINDING = ("core.parity.runs", "core.mup.search", "core.commands.demo")


def one_rank_here(patch: pytest.MonkeyPatch, real: Sequence[str] = (), pool: Pool | None = None) -> None:
    """Let commands that this process runs carry out launches of a single rank here; larger ones are real, or of the
    ranks of ``pool``.

    real: backends whose first launch is a real one all the same.
    """
    launch, left = launcher.launch, set(real)

    def instead(backend: str, script_args: Sequence[str], nproc: int = 1, *args: Any, **more: Any) -> int:
        several = nproc > 1 and more.get("nnodes", 1) == 1
        if backend not in left and pool is not None and several:
            return launch_warm(pool, backend, script_args, nproc, *args, **more)
        if nproc > 1 or more.get("nnodes", 1) > 1 or backend in left:
            left.discard(backend)
            return launch(backend, script_args, nproc, *args, **more)
        return launch_here(backend, script_args, *args, **more)

    patch.setattr(launcher, "launch", instead)
    for name in BINDING:
        patch.setattr(importlib.import_module(f"telechat_twins.{name}"), "launch", instead)


def launch_here(
    backend: str,
    script_args: Sequence[str],
    log_dir: str | Path = "logs",
    timeout: float | None = None,
    script: str | Path | None = None,
    *,
    instead: Callable[[], None] | None = None,
    **_: Any,
) -> int:
    """``launcher.launch`` of one rank without its processes: the same exit codes, log, status file and lock.

    The time limits, ``timeout`` and the collectives' one, are not kept.
    """
    path, folder = str(script or SCRIPTS[backend]), Path(log_dir).resolve()
    printed = io.StringIO()
    with hold_folder(folder), pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [path, *script_args])
        patch.setattr(worker, "_supervised", True)
        code, outcome = worker._run(path)
        (folder / "worker_0.log").write_text(printed.getvalue(), encoding="utf-8")
        worker.write_status(folder, 0, code, **outcome)
    if instead:
        instead()
    else:
        print(printed.getvalue(), end="")
    if code:
        print(f"tele: {outcome.get('message', '')}", file=sys.stderr)
    return code


def launch_warm(
    pool: Pool,
    backend: str,
    script_args: Sequence[str],
    nproc: int,
    log_dir: str | Path = "logs",
    timeout: float | None = None,
    script: str | Path | None = None,
    *,
    instead: Callable[[], None] | None = None,
    **_: Any,
) -> int:
    """``launcher.launch`` of several ranks on one node, by those of ``pool``: the same exit codes, logs, status files
    and lock. ``timeout`` is kept, the collectives' limit is that of the pool's first launch."""
    path, folder = str(Path(script or SCRIPTS[backend]).resolve()), Path(log_dir).resolve()
    with hold_folder(folder):
        code, outcome = pool.of(backend, nproc).run(path, script_args, folder, timeout or 300.0)
    if instead:
        instead()
    else:
        print((folder / "worker_0.log").read_text(encoding="utf-8"), end="")
    if code:
        print(f"tele: {outcome['message']}\n{outcome['trace']}", file=sys.stderr)
    return code
