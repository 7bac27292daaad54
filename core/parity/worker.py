"""Layout tasks on one batch: the work of one rank, and the ranks' results joined into whole tensors.

    core/parity/worker.py JOB.json              one rank of a job; started by core.launch.launcher
    convert/parity_rank.py JOB.json             the same, for tasks with the weights of a model's folder

A job is a list of tasks. Each is one model, one batch and one layout of as many ranks as were started; the ranks do
them one after another, because starting takes longer than most tasks. Of task number I, rank R leaves its pieces of
every tensor in ``I/<kind>/`` beside the job's file, what they are pieces of in ``I/<kind>/part-R.json``, and its
numbers in ``I/rank-R.json``; a record of it is in ``I/records``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.checkpoint.pieces import tiling_fault
from telechat_twins.core.checkpoint.read import PieceWriter, TensorPiece
from telechat_twins.core.checkpoint.source import OpenReader, ReadBox
from telechat_twins.core.config import DataConfig, OptimConfig, PreferenceConfig, RunConfig, TrainConfig
from telechat_twins.core.files.safetensors import SafetensorsFile
from telechat_twins.core.launch.worker import run_script
from telechat_twins.core.model.batch import IGNORE, Batch
from telechat_twins.core.model.config import PRECISIONS, ModelConfig
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.model.lora import LoraConfig, init_adapter, is_adapter
from telechat_twins.core.parallel.layout import Coord, Layout
from telechat_twins.core.parallel.sequence import LocalBatch, real_places, split_batch
from telechat_twins.core.parallel.sharding import Box
from telechat_twins.core.parallel.traffic import Traffic
from telechat_twins.core.parity.record.recorder import Recorder
from telechat_twins.core.schema import from_mapping, option
from telechat_twins.core.train.loss_scale import largest_magnitude, largest_scale
from telechat_twins.core.train.recipe import clip_factor
from telechat_twins.core.train.trainer import BaseTrainer, Stage
from telechat_twins.core.types import JsonObject

SCRIPT = Path(__file__).resolve()
KINDS = ("logits", "gradients", "weights")
SCHEMES = ("strong", "normal")  # of core.model.init
_ARRAYS = ("input_ids", "targets", "positions")
_OPTIONAL = {"doc_ids": np.int32, "weights": np.float32, "reference": np.float64}
_HOST = ("agree", "barrier")  # a few numbers, which core.parallel.traffic leaves out


@dataclass(frozen=True, kw_only=True)
class Task:
    """One layout on one batch, and what to keep of it."""

    name: str = option(help="for messages")
    model: ModelConfig = option(help="the decoder")
    layout: Layout = option(help="its ranks are all that were started")
    batch: str = option(help="file of write_batch: rows [B, S], any B and S")
    weights: str = option("strong", help="initial values of that scheme (strong | normal), or a model's folder")
    seed: int = option(0, help="of the initial values", min=0)
    precision: str = option("fp32", help="arithmetic", choices=PRECISIONS)
    recompute: str = option("none", help="as in a run", choices=("none", "selective", "full"))
    micro_batch: int = option(1, help="rows of a forward pass", min=1)
    logits: bool = option(False, help="keep them")
    gradients: bool = option(True, help="compute and keep them")
    steps: int = option(0, help="optimizer updates on this batch; their weights are kept", min=0)
    optim: OptimConfig = option(OptimConfig(lr=1e-3), help="AdamW and clipping; the rate stays lr")
    preference: PreferenceConfig | None = option(None, help="of a batch of pairs, which has a reference")
    lora: LoraConfig | None = option(None, help="adapters, which alone are trained")
    freeze: list[str] = option([], help="as in a run")
    record: bool = option(False, help="record the first update (core.parity.record) under the results' folder")


@dataclass(frozen=True)
class Outcome:
    """One task's results, put together.

    ``losses`` and ``norms``: before each update, at least one (``norms`` only with gradients). ``log_probs``: of each
    row, before the first, for preference pairs. ``loss_scale``: what fp16 gradients were computed with; all results are
    without it. Tensors by logical name, whole. ``traffic`` of one forward, backward and update, ``peaks`` (most graphs
    alive at once) and ``seconds`` by rank. ``problems``: what the ranks did not agree on, and tensors whose pieces do
    not make them up.
    """

    losses: list[float]
    norms: list[float] = field(default_factory=list)
    logits: np.ndarray | None = None
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    traffic: list[Traffic] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    loss_scale: float = 1.0
    log_probs: list[float] = field(default_factory=list)


Around = Callable[[Task, str], AbstractContextManager[None]]


def main(
    argv: Sequence[str] | None = None,
    around: Around = lambda task, backend: nullcontext(),
    open_reader: OpenReader | None = None,
) -> int:
    """One rank's part of every task of a job.

    ``around(task, backend)`` is entered before a task's model is built and left after it. ``open_reader`` opens the
    weights of tasks that name a model's folder.
    """
    path = Path((sys.argv[1:] if argv is None else argv)[0])
    job = json.loads(path.read_text(encoding="utf-8"))
    backend = job["backend"]
    for number, values in enumerate(job["tasks"]):
        task = from_mapping(Task, values, f"{path.name}: tasks[{number}]")
        with around(task, backend):
            perform(backend, task, path.parent / str(number), open_reader)
    backends.load(backend, "mesh").leave()
    return 0


def launch_tasks(
    backend: str,
    tasks: Sequence[Task],
    folder: Path,
    *,
    script: Path = SCRIPT,
    timeout: float | None = None,
    collective_timeout: float | None = None,
) -> int:
    """Do all ``tasks`` in one launch, with results under ``folder``; returns the launcher's code, 0 when all is there.

    Their layouts must have equal worlds (ValueError). ``timeout`` is for the whole job, ``collective_timeout`` for a
    rank's wait for others, in seconds.
    """
    from telechat_twins.core.launch.launcher import COLLECTIVE_TIMEOUT_S, launch

    worlds = {task.layout.world for task in tasks}
    if len(worlds) != 1:
        raise ValueError(f"one launch has one number of processes, the tasks want {sorted(worlds)}")
    folder.mkdir(parents=True, exist_ok=True)
    job = {"backend": backend, "tasks": [dataclasses.asdict(task) for task in tasks]}
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    limit = COLLECTIVE_TIMEOUT_S if collective_timeout is None else collective_timeout
    return launch(
        backend, [str(path.resolve())], worlds.pop(), folder / "logs", timeout, script, collective_timeout=limit
    )


def run_alone(backend: str, task: Task, folder: Path, open_reader: OpenReader | None = None) -> Outcome:
    """A task of one rank, in this process."""
    perform(backend, task, folder, open_reader)
    return collect(folder)


def perform(backend: str, task: Task, folder: Path, open_reader: OpenReader | None = None) -> None:
    """This rank's part of ``task``; what it computes goes into ``folder``, which all ranks see."""
    started = time.perf_counter()
    batch = read_batch(task.batch)
    rows, seq_len = batch.input_ids.shape
    padded = pad_rows(batch, row_multiple(task))
    trainer = _trainer(backend, task, run_config(task, len(padded.input_ids), seq_len), open_reader)
    first, count = trainer.share(len(padded.input_ids))
    mine = padded.rows(first, first + count)
    # A batch without targets has no loss, but its logits may be wanted.
    targets = trainer.count_targets(mine.num_terms) or 1
    backward = task.gradients or task.steps > 0
    sent = backends.load(backend, "collectives").TRAFFIC
    seen: list[TensorPiece] = []

    def watch(micro: int, logits: object) -> None:
        array = backends.load(backend, "model").to_numpy(logits)
        place = micro * task.micro_batch
        part = mine.rows(place, place + task.micro_batch)
        seen.extend(_logits_pieces(array, part, first + place, task, trainer.mesh.coord, (rows, seq_len)))

    losses, norms = list[float](), list[float]()
    log_probs = [] if batch.reference is None else trainer.log_probs(mine)

    def compute(scale: float) -> None:
        """Gradients of scale * loss, in the place of those of another scale."""
        trainer.discard()
        sent.reset()
        seen.clear()
        losses[:] = [trainer.gradients(mine, targets, scale, backward, watch if task.logits else None)]

    recorder = _recorder(trainer, task, folder, mine, (first, len(padded.input_ids)))
    scale = _scaled(trainer, compute, backward and task.precision == "fp16")
    peak, traffic = trainer.pipeline.peak, _counted(sent)
    if task.logits:
        _write_pieces(folder, "logits", trainer.rank, seen)
    if task.gradients:
        _write_pieces(folder, "gradients", trainer.rank, _divided(trainer.optimizer.export_gradients(), scale))
    if backward and not task.steps:
        norms = [trainer.grad_norm(scale)]
    for step in range(task.steps):
        if step:
            losses.append(trainer.gradients(mine, targets, scale))
        norms.append(trainer.grad_norm(scale))
        _update(trainer, task, losses, norms, scale, None if step else recorder)
        if step == 0:
            traffic = _counted(sent)
    if task.steps:
        _write_pieces(folder, "weights", trainer.rank, trainer.weights())
    record = {
        "losses": losses,
        "norms": norms,
        "log_probs": log_probs,
        "loss_scale": scale,
        "peak": peak,
        "traffic": [[*key, *numbers] for key, numbers in traffic.items()],
        "seconds": time.perf_counter() - started,
    }
    (folder / f"rank-{trainer.rank}.json").write_text(json.dumps(record), encoding="utf-8")


def _recorder(
    trainer: BaseTrainer[Stage], task: Task, folder: Path, mine: Batch, share: tuple[int, int]
) -> Recorder | None:
    """The recorder of the task's first update, where it has one. ``share``: this rank's first row, and all rows."""
    if not task.record:
        return None
    recorder = Recorder(trainer.config, folder, at=(1,))
    recorder.before(trainer, 1, mine, *share, task.model.to_dict())
    return recorder


def _update(
    trainer: BaseTrainer[Stage],
    task: Task,
    losses: Sequence[float],
    norms: Sequence[float],
    scale: float,
    recorder: Recorder | None,
) -> None:
    """One update from the gradients whose norm is the last of ``norms``; the recorder sees the step around it."""
    if recorder is not None:
        recorder.computed(losses[0], norms[0], scale)
    trainer.update(task.optim.lr, clip_factor(norms[-1], task.optim.clip_grad) / scale)
    if recorder is not None:
        recorder.after({"step": 1, "loss": losses[0], "grad_norm": norms[0], "lr": task.optim.lr})


def _trainer(backend: str, task: Task, config: RunConfig, open_reader: OpenReader | None) -> BaseTrainer[Stage]:
    """The backend's trainer with the task's weights, and its adapters where it has any."""
    trainer: BaseTrainer[Stage] = backends.load(backend, "train").Trainer(config)
    read = _reader(task, open_reader)
    trainer.load_weights(read)
    if task.lora is not None:
        trainer.load_adapters(read)
    trainer.optimizer.refresh()  # now, so that the messages of the step are the step's
    return trainer


def collect(folder: Path, world: int = 1) -> Outcome:
    """What ``world`` ranks left of one task in ``folder``."""
    records = [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
    problems = []
    for what in ("losses", "norms", "log_probs"):
        if any(record[what] != records[0][what] for record in records):
            problems.append(f"{what} differ between ranks: {[record[what] for record in records]}")
    tensors = {kind: _join(folder / kind, world, problems) for kind in KINDS}
    return Outcome(
        losses=records[0]["losses"],
        norms=records[0]["norms"],
        log_probs=records[0]["log_probs"],
        loss_scale=records[0]["loss_scale"],
        logits=tensors["logits"].get("logits"),
        gradients=tensors["gradients"],
        weights=tensors["weights"],
        traffic=[{(op, group): [calls, size] for op, group, calls, size in record["traffic"]} for record in records],
        peaks=[record["peak"] for record in records],
        seconds=[record["seconds"] for record in records],
        problems=problems,
    )


def row_multiple(task: Task) -> int:
    """What the rows of a batch are padded to a multiple of: equal shares, of whole micro-batches, in groups of pp
    where the pipeline is interleaved."""
    return task.layout.dp * task.micro_batch * (task.layout.pp if task.layout.virtual > 1 else 1)


def pad_rows(batch: Batch, multiple: int) -> Batch:
    """``batch`` with its last row repeated up to a multiple of rows; the copies have no targets and no reference."""
    missing = -len(batch.input_ids) % multiple
    if not missing:
        return batch

    def lengthen(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, np.repeat(values[-1:], missing, 0)])

    targets = np.concatenate([batch.targets, np.full((missing, batch.targets.shape[1]), IGNORE, np.int32)])
    doc_ids = None if batch.doc_ids is None else lengthen(batch.doc_ids)
    weights = None if batch.weights is None else lengthen(batch.weights)
    reference = batch.reference
    if reference is not None:
        reference = np.concatenate([reference, np.full(missing, np.nan)])
    return Batch(lengthen(batch.input_ids), targets, lengthen(batch.positions), doc_ids, weights, reference)


def write_batch(path: Path, batch: Batch) -> str:
    """Keep a batch in a safetensors file for the ranks; returns its full path."""
    from safetensors.numpy import save_file

    arrays = {name: getattr(batch, name) for name in (*_ARRAYS, *_OPTIONAL)}
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {n: np.ascontiguousarray(a, _OPTIONAL.get(n, np.int32)) for n, a in arrays.items() if a is not None}
    save_file(kept, path)
    return str(path.resolve())


def read_batch(path: str) -> Batch:
    """The batch that write_batch kept."""
    file = SafetensorsFile(path)
    ids, targets, positions = (file.read(name) for name in _ARRAYS)
    return Batch(ids, targets, positions, *(file.read(n) if n in file.tensors else None for n in _OPTIONAL))


def run_config(task: Task, rows: int, seq_len: int) -> RunConfig:
    """A training run that has this task's rows as its global batch; the trainer does not look at its data."""
    length = max(2, min(seq_len, task.model.max_seqlen))
    return RunConfig(
        model=task.model,
        data=DataConfig(sources=[], seq_len=length),
        train=TrainConfig(
            steps=max(task.steps, 1),
            global_batch=rows,
            micro_batch=task.micro_batch,
            precision=task.precision,
            recompute=task.recompute,
            seed=task.seed,
            freeze=task.freeze,
        ),
        optim=dataclasses.replace(
            task.optim,
            schedule="cosine",
            warmup_steps=0,
            warmup_ratio=None,
            decay_steps=None,
            decay_ratio=None,
            decay_shape="linear",
        ),  # fmt: skip
        parallel=task.layout,
        preference=task.preference,
        lora=task.lora,
    )


def _reader(task: Task, open_reader: OpenReader | None) -> ReadBox:
    if task.weights in SCHEMES:

        def initial(name: str, box: Box) -> np.ndarray:
            if task.lora is not None and is_adapter(name):
                return init_adapter(name, task.model, task.lora, task.seed, box, task.weights)
            return init_tensor(name, task.model, task.seed, box, task.weights)

        return initial
    if open_reader is None:
        raise ValueError(
            f"weights: expected a scheme ({', '.join(SCHEMES)}), found the folder {task.weights}; start the ranks with "
            "convert/parity_rank.py, or pass open_reader"
        )
    return open_reader(task.weights)


def _logits_pieces(
    logits: np.ndarray, part: Batch, first_row: int, task: Task, coord: Coord, shape: tuple[int, int]
) -> Iterator[TensorPiece]:
    """What one rank holds of one micro-batch's logits [b, s, V/tp], without padding, as pieces of [B, S, V]."""
    rows, seq_len = shape
    vocab_size, columns = task.model.vocab_size, logits.shape[2]
    column = coord.tp * columns
    real = min(columns, vocab_size - column)
    local = split_batch(part, task.layout, coord.cp)
    # Rows whose documents are dealt differently have their places one by one.
    groups = [slice(0, len(logits))] if len(local.index) == 1 else [slice(b, b + 1) for b in range(len(logits))]
    for group in groups:
        row, count = first_row + group.start, min(group.stop - group.start, rows - first_row - group.start)
        if count <= 0 or real <= 0:
            continue
        for start, place, length in real_places(_with_index_of(local, group), seq_len):
            array = logits[group][:count, start : start + length, :real]
            yield TensorPiece("logits", array, (row, place, column), (rows, seq_len, vocab_size))


def _with_index_of(local: LocalBatch, group: slice) -> LocalBatch:
    return local if len(local.index) == 1 else dataclasses.replace(local, index=local.index[group])


class ScaledGradients(Protocol):
    """What the search for a loss scale needs of a trainer."""

    @property
    def optimizer(self) -> GradientExporter: ...

    def agree(self, values: list[float], op: str) -> list[float]: ...


class GradientExporter(Protocol):
    """The accumulated gradients of one rank, as pieces of whole tensors."""

    def export_gradients(self) -> Iterator[TensorPiece]: ...


def _scaled(trainer: ScaledGradients, compute: Callable[[float], None], search: bool) -> float:
    """Leave the gradients of a scaled loss in the trainer; returns the scale, 1 without a search for the largest."""

    def attempt(scale: float) -> float:
        compute(scale)
        mine = largest_magnitude(piece.array for piece in trainer.optimizer.export_gradients())
        return float(trainer.agree([mine], "max")[0])

    if search:
        return largest_scale(attempt)
    compute(1.0)
    return 1.0


def _divided(pieces: Iterable[TensorPiece], scale: float) -> Iterator[TensorPiece]:
    """Pieces divided by a power of two, in their own dtype."""
    for piece in pieces:
        yield piece if scale == 1.0 else piece._replace(array=piece.array / piece.array.dtype.type(scale))


def _counted(sent: Traffic) -> Traffic:
    return {key: list(numbers) for key, numbers in sent.items() if key[0] not in _HOST}


def _write_pieces(folder: Path, kind: str, rank: int, pieces: Iterable[TensorPiece]) -> None:
    """Write a rank's pieces of one kind of tensors."""
    where = folder / kind
    where.mkdir(parents=True, exist_ok=True)
    with PieceWriter(where, rank=rank) as writer:
        for piece in pieces:
            writer.add("weights", piece)
    part = writer.part()["tensors"]["weights"]
    (where / f"part-{rank}.json").write_text(json.dumps(part), encoding="utf-8")


def _join(folder: Path, world: int, problems: list[str]) -> dict[str, np.ndarray]:
    """Whole tensors from the pieces of all ranks, {} where none were kept. A tensor that they do not make up, each
    element once, is left out and listed in ``problems``."""
    if not folder.is_dir():
        return {}
    entries: dict[str, JsonObject] = {}
    for rank in range(world):
        for name, entry in json.loads((folder / f"part-{rank}.json").read_text(encoding="utf-8")).items():
            entries.setdefault(name, {**entry, "pieces": []})["pieces"] += entry["pieces"]
    files: dict[str, SafetensorsFile] = {}
    tensors: dict[str, np.ndarray] = {}
    for name, entry in entries.items():
        fault = tiling_fault(entry["shape"], [(piece["offset"], piece["extent"]) for piece in entry["pieces"]])
        if fault:
            problems.append(f"{folder.name}: the {len(entry['pieces'])} pieces of '{name}' {fault}")
            continue
        for piece in entry["pieces"]:
            file = files.setdefault(piece["file"], SafetensorsFile(folder / piece["file"]))
            array = file.read(piece["key"])
            whole = tensors.setdefault(name, np.empty(entry["shape"], array.dtype))
            whole[tuple(slice(o, o + n) for o, n in zip(piece["offset"], piece["extent"], strict=True))] = array
    return tensors


if __name__ == "__main__":
    from telechat_twins.core.parity.worker import (
        main as run_rank,  # the module that core.commands meets, not this __main__ copy
    )

    raise SystemExit(run_script(run_rank))
