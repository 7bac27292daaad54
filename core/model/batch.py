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
    doc_ids [B, S] int32 (attention stays inside one id) or None when documents are not isolated.
    """

    input_ids: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    doc_ids: np.ndarray | None = None

    @property
    def num_targets(self) -> int:
        """Positions that count in the loss; the divisor is their number over the *global* batch."""
        return int((self.targets != IGNORE).sum())

    def rows(self, start: int, stop: int) -> Batch:
        """The samples start..stop-1: a micro-batch."""
        doc_ids = None if self.doc_ids is None else self.doc_ids[start:stop]
        return Batch(self.input_ids[start:stop], self.targets[start:stop], self.positions[start:stop], doc_ids)


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
