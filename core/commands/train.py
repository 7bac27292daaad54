"""Train or resume a model.

The config is checked before anything starts; then the backend's train.py runs under its own launcher (msrun or
torchrun). Ctrl-C ends all processes. What the run writes, under --out: metrics.jsonl (a row per step), TensorBoard
events, a plot of the loss, checkpoints (step-*, latest), and logs/ with each rank's output.

The raw launchers work as well:
  msrun --worker_num=1 --local_worker_num=1 --join=True --log_dir=LOGS telechat_ms/train.py --config F --out DIR
  torchrun --nproc-per-node=1 pt_reference/train.py --config F --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

from core.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", required=True, choices=("ms", "pt"), help="ms: MindSpore, pt: PyTorch")
    parser.add_argument("--config", required=True, metavar="F", help="YAML file of the run")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. train.steps=100"
    )
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/<config's name>-<backend>)")
    parser.add_argument(
        "--resume", metavar="DIR|auto", help="go on from a checkpoint or run folder; auto: from --out if it has one"
    )
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes (default 1)")


def run(args: argparse.Namespace) -> int:
    from core.config import load_run_config
    from core.data.blend import open_blend
    from core.launch import launch

    config = load_run_config(args.config, args.set)
    if args.nproc != 1:
        raise UserError(f"--nproc: training runs in one process in this version, found {args.nproc}; use --nproc 1")
    # A launcher takes seconds to start; what can be refused is refused before that.
    open_blend(config.data, config.train.seed, config.model.vocab_size, config.model.pad_token_id)
    if args.resume not in (None, "auto") and not Path(args.resume).is_dir():
        raise UserError(f"--resume: no folder {args.resume}; give a checkpoint or a run's folder, or 'auto'")
    out = Path(args.out or Path("runs") / f"{Path(args.config).stem}-{args.backend}")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out: {out} is a file; give a folder")
    _keep_earlier_run(out, args.resume)
    script_args = ["--config", args.config, "--out", str(out)]
    for assignment in args.set:
        script_args += ["--set", assignment]
    if args.resume:
        script_args += ["--resume", args.resume]
    try:
        return launch(args.backend, script_args, args.nproc, out / "logs")
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror})") from None


def _keep_earlier_run(out: Path, resume: str | None) -> None:
    """UserError when ``out`` holds a run that is not the one to go on with.

    The loop refuses that as well, but the launch clears the earlier run's logs before the loop is reached.
    """
    from core.metrics import require_fresh

    if resume is not None:
        source = Path(resume).resolve()
        if resume == "auto" or out.resolve() in (source, source.parent):
            return
    require_fresh(out)
