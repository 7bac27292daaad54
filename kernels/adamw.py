"""Scalars of one AdamW update, shared by every implementation of the operator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class AdamWStep:
    """Hyperparameters of update number ``step``, counted from 1, of one group of parameters.

    Gradients are multiplied by ``grad_scale`` (clipping, loss scale) before they enter the moments; ``weight_decay`` is
    decoupled (Loshchilov and Hutter, arXiv 1711.05101). The properties are Python floats, float64, so that every
    implementation rounds the same values. Raises ValueError for a ``step`` below 1, where no bias correction exists.
    """

    step: int
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_scale: float = 1.0

    def __post_init__(self) -> None:
        if np.min(self.step) < 1:
            raise ValueError(f"step: got {self.step}, needs 1 for the first update")

    @property
    def bias_correction1(self) -> float:
        """1 - beta1^step: the sum of the weights that m gives to the gradients so far."""
        return 1.0 - self.beta1**self.step

    @property
    def bias_correction2(self) -> float:
        """1 - beta2^step: the sum of the weights that v gives to the squared gradients so far."""
        return 1.0 - self.beta2**self.step

    @property
    def decay_factor(self) -> float:
        """1 - lr * weight_decay: the factor of the old weight in the new one."""
        return 1.0 - self.lr * self.weight_decay

    def scalars(self) -> tuple[float, ...]:
        """What the C++ operator reads: lr, beta1, beta2, eps, decay factor, 1 / (1 - beta1^step), 1 / sqrt(1 -
        beta2^step), grad_scale."""
        corrections = 1.0 / self.bias_correction1, self.bias_correction2**-0.5
        return self.lr, self.beta1, self.beta2, self.eps, self.decay_factor, *corrections, self.grad_scale
