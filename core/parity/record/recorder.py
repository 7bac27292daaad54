"""Recording of steps inside the training loop, on every rank, and the record that rank 0 writes.

For a chosen step each rank adds up what it holds: weights before the step, activations and their gradients while the
model runs, gradients once they are summed over ranks, weights and moments after the update. Its share goes into a file
beside the record; when all ranks have written theirs, rank 0 joins them.
"""

from __future__ import annotations

import copy
import platform
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.checkpoint.read import TensorPiece
from telechat_twins.core.cli import version
from telechat_twins.core.config import RunConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parallel.sequence import LocalBatch
from telechat_twins.core.parity.record.blocks import Grid, fitting_grids
from telechat_twins.core.parity.record.format import (
    Header,
    blocks_room,
    digest_of,
    fitting_buckets,
    quantity_key,
    write_record,
)
from telechat_twins.core.parity.record.observer import Observer
from telechat_twins.core.parity.record.sites import SCALARS, Site, sites
from telechat_twins.core.parity.record.sketch import matrix_shape
from telechat_twins.core.parity.record.sums import provided_sums
from telechat_twins.core.parity.record.tally import (
    Tally,
    full_tensors,
    join_tallies,
    quantities,
    read_share,
    write_share,
)
from telechat_twins.core.parity.record.window import Windows
from telechat_twins.core.schema import from_mapping
from telechat_twins.core.train.agreement import meet, run_on_all
from telechat_twins.core.train.stepper import Stepper
from telechat_twins.core.train.trainable import run_table
from telechat_twins.core.train.trainer import BaseTrainer
from telechat_twins.core.types import JsonObject

FOLDER = "records"  # of a run
# Activations are recorded of so many rows of a batch that they and their gradients have at most as many elements as the
# five kinds of parameters, or LEAST: a recorded step then takes no longer for the former than for the latter.
LEAST = 1 << 25


def step_folder(out: Path, step: int) -> Path:
    """The record of a run's step."""
    return out / FOLDER / f"step-{step:08d}"


def rows_recorded(config: RunConfig, rows: int, seq_len: int, wanted: int = 0) -> int:
    """How many rows of a global batch, from the first, have their activations recorded: ``wanted``, or, for 0, as many
    as cost little beside the parameters."""
    if wanted:
        return min(rows, wanted)
    places = sum(site.width or 0 for site in sites(config.model, config.lora))
    parameters = 5 * sum(spec.size for spec in run_table(config).values())
    return max(1, min(rows, max(parameters, LEAST) // (2 * places * seq_len)))


def quantity_order(config: RunConfig, step: int) -> list[str]:
    """Keys of all quantities that a step of a run can have, in the order of ``_ordered``."""
    return [quantity_key(kind, name, step) for kind, name in _ordered(config)]


def _ordered(config: RunConfig) -> list[tuple[str, str]]:
    """Kinds and names of a step's quantities, in its order: weights before, forward, backward, gradients, moments,
    weights after."""
    places = [site.name for site in sites(config.model, config.lora)]
    parameters = list(run_table(config))
    kinds = {
        "weight_before": parameters,
        "activation": places,
        "activation_grad": [name for name in reversed(places) if name not in SCALARS],
        "gradient": parameters,
        "moment1": parameters,
        "moment2": parameters,
        "weight_after": parameters,
    }
    return [(kind, name) for kind, names in kinds.items() for name in names]


def fitting_sketches(config: RunConfig, steps: int = 1) -> tuple[int, dict[str, Grid]]:
    """K of a record of ``steps`` steps of a run, and the blocks of its large gradients by name."""
    rows = len(quantity_order(config, 1)) * steps
    buckets = fitting_buckets(rows)
    shapes = {name: matrix_shape(spec.shape) for name, spec in run_table(config).items()}
    return buckets, fitting_grids(shapes, blocks_room(rows, buckets) // steps)


def open_recorder(config: RunConfig, out: Path) -> Recorder | None:
    """The recorder of ``train.record_every``, if it is set."""
    every, rows = config.train.record_every, config.train.record_rows
    return Recorder(config, out, every=every, rows=rows) if every else None


@dataclass(frozen=True)
class _Common:
    """What all recorded steps of a run have in common while its model is ``model``: its config with that and the digest
    of it, versions of all but the framework, kinds and names in order, sites."""

    model: JsonObject
    tree: JsonObject
    digest: str
    versions: dict[str, str]
    order: list[tuple[str, str]]
    places: list[Site]

    @staticmethod
    def of(config: RunConfig, model: JsonObject) -> _Common:
        model = copy.deepcopy(model)
        tree = {**config.to_dict(), "model": model}
        versions = {"telechat-twins": version(), "python": platform.python_version(), "numpy": np.__version__}
        places = sites(config.model, config.lora)
        return _Common(model, tree, config_digest(tree), versions, _ordered(config), places)


class Recorder:
    """core.train.stepper.StepRecorder. Steps of ``at``, and every ``every``-th, are recorded in ``step_folder``.

    full: see Tally. last: the run ends after that step, without a checkpoint. rows: of the global batch, from the
    first, whose activations are recorded; 0: as ``rows_recorded`` says.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        at: Collection[int] = (),
        every: int = 0,
        full: Sequence[str] = (),
        last: int | None = None,
        rows: int = 0,
    ) -> None:
        self.last, self._rows = last, rows
        self._config, self._out, self._at, self._every, self._full = config, out, frozenset(at), every, tuple(full)
        buckets, grids = fitting_sketches(config)
        self._windows = Windows(buckets, grids=grids)
        self._step: _RecordedStep | None = None
        self._common: _Common | None = None
        self._kept: dict[tuple[int, int], int] = {}  # rows recorded, by those and the length of a batch

    def wants(self, step: int) -> bool:
        return step in self._at or bool(self._every and step % self._every == 0)

    def before(self, stepper: Stepper, step: int, batch: Batch, first: int, rows: int, model: JsonObject) -> None:
        if not self.wants(step):
            return
        if not isinstance(stepper, BaseTrainer):
            raise TypeError(f"steps of a {type(stepper).__name__} cannot be recorded")
        self._windows.sums = provided_sums()
        tally = Tally(step, self._windows, full=self._full)
        tally.add_batch(batch, first)
        seq_len = batch.input_ids.shape[1]
        if (kept := self._kept.get((rows, seq_len))) is None:
            kept = self._kept[rows, seq_len] = rows_recorded(self._config, rows, seq_len, self._rows)
        notes = [] if kept == rows else [f"activations are those of the first {kept} of {rows} rows of the batch"]
        if self._common is None or self._common.model != model:
            self._common = _Common.of(self._config, model)
        self._step = _RecordedStep(self._config, stepper, tally, first, kept, seq_len, self._common, notes)
        self._step.add("weight_before", stepper.weights())

    def computed(self, loss: float, norm: float, loss_scale: float) -> None:
        if self._step is not None:
            self._step.computed(loss, norm, loss_scale)

    def after(self, row: JsonObject) -> str | None:
        if self._step is None:
            return None
        step, self._step = self._step, None
        path = step_folder(self._out, step.tally.step)
        step.finish(path, row)
        return f"step {step.tally.step}: recorded in {path}"


class _RecordedStep:
    """One step on this rank. ``rows``, ``seq_len``: B and S of the recorded activations; ``first``: number of this
    rank's first row in the global batch."""

    def __init__(
        self,
        config: RunConfig,
        trainer: BaseTrainer,  # type: ignore[type-arg]
        tally: Tally,
        first: int,
        rows: int,
        seq_len: int,
        common: _Common,
        notes: list[str],
    ) -> None:
        self.config, self.trainer, self.tally = config, trainer, tally
        self.first, self.rows, self.seq_len, self.common, self.notes = first, rows, seq_len, common, notes
        self.loss: float | None = None
        self.norm: float | None = None
        trainer.observe = self._observe

    def _observe(self, batches: Sequence[LocalBatch], scale: float) -> AbstractContextManager[None]:
        self.tally.forget("activation", "activation_grad")  # of gradients that were discarded
        place = self.trainer.mesh.coord
        seen = Observer(self.config, self.common.places, place, batches, self.first, self.rows, scale, self.tally)
        return self.trainer.observed(seen)

    def add(self, kind: str, pieces: Iterable[TensorPiece], scale: float = 1.0) -> None:
        """Add pieces of parameters, divided by ``scale``."""
        self.tally.add_boxes((kind, p.name, p.shape, _divided(p.array, scale), p.offset, "") for p in pieces)

    def computed(self, loss: float, norm: float, scale: float) -> None:
        self.trainer.observe = None
        self.add("gradient", self.trainer.optimizer.export_gradients(), scale)
        self.loss, self.norm = loss, norm
        if self.trainer.rank == 0:
            self.tally.add_scalar("loss", loss)
            self.tally.add_scalar("grad_norm", norm)

    def finish(self, path: Path, row: JsonObject) -> None:
        """Weights and moments after the update; the ranks' shares become the record at ``path``."""
        self.trainer.observe = None
        self.add("weight_after", self.trainer.weights())
        kinds = {"m.": "moment1", "v.": "moment2"}
        state = self.trainer.optimizer_state()
        self.tally.add_boxes((kinds[p.name[:2]], p.name[2:], p.shape, p.array, p.offset, "") for p in state)
        trainer, rank = self.trainer, self.trainer.rank
        if trainer.world == 1:
            self._write(path, [self.tally], row)
            return
        shares = path.with_name(f".{path.name}-shares")
        run_on_all(trainer, lambda: _refused(shares, lambda: shares.mkdir(parents=True, exist_ok=True)))
        run_on_all(trainer, lambda: _refused(shares, partial(write_share, shares / str(rank), self.tally)))
        run_on_all(trainer, lambda: self._join(shares, path, row) if rank == 0 else None)
        meet(trainer)

    def _join(self, shares: Path, path: Path, row: JsonObject) -> None:
        step, buckets = self.tally.step, self.tally.windows.buckets
        tallies = [read_share(shares / str(rank), step, buckets) for rank in range(self.trainer.world)]
        shutil.rmtree(shares, ignore_errors=True)
        self._write(path, tallies, row)

    def _write(self, path: Path, tallies: Sequence[Tally], row: JsonObject) -> None:
        whole = join_tallies(tallies)
        found = quantities(whole, self.common.order)
        write_record(path, self._header(whole), [row], found, full_tensors(whole))

    def _header(self, whole: Tally) -> Header:
        config, implementation = self.config, self.trainer.implementation()
        title, _, number = implementation["backend"].partition(" ")
        names = {name: short for short, name in backends.TITLES.items()}
        return Header(
            backend=names[title],
            device=implementation["device"],
            layout=config.parallel.name,
            precision=config.train.precision,
            versions={**self.common.versions, title: number},
            config=self.common.tree,
            digests={
                "weights": digest_of({name: str(value) for name, value in whole.checksums.items()}),
                "batch": digest_of({str(number): digest for number, digest in whole.rows.items()}),
                "config": self.common.digest,
            },
            steps=[whole.step],
            rows=self.rows,
            seq_len=self.seq_len,
            buckets=whole.windows.buckets,
            seed=whole.windows.seed,
            loss=_finite(self.loss),
            grad_norm=_finite(self.norm),
            notes=self.notes,
        )


def config_digest(tree: JsonObject) -> str:
    """Digest of what of a run decides its numbers: the model, the optimizer, the loss, seed and batch; neither layout
    and precision nor files."""
    train = {key: tree["train"][key] for key in ("global_batch", "seed", "freeze")}
    rest = {key: tree[key] for key in ("optim", "lora", "preference")}
    model = from_mapping(ModelConfig, tree["model"], "model").to_dict()
    return digest_of({"model": model, "train": train, **rest})


def _divided(array: np.ndarray, scale: float) -> np.ndarray:
    return array if scale == 1.0 else array / np.asarray(scale, array.dtype)


def _finite(value: float | None) -> float | None:
    return value if value is not None and np.isfinite(value) else None


def _refused(path: Path, action: Callable[[], None]) -> None:
    """UserError in place of an OSError of ``action``."""
    try:
        action()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free some space or give another folder"
        ) from None
