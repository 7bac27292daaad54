"""Direct preference optimisation (DPO): loss of pairs of answers from the log-probabilities of whole rows.

Rafailov et al., arXiv 2305.18290, equation 7; label smoothing as in the authors' conservative DPO. Plain floats, so
that every backend computes the same: a backend sums the log-probabilities of each row's targets, and multiplies the
gradient of each row by the derivative found here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from telechat_twins.core.config import PreferenceConfig


class PairLoss(NamedTuple):
    """Loss of one pair (nats), its derivative by the chosen row's log-probability (that by the rejected row's is the
    negative), and the reward margin."""

    loss: float
    slope: float
    margin: float


def pair_loss(config: PreferenceConfig, chosen: float, rejected: float) -> PairLoss:
    """DPO of one pair. ``chosen``, ``rejected``: log-probability of the row's targets under the model minus that under
    the reference, in nats.

    margin = beta (chosen - rejected), the difference of the implicit rewards;
    loss = -(1 - e) log sigmoid(margin) - e log sigmoid(-margin) with e = ``label_smoothing``.
    """
    smoothing, margin = config.label_smoothing, config.beta * (chosen - rejected)
    loss = (1.0 - smoothing) * _softplus(-margin) + smoothing * _softplus(margin)
    slope = config.beta * (smoothing * _sigmoid(margin) - (1.0 - smoothing) * _sigmoid(-margin))
    return PairLoss(loss, slope, margin)


@dataclass
class PairObjective:
    """The pairs of one step on one rank (core.parallel.objective.RowObjective): sums of loss and metrics over them."""

    config: PreferenceConfig
    loss: float = 0.0
    margin: float = 0.0
    correct: int = 0
    pairs: int = 0

    def __call__(self, log_probs: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
        """d(sum of pair losses) / d log_probs, float64 [B].

        log_probs [B] float64: row sums of target log-probabilities, row 2i the chosen and 2i+1 the rejected one;
        reference [B]: the same under the reference model, nan for rows that only fill up the batch.
        """
        assert reference is not None  # batches of pairs have one
        slopes = np.zeros(len(log_probs))
        gains = (log_probs - reference).tolist()
        for row in range(0, len(gains), 2):
            found = pair_loss(self.config, gains[row], gains[row + 1])
            if math.isnan(found.margin) and math.isnan(reference[row] + reference[row + 1]):
                continue
            slopes[row], slopes[row + 1] = found.slope, -found.slope
            self.loss += found.loss
            self.margin += found.margin
            self.correct += found.margin > 0
            self.pairs += 1
        return slopes


@dataclass
class RowSums:
    """Keeps the log-probabilities of rows and asks for no gradient: how the reference is evaluated."""

    found: list[float]

    def __call__(self, log_probs: np.ndarray, reference: np.ndarray | None) -> np.ndarray:
        self.found += log_probs.tolist()
        return np.zeros(len(log_probs))


def _softplus(x: float) -> float:
    """log(1 + exp(x)), without overflow."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _sigmoid(x: float) -> float:
    small = math.exp(-abs(x))
    return 1.0 / (1.0 + small) if x >= 0 else small / (1.0 + small)
