"""``tele parity record``: launches some steps of a run, and makes one record of those that were recorded."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.files.atomic import show_bytes
from telechat_twins.core.files.safetensors import DTYPES
from telechat_twins.core.parallel.sharding import Shard, chunk_table
from telechat_twins.core.parity.record.blocks import Grid, blocks_bytes
from telechat_twins.core.parity.record.fold import fitted, folded
from telechat_twins.core.parity.record.format import (
    MAX_BYTES,
    Record,
    blocks_room,
    digest_of,
    estimated_bytes,
    fitting_buckets,
    write_record,
)
from telechat_twins.core.parity.record.read import is_record, open_record, read_full
from telechat_twins.core.parity.record.recorder import fitting_sketches, quantity_order, rows_recorded, step_folder
from telechat_twins.core.parity.record.sites import sites
from telechat_twins.core.train.metrics import read_metrics
from telechat_twins.core.train.trainable import run_table

USER_ERROR = 2  # the launcher's code for a mistake of the user's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to record. ``steps``: how many the run makes; ``at``: those whose quantities are recorded; ``full``: glob
    patterns of the tensors to keep whole; ``resume``: a checkpoint to begin with; ``rows``: of the global batch, from
    the first, whose activations are recorded; 0: core.parity.record.recorder.rows_recorded."""

    steps: int
    at: tuple[int, ...] = (1,)
    full: tuple[str, ...] = ()
    resume: str | None = None
    rows: int = 0


def check_wanted(config: RunConfig, out: Path, wanted: Wanted) -> None:
    """UserError for a record that cannot be taken."""
    if wanted.steps < 1:
        raise UserError(f"--steps: must be at least 1, found {wanted.steps}")
    if config.train.steps and wanted.steps > config.train.steps:
        raise UserError(f"--steps: must be at most the run's train.steps {config.train.steps}, found {wanted.steps}")
    outside = [step for step in wanted.at if wanted.resume is None and not 1 <= step <= wanted.steps]
    if outside or not wanted.at:
        raise UserError(f"--at: must name steps from 1 to --steps {wanted.steps}, found {outside or 'none'}")
    keys = [key for step in wanted.at for key in quantity_order(config, step)]
    texts = {*keys, *(key.partition(":")[2].rpartition("@")[0] for key in keys)}
    if lost := [pattern for pattern in wanted.full if not any(fnmatch.fnmatchcase(text, pattern) for text in texts)]:
        raise UserError(
            f"--full: '{lost[0]}' matches no quantity of the recorded steps; give names as 'layers.1.ffn.*' or keys as "
            f"'{keys[0]}'"
        )
    fitting_buckets(len(keys), wanted.steps)
    if out.is_symlink() or out.exists() and not (out.is_dir() and (is_record(out) or not any(out.iterdir()))):
        raise UserError(f"--out {out}: must be a new folder, an empty one or a former record; give another folder")


def take_record(backend: str, config: RunConfig, out: Path, wanted: Wanted, script: Path) -> Record:
    """Run ``wanted.steps`` steps of ``config`` in its layout and write their record to ``out``.

    ``script``: the rank script. Logs lie beside ``out`` while it runs, and stay there when it fails, unless the cause
    is a mistake of the user's, which is reported in full. Raises SystemExit with the launcher's code when a rank fails,
    UserError as ``check_wanted``.
    """
    from telechat_twins.core.launch.launcher import launch

    check_wanted(config, out, wanted)
    work = out.absolute().with_name(f"{out.name}.work")
    shutil.rmtree(work, ignore_errors=True)  # a former attempt's, by its name
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give another folder") from None
    job = {"backend": backend, "config": _resolved(config), **dataclasses.asdict(wanted)}
    try:
        (work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        code = launch(backend, [str(work / "job.json")], config.parallel.world, work / "logs", script=script)
        record = None if code else join_steps(work / "run", wanted.at, out)
    except (UserError, OSError):
        shutil.rmtree(work, ignore_errors=True)
        raise
    if code in (0, USER_ERROR):
        shutil.rmtree(work, ignore_errors=True)
    if record is None:
        raise SystemExit(code)
    return record


def join_steps(run: Path, at: Sequence[int], out: Path) -> Record:
    """One record at ``out`` of the records of a run's steps ``at``, with the trace of the whole run."""
    records = [open_record(step_folder(run, step)) for step in sorted(at)]
    first, trace = records[0].header, read_metrics(run)
    count = sum(len(record.quantities) for record in records)
    buckets = fitting_buckets(count, len(trace))
    held = [folded(q, buckets, first.seed) for record in records for q in record.quantities.values()]
    held = fitted(held, blocks_room(count, buckets, len(trace)))
    batches = [record.header.digests["batch"] for record in records]
    digests = {**first.digests, "batch": batches[0] if len(batches) == 1 else digest_of(batches)}
    header = dataclasses.replace(
        first, steps=[record.header.steps[0] for record in records], digests=digests, buckets=buckets
    )
    full = {key: read_full(record, key) for record in records for key in record.full}
    return write_record(out, header, trace, held, full)


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What a record of a run would take: ``quantities`` of each recorded step, ``buckets`` (K), elements of a
    ``block`` of large gradients (0: none has blocks), and upper bounds in bytes: of the ``record``, of its ``full``
    tensors, of the ranks' ``shares`` of a step (the smallest and the largest), and of the float32 values that a rank
    adds up for a step (the most, ``read``)."""

    quantities: int
    buckets: int
    block: int
    record: int
    full: int
    ranks: int
    shares: tuple[int, int]
    read: int

    def lines(self) -> list[str]:
        """For the terminal."""
        rows = {
            "quantities": f"{self.quantities:,} a recorded step, {self.buckets} numbers each",
            "blocks": f"of {self.block:,} elements of large gradients" if self.block else "none",
            "record": f"at most {show_bytes(self.record)}, limit {show_bytes(MAX_BYTES)}",
            "full tensors": f"{show_bytes(self.full)} beside it" if self.full else "none",
            "ranks": f"{self.ranks:,}, with shares of {' to '.join(map(show_bytes, self.shares))} a step",
            "values": f"at most {show_bytes(self.read)} summed up by a rank in a recorded step",
        }
        width = max(map(len, rows))
        return [f"{name:<{width}}  {text}" for name, text in rows.items()]


def rehearse(config: RunConfig, wanted: Wanted) -> Rehearsal:
    """The sizes of a record, from shapes alone: nothing is allocated, and no data is read."""
    order = quantity_order(config, 1)
    buckets, grids = fitting_sketches(config, len(wanted.at))
    sums = sum(blocks_bytes(grid.blocks) for grid in grids.values())
    rows = rows_recorded(config, config.train.global_batch, config.data.seq_len, wanted.rows)
    shapes = {site.name: site.shape(rows, config.data.seq_len) for site in sites(config.model)}
    shapes |= {name: spec.shape for name, spec in run_table(config).items()}
    full = 0
    for key in order:
        name = key.partition(":")[2].rpartition("@")[0]
        if any(fnmatch.fnmatchcase(text, pattern) for pattern in wanted.full for text in (name, key)):
            full += math.prod(shapes[name]) * DTYPES["F32"].itemsize
    shares, values = zip(
        *(_rank_share(config, rows, rank, buckets, grids) for rank in _model_ranks(config)), strict=True
    )
    return Rehearsal(
        quantities=len(order),
        buckets=buckets,
        block=max((grid.height * grid.width for grid in grids.values()), default=0),
        record=estimated_bytes(len(order) * len(wanted.at), buckets, wanted.steps) + sums * len(wanted.at),
        full=full * len(wanted.at),
        ranks=config.parallel.world,
        shares=(min(shares), max(shares)),
        read=max(values),
    )


def _model_ranks(config: RunConfig) -> tuple[int, ...]:
    """Ranks that together hold one copy of the model: all others hold as much as one of them."""
    return config.parallel.ranks("model", 0)


def _rank_share(config: RunConfig, rows: int, rank: int, buckets: int, grids: Mapping[str, Grid]) -> tuple[int, int]:
    """Bytes of a rank's share of a step, and of the float32 values that make it."""
    layout = config.parallel
    coord = layout.coord(rank)
    held: dict[str, Shard] = {}
    for chunk in range(layout.virtual):
        held |= chunk_table(config.model, layout, coord, chunk, config.lora)
    layers = {name.split(".")[1] for name in held if name.startswith("layers.")}
    here = [s for s in sites(config.model, config.lora) if s.layer is None or str(s.layer) in layers]
    rows = min(rows, config.train.global_batch // layout.dp)
    places = -(-config.data.seq_len // layout.cp)
    active = sum(rows * places * -(-(site.width or 1) // layout.tp) for site in here)
    shards = layout.dp * layout.cp if layout.zero1 else 1
    owned = sum(math.prod(shard.shape) for shard in held.values()) // shards
    share = estimated_bytes(2 * len(here) + 5 * len(held), buckets)
    share += 2 * sum(blocks_bytes(grid.blocks) for name, grid in grids.items() if name in held)  # in float64
    return share, int(np.int64(4) * (2 * active + 5 * owned))


def _resolved(config: RunConfig) -> dict[str, object]:
    """The run as JSON, its data's paths absolute."""
    tree = config.to_dict()
    stages = [tree["data"], *(stage for stage in tree["train"]["stages"] or [] if stage["sources"] is not None)]
    for section in stages:
        for source in section["sources"]:
            source["path"] = str(Path(source["path"]).resolve())
    return tree
