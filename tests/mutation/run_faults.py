"""Faults of whole runs: the schedule, what a checkpoint gives back, and growth."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from telechat_twins.convert.growth import plan, weights
from telechat_twins.core.backends import load
from telechat_twins.core.config import OptimConfig
from telechat_twins.core.data.blend import Blend
from telechat_twins.core.model import growth, growth_mask, masks
from telechat_twins.core.model.growth_mask import GrowthMask
from telechat_twins.core.train import recipe, trainer
from telechat_twins.core.train.health import Health
from telechat_twins.core.train.preference import PairObjective
from telechat_twins.core.train.run import state as run_state
from telechat_twins.core.train.run import step as run_step
from tests.mutation.fault import FORWARD, Change, fault
from tests.parity import test_optimizer_trace

Changes = Iterator[Change]


def _rate(wrong: Callable[..., float]) -> Changes:
    """``wrong(real, optim, steps, step)`` in the place of the learning rate, wherever it is read."""
    real = recipe.learning_rate
    for owner in (recipe, test_optimizer_trace):
        yield owner, "learning_rate", lambda *args: wrong(real, *args)


@fault("schedule", "golden", "learning rate")
def warm_up_from_zero(backend: str) -> Changes:
    """Step s < warmup has peak * s / warmup."""

    def wrong(real: Any, optim: OptimConfig, steps: int, step: int, *rest: Any) -> float:
        warmup = optim.warmup(steps)
        return optim.lr * step / warmup if step < warmup else real(optim, steps, step, *rest)

    return _rate(wrong)


@fault("schedule", "golden", "learning rate")
def rate_of_the_step_before(backend: str) -> Changes:
    """The schedule lags by one step."""
    return _rate(lambda real, optim, steps, step, *rest: real(optim, steps, max(step - 1, 0), *rest))


@fault("schedule", "golden", "learning rate")
def cosine_from_the_first_step(backend: str) -> Changes:
    """The cosine counts the warm-up's steps as its own."""
    real = recipe._after_warmup
    yield recipe, "_after_warmup", lambda optim, peak, step, begin, end: real(optim, peak, step, 0, end)


@fault("schedule", "golden", "learning rate")
def floor_of_the_rate_missed(backend: str) -> Changes:
    """The cosine falls to 0."""
    real = recipe._after_warmup
    yield (
        recipe,
        "_after_warmup",
        lambda optim, *rest: real(dataclasses.replace(optim, min_lr=0.0), *rest),
    )


@fault("schedule", "golden", "learning rate")
def last_step_at_the_floor(backend: str) -> Changes:
    """The cosine reaches its end one step early."""
    real = recipe._after_warmup
    yield (
        recipe,
        "_after_warmup",
        lambda optim, peak, step, begin, end: real(optim, peak, step, begin, end - 1),
    )


@fault("schedule", "golden", "loss|weight|gradient")
def clip_each_update_by_the_last_norm(backend: str) -> Changes:
    """Clipping uses the gradient norm of the step before."""
    real, held = recipe.clip_factor, [1.0]

    def wrong(norm: float, limit: float) -> float:
        held[0], before = norm, held[0]
        return real(before, limit)

    yield test_optimizer_trace, "clip_factor", wrong


@fault("schedule", "golden", "weight|loss|gradient")
def second_moment_of_unclipped_gradients(backend: str) -> Changes:
    """Clipping scales the rate, not the gradients."""
    adamw = load(backend, "optim").AdamW
    real = adamw.step
    yield adamw, "step", lambda self, lr, grad_scale: real(self, lr * grad_scale, 1.0)


@fault("remainder", "samples", "samples")
def last_samples_of_a_pass_dropped(backend: str) -> Changes:
    """What does not fill a batch at the end of a pass is not drawn."""
    real = Blend.locate

    def wrong(self: Blend, sample: int) -> Any:
        passes, place = divmod(sample, self.num_samples[0] // 4 * 4)
        return real(self, passes * self.num_samples[0] + place)

    yield Blend, "locate", wrong


@fault("position", "samples", "samples")
def batches_overlap_by_one(backend: str) -> Changes:
    """Each batch begins with the last sample of the one before."""
    real = Blend.batch
    yield Blend, "batch", lambda self, first, count: real(self, max(first - first // count, 0), count)


def _load(wrong: Callable[[Any, Any], None]) -> Changes:
    """``wrong(run, checkpoint)`` after a run has been loaded."""
    real = run_state.Run.load

    def load_run(self: Any, checkpoint: Any) -> None:
        real(self, checkpoint)
        wrong(self, checkpoint)

    yield run_state.Run, "load", load_run


def _state(backend: str, wrong: Callable[..., Any]) -> Changes:
    """``wrong(real, self, read, step_count, history)`` in the place of the optimizer's loading of its state."""
    adamw = load(backend, "optim").AdamW
    real = adamw.load_state
    yield (
        adamw,
        "load_state",
        lambda self, read, step_count, history=(): wrong(real, self, read, step_count, history),
    )


@fault("resume", "resume plain", "rows|tensors")
def moments_not_resumed(backend: str) -> Changes:
    """The optimizer begins with empty moments."""
    return _state(backend, lambda real, self, read, *rest: real(self, lambda key, box: read(key, box) * 0.0, *rest))


@fault("resume", "resume plain", "rows|tensors")
def second_moment_not_resumed(backend: str) -> Changes:
    """Only the first moment comes back."""

    def wrong(real: Any, self: Any, read: Any, *rest: Any) -> None:
        real(self, lambda key, box: read(key, box) * (1.0 if key.startswith("m.") else 0.0), *rest)

    return _state(backend, wrong)


@fault("resume", "resume plain", "rows|tensors|loss is nan")
def moments_swapped(backend: str) -> Changes:
    """m is read where v belongs, and v where m does."""

    def wrong(real: Any, self: Any, read: Any, *rest: Any) -> None:
        real(self, lambda key, box: read(("v" if key[0] == "m" else "m") + key[1:], box), *rest)

    return _state(backend, wrong)


@fault("resume", "resume plain", "refused")
def updates_counted_anew(backend: str) -> Changes:
    """The bias correction begins again."""
    return _state(backend, lambda real, self, read, step_count, history: real(self, read, 0, history))


@fault("resume", "resume plain", "rows|tensors")
def data_from_the_start(backend: str) -> Changes:
    """A resumed run draws the first samples again."""
    return _load(lambda run, _: setattr(run, "state", dataclasses.replace(run.state, samples=0)))


@fault("resume", "resume plain", "rows|tensors")
def last_batch_drawn_again(backend: str) -> Changes:
    """A resumed run begins with the batch of its last step."""
    return _load(
        lambda run, _: setattr(run, "state", dataclasses.replace(run.state, samples=run.state.samples - 4))
    )  # fmt: skip


@fault("resume", "resume plain", "rows|tensors")
def tokens_counted_anew(backend: str) -> Changes:
    """A resumed run reports only its own tokens."""
    return _load(lambda run, _: setattr(run, "state", dataclasses.replace(run.state, tokens=0)))


@fault("resume", "resume plain", "rows|tensors")
def schedule_begins_again(backend: str) -> Changes:
    """A resumed run warms up from its own first step."""
    real = run_step.rate_at
    yield run_step, "rate_at", lambda config, step, *rest: real(config, step - 3, *rest)


@fault("resume", "resume plain", "run's state")
def health_window_lost(backend: str) -> Changes:
    """The statistics by which spikes are judged begin again."""
    yield Health, "load", lambda self, state: None


@fault("dtype", "resume bf16", "rows|tensors")
def masters_resumed_from_bfloat16(backend: str) -> Changes:
    """Masters are read from the weights that the model computes with."""
    from ml_dtypes import bfloat16

    adamw = load(backend, "optim").AdamW
    real = adamw.load_masters

    def wrong(self: Any, read: Any) -> None:
        real(self, lambda name, box: read(name, box).astype(bfloat16).astype(np.float32))

    yield adamw, "load_masters", wrong


@fault("resume", "resume fp16", "run's state")
def loss_scale_not_resumed(backend: str) -> Changes:
    """A resumed float16 run begins with the first loss scale."""

    def wrong(run: Any, _: Any) -> None:
        run.loss_scale = type(run.loss_scale)()

    return _load(wrong)


@fault("resume", "resume lora", "rows|tensors")
def dropout_counts_from_the_resumption(backend: str) -> Changes:
    """Masks of adapters are counted by the steps of this process."""
    real = trainer.LoraDropout
    yield trainer, "LoraDropout", lambda rate, seed, step, *rest: real(rate, seed, step - 3, *rest)


@fault("resume", "resume grown", "rows|tensors")
def mask_rises_anew(backend: str) -> Changes:
    """A resumed run begins to let the masks rise at its own first step."""
    real = GrowthMask.at_step
    yield GrowthMask, "at_step", lambda self, step: real(self, step - 2)


@fault("resume", "resume grown", "rows|tensors")
def ages_not_resumed(backend: str) -> Changes:
    """A resumed run takes every entry for one of the start."""
    return _state(backend, lambda real, self, read, step_count, history: real(self, read, step_count, ()))


@fault("growth", "ages", "update")
def ages_of_the_oldest(backend: str) -> Changes:
    """New entries have the bias correction of the old ones."""
    yield load(backend, "optim"), "birth_classes", lambda history, pieces, size: None


@fault("position", "ages", "update")
def ages_off_by_one(backend: str) -> Changes:
    """New entries are one update older than they are."""
    module = load(backend, "optim")
    real = module.birth_classes

    def wrong(*args: Any) -> Any:
        found = real(*args)
        return None if found is None else (found[0], [max(0, born - 1) for born in found[1]])

    yield module, "birth_classes", wrong


@fault("growth", "growth", "loss|logits|gradient")
def new_heads_appended(backend: str) -> Changes:
    """New heads are numbered after all old ones, which regroups old heads over the keys."""

    def wrong(old: tuple[int, int], new: tuple[int, int]) -> np.ndarray:
        return np.where(np.arange(new[0]) < old[0], np.arange(new[0]), -1)

    yield growth_mask, "head_map", wrong
    for owner in (growth, plan, weights):
        yield owner, "head_map", wrong


@fault("growth", "growth", "loss|logits|gradient")
def masks_begin_at_one(backend: str) -> Changes:
    """What is new counts in full from the first step."""
    real = masks.masks
    model = load(backend, "model")
    yield model, "masks", lambda config, c, columns: real(config, None if c is None else 1.0, columns)


@fault("growth", "growth", "loss|logits|gradient")
def norms_of_the_grown_model_unmasked(backend: str) -> Changes:
    """Norms take their statistics over new channels, too."""
    ops = load(backend, "ops")
    norm = ops.rms_norm

    def rms(x: Any, weight: Any, eps: float, stat: Any, compute: Any, mask: Any = None) -> Any:
        out = norm(x, weight, eps, stat, compute)
        return out if mask is None else out * mask

    yield ops, "rms_norm", rms
    yield ops, "add_rms_norm", lambda x, residual, *rest: (rms(residual + x, *rest), residual + x)


@fault("growth", "growth", "loss|logits|gradient")
def new_block_counts_at_once(backend: str) -> Changes:
    """New blocks are not the identity."""
    block = load(backend, "model").DecoderBlock
    real = getattr(block, FORWARD[backend])

    def wrong(self: Any, *args: Any) -> Any:
        kept, self.mask = self.mask, None
        try:
            return real(self, *args)
        finally:
            self.mask = kept

    yield block, FORWARD[backend], wrong


@fault("growth", "growth", "loss|logits|gradient")
def old_channels_last(backend: str) -> Changes:
    """The mask takes the last channels for the old ones."""
    real = masks.new_channels
    yield masks, "new_channels", lambda size, old: real(size, old)[::-1].copy()


@fault("growth", "growth run", "mask|loss")
def mask_one_step_ahead(backend: str) -> Changes:
    """The first step after a growth has the mask of the second."""
    real = GrowthMask.at_step
    yield GrowthMask, "at_step", lambda self, step: real(self, step + 1)


@fault("growth", "growth run", "mask|rate")
def warm_up_after_growth_missed(backend: str) -> Changes:
    """The rate goes on as if nothing had grown."""
    real = run_step.rate_at
    yield run_step, "rate_at", lambda config, step, grown_at=None: real(config, step)


@fault("growth", "growth run", "tensors|moments")
def moments_of_new_entries_copied(backend: str) -> Changes:
    """What is new begins with moments of what is old."""
    adamw = load(backend, "optim").AdamW
    real = adamw.load_state

    def wrong(self: Any, read: Any, step_count: int, history: Any = ()) -> None:
        def filled(key: str, box: Any) -> np.ndarray:
            array = read(key, box)
            return np.where(array == 0.0, np.abs(array).mean(), array).astype(array.dtype)

        real(self, filled, step_count, history)

    yield adamw, "load_state", wrong


@fault("preference", "resume pairs", "rows|tensors")
def reference_moves_with_the_model(backend: str) -> Changes:
    """A resumed run takes the log-probabilities of the present weights for those of the reference."""
    real = PairObjective.__call__
    yield PairObjective, "__call__", lambda self, now, reference: real(self, now, now)
