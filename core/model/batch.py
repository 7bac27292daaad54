"""One batch of training samples, as numpy, the same for both backends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """``targets[b, t]`` is the token that position t must predict, or IGNORE: labels are shifted here, once, before
    any split of the sequence.

    input_ids [B, S] int32, targets [B, S] int32, positions [B, S] int32 (restart per document when isolated),
    doc_ids [B, S] int32 (attention stays inside one id) or None when documents are not isolated. weights [B, S]
    float32: factor of each position's loss; None: 1 everywhere. reference [B] float64, of preference pairs only: the
    log-probability (nats) of each row's targets under the reference model, nan for rows that only fill up the batch;
    row 2i is the chosen and 2i+1 the rejected answer.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    doc_ids: np.ndarray | None = None
    weights: np.ndarray | None = None
    reference: np.ndarray | None = None

    @property
    def num_targets(self) -> int:
        """Positions that count in the loss, whatever their weights."""
        return int((self.targets != IGNORE).sum())

    @property
    def num_terms(self) -> int:
        """Terms whose mean over the *global* batch is the loss: targets, or preference pairs."""
        if self.reference is None:
            return self.num_targets
        return int(np.isfinite(self.reference).reshape(-1, 2).all(1).sum())

    def rows(self, start: int, stop: int) -> Batch:
        """The samples start..stop-1: a micro-batch."""
        optional = (self.doc_ids, self.weights, self.reference)
        return Batch(
            *(array[start:stop] for array in (self.input_ids, self.targets, self.positions)),
            *(None if array is None else array[start:stop] for array in optional),
        )


def shift_labels(labels: np.ndarray, loss_mask: np.ndarray | None = None) -> np.ndarray:
    """Hugging Face labels [B, S] (same positions as the inputs, IGNORE to skip) -> targets [B, S] int32.

    Position t predicts ``labels[t+1]``; the last position predicts nothing. ``loss_mask`` [B, S] (0/1, before the
    shift) drops the labels where it is 0.
    """
    if loss_mask is not None:
        labels = np.where(np.asarray(loss_mask) != 0, labels, IGNORE)
    targets = np.full(labels.shape, IGNORE, np.int32)
    targets[:, :-1] = labels[:, 1:]
    return targets
