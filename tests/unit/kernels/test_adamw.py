"""Scalars of one AdamW update."""

from __future__ import annotations

import pytest

from telechat_twins.kernels.adamw import AdamWStep


def test_derived_scalars_are_those_of_the_definition() -> None:
    step = AdamWStep(3, lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    assert step.grad_scale == 1.0
    assert step.bias_correction1 == 1.0 - 0.9**3
    assert step.bias_correction2 == 1.0 - 0.95**3
    assert step.decay_factor == 1.0 - 0.01 * 0.1


def test_updates_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match="step: got 0, needs 1 for the first update"):
        AdamWStep(0, 0.01, 0.9, 0.95, 1e-8, 0.1)
