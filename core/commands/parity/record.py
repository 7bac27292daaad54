"""`tele parity record`: records what some training steps compute."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from telechat_twins.core.config import RunConfig, load_run_config, naming_lines
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import show_bytes
from telechat_twins.core.parallel.layout import check_layout, parse_layout
from telechat_twins.core.parity.record.read import is_record
from telechat_twins.core.parity.record.take import Wanted, check_wanted, rehearse, take_record


def run(args: argparse.Namespace) -> int:
    """Take the record, or rehearse it; 0."""
    from telechat_twins.convert.record_rank import SCRIPT
    from telechat_twins.core.data.blend import open_blend
    from telechat_twins.core.train.stages import StagedData

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
    if is_record(out) and not args.force:
        raise UserError(f"--out {out}: holds a record; give another folder, or --force to replace it")
    with naming_lines(args.config, args.set):
        StagedData(config, open_blend)  # a launcher takes seconds to start
    record = take_record(args.backend, config, out, wanted, SCRIPT)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{len(record.quantities):,} quantities and {len(record.trace):,} steps in {out}: {show_bytes(size)}")
    return 0


def load(args: argparse.Namespace) -> RunConfig:
    """The run's config in the layout of ``--layout``."""
    from telechat_twins.convert.initial import open_initial

    config = load_run_config(args.config, args.set, lambda init: open_initial(init).config)
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
