"""Objectives on whole rows: the training loss as a function of each row's log-probability."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class RowObjective(Protocol):
    """Called once for each micro-batch, on every rank that holds logits, with the same numbers on all of them."""

    def __call__(self, log_probs: np.ndarray, reference: np.ndarray | None, /) -> np.ndarray:
        """d(objective) / d log_probs, float64 [B].

        log_probs [B] float64: log-probability (nats) of each row's targets under the model; reference [B] float64: of
        ``Batch.reference``.
        """
        ...
