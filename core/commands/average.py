"""``tele average``: the weighted average of checkpoints of one model."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from telechat_twins.core.checkpoint.target import check_target
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import show_bytes, standing
from telechat_twins.core.files.progress import Progress
from telechat_twins.core.launch.run_lock import hold_place
from telechat_twins.core.shown import message_line, printable

EPILOG = """\
examples:
  tele average runs/sft/step-00000800 runs/sft/step-00001000 --out averaged
  tele average sft-a sft-b sft-c --weights 2 1 1 --out averaged

Every tensor is summed in float64 and rounded once. DST has the form of the first checkpoint, and its small files. It
holds weights only: training starts from it with `tele train --init`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele average``."""
    parser.epilog = EPILOG
    parser.add_argument(
        "checkpoints", metavar="CK", type=Path, nargs="+", help="released folders, canonical checkpoints, or runs"
    )
    parser.add_argument("--out", metavar="DST", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--weights", metavar="W", type=float, nargs="+", help="one for each checkpoint, 0 or more (default: all equal)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="store weights in this dtype (default: as they are)"
    )
    parser.add_argument("--force", action="store_true", help="replace the model in DST, if it holds one")


def run(args: argparse.Namespace) -> int:
    """Average; one line on stdout for each fact."""
    from telechat_twins.convert.average import shares

    if len(args.checkpoints) < 2:
        raise UserError(
            f"CK: an average needs two checkpoints or more, found {args.checkpoints[0]} alone; name another"
        )
    weights = shares(args.weights, len(args.checkpoints))
    for source in args.checkpoints:
        check_target(source, args.out, args.force)
    with hold_place(args.out):
        for source in args.checkpoints:
            check_target(source, args.out, args.force)
        return _average(args, weights)


def _average(args: argparse.Namespace, weights: list[float]) -> int:
    from telechat_twins.convert.average import AverageSource
    from telechat_twins.convert.copy import weight_bytes, write_like
    from telechat_twins.convert.source import open_model

    started = time.monotonic()
    sources = [open_model(standing(path)) for path in args.checkpoints]
    average = AverageSource(sources, weights, args.dtype)
    for note in average.notes:
        print(f"note: {message_line(note)}")
    total = weight_bytes(average)
    with Progress("averaging", total) as bar:
        write_like(sources[0], average, args.out, on_bytes=bar.update)
    parts = ", ".join(f"{weight:g} {source.path}" for weight, source in zip(weights, sources, strict=True))
    print(
        f"wrote {args.out}: {show_bytes(total)} of tensors in {time.monotonic() - started:.1f} s ({printable(parts)})"
    )
    return 0
