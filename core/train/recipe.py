"""Scalars of the training recipe: learning rate per step, gradient clipping, which parameters decay.

The update itself (AdamW on fp32 masters) is an operator like any other: its definition is in ``kernels/reference.py``
and each backend runs its own. This module holds the arithmetic on scalars, so that both
backends use identical float64 values.
"""

from __future__ import annotations

import math

import numpy as np

from telechat_twins.core.config import OptimConfig
from telechat_twins.core.model.params import MATRIX

# Keeps clip_factor finite for a zero norm; the value is part of the published recipe (torch.nn.utils.clip_grad_norm_).
CLIP_EPS = 1e-6


def learning_rate(optim: OptimConfig, train_steps: int, step: int, grown_at: int | None = None) -> float:
    """Learning rate of ``step`` (0-based) in a run of ``train_steps``: linear warm-up, then cosine to ``min_lr``.

    Step s < warmup uses peak*(s+1)/warmup; after that floor + 0.5*(peak-floor)*(1 + cos(pi*(s-warmup)/(total-warmup))).
    The schedule counts batches drawn, not updates made: a skipped step moves along it like any other, so the learning
    rate of step s never depends on what went wrong before. Past the end it stays at the floor.

    After a growth at step g it warms up once more, rate*(s-g+1)/rewarmup, on the same cosine; with ``restart_lr`` on a
    new one from there, which begins where this warm-up ends and ends where the old one would.
    """
    if grown_at is None:
        if step < optim.warmup_steps:
            return optim.lr * (step + 1) / optim.warmup_steps
        return _cosine(optim.lr, optim.min_lr, step - optim.warmup_steps, train_steps - optim.warmup_steps)
    begin = grown_at + optim.rewarmup_steps
    warm = min(1.0, (step - grown_at + 1) / optim.rewarmup_steps) if optim.rewarmup_steps else 1.0
    if optim.restart_lr is None:
        return warm * learning_rate(optim, train_steps, step)
    return warm * _cosine(optim.restart_lr, optim.min_lr, max(0, step - begin), train_steps - begin)


def _cosine(peak: float, floor: float, step: int, steps: int) -> float:
    progress = min(1.0, step / steps) if steps > 0 else 1.0
    return floor + 0.5 * (peak - floor) * (1.0 + math.cos(math.pi * progress))


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
    pairs = zip(corrections(optim, updates, born), corrections(optim, updates), strict=True)
    rounded = np.dtype(dtype).type
    return any(rounded(own) != rounded(others) for own, others in pairs)


def clip_factor(norm: float, limit: float) -> float:
    """What to multiply the gradients by so that their global norm stays within ``limit``; 0 switches clipping off."""
    if limit == 0.0:
        return 1.0
    return min(1.0, limit / (norm + CLIP_EPS))
