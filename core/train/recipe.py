"""Scalars of the training recipe: learning rate per step, gradient clipping, which parameters decay.

The update itself (AdamW on fp32 masters) is an operator like any other: its definition is in ``kernels/reference.py``
and each backend runs its own. This module holds the arithmetic on scalars, so that both
backends use identical float64 values.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

from telechat_twins.core.config import OptimConfig, RunConfig
from telechat_twins.core.model.params import MATRIX

# Keeps clip_factor finite for a zero norm; the value is part of the published recipe (torch.nn.utils.clip_grad_norm_).
CLIP_EPS = 1e-6


def learning_rate(optim: OptimConfig, schedule_steps: int, step: int, grown_at: int | None = None) -> float:
    """Learning rate of ``step`` (0-based) in a schedule of ``schedule_steps``: linear warm-up, then ``optim.schedule``.

    Step s < warmup uses peak*(s+1)/warmup. After that, with p = (s-warmup)/(total-warmup) up to 1:
        cosine    floor + 0.5*(peak-floor)*(1 + cos(pi*p))
        linear    floor + (peak-floor)*(1-p)
        constant  peak
        wsd       peak until total-decay, then floor + (peak-floor)*(1-f(q)) with q = (s-(total-decay))/decay up to 1
                  and f(q) = q (linear), (1 - cos(pi*q))/2 (cosine) or sqrt(q) (sqrt)
    The schedule counts batches drawn, not updates made: a skipped step moves along it like any other, so the learning
    rate of step s never depends on what went wrong before. Past the end it stays at the floor.

    After a growth at step g it warms up once more, rate*(s-g+1)/rewarmup, on the same schedule; with ``restart_lr`` on
    a new one from there, which begins where this warm-up ends and ends where the old one would.

    Sources: wsd is MiniCPM's warmup-stable-decay (Hu et al., arXiv 2404.06395), its sqrt form Haegele et al.
    (arXiv 2405.18392).
    """
    warmup = optim.warmup(schedule_steps)
    if grown_at is None:
        if step < warmup:
            return optim.lr * (step + 1) / warmup
        return _after_warmup(optim, optim.lr, step, warmup, schedule_steps)
    begin = grown_at + optim.rewarmup_steps
    warm = min(1.0, (step - grown_at + 1) / optim.rewarmup_steps) if optim.rewarmup_steps else 1.0
    if optim.restart_lr is None:
        return warm * learning_rate(optim, schedule_steps, step)
    return warm * _after_warmup(optim, optim.restart_lr, max(begin, step), begin, schedule_steps)


def _after_warmup(optim: OptimConfig, peak: float, step: int, begin: int, end: int) -> float:
    """The schedule's value at ``step`` of the steps ``begin`` to ``end``, which fall from ``peak``."""
    floor = optim.min_lr
    if optim.schedule == "constant":
        return peak
    if optim.schedule == "wsd":
        begin = max(begin, end - optim.decay(end))
        if step < begin:
            return peak
    progress = min(1.0, (step - begin) / (end - begin)) if end > begin else 1.0
    shape = optim.decay_shape if optim.schedule == "wsd" else optim.schedule
    if shape == "cosine":
        return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * progress))
    return floor + (peak - floor) * (1.0 - (math.sqrt(progress) if shape == "sqrt" else progress))


def rate_at(config: RunConfig, step: int, grown_at: int | None = None) -> float:
    """Learning rate of ``step`` (0-based) of a run."""
    train = config.train
    return learning_rate(config.optim, train.schedule_steps or train.steps, step, grown_at)


def with_steps(config: RunConfig, samples: int) -> tuple[RunConfig, list[str]]:
    """``config`` with ``train.steps`` in place of ``train.epochs``, by the samples of one pass, and a note on it.

    The last step is whole: it may draw samples of the next pass.
    """
    train = config.train
    if train.epochs is None:
        return config, []
    # Of the number as it was written: 1.1 * 100 in binary is a little above 110.
    drawn = math.ceil(Fraction(str(train.epochs)) * samples)
    steps = -(-drawn // train.global_batch)
    beyond = steps * train.global_batch - drawn
    note = (
        f"train.epochs {train.epochs:g}: {samples:,} samples a pass of {train.global_batch} a step are {steps:,} steps"
    )
    if beyond:
        note += f"; the last draws {beyond} samples more"
    return dataclasses.replace(config, train=dataclasses.replace(train, steps=steps, epochs=None)), [note]


def tells_classes_apart(optim: OptimConfig) -> bool:
    """Whether matrix-like parameters have numbers of their own."""
    return optim.matrix_lr is not None or optim.matrix_weight_decay is not None


def class_rate(optim: OptimConfig, lr: float, mup_class: str) -> float:
    """Learning rate of a muP class (core.model.params) when that of the vector-like parameters is ``lr``.

    Matrix-like ones follow the same schedule with their own peak, so their floor is to ``min_lr`` what ``matrix_lr`` is
    to ``lr``. The output class has the vector-like rate: its share of muP is the logits' multiplier.
    """
    if mup_class != MATRIX or optim.matrix_lr is None or optim.matrix_lr == optim.lr:
        return lr
    return optim.matrix_lr * (lr / optim.lr)  # in this order the peak is matrix_lr exactly


def class_decay(optim: OptimConfig, decays: bool, mup_class: str) -> float:
    """Decoupled weight decay of parameters of one class that do or do not decay."""
    if not decays:
        return 0.0
    if mup_class == MATRIX and optim.matrix_weight_decay is not None:
        return optim.matrix_weight_decay
    return optim.weight_decay


def corrections(optim: OptimConfig, updates: int, born: int = 0) -> tuple[float, float]:
    """What update number ``updates`` (from 1) multiplies m and sqrt(v) by, for entries that came to be after update
    number ``born``: 1 / (1 - beta1^age) and 1 / sqrt(1 - beta2^age)."""
    age = updates - born
    return 1.0 / (1.0 - optim.beta1**age), (1.0 - optim.beta2**age) ** -0.5


def is_young(optim: OptimConfig, updates: int, born: int, dtype: str = "float32") -> bool:
    """Whether the corrections of entries born after update ``born`` differ in ``dtype``, that of the masters, from
    those of the oldest ones."""
    import numpy as np  # here, since `tele plan` reads recipes and rounds nothing

    pairs = zip(corrections(optim, updates, born), corrections(optim, updates), strict=True)
    rounded = np.dtype(dtype).type
    return any(rounded(own) != rounded(others) for own, others in pairs)


def clip_factor(norm: float, limit: float) -> float:
    """What to multiply the gradients by so that their global norm stays within ``limit``; 0 switches clipping off."""
    if limit == 0.0:
        return 1.0
    return min(1.0, limit / (norm + CLIP_EPS))
