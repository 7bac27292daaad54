"""One step of a run: its batch, its learning rate, gradients, the verdict on them, the update, its row of metrics."""

from __future__ import annotations

import math
import time

from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.params import MATRIX
from telechat_twins.core.train.health import TrainingStopped
from telechat_twins.core.train.metrics import Row
from telechat_twins.core.train.recipe import class_rate, clip_factor, rate_at
from telechat_twins.core.train.records import Records
from telechat_twins.core.train.reference import with_live_reference
from telechat_twins.core.train.run.saving import save_unless_saved
from telechat_twins.core.train.run.state import Run
from telechat_twins.core.train.stages import Stage, describe_stage, stage_of
from telechat_twins.core.train.stepper import TrainState


def one_step(run: Run, records: Records) -> Row:
    """Draw a global batch, train on it, advance; returns the step's row of metrics."""
    state, stage = run.state, _enter_stage(run, records)
    started = time.perf_counter()
    grown_at = run.history[-1].step if run.history else None
    lr = rate_at(run.config, state.step, grown_at)
    _set_mask(run, records)
    first, count = run.stepper.share(stage.global_batch)
    run.meter.begin()
    batch = run.data.of(stage).batch(state.samples - stage.drawn + first, count)
    loaded = time.perf_counter() - started
    if run.live:
        batch = with_live_reference(run.stepper, batch, first)
    # One divisor for the whole global batch: with masked targets, a mean of micro-batch means is another number.
    num_targets = run.stepper.count_targets(batch.num_terms)
    row: Row = {"step": state.step + 1, "loss": None, "grad_norm": None, "lr": lr}
    if len(run.stages) > 1:
        row |= {"stage": stage.number, "seq_len": stage.data.seq_len}
    if run.growth is not None:
        row["mask"] = run.growth.at_step(state.step)
    if (own := class_rate(run.config.optim, lr, MATRIX)) != lr:
        row["matrix_lr"] = own
    if run.loss_scale is not None:
        row["loss_scale"] = run.loss_scale.scale
    if run.recorder is not None:
        run.recorder.before(run.stepper, state.step + 1, batch, first, stage.global_batch, run.model_config())
    if num_targets:
        skipped = _accumulate_and_update(run, batch, num_targets, lr, row, records)
    else:
        skipped = True
        records.note(f"warning: step {state.step + 1}: no position of this batch counts in the loss; skipped")
    seconds = time.perf_counter() - started
    tokens = stage.tokens
    run.state = TrainState(state.step + 1, state.samples + stage.global_batch, state.tokens + tokens)
    row |= {"tokens": run.state.tokens, "tokens_per_s": tokens / seconds, "step_ms": seconds * 1000}
    row |= run.meter.columns(stage, seconds, loaded)
    row |= {"skipped": True} if skipped else {}
    if run.recorder is not None and (note := run.recorder.after(row)) is not None:
        records.note(note)
    return row


def _enter_stage(run: Run, records: Records) -> Stage:
    """The stage of the next step; its length and batch are noted where it begins."""
    stage = stage_of(run.stages, run.state.step)
    if stage is not run.stage:
        run.stage, run.stepper.micro_batch = stage, stage.micro_batch
        if len(run.stages) > 1:
            records.note(describe_stage(stage, run.stages, run.config.model))
    return stage


def _set_mask(run: Run, records: Records) -> None:
    """Let the masks of a growing model rise with the steps, and go when they are 1."""
    if run.growth is None:
        return
    c = run.growth.at_step(run.state.step)
    run.stepper.set_mask(c)
    if c is None:
        run.growth = None
        records.note(f"step {run.state.step + 1}: the masks are 1 and gone, the model has its full size")


def _accumulate_and_update(run: Run, batch: Batch, num_targets: int, lr: float, row: Row, records: Records) -> bool:
    """Gradients, verdict, update. Fills loss and norm into ``row``; True if the step was skipped."""
    step = run.state.step + 1
    scale = run.loss_scale.scale if run.loss_scale else 1.0
    loss = run.stepper.gradients(batch, num_targets, scale)
    norm = run.stepper.grad_norm(scale)
    row["loss"], row["grad_norm"] = loss, norm
    if run.recorder is not None:
        run.recorder.computed(loss, norm, scale)
    if run.config.preference is not None:
        row |= run.stepper.preference_metrics

    if run.loss_scale is not None and math.isfinite(loss) and not math.isfinite(norm):
        run.stepper.discard()
        if not run.loss_scale.overflow():
            raise TrainingStopped(
                f"training stopped at step {step}: fp16 gradients overflow even with loss scale {scale:g}; "
                "use precision bf16 or a lower learning rate"
            )
        records.note(
            f"step {step}: fp16 gradients overflowed; skipped, loss scale {scale:g} -> {run.loss_scale.scale:g}"
        )
        return True

    before = run.health.to_dict()
    verdict = run.health.judge(loss, norm)
    if verdict.action == "stop":
        run.stepper.discard()
        if math.isfinite(loss) and math.isfinite(norm):
            # A spike: the weights are still good, so keep the work up to here. After a non-finite loss they are
            # suspect, and a checkpoint of them could push a good one out of keep_last.
            run.health.load(before)
            if run.state.step:
                save_unless_saved(run)
        # The same batch comes again after a resume, so say how to get past it.
        past = "; --set health.spike_policy=skip passes it" if math.isfinite(loss) and math.isfinite(norm) else ""
        raise TrainingStopped(f"training stopped at step {step}: {verdict.reason}{past}")
    if verdict.action == "skip":
        run.stepper.discard()
        records.note(f"warning: step {step}: {verdict.reason}; skipped")
    else:
        if verdict.action == "warn":
            records.note(f"warning: step {step}: {verdict.reason}")
        run.stepper.update(lr, clip_factor(norm, run.config.optim.clip_grad) / scale)
    if run.loss_scale is not None:
        run.loss_scale.good()
    return verdict.action == "skip"
