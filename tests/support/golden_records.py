"""Goldens of records: the first update of small models on one batch, from strong weights, in PyTorch's float64.

python -m tests.support.golden_records         write them again, into tests/goldens/records
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from telechat_twins.convert.growth.schedule import load_schedule
from telechat_twins.core.config import OptimConfig
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.model.config import ModelConfig, load_model_config
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parity.record.fold import folded
from telechat_twins.core.parity.record.format import Record, write_record
from telechat_twins.core.parity.record.read import open_record
from telechat_twins.core.parity.record.recorder import step_folder
from telechat_twins.core.parity.worker import Task, run_alone, write_batch

FOLDER = Path(__file__).resolve().parent.parent / "goldens" / "records"
BUCKETS = 32  # numbers a tensor: they are in the repository
MASK = 0.4  # of the growing models


def models() -> Iterator[tuple[str, ModelConfig]]:
    """Name and model of each golden: the bundled small ones, and every growth of a schedule in the middle of it."""
    for name in ("telechat2-tiny", "telechat2-mini"):
        yield name, load_model_config(name)
    for stage in load_schedule("flm-replica", "flm-tiny"):
        if stage.plan is not None and stage.plan.config.growth is not None:
            growth = dataclasses.replace(stage.plan.config.growth, mask=MASK)
            yield f"flm-replica-{stage.name}", dataclasses.replace(stage.plan.config, growth=growth)


def task(name: str, model: ModelConfig, folder: Path, precision: str) -> Task:
    """One update on a batch of 2 x 24 tokens; eps is large, so that an update is smooth in the gradient."""
    random = np.random.default_rng(11)
    ids = random.integers(0, model.num_tokens, (2, 24)).astype(np.int32)
    targets = shift_labels(ids)
    targets[1, :7] = -100
    positions = np.tile(np.arange(24, dtype=np.int32), (2, 1))
    return Task(
        name=name,
        model=model,
        layout=Layout(),
        batch=write_batch(folder / f"{name}.safetensors", Batch(ids, targets, positions)),
        seed=7,
        precision=precision,
        gradients=False,
        steps=1,
        optim=OptimConfig(lr=1e-3, eps=1e-2),
        record=True,
    )


def take(backend: str, name: str, model: ModelConfig, folder: Path, precision: str) -> Record:
    """A golden's record, by one backend in one precision."""
    run_alone(backend, task(name, model, folder, precision), folder / f"{backend}-{name}")
    return open_record(step_folder(folder / f"{backend}-{name}", 1))


def smaller(record: Record) -> Record:
    """A record with sketches of BUCKETS numbers, in memory."""
    held = {key: folded(q, BUCKETS, record.header.seed) for key, q in record.quantities.items()}
    return dataclasses.replace(
        record, header=dataclasses.replace(record.header, buckets=BUCKETS, device="cpu"), quantities=held
    )


def main(folder: Path = FOLDER) -> None:
    """Write all goldens."""
    import tempfile

    for name, model in models():
        with tempfile.TemporaryDirectory() as work:
            small = smaller(take("pt", name, model, Path(work), "fp64"))
        write_record(folder / name, small.header, small.trace, small.quantities.values())
        print(name, len(small.quantities), sum(file.stat().st_size for file in (folder / name).iterdir()))


if __name__ == "__main__":
    main()
