"""Train or resume a model, in one process or in many.

The config is checked before anything starts; then the backend's train.py runs under its own launcher (msrun or
torchrun). Ctrl-C ends all processes, after the step and a checkpoint; a second one ends them at once. What the run
writes, under --out: metrics.jsonl (a row per step), TensorBoard events, a plot of the loss, checkpoints (step-*,
latest), and logs/ with each rank's output (logs-nodeN/ on node N > 0).

  tele train --backend ms --config telechat2-tiny --out runs/first
      trains the bundled recipe on data/tiny; `--set train.steps=100 optim.lr=1e-3` changes it

Layouts (--layout, or `parallel:` in the config) say how many processes share the work and how: parts joined by dots.
  tpN        tensor parallel: matrices and heads          dpN        data parallel: samples of the batch
  ppN        pipeline: layers; vppN: N chunks a rank      cpN        context: every sequence, over a ring
  ulyssesN   context by all-to-all over heads             ringN.ulyssesM  both, N x M processes
  gpipe, nosp, nozero: the GPipe schedule; no sequence parallel; optimizer states whole on every rank
Examples:
  tele train --backend ms --config F --layout tp2.dp2
      4 processes: every matrix in 2 halves, the batch in 2 shares
  tele train --backend pt --config F --layout pp2.ring2.ulysses2.tp2
      16 processes: 2 stages of layers, every sequence in 4 parts, every matrix in 2 halves

Several machines: the same command on each, with its own --node-rank. HOST:PORT is node 0's; PORT and PORT + 1 are used.
  tele train --backend ms --config F --layout tp8.dp2 --nnodes 2 --node-rank 0 --master 10.0.0.1:29500

Fine-tuning: --init takes the weights of another model; `model:` of the config may then be left out.
  tele train --backend pt --config F --init TeleChat2-3B --out runs/tuned --resume auto

Growth: a schedule of stages, each a larger model at a layout of its own; between them the checkpoint is grown.
  tele train --backend ms --config F --growth flm-replica --out runs/grown

In a checkout the raw launchers work as well, with the layout as --set:
  msrun --worker_num=4 --local_worker_num=4 --join=True --log_dir=LOGS telechat_ms/train.py --config F --out DIR \\
    --set parallel.tp=2 parallel.dp=2
  torchrun --nproc-per-node=4 pt_reference/train.py --config F --out DIR --set parallel.tp=2 parallel.dp=2
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from telechat_twins.core.errors import UserError
from telechat_twins.core.near import near_path

if TYPE_CHECKING:
    from telechat_twins.core.checkpoint.read import Checkpoint
    from telechat_twins.core.parallel.layout import Layout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", required=True, choices=("ms", "pt"), help="ms: MindSpore, pt: PyTorch")
    parser.add_argument(
        "--config",
        required=True,
        metavar="F",
        help="YAML file of the run, or a bundled run's name, e.g. telechat2-tiny",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. train.steps=100"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/<config's name>-<backend>)")
    parser.add_argument(
        "--init",
        metavar="DIR",
        help="begin with these weights (train.init): a released folder, a checkpoint with or without training state, a "
        "run, MindFormers' weights; optimizer and schedule are new. With --resume auto: where the run begins if it has "
        "no checkpoint yet. To resume an adapter: its base",
    )
    parser.add_argument(
        "--resume", metavar="DIR|auto", help="go on from a checkpoint or run folder; auto: from --out if it has one"
    )
    parser.add_argument(
        "--growth",
        metavar="G",
        help="growth schedule (YAML file or bundled name, e.g. flm-replica); each stage has its own model and layout",
    )
    parser.add_argument(
        "--layout", metavar="TEXT", help="e.g. tp2.pp2: in place of the config's `parallel:` (--set is applied after)"
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes on this machine (default: as many as the layout needs)"
    )
    parser.add_argument("--nnodes", type=int, metavar="N", help="machines of --nproc processes each (default 1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="N", help="which of them this is, from 0")
    parser.add_argument("--master", metavar="HOST:PORT", help="node 0, as the others reach it")
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again from the latest checkpoint, at most N times, after a rank, a launcher or a machine has died; "
        "not after a mistake of yours, Ctrl-C, or training that stopped itself (default 0)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        help="end the job, and say who waits where, when a rank waits longer in one collective (default 540; 0: never)",
    )


def run(args: argparse.Namespace) -> int:
    from telechat_twins.convert.initial import open_initial
    from telechat_twins.core.checkpoint.retention import latest_save
    from telechat_twins.core.config import load_run_config, naming_lines
    from telechat_twins.core.data.blend import open_blend
    from telechat_twins.core.data.vocabulary import fit_run
    from telechat_twins.core.eval.beforehand import check_evaluations
    from telechat_twins.core.launch.command import check_nodes, node_logs
    from telechat_twins.core.launch.launcher import launch
    from telechat_twins.core.launch.restarts import launch_with_restarts
    from telechat_twins.core.launch.run_lock import RELEASE_WAIT_S, require_free
    from telechat_twins.core.launch.worker import STOPPED
    from telechat_twins.core.train.stages import StagedData, check_stages
    from telechat_twins.core.train.start import init_override, is_new, model_of_run, open_start
    from telechat_twins.core.train.track.open import require_trackers
    from telechat_twins.core.train.watch.peak import peak_flops

    timeout = _checked(args)
    if args.growth is not None:
        from telechat_twins.core.commands import train_growth

        return train_growth.run(args)
    _check_resume(args)
    out = Path(args.out or Path("runs") / f"{Path(args.config).stem}-{args.backend}")
    overrides = [*_layout_overrides(args.layout, args.config, args.set), *args.set, *init_override(args.init)]
    config = load_run_config(args.config, overrides, lambda init: model_of_run(init, out, args.resume, open_initial))
    nproc = _share(config.parallel, args.nnodes) if args.nproc is None else args.nproc
    check_nodes(nproc, args.nnodes, args.node_rank, args.master)
    # A launcher takes seconds to start; what can be refused is refused before that.
    with naming_lines(args.config, overrides):
        check_stages(config, nproc * args.nnodes)
        peak_flops(config)
        require_trackers(config.track)
        blend = StagedData(config, open_blend).first
        check_evaluations(config, blend)
        resumed = None if args.resume is None or (args.resume == "auto" and is_new(out)) else args.resume
        if config.train.init is not None and (resumed is None or config.lora is not None):
            _require_base(config.train.init, out if resumed == "auto" else resumed)
            open_start(fit_run(config, blend.vocab_size, blend.end_token)[0], open_initial)
    _check_out(out, config.train.init)
    what = f"--out {out}"
    require_free(node_logs(out / "logs", args.node_rank), what)
    if not args.node_rank:
        require_free(out, what, patience=RELEASE_WAIT_S)  # rank 0's own, which a raw msrun or torchrun has, too
    _keep_earlier_run(out, args.resume)
    script_args = ["--config", args.config, "--out", str(out)]
    for assignment in overrides:
        script_args += ["--set", assignment]
    nodes = {"nnodes": args.nnodes, "node_rank": args.node_rank, "master": args.master}

    def start(resume: str | None) -> int:
        words = [*script_args, *(["--resume", resume] if resume else [])]
        return launch(args.backend, words, nproc, out / "logs", **nodes, collective_timeout=timeout, stopped=STOPPED)

    logs = node_logs(out / "logs", args.node_rank)
    try:
        return launch_with_restarts(start, args.restarts, args.resume, logs, lambda: latest_save(out))
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror})") from None


def _checked(args: argparse.Namespace) -> float:
    """The seconds of ``--timeout``. UserError for numbers that no run can have; ``--nnodes`` gets its default."""
    from telechat_twins.core.launch.launcher import COLLECTIVE_TIMEOUT_S

    if args.restarts < 0:
        raise UserError(f"--restarts: must be 0 or more, found {args.restarts}")
    if args.master is not None and args.nnodes is None:
        raise UserError("--master: belongs to a job on several machines; give --nnodes too, or leave it out")
    args.nnodes = 1 if args.nnodes is None else args.nnodes
    timeout = COLLECTIVE_TIMEOUT_S if args.timeout is None else args.timeout
    if not (math.isfinite(timeout) and timeout >= 0):
        raise UserError(f"--timeout: must be 0 (never) or a number of seconds above it, found {timeout:g}")
    return timeout


def _check_out(out: Path, init: str | None) -> None:
    """UserError for a file, and for a folder that holds what is read: packed data, or the model to begin with."""
    from telechat_twins.core.data.packed import is_packed

    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; give a folder")
    if is_packed(out) or (init is not None and out.resolve() == Path(init).resolve()):
        what = "packed data" if is_packed(out) else "the model of --init"
        raise UserError(f"--out: {out} holds {what}; give the run a folder of its own")


def _check_resume(args: argparse.Namespace) -> None:
    """UserError for a ``--resume`` that names no training state, or a whole model's beside an ``--init``."""
    from telechat_twins.core.train.resume import require_training_state

    if args.resume in (None, "auto"):
        return
    if not Path(args.resume).is_dir():
        hint = near_path(args.resume)
        raise UserError(f"--resume: no folder {args.resume}; give a checkpoint or a run's folder, or 'auto'{hint}")
    checkpoint = _checkpoint(args.resume)
    if args.init is not None and (checkpoint is None or "adapter" not in checkpoint.model):
        raise UserError("--init, --resume: both name what the run begins with; give one, or --resume auto")
    if checkpoint is not None:
        require_training_state(checkpoint)


def _checkpoint(folder: str | Path) -> Checkpoint | None:
    """The checkpoint of a step's or a run's folder, unverified; None where there is none, which the run itself says."""
    from telechat_twins.core.checkpoint.read import open_checkpoint

    here = any((Path(folder) / name).is_file() for name in ("manifest.json", "latest"))
    return open_checkpoint(folder, verify=False) if here else None


def _require_base(init: str, resumed: str | Path | None) -> None:
    """UserError where the base of a ``resumed`` adapter is not at ``init``: the checkpoint knows where it was."""
    from telechat_twins.core.model.lora import read_adapter

    checkpoint = None if resumed is None or Path(init).exists() else _checkpoint(resumed)
    held = checkpoint and read_adapter(checkpoint.model, str(checkpoint.path / "model.json"))
    if checkpoint is not None and held:
        raise UserError(
            f"train.init: {init}: no such folder; the adapter {checkpoint.path} was trained on {held.base.path}: give "
            "that model with --init"
        )


def _layout_overrides(text: str | None, config: str, later: Sequence[str] = ()) -> list[str]:
    """``--set`` assignments that turn the config's ``parallel:`` into the layout ``text``, but for what ``later`` sets.

    Whatever the text leaves out goes back to its default, except ``bucket_mb``, of which a layout's text says nothing.
    """
    from telechat_twins.core.config import bundled_file
    from telechat_twins.core.parallel.layout import Layout, parse_layout
    from telechat_twins.core.schema import load_yaml, without

    if text is None:
        return []
    wanted, default = parse_layout(text), Layout()
    tree = load_yaml(bundled_file(config, "train", "--config"))
    section = tree.get("parallel") if isinstance(tree, dict) else None
    given = set(section) if isinstance(section, dict) else set()
    assignments = []
    for field in dataclasses.fields(Layout):
        value = getattr(wanted, field.name)
        if field.name != "bucket_mb" and (value != getattr(default, field.name) or field.name in given):
            assignments.append(f"parallel.{field.name}={_yaml(value)}")
    return without(assignments, later)


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _share(layout: Layout, nnodes: int) -> int:
    """Processes of one of ``nnodes`` machines; UserError when they cannot hold equal shares of the layout."""
    from telechat_twins.core.launch.command import MAX_PROCESSES

    share = layout.world // max(nnodes, 1)
    if share > MAX_PROCESSES:
        raise UserError(
            f"--nnodes: the {layout.world} ranks of layout {layout.name} need several machines, e.g. --nnodes "
            f"{-(-layout.world // 8)} of 8 devices each; or give a smaller layout, e.g. --layout single"
        )
    if nnodes < 1 or layout.world % nnodes == 0:
        return share
    fitting = max(n for n in range(1, nnodes) if layout.world % n == 0)
    raise UserError(
        f"--nnodes: {nnodes} machines cannot hold equal shares of the {layout.world} ranks of layout {layout.name}; "
        f"nearest that can: {fitting}"
    )


def _keep_earlier_run(out: Path, resume: str | None) -> None:
    """UserError when ``out`` holds a run that is not the one to go on with.

    The loop refuses that as well, but the launch clears the earlier run's logs before the loop is reached.
    """
    from telechat_twins.core.train.metrics import require_fresh

    if resume is not None:
        source = Path(resume).resolve()
        if resume == "auto" or out.resolve() in (source, source.parent):
            return
    require_fresh(out)
