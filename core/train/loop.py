"""Training loop shared by both backends: everything about a step except its arithmetic.

A backend's ``train.py`` supplies a ``Stepper`` and calls ``main(Trainer)``. The loop draws batches, sets the learning
rate, judges gradients, and keeps the records (metrics.jsonl, TensorBoard, checkpoints), so that the two backends cannot
drift apart in any of these. Its state (step, samples drawn, health window, loss scale) is small, plain numbers and in
every checkpoint: a run that was interrupted and resumed equals one that was not, bit for bit.

With many ranks each runs this loop, draws its own rows, and comes to every decision from numbers that are the same on
all of them; what only one can know (a signal, a full disk) is agreed upon. Rank 0 alone prints and keeps the records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from telechat_twins.core.checkpoint.read import Checkpoint, Saver, SaveRanks
from telechat_twins.core.checkpoint.save import Asset, Contents
from telechat_twins.core.checkpoint.source import OpenInitial, WeightSource
from telechat_twins.core.config import RunConfig
from telechat_twins.core.data.blend import open_blend
from telechat_twins.core.data.vocabulary import fit_run
from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.run_lock import RELEASE_WAIT_S, hold_folder
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.growth import Growth, read_history
from telechat_twins.core.model.lora import AdapterBase, AdapterRecord, adapter_record
from telechat_twins.core.model.params import MATRIX
from telechat_twins.core.model.xpos_range import check_xpos_range
from telechat_twins.core.train.agreement import meet, raise_on_all, require_same_on_all, run_on_all
from telechat_twins.core.train.health import Health, TrainingStopped
from telechat_twins.core.train.heldout.evaluate import HeldOut
from telechat_twins.core.train.heldout.sources import open_held_out
from telechat_twins.core.train.loss_scale import DynamicLossScale
from telechat_twins.core.train.metrics import Row
from telechat_twins.core.train.recipe import class_rate, clip_factor, rate_at, with_steps
from telechat_twins.core.train.records import Records, Signals, header
from telechat_twins.core.train.reference import Reference, check_preference, origin_of, prepare, with_live_reference
from telechat_twins.core.train.resume import (
    adopt_growth,
    checkpoint_to_resume,
    describe_resumption,
    require_optimizer_state,
    require_same_adapter,
    require_same_base,
    require_same_model,
)
from telechat_twins.core.train.stages import (
    Stage,
    StagedData,
    describe_stage,
    marks,
    plan_stages,
    require_same_samples,
    stage_of,
)
from telechat_twins.core.train.start import (
    Lineage,
    adopt_start,
    describe_adapter,
    describe_start,
    lineage_of,
    open_start,
    require_base,
    start_reader,
    start_record,
    tokenizer_note,
)
from telechat_twins.core.train.stepper import OpenRecorder, Stepper, StepRecorder, TrainState
from telechat_twins.core.train.trainable import check_freeze, run_table, trainable
from telechat_twins.core.types import JsonObject

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
T = TypeVar("T")


@dataclass(frozen=True)
class TrainResult:
    """How ``train`` ended: at which step, with which checkpoint (None: a recorder ended it), and the signal that
    interrupted it, if one did."""

    step: int
    checkpoint: Path | None
    interrupted_by: int | None = None


def train(
    stepper_factory: Callable[[RunConfig], Stepper],
    config: RunConfig,
    out: str | Path,
    resume: str | None = None,
    open_initial: OpenInitial | None = None,
    open_recorder: OpenRecorder | None = None,
) -> TrainResult:
    """Train to ``config.train.steps`` and write everything under ``out``.

    ``resume``: None starts anew; "auto" continues from ``out``'s latest checkpoint if there is one; otherwise a
    checkpoint or run folder, of either backend and any layout. ``open_initial`` opens the model of ``train.init``,
    whose weights a run begins with unless it resumes; ``open_recorder`` what records some of its steps. Writes
    metrics.jsonl, tensorboard/, loss.png and step-*/ checkpoints. Raises UserError before the model is built for what
    the user can mend, TrainingStopped when the numbers go wrong. SIGINT or SIGTERM, to any rank, ends the run after the
    current step with a checkpoint; a second signal kills at once.

    With more ranks than one, each calls this; ``out`` is one folder for all of them, and they raise or return alike.
    Rank 0 holds the folder's lock meanwhile: a second run there raises UserError.
    """
    with contextlib.ExitStack() as held:
        return _train(stepper_factory, config, Path(out), resume, open_initial, held, open_recorder)


def _train(
    stepper_factory: Callable[[RunConfig], Stepper],
    config: RunConfig,
    folder: Path,
    resume: str | None,
    open_initial: OpenInitial | None,
    held: contextlib.ExitStack,
    open_recorder: OpenRecorder | None = None,
) -> TrainResult:
    # Files only, and each rank finds the same in them: a refusal comes at once, before anything is built or joined.
    with _refused(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if config.parallel.world == 1:
        _hold(folder, held)
    data = StagedData(config, open_blend)
    check_preference(config, data.first)
    config, padding = fit_run(config, data.first.vocab_size, data.first.end_token)
    config, length = with_steps(config, data.rows_of_a_pass)
    held_out = HeldOut(config, open_held_out(config, data.first))
    alone = config.parallel.world == 1
    checkpoint = checkpoint_to_resume(folder, resume, verify=alone)
    require_base(config)
    start: WeightSource | None = None
    if checkpoint is not None:
        config = adopt_growth(checkpoint, config)
        require_same_model(checkpoint, config)
        require_same_adapter(checkpoint, config)
    if config.train.init is not None and (checkpoint is None or config.lora is not None):
        # An adapter's checkpoint holds the adapter alone: its base is read again.
        start = open_start(config, open_initial)
        config = adopt_start(start, config) if checkpoint is None else config
        if alone:
            start.verify()
    check_freeze(run_table(config), config)
    if checkpoint is not None:
        require_optimizer_state(checkpoint, trainable(run_table(config), config))
    stepper = stepper_factory(config)
    require_same_on_all(stepper, {**config.to_dict(), "--out": str(folder), "--resume": resume})
    if config.parallel.world > 1:
        # Not before the ranks have met: only then does each know which it is, however it was started.
        run_on_all(stepper, lambda: _hold(folder, held) if stepper.rank == 0 else None)
    run = _Run(stepper, config, folder, data, held_out)
    run.notes += padding + length
    run.recorder = None if open_recorder is None else open_recorder(config, folder)
    if not alone:
        share = (stepper.rank, stepper.world)
        for verify in [model.verify for model in (checkpoint, start) if model is not None]:
            run_on_all(stepper, functools.partial(verify, share=share))
    if start is not None:
        run_on_all(stepper, lambda: run.start(start, checkpoint is None))
    if checkpoint is not None:
        run_on_all(stepper, lambda: run.load(checkpoint))
    return run.go()


@contextlib.contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """UserError in place of an OSError about the run's folder."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be made ({error.strerror}); give another folder") from None


def _hold(folder: Path, held: contextlib.ExitStack) -> None:
    with _refused(folder):
        held.enter_context(hold_folder(folder, f"--out {folder}", patience=RELEASE_WAIT_S))


class _Run:
    """One training run on one rank: the loop's state and its outputs."""

    def __init__(self, stepper: Stepper, config: RunConfig, out: Path, data: StagedData, held_out: HeldOut) -> None:
        self.stepper, self.config, self.out, self.data, self.held_out = stepper, config, out, data, held_out
        self.stages = plan_stages(config)
        self.stage: Stage | None = None  # that of the last step made
        self.state = TrainState()
        self.health = Health(config.health)
        self.loss_scale = DynamicLossScale() if config.train.precision == "fp16" else None
        self.saver = Saver()
        self.origin: Path | None = None  # the checkpoint of another folder that this run went on from
        longest = max(stage.data.seq_len for stage in self.stages)
        warning = check_xpos_range(config.model, config.train.precision, longest)
        self.notes: list[str] = [] if warning is None else [f"warning: {warning}"]
        self.history: tuple[Growth, ...] = ()
        self.lineage = Lineage()
        # Whether the reference of preference pairs is the adapters' base, evaluated with each batch.
        self.live = config.preference is not None and config.preference.reference == "live"
        self.adapter: AdapterRecord | None = None  # with its base, once that is read
        self.growth = config.model.growth  # None once its masks have done their work
        self.recorder: StepRecorder | None = None

    def start(self, source: WeightSource, anew: bool = True) -> None:
        """Begin with the weights of another model; ``anew``: no checkpoint of an adapter of it follows."""
        self.stepper.load_weights(start_reader(source, self.config.model))
        record = start_record(source)
        if self.config.lora is not None:
            self.adapter = adapter_record(self.config.lora, AdapterBase(**record))
            self.notes.append(describe_adapter(self.adapter))
        self.lineage = lineage_of(source, self.stepper.rank == 0, record)
        if anew:
            self.notes += describe_start(source, record["fingerprint"])
            data = self.data.first
            self.notes += tokenizer_note(source, data.tokenizer_name, data.tokenizer())

    def load(self, checkpoint: Checkpoint) -> None:
        """Continue where ``checkpoint`` was taken; notes for the log say what differs from the run that wrote it."""
        trainer = checkpoint.trainer
        assert trainer is not None  # checkpoint_to_resume refuses others
        if self.adapter is not None:
            require_same_base(checkpoint, self.adapter)
        self.stepper.load(checkpoint, optimizer=True)
        if self.stepper.step != trainer["optimizer_steps"]:
            raise RuntimeError(f"stepper is at update {self.stepper.step}, checkpoint at {trainer['optimizer_steps']}")
        self.state = TrainState(trainer["step"], trainer["samples"], trainer["tokens"])
        self.health.load(trainer["health"])
        self.held_out.load(trainer)
        self.lineage = lineage_of(checkpoint, self.stepper.rank == 0)
        self.history = read_history(checkpoint.model, str(checkpoint.path / "model.json"))
        if self.loss_scale is not None and trainer["loss_scale"] is not None:
            self.loss_scale = DynamicLossScale.from_dict(trainer["loss_scale"])
        require_same_samples(self.stages, self.state)
        self.notes += describe_resumption(checkpoint, self.config, self.history, self._digest())
        if checkpoint.path.resolve().parent == self.out.resolve():
            self.saver.last = checkpoint.path
        else:
            self.origin = checkpoint.path

    def go(self) -> TrainResult:
        """Run from the present state to the end, an interruption or a stop."""
        every, last = self.config.checkpoint.every, None if self.recorder is None else self.recorder.last
        total = min(self.config.train.steps, last or self.config.train.steps)
        first = self.stepper.rank == 0
        lines = (*header(self.stepper, self.config, self.stages, self.data, self.state), *self.notes) if first else ()
        with Signals(quiet=not first) as signals, contextlib.ExitStack() as ended:
            records = run_on_all(
                self.stepper, lambda: Records(self.out, total, self.state.step, first, lines, marks(self.stages))
            )
            ended.callback(records.close)
            try:
                caught = self._agree(signals)
                if self.config.preference is not None and not self.live:
                    self._prepare_reference(signals, records)
                    caught = self._agree(signals)
                while self.state.step < total and caught is None and not self.held_out.exhausted:
                    row = self.one_step(records)
                    best = self.held_out.evaluate(row, self.stepper, records.note)
                    caught = self._agree(signals, self._recorded(records, row))
                    if best and last is None:  # a recording saves nothing
                        self.save(asynchronous=False)
                        run_on_all(
                            self.stepper, lambda: self.held_out.mark(self.out, self.saver.last, self.stepper.rank)
                        )
                    elif every and self.state.step % every == 0 and last is None:
                        self.save(self.config.checkpoint.asynchronous)
                        caught = self._agree(signals)
                if last is None:
                    self._save_unless_saved()
                caught = self._agree(signals)
            except TrainingStopped as stop:
                with contextlib.suppress(UserError, OSError):  # why training stopped matters more
                    self.saver.wait()
                raise TrainingStopped(f"{stop}. {self._way_back()}") from None
            except BaseException as error:
                # All ranks raise a UserError, so all of them finish what they write. After anything else the others may
                # be gone, and their parts of the checkpoint would never come.
                if self.stepper.world == 1 or isinstance(error, UserError):
                    with contextlib.suppress(Exception):
                        self.saver.wait()
                raise
        saved = self.saver.last
        if last is not None:
            records.note(f"recorded {self.state.step} steps")
        elif caught is not None:
            records.note(
                f"stopped by {signal.Signals(caught).name} after step {self.state.step}; "
                f"saved {saved}. Go on with: --resume auto"
            )
        else:
            plot = self.out / "loss.png"
            records.note(f"{self.held_out.ending}finished {self.state.step} steps; checkpoint {saved}; plot {plot}")
        return TrainResult(self.state.step, saved, caught)

    def _prepare_reference(self, signals: Signals, records: Records) -> None:
        """Log-probabilities of the initial weights, for the blend; unfinished when a signal came meanwhile."""
        reference = Reference(self.out, self.data.first, origin_of(self.config, self.lineage.init))
        moved_in = (self.origin or self.out / "latest").parent if self.state.step else None
        rows = self.config.train.global_batch
        prepare(reference, self.stepper, rows, moved_in, lambda: self._agree(signals) is not None, records.note)

    def _agree(self, signals: Signals, problem: str | None = None) -> int | None:
        """The signal that some rank has caught, if any. Raises on all ranks when one has a ``problem``, or when the
        save in the background has failed on one."""
        mine = [signals.caught or 0, problem is not None, self.saver.failed]
        caught, stuck, failed = self.stepper.agree([float(number) for number in mine], "max")
        if stuck:
            raise_on_all(self.stepper, problem)
        if failed:
            run_on_all(self.stepper, self.saver.wait)
        return int(caught) or None

    def _recorded(self, records: Records, row: Row) -> str | None:
        """Record a step; the line for the user if the disk is full."""
        try:
            records.step(row)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise
            with contextlib.suppress(UserError, OSError):
                self.saver.wait()
            return (
                f"{self.out}: the disk is full ({error.strerror}) after step {self.state.step}; "
                f"free some space and go on with --resume auto. {self._way_back()}"
            )
        return None

    def one_step(self, records: Records) -> Row:
        """Draw a global batch, train on it, advance; returns the step's row of metrics."""
        state, stage = self.state, self._enter_stage(records)
        started = time.perf_counter()
        grown_at = self.history[-1].step if self.history else None
        lr = rate_at(self.config, state.step, grown_at)
        self._set_mask(records)
        first, count = self.stepper.share(stage.global_batch)
        batch = self.data.of(stage).batch(state.samples - stage.drawn + first, count)
        if self.live:
            batch = with_live_reference(self.stepper, batch, first)
        # One divisor for the whole global batch: with masked targets, a mean of micro-batch means is another number.
        num_targets = self.stepper.count_targets(batch.num_terms)
        row: Row = {"step": state.step + 1, "loss": None, "grad_norm": None, "lr": lr}
        if len(self.stages) > 1:
            row |= {"stage": stage.number, "seq_len": stage.data.seq_len}
        if self.growth is not None:
            row["mask"] = self.growth.at_step(state.step)
        if (own := class_rate(self.config.optim, lr, MATRIX)) != lr:
            row["matrix_lr"] = own
        if self.loss_scale is not None:
            row["loss_scale"] = self.loss_scale.scale
        if self.recorder is not None:
            self.recorder.before(self.stepper, state.step + 1, batch, first, stage.global_batch, self._model_config())
        if num_targets:
            skipped = self._accumulate_and_update(batch, num_targets, lr, row, records)
        else:
            skipped = True
            records.note(f"warning: step {state.step + 1}: no position of this batch counts in the loss; skipped")
        seconds = time.perf_counter() - started
        tokens = stage.tokens
        self.state = TrainState(state.step + 1, state.samples + stage.global_batch, state.tokens + tokens)
        row |= {"tokens": self.state.tokens, "tokens_per_s": tokens / seconds, "step_ms": seconds * 1000}
        row |= {"skipped": True} if skipped else {}
        if self.recorder is not None and (note := self.recorder.after(row)) is not None:
            records.note(note)
        return row

    def _enter_stage(self, records: Records) -> Stage:
        """The stage of the next step; its length and batch are noted where it begins."""
        stage = stage_of(self.stages, self.state.step)
        if stage is not self.stage:
            self.stage, self.stepper.micro_batch = stage, stage.micro_batch
            if len(self.stages) > 1:
                records.note(describe_stage(stage, self.stages, self.config.model))
        return stage

    def _digest(self) -> str:
        """That of the data which the last step was drawn from."""
        return self.data.of(stage_of(self.stages, max(self.state.step - 1, 0))).digest()

    def _set_mask(self, records: Records) -> None:
        """Let the masks of a growing model rise with the steps, and go when they are 1."""
        if self.growth is None:
            return
        c = self.growth.at_step(self.state.step)
        self.stepper.set_mask(c)
        if c is None:
            self.growth = None
            records.note(f"step {self.state.step + 1}: the masks are 1 and gone, the model has its full size")

    def _model_config(self) -> JsonObject:
        """The model as it is for the next step, the state of its masks included."""
        c = None if self.growth is None else self.growth.at_step(self.state.step)
        growth = None if self.growth is None or c is None else dataclasses.replace(self.growth, mask=c)
        return dataclasses.replace(self.config.model, growth=growth).to_dict()

    def _accumulate_and_update(self, batch: Batch, num_targets: int, lr: float, row: Row, records: Records) -> bool:
        """Gradients, verdict, update. Fills loss and norm into ``row``; True if the step was skipped."""
        step = self.state.step + 1
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        loss = self.stepper.gradients(batch, num_targets, scale)
        norm = self.stepper.grad_norm(scale)
        row["loss"], row["grad_norm"] = loss, norm
        if self.recorder is not None:
            self.recorder.computed(loss, norm, scale)
        if self.config.preference is not None:
            row |= self.stepper.preference_metrics

        if self.loss_scale is not None and math.isfinite(loss) and not math.isfinite(norm):
            self.stepper.discard()
            if not self.loss_scale.overflow():
                raise TrainingStopped(
                    f"training stopped at step {step}: fp16 gradients overflow even with loss scale {scale:g}; "
                    "use precision bf16 or a lower learning rate"
                )
            records.note(
                f"step {step}: fp16 gradients overflowed; skipped, loss scale {scale:g} -> {self.loss_scale.scale:g}"
            )
            return True

        before = self.health.to_dict()
        verdict = self.health.judge(loss, norm)
        if verdict.action == "stop":
            self.stepper.discard()
            if math.isfinite(loss) and math.isfinite(norm):
                # A spike: the weights are still good, so keep the work up to here. After a non-finite loss they are
                # suspect, and a checkpoint of them could push a good one out of keep_last.
                self.health.load(before)
                if self.state.step:
                    self._save_unless_saved()
            # The same batch comes again after a resume, so say how to get past it.
            past = "; --set health.spike_policy=skip passes it" if math.isfinite(loss) and math.isfinite(norm) else ""
            raise TrainingStopped(f"training stopped at step {step}: {verdict.reason}{past}")
        if verdict.action == "skip":
            self.stepper.discard()
            records.note(f"warning: step {step}: {verdict.reason}; skipped")
        else:
            if verdict.action == "warn":
                records.note(f"warning: step {step}: {verdict.reason}")
            self.stepper.update(lr, clip_factor(norm, self.config.optim.clip_grad) / scale)
        if self.loss_scale is not None:
            self.loss_scale.good()
        return verdict.action == "skip"

    def save(self, asynchronous: bool) -> None:
        """A checkpoint of the present state under ``out``; ``asynchronous``: written while training goes on."""
        state, stepper = self.state, self.stepper
        trainer: JsonObject = {
            **dataclasses.asdict(state),
            "optimizer_steps": stepper.step,
            "data_digest": self._digest(),
            "loss_scale": self.loss_scale.to_dict() if self.loss_scale else None,
            "health": self.health.to_dict(),
            **self.held_out.trainer_entries,
            # The only randomness is the initial weights and the data order, both functions of this seed and a counter.
            "seed": self.config.train.seed,
            "backend": stepper.implementation().get("backend", "unknown"),
            "layout": self.config.parallel.name,
            **self.lineage.trainer_entries,
            "config": {**self.config.to_dict(), "model": self._model_config()},
        }
        tokenizer = Asset(self.data.first.tokenizer_name, self.data.first.tokenizer())
        contents = Contents(
            model={
                "config": self._model_config(),
                **({"grown": [growth.to_dict() for growth in self.history]} if self.history else {}),
                **self.lineage.model_entries,
                **({} if self.adapter is None else {"adapter": self.adapter.to_dict()}),
            },
            weights=stepper.weights(),
            optimizer=stepper.optimizer_state(),
            trainer=trainer,
            assets=[tokenizer, *(asset for asset in self.lineage.assets if asset.name != tokenizer.name)],
            ranks=SaveRanks(stepper.rank, stepper.world, lambda: meet(stepper)),
        )
        keep_last = self.config.checkpoint.keep_last
        self.saver.save(self.out, state.step, contents, keep_last=keep_last, asynchronous=asynchronous)

    def _save_unless_saved(self) -> None:
        self.saver.wait()
        if self.saver.last is None or self.saver.last.name != f"step-{self.state.step:08d}":
            self.save(asynchronous=False)

    def _way_back(self) -> str:
        every = self.config.checkpoint.every
        if self.saver.last is not None:
            return f"The last checkpoint is intact: {self.saver.last}"
        if self.origin is not None:
            return f"No checkpoint had been saved since; the one this run went on from is intact: {self.origin}"
        if every:
            return f"No checkpoint had been saved: the first would have come after step {every} (checkpoint.every)"
        return "No checkpoint had been saved (set checkpoint.every)"
