"""Runs of `tele parity locate --rerun`: the recorded step again, with whole tensors or in float64, and its batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from telechat_twins.core.checkpoint.source import OpenInitial, ReadBox
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.data.blend import open_blend
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parity.locate.recipe import Read, Setting
from telechat_twins.core.parity.record.format import Record, digest_of
from telechat_twins.core.parity.record.take import Wanted, take_record
from telechat_twins.core.parity.record.tally import Tally
from telechat_twins.core.train.stages import StagedData, plan_stages, samples_at, stage_of
from telechat_twins.core.train.start import open_start, start_reader


def run_of(record: Record) -> RunConfig:
    """The run that a record was taken of; UserError where its config is not one of this version."""
    try:
        return run_config_from_dict(record.header.config)
    except UserError as error:
        raise UserError(f"{record.path}: config: {error}") from None


def batch_of(config: RunConfig, record: Record, step: int) -> Batch:
    """The global batch of ``step``, from the run's data; UserError where that is not here, or gives another batch."""
    batches = {one: _batch(config, one) for one in record.header.steps}
    digests = [_digest(batches[one]) for one in record.header.steps]
    if (digests[0] if len(digests) == 1 else digest_of(digests)) != record.header.digests["batch"]:
        raise UserError(f"{record.path}: the data of its config gives another batch than was recorded")
    return batches[step]


def _batch(config: RunConfig, step: int) -> Batch:
    stages = plan_stages(config)
    stage = stage_of(stages, step - 1)
    return (
        StagedData(config, open_blend).of(stage).batch(samples_at(stages, step - 1) - stage.drawn, stage.global_batch)
    )


def _digest(batch: Batch) -> str:
    tally = Tally(1)
    tally.add_batch(batch, 0)
    return digest_of({str(number): digest for number, digest in tally.rows.items()})


def untrained_weights(config: RunConfig, open_initial: OpenInitial) -> Read:
    """Reader of whole weights as the run begins with them, by name: those of ``train.init``, or the initial ones."""
    opened: list[ReadBox] = []

    def read(name: str) -> np.ndarray:
        box = tuple(slice(0, n) for n in parameter_table(config.model)[name].shape)
        if config.train.init is None:
            return init_tensor(name, config.model, config.train.seed, box)
        if not opened:
            opened.append(start_reader(open_start(config, open_initial), config.model))
        return opened[0](name, box)

    return read


def setting_of(record: Record, step: int, batch: Batch | None, weight: Read | None = None) -> Setting:
    """What replays of a record's step depend on; ``weight``: reader of the weights that the run does not train."""
    row = next((row for row in record.trace if row["step"] == step), {})
    return Setting(
        run_of(record),
        batch,
        record.header.rows,
        record.header.seq_len,
        step,
        float(row.get("lr") or 0.0),
        float(row.get("grad_norm") or 0.0),
        weight,
    )


def again(record: Record, full: Sequence[str], out: Path, script: Path) -> Record:
    """The record's run once more, in its backend and layout, with the tensors ``full`` kept whole."""
    wanted = Wanted(steps=max(record.header.steps), at=tuple(record.header.steps), full=tuple(full))
    return _same(take_record(record.header.backend, run_of(record), out, wanted, script), record)


def exact(record: Record, backend: str, out: Path, script: Path) -> Record:
    """The record's run in float64, on one device."""
    config = run_of(record)
    train = dataclasses.replace(config.train, precision="fp64")
    config = dataclasses.replace(config, train=train, parallel=Layout())
    wanted = Wanted(steps=max(record.header.steps), at=tuple(record.header.steps))
    return _same(take_record(backend, config, out, wanted, script), record)


def _same(new: Record, old: Record) -> Record:
    for what in ("weights", "batch"):
        if new.header.digests[what] != old.header.digests[what]:
            raise UserError(f"{new.path}: the run gives other {what} here than in {old.path}; bring its files, too")
    return new
