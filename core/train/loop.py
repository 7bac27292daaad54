"""Training loop shared by both backends: everything about a run except the arithmetic of its steps.

A backend's ``train.py`` supplies a ``Stepper`` and calls ``main(Trainer)``. The loop and its step (core.train.run) draw
batches, set the learning rate, judge gradients, and keep the records (metrics.jsonl, TensorBoard, checkpoints), so that
the two backends cannot drift apart in any of these. The state of a run (step, samples drawn, health window, loss scale)
is small, plain numbers and in every checkpoint: a run that was interrupted and resumed equals one that was not, bit for
bit.

With many ranks each runs this loop, draws its own rows, and comes to every decision from numbers that are the same on
all of them; what only one can know (a signal, a full disk) is agreed upon. Rank 0 alone prints and keeps the records.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from telechat_twins.core.checkpoint.source import OpenInitial, WeightSource
from telechat_twins.core.config import RunConfig
from telechat_twins.core.data.blend import open_blend
from telechat_twins.core.data.vocabulary import fit_run
from telechat_twins.core.errors import UserError
from telechat_twins.core.launch.run_lock import RELEASE_WAIT_S, hold_folder
from telechat_twins.core.train.agreement import raise_on_all, require_same_on_all, run_on_all
from telechat_twins.core.train.health import TrainingStopped
from telechat_twins.core.train.heldout.evaluate import HeldOut
from telechat_twins.core.train.heldout.scores import check_folders, open_scores
from telechat_twins.core.train.heldout.sources import open_held_out, trained_on
from telechat_twins.core.train.recipe import with_steps
from telechat_twins.core.train.records import Records, Signals, header
from telechat_twins.core.train.reference import Reference, check_preference, origin_of, prepare
from telechat_twins.core.train.resume import (
    adopt_growth,
    checkpoint_to_resume,
    require_optimizer_state,
    require_same_adapter,
    require_same_model,
)
from telechat_twins.core.train.run.hooks import Hook, OpenHooks
from telechat_twins.core.train.run.saving import save, save_unless_saved, step_folder, way_back
from telechat_twins.core.train.run.state import Run
from telechat_twins.core.train.run.step import one_step
from telechat_twins.core.train.stages import StagedData
from telechat_twins.core.train.start import adopt_start, open_start, require_base
from telechat_twins.core.train.stepper import OpenRecorder, Stepper
from telechat_twins.core.train.trainable import check_freeze, run_table, trainable
from telechat_twins.core.train.watch.profile import check_profile, open_profile

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class TrainResult:
    """How ``train`` ended: at which step, with which checkpoint (None: a recorder ended it), and the signal that
    interrupted it, if one did; ``relayed``: a launcher passed it on."""

    step: int
    checkpoint: Path | None
    interrupted_by: int | None = None
    relayed: bool = False


def train(
    stepper_factory: Callable[[RunConfig], Stepper],
    config: RunConfig,
    out: str | Path,
    resume: str | None = None,
    open_initial: OpenInitial | None = None,
    open_recorder: OpenRecorder | None = None,
    open_hooks: OpenHooks | None = None,
) -> TrainResult:
    """Train to ``config.train.steps`` and write everything under ``out``.

    ``resume``: None starts anew; "auto" continues from ``out``'s latest checkpoint if there is one; otherwise a
    checkpoint or run folder, of either backend and any layout. ``open_initial`` opens the model of ``train.init``,
    whose weights a run begins with unless it resumes; ``open_recorder`` what records some of its steps, and
    ``open_hooks`` what else takes part (core.train.run.hooks). Writes
    metrics.jsonl, tensorboard/, loss.png and step-*/ checkpoints. Raises UserError before the model is built for what
    the user can mend, TrainingStopped when the numbers go wrong. SIGINT or SIGTERM, to any rank, ends the run after the
    current step with a checkpoint; a second signal kills at once.

    With more ranks than one, each calls this; ``out`` is one folder for all of them, and they raise or return alike.
    Rank 0 holds the folder's lock meanwhile: a second run there raises UserError.
    """
    with contextlib.ExitStack() as held:
        return _train(stepper_factory, config, Path(out), resume, open_initial, held, open_recorder, open_hooks)


def _train(
    stepper_factory: Callable[[RunConfig], Stepper],
    config: RunConfig,
    folder: Path,
    resume: str | None,
    open_initial: OpenInitial | None,
    held: contextlib.ExitStack,
    open_recorder: OpenRecorder | None = None,
    open_hooks: OpenHooks | None = None,
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
    check_profile(config)
    check_folders(config)
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
    run = Run(stepper, config, folder, data, held_out)
    run.notes += padding + length + trained_on(config)
    run.recorder = None if open_recorder is None else open_recorder(config, folder)
    run.hooks += run_on_all(stepper, lambda: open_profile(config, folder, stepper))
    run.hooks += run_on_all(stepper, lambda: open_scores(config, folder, stepper))
    if open_hooks is not None:
        run.hooks += run_on_all(stepper, lambda: open_hooks(config, folder, stepper))
    if not alone:
        share = (stepper.rank, stepper.world)
        for verify in [model.verify for model in (checkpoint, start) if model is not None]:
            run_on_all(stepper, functools.partial(verify, share=share))
    if start is not None:
        run_on_all(stepper, lambda: run.start(start, checkpoint is None))
    if checkpoint is not None:
        run_on_all(stepper, lambda: run.load(checkpoint))
    return _go(run)


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


def _go(run: Run) -> TrainResult:
    """Run from the present state to the end, an interruption or a stop."""
    last = None if run.recorder is None else run.recorder.last
    total = min(run.config.train.steps, last or run.config.train.steps)
    first = run.stepper.rank == 0
    lines = (*header(run.stepper, run.config, run.stages, run.data, run.state, total), *run.notes) if first else ()
    with Signals(quiet=not first) as signals, contextlib.ExitStack() as ended:
        records = run_on_all(run.stepper, lambda: Records(run, total, first, lines))
        ended.callback(records.close)
        for hook in run.hooks:
            ended.callback(hook.close)
        try:
            caught = _steps(run, signals, records, total, saves=last is None)
        except TrainingStopped as stop:
            with contextlib.suppress(UserError, OSError):  # why training stopped matters more
                run.saver.wait()
            raise TrainingStopped(f"{stop}. {way_back(run)}") from None
        except BaseException as error:
            # All ranks raise a UserError, so all of them finish what they write. After anything else the others may
            # be gone, and their parts of the checkpoint would never come.
            if run.stepper.world == 1 or isinstance(error, UserError):
                with contextlib.suppress(Exception):
                    run.saver.wait()
            raise
    saved = run.saver.last
    if last is not None:
        records.note(f"recorded {run.state.step} steps")
    elif caught is not None:
        records.note(
            f"stopped by {signal.Signals(caught).name} after step {run.state.step}; "
            f"saved {saved}. Go on with: --resume auto"
        )
    else:
        plot = run.out / "loss.png"
        records.note(f"{run.held_out.ending}finished {run.state.step} steps; checkpoint {saved}; plot {plot}")
    return TrainResult(run.state.step, saved, caught, signals.relayed)


def _steps(run: Run, signals: Signals, records: Records, total: int, saves: bool) -> int | None:
    """Steps up to ``total`` and their checkpoints (none unless ``saves``: a recording keeps none); the signal that
    ended them early."""
    every = run.config.checkpoint.every
    caught = _agree(run, signals)
    if run.config.preference is not None and not run.live:
        _prepare_reference(run, signals, records)
        caught = _agree(run, signals)
    if run.hooks and run.saver.last is not None:
        # By name, since --resume may spell the run's folder otherwise than --out.
        left = [
            run.saver.last.name == step_folder(run).name and h.unfinished(run.state.step, run.due) for h in run.hooks
        ]
        agreed = run.stepper.agree([float(flag) for flag in left], "max")
        _judge(run, signals, records, [hook for hook, flag in zip(run.hooks, agreed, strict=True) if flag])
    while run.state.step < total and caught is None and not run.held_out.exhausted:
        for hook in run.hooks:
            hook.before_step(run.state.step + 1)
        row = one_step(run, records)
        best = run.held_out.evaluate(row, run.stepper, records.note)
        due = bool(every) and run.state.step % every == 0
        for hook in run.hooks:
            hook.after_step(row, saves and (best or due or run.state.step == total), records.note)
        caught = _agree(run, signals, _recorded(run, functools.partial(records.step, row)))
        if saves and (best or due):
            save(run, run.config.checkpoint.asynchronous and not best)
            if best:
                run_on_all(run.stepper, lambda: run.held_out.mark(run.out, run.saver.last, run.stepper.rank))
            _at_checkpoint(run, signals, records)
            caught = _agree(run, signals)
    if saves and save_unless_saved(run):
        _at_checkpoint(run, signals, records)
    return _agree(run, signals)


def _at_checkpoint(run: Run, signals: Signals, records: Records) -> None:
    for hook in run.hooks:
        hook.at_checkpoint(run.state.step, step_folder(run), records.note)
    _judge(run, signals, records, [hook for hook in run.hooks if hook.judges])


def _judge(run: Run, signals: Signals, records: Records, hooks: Sequence[Hook]) -> None:
    """Let ``hooks`` evaluate the last checkpoint, unless the run is ending by a signal."""
    if not hooks or _agree(run, signals) is not None:
        return
    run_on_all(run.stepper, run.saver.wait)
    step = run.state.step
    for hook in hooks:
        row = hook.judge(step, step_folder(run), records.note, lambda: _agree(run, signals) is not None)
        if _agree(run, signals) is None:
            _agree(run, signals, _recorded(run, functools.partial(records.more, step, row)))
            hook.judged(step)


def _prepare_reference(run: Run, signals: Signals, records: Records) -> None:
    """Log-probabilities of the initial weights, for the blend; unfinished when a signal came meanwhile."""
    reference = Reference(run.out, run.data.first, origin_of(run.config, run.lineage.init))
    moved_in = (run.origin or run.out / "latest").parent if run.state.step else None
    rows = run.config.train.global_batch
    prepare(reference, run.stepper, rows, moved_in, lambda: _agree(run, signals) is not None, records.note)


def _agree(run: Run, signals: Signals, problem: str | None = None) -> int | None:
    """The signal that some rank has caught, if any. Raises on all ranks when one has a ``problem``, or when the
    save in the background has failed on one."""
    mine = [signals.caught or 0, signals.relayed, problem is not None, run.saver.failed, *run.meter.memory]
    caught, relayed, stuck, failed, *memory = run.stepper.agree([float(number) for number in mine], "max")
    run.meter.largest = memory
    if relayed:
        signals.relayed = True
    if stuck:
        raise_on_all(run.stepper, problem)
    if failed:
        run_on_all(run.stepper, run.saver.wait)
    return int(caught) or None


def _recorded(run: Run, record: Callable[[], None]) -> str | None:
    """Record figures of a step; the line for the user if the disk is full."""
    try:
        record()
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        with contextlib.suppress(UserError, OSError):
            run.saver.wait()
        return (
            f"{run.out}: the disk is full ({error.strerror}) after step {run.state.step}; "
            f"free some space and go on with --resume auto. {way_back(run)}"
        )
    return None
