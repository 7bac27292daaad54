"""Command line of msrun or torchrun for one node, and the environment of its ranks."""

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
MAX_PROCESSES = 256  # on one machine: more than any has devices
FRAMEWORK = {"ms": "mindspore", "pt": "torch"}
TORCHRUN_LOGS = "torchrun"

# Variables by which a launcher gives a process its rank. Inherited from one around this launch (a cluster's own, say),
# they would give our ranks wrong numbers, so they are removed.
RANK_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("RANK_ID", "RANK_SIZE", "MS_ROLE", "MS_NODE_ID", "MS_WORKER_NUM", "MS_SCHED_HOST", "MS_SCHED_PORT"),
)


@dataclass(frozen=True)
class LaunchPlan:
    """Everything that one node's launcher has to know. ``port`` 0: a single machine, whose port is chosen here."""

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
        """Global ranks of this node: node n holds ranks n * nproc to (n + 1) * nproc - 1."""
        return range(self.node_rank * self.nproc, (self.node_rank + 1) * self.nproc)


def node_logs(logs: str | Path, node_rank: int) -> Path:
    """Folder of one node's logs: ``logs`` for node 0, ``logs-nodeN`` beside it for node N."""
    return Path(f"{logs}-node{node_rank}" if node_rank else logs)


def check_nodes(nproc: int, nnodes: int, node_rank: int, master: str | None) -> tuple[str, int]:
    """(host, port) of node 0, ("127.0.0.1", 0) on one machine. UserError names the option that is out of range."""
    for name, number in (("--nproc", nproc), ("--nnodes", nnodes)):
        if number < 1:
            raise UserError(f"{name}: must be at least 1, found {number}")
    if nproc > MAX_PROCESSES:
        raise UserError(f"--nproc: must be at most {MAX_PROCESSES} on one machine, found {nproc}")
    if not 0 <= node_rank < nnodes:
        raise UserError(f"--node-rank: must be from 0 to {nnodes - 1} with --nnodes {nnodes}, found {node_rank}")
    if nnodes == 1:
        return "127.0.0.1", 0
    if master is None:
        raise UserError(f"--master: required with --nnodes {nnodes}; give HOST:PORT of node 0, the same on every node")
    return parse_master(master)


def command(plan: LaunchPlan, port: int) -> list[str]:
    """The command line of msrun or torchrun. ``port`` 0: torchrun picks a free one."""
    worker = [str(ROOT / "core" / "launch" / "worker.py"), "--status-dir", str(plan.folder), "--lifeline"]
    if sys.stdout.isatty():
        worker.append("--terminal")
    if plan.backend == "ms":
        launcher = [sys.executable, "-m", "mindspore.parallel.cluster.run"]  # what the `msrun` command itself calls
        launcher += [f"--worker_num={plan.world}", f"--local_worker_num={plan.nproc}"]
        launcher += [f"--master_addr={plan.host}", f"--master_port={port}"]
        if plan.nnodes > 1:
            launcher.append(f"--node_rank={plan.node_rank}")
        # msrun starts a `tail` for the worker named here. A number that no worker has switches that off, since
        # core.launch.screen shows rank 0's output.
        launcher += [f"--log_dir={plan.folder}", "--join=True", f"--tail_worker_log={plan.world}"]
        if plan.node_rank > 0:
            # msrun starts a scheduler wherever the master's address is local. Two nodes on one machine would start two.
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
    """Environment of the ranks. UserError when msrun would not find a `python` to start them with."""
    env = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    beside = Path(sys.executable).parent
    if plan.backend == "ms" and not (beside / "python").exists():
        raise UserError(
            f"backend ms: msrun starts its ranks with `python`, and there is none in {beside}; "
            "run from a virtual environment"
        )
    env["PATH"] = os.pathsep.join([str(beside), env.get("PATH", "")])
    env["PYTHONUNBUFFERED"] = "1"
    env["PYTHONFAULTHANDLER"] = "1"  # a crash in native code then leaves the Python stack in the rank's log
    size = shutil.get_terminal_size()  # the ranks write to files, so their progress bars cannot ask for it
    env["COLUMNS"], env["LINES"] = str(size.columns), str(size.lines)
    # Measured: without it every small operator of MindSpore on the CPU takes about 4 ms longer, waiting for OpenMP
    # threads that spin; for PyTorch see kernels/pytorch/__init__.py.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # MindSpore's import, in msrun too, sets the variable to 1 for child processes where it is not set.
    if plan.nproc > 1 or plan.backend == "ms":
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // plan.nproc)))
    return env


def check_port(plan: LaunchPlan) -> None:
    """UserError on node 0 when its ``--master`` port is in use or its host is another machine's address."""
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
                f"--master: {plan.host} is not an address of this machine, which is started as node 0; "
                "give an address that this machine has"
            ) from None
