"""`tele parity record`: records what some training steps compute."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from telechat_twins.core import backends
from telechat_twins.core.config import RunConfig, load_run_config
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import show_bytes
from telechat_twins.core.parallel.layout import check_layout, parse_layout
from telechat_twins.core.parity.record.format import MAX_BYTES
from telechat_twins.core.parity.record.take import Wanted, check_wanted, rehearse, take_record

DESCRIPTION = f"""\
Run the first steps of a training run and record what they compute, in a folder of at most {show_bytes(MAX_BYTES)}.

Of the steps of --at, the record holds norms, extremes and sketches of every activation, its gradient, every parameter
before and after the step, its gradient and its moments; of all steps the metrics. Records taken on different machines,
by different backends, in different layouts and precisions can be compared: tele parity compare A B. With --set
train.precision=fp64 the record is one to judge others by. A run that trains can record itself: train.record_every.
"""
EXAMPLES = """\
examples:
  tele parity record --backend ms --config telechat2-tiny --steps 50 --out records/npu
  tele parity record --backend pt --config telechat2-tiny --layout tp2.pp2 --full 'layers.3.*' --out records/tp2.pp2
  tele parity record --backend pt --config telechat2-tiny --set train.precision=fp64 --out records/judge
  tele parity record --backend ms --config telechat2-115b --dry
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele parity record``."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--backend", required=True, choices=sorted(backends.BACKENDS), help="ms: MindSpore, pt: PyTorch"
    )
    parser.add_argument(
        "--config", required=True, metavar="F", help="YAML file of a training run, or the name of a bundled one"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. train.precision=bf16"
    )
    parser.add_argument("--layout", metavar="L", help="parallel layout, e.g. tp2.pp2 (default: the config's)")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="steps to run; the trace has them all (1)")
    parser.add_argument(
        "--at", type=int, nargs="+", default=[1], metavar="STEP", help="steps whose tensors are recorded (1)"
    )
    parser.add_argument(
        "--full",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="also keep these tensors whole, e.g. 'layers.3.*' or 'gradient:embed.weight@1'",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=0,
        metavar="B",
        help="record the activations of the first B rows of the global batch (default: as many as cost little)",
    )
    parser.add_argument("--resume", metavar="DIR", help="begin with this checkpoint, its optimizer included")
    parser.add_argument("--out", default="record", metavar="REC", help="folder of the record (record)")
    parser.add_argument("--dry", action="store_true", help="only print the sizes; needs neither weights nor data")


def run(args: argparse.Namespace) -> int:
    """Take the record, or rehearse it; 0."""
    from telechat_twins.convert.record_rank import SCRIPT

    config, out = load(args), Path(args.out)
    first = 0
    if args.resume is not None:
        first = _resumed_step(args.resume)
    at = tuple(sorted({first + step for step in args.at}))
    wanted = Wanted(steps=first + args.steps, at=at, full=tuple(args.full), resume=args.resume, rows=args.rows)
    if args.steps < 1:
        raise UserError(f"--steps: must be at least 1, found {args.steps}")
    if args.rows < 0:
        raise UserError(f"--rows: must be at least 1, or 0 for as many as cost little, found {args.rows}")
    check_wanted(config, out, wanted)
    if args.dry:
        print("\n".join(rehearse(config, wanted).lines()))
        return 0
    record = take_record(args.backend, config, out, wanted, SCRIPT)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{len(record.quantities):,} quantities and {len(record.trace):,} steps in {out}: {show_bytes(size)}")
    return 0


def load(args: argparse.Namespace) -> RunConfig:
    """The run's config in the layout of ``--layout``."""
    config = load_run_config(args.config, args.set)
    if args.layout is None:
        return config
    layout = dataclasses.replace(parse_layout(args.layout), bucket_mb=config.parallel.bucket_mb)
    try:
        check_layout(layout, config.model, seq_len=config.data.seq_len)
    except UserError as error:
        raise UserError(f"--layout {layout.name}: {error}") from None
    return dataclasses.replace(config, parallel=layout)


def _resumed_step(path: str) -> int:
    """The step of the checkpoint that a record begins with."""
    from telechat_twins.core.checkpoint.read import open_checkpoint
    from telechat_twins.core.train.resume import require_training_state

    checkpoint = open_checkpoint(path, verify=False)
    require_training_state(checkpoint)
    assert checkpoint.trainer is not None  # required above
    step: int = checkpoint.trainer["step"]
    return step
