"""What a launch starts: the command line of msrun or torchrun for one node, and the environment of its ranks."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.errors import UserError
from telechat_twins.core.files import ROOT
from telechat_twins.core.launch.nodes import bind, parse_master

SCRIPTS = {"ms": ROOT / "telechat_ms" / "train.py", "pt": ROOT / "pt_reference" / "train.py"}
MAX_PROCESSES = 256  # of one machine; none has as many devices
FRAMEWORK = {"ms": "mindspore", "pt": "torch"}
TORCHRUN_LOGS = "torchrun"

# Left by a launcher around this one (a cluster's own, say), these would tell a rank a wrong place.
PLACES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("RANK_ID", "RANK_SIZE", "MS_ROLE", "MS_NODE_ID", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT"),
)


@dataclass(frozen=True)
class LaunchPlan:
    """What one launcher starts. ``port`` 0: one machine, the port is chosen by itself."""

    backend: str
    script: Path
    args: tuple[str, ...]
    nproc: int
    folder: Path
    nnodes: int = 1
    node_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def world(self) -> int:
        return self.nnodes * self.nproc

    @property
    def ranks(self) -> range:
        """The ranks of this node: nodes hold equal shares, in order."""
        return range(self.node_rank * self.nproc, (self.node_rank + 1) * self.nproc)


def check_nodes(nproc: int, nnodes: int, node_rank: int, master: str | None) -> tuple[str, int]:
    """(host, port) of node 0, ("127.0.0.1", 0) on one machine; UserError for numbers that cannot be."""
    for name, number in (("--nproc", nproc), ("--nnodes", nnodes)):
        if number < 1:
            raise UserError(f"{name}: must be at least 1, found {number}")
    if nproc > MAX_PROCESSES:
        raise UserError(f"--nproc: {nproc} processes on one machine are too many; at most {MAX_PROCESSES}")
    if not 0 <= node_rank < nnodes:
        raise UserError(f"--node-rank: must be from 0 to {nnodes - 1} with --nnodes {nnodes}, found {node_rank}")
    if nnodes == 1:
        return "127.0.0.1", 0
    if master is None:
        raise UserError(f"--master: needed with --nnodes {nnodes}; give HOST:PORT of node 0, the same on every node")
    return parse_master(master)


def command(plan: LaunchPlan, port: int) -> list[str]:
    """The launcher's own command line. ``port`` 0: torchrun finds one."""
    worker = [str(ROOT / "core" / "launch" / "worker.py"), "--status-dir", str(plan.folder), "--lifeline"]
    if sys.stdout.isatty():
        worker.append("--terminal")
    if plan.backend == "ms":
        launcher = [sys.executable, "-m", "mindspore.parallel.cluster.run"]  # what the `msrun` command itself calls
        launcher += [f"--worker_num={plan.world}", f"--local_worker_num={plan.nproc}"]
        launcher += [f"--master_addr={plan.host}", f"--master_port={port}"]
        if plan.nnodes > 1:
            launcher.append(f"--node_rank={plan.node_rank}")
        # msrun would start a `tail` per worker; a number no worker has switches that off, this file does the showing
        launcher += [f"--log_dir={plan.folder}", "--join=True", f"--tail_worker_log={plan.world}"]
        if plan.node_rank > 0:
            # msrun starts a scheduler wherever the master's address is local: twice, when two nodes share a machine.
            worker.append("--no-scheduler")
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={plan.nproc}"]
        if plan.nnodes == 1:
            launcher.append("--standalone")
        else:
            launcher += [f"--nnodes={plan.nnodes}", f"--node-rank={plan.node_rank}"]
            launcher += [f"--master-addr={plan.host}", f"--master-port={port}"]
        # torchrun makes folders for logs even when it keeps none: without this, a new tree in /tmp at every launch.
        launcher.append(f"--log-dir={plan.folder / TORCHRUN_LOGS}")
        worker += ["--output-file", str(plan.folder / "worker_{rank}.log")]
    return [*launcher, *worker, str(plan.script), *plan.args]


def environment(plan: LaunchPlan) -> dict[str, str]:
    """The ranks' environment; UserError where msrun could not start them."""
    env = {name: value for name, value in os.environ.items() if name not in PLACES}
    beside = Path(sys.executable).parent
    if plan.backend == "ms" and not (beside / "python").exists():
        raise UserError(f"msrun starts `python`, and {beside} has none; use a virtual environment")
    env["PATH"] = os.pathsep.join([str(beside), env.get("PATH", "")])
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONFAULTHANDLER"] = "1"  # a crash in native code leaves the Python stack in the rank's log
    size = shutil.get_terminal_size()  # progress bars write to a file there and cannot ask
    env["COLUMNS"], env["LINES"] = str(size.columns), str(size.lines)
    if plan.backend == "ms":
        # Measured: without it every small operator on the CPU waits about 4 ms for a spinning OpenMP thread.
        env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if plan.nproc > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // plan.nproc)))
    return env


def check_port(plan: LaunchPlan) -> None:
    """UserError on node 0 when ``--master`` cannot be served here."""
    if not plan.port or plan.node_rank:
        return
    try:
        bind(plan.host, plan.port).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"--master: port {plan.port} is in use on this machine, by another node 0 (of this job or of another) "
                "or by another program; give this machine its own --node-rank, or this job another port"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL and plan.backend == "ms":
            # msrun starts its scheduler only on the machine that has this address itself.
            raise UserError(
                f"--master: {plan.host} is not an address of this machine (node 0); give one that is"
            ) from None
