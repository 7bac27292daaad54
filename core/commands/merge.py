"""``tele merge``: a model with an adapter added to its weights."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from telechat_twins.core.checkpoint.target import check_target
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import show_bytes, standing
from telechat_twins.core.files.progress import Progress
from telechat_twins.core.launch.run_lock import hold_place
from telechat_twins.core.shown import message_line

EPILOG = """\
examples:
  tele merge TeleChat2-7B runs/sft-lora TeleChat2-7B-sft
  tele merge ckpt-7b peft-adapter ckpt-7b-merged --dtype bfloat16

DST has the form of SRC: a released folder with the same files, or a canonical checkpoint. Every adapted weight becomes
W + (alpha / rank) B A, computed in float64 and rounded once; every other byte stays as it is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``tele merge``."""
    parser.epilog = EPILOG
    parser.add_argument("source", metavar="SRC", type=Path, help="released folder, canonical checkpoint, or run")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="adapter of a run here, or a PEFT folder")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="store weights in this dtype (default: as they are)"
    )
    parser.add_argument("--sums", action="store_true", help="put SHA256SUMS into a released folder")
    parser.add_argument("--force", action="store_true", help="replace the model in DST, if it holds one")


def run(args: argparse.Namespace) -> int:
    """Merge; one line on stdout for each fact."""
    for source in (args.source, args.adapter):
        check_target(source, args.target, args.force)
    with hold_place(args.target):
        for source in (args.source, args.adapter):
            check_target(source, args.target, args.force)
        return _merge(args)


def _merge(args: argparse.Namespace) -> int:
    from telechat_twins.convert.adapter import MergedSource, open_any_adapter
    from telechat_twins.convert.copy import weight_bytes, write_like
    from telechat_twins.convert.source import HfSource, open_model

    started = time.monotonic()
    source = open_model(standing(args.source))
    adapter = open_any_adapter(args.adapter, source)
    merged = MergedSource(source, adapter, args.dtype)
    for note in merged.notes:
        print(f"note: {message_line(note)}")
    if args.sums and not isinstance(source, HfSource):
        raise UserError("--sums: goes with a released SRC; a canonical checkpoint has hashes")
    total = weight_bytes(merged)
    with Progress("merging", total) as bar:
        write_like(source, merged, args.target, args.sums, bar.update)
    seconds = time.monotonic() - started
    print(
        f"wrote {args.target}: {show_bytes(total)} of tensors, {len(adapter.modules)} linears with an "
        f"adapter, in {seconds:.1f} s"
    )
    return 0
