"""From logits to the next token, in numpy, written once: both backends turn the same logits into the same token.

The rules are those of Hugging Face's generation, in its order: repetition penalty, temperature, top-k, top-p, draw.
Everything after the model is float64, so no decision hangs on a framework's softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from core.errors import UserError
from core.schema import from_mapping, option


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen. ``temperature`` 0 is greedy; top-k and top-p act on drawing only."""

    temperature: float = option(0.0, help="0 takes the likeliest token; above 0 draws", min=0.0, max=1e6)
    top_k: int = option(0, help="draw only from the k likeliest tokens; 0 switches it off", min=0)
    top_p: float = option(1.0, help="draw only from the likeliest tokens that hold this share", above=0.0, max=1.0)
    repetition_penalty: float = option(
        1.0, help="above 1 makes every token already in the prompt or the output less likely", above=0.0, max=1e6
    )
    seed: int = option(0, help="start of the random draws", min=0, max=2**64 - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def sampling_config(**values: Any) -> SamplingConfig:
    """A checked SamplingConfig; UserError names the option that is unknown, of the wrong type or out of range."""
    return from_mapping(SamplingConfig, values, "sampling")


def penalise(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Repetition penalty: logits [V], ``seen`` bool [V] -> float64 [V].

    A seen token's logit is divided by the penalty when positive and multiplied when negative, once, however often the
    token occurred.
    """
    scores = np.asarray(logits).astype(np.float64)
    if penalty != 1.0:
        scores = np.where(seen, np.where(scores < 0.0, scores * penalty, scores / penalty), scores)
    return scores


def keep_top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """-inf below the k-th largest score; tokens tied with it stay. float64 [V] -> float64 [V]."""
    if k <= 0 or k >= scores.size:
        return scores
    kth = np.partition(scores, scores.size - k)[scores.size - k]
    return np.where(scores < kth, -np.inf, scores)


def keep_top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """-inf for the tail whose cumulative share, counted from the least likely, is at most 1 - p. [V] -> [V].

    The likeliest token always stays. Among equal scores the higher id counts as likelier (a stable ascending sort).
    """
    if p >= 1.0:
        return scores
    order = np.argsort(scores, kind="stable")
    remove = np.cumsum(_softmax(scores[order])) <= 1.0 - p
    remove[-1] = False
    kept = scores.copy()
    kept[order[remove]] = -np.inf
    return kept


def probabilities(scores: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """The distribution drawn from, float64 [V], out of penalised scores [V]; temperature must be above 0."""
    # The largest score is moved to 0 first: the same distribution, and a tiny temperature cannot overflow it.
    with np.errstate(over="ignore"):
        scaled = (scores - scores.max()) / config.temperature
    return _softmax(keep_top_p(keep_top_k(scaled, config.top_k), config.top_p))


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that belongs to (seed, position), the same on every platform and in any order.

    Philox4x64-10 with the seed as key and the position as counter; the first 53 bits of the first word.
    """
    word = np.random.Philox(key=seed, counter=[position, 0, 0, 0]).random_raw()
    return (int(word) >> 11) * 2.0**-53


def pick(scores: np.ndarray, config: SamplingConfig, position: int) -> int:
    """The next token out of penalised scores [V]. ``position`` is its place in the whole sequence, prompt included.

    Greedy takes the first maximum; otherwise the inverse of the cumulative distribution at ``uniform``.
    """
    if config.greedy:
        return int(np.argmax(scores))
    cumulative = np.cumsum(probabilities(scores, config))
    target = uniform(config.seed, position) * cumulative[-1]
    # The first token whose share reaches beyond the target: a token of share 0 can never be it.
    token = int(np.searchsorted(cumulative, target, side="right"))
    return min(token, int(np.searchsorted(cumulative, cumulative[-1], side="left")))


def top2_margin(scores: np.ndarray) -> float:
    """Largest minus second largest score: how far a greedy choice was from being another one."""
    if scores.size < 2:
        return float("inf")
    second, first = np.partition(scores, scores.size - 2)[-2:]
    return float(first - second)


def check_finite(logits: np.ndarray, position: int) -> None:
    """UserError when the model gave NaN or infinity: choosing among them would look like an answer."""
    bad = int(np.count_nonzero(~np.isfinite(logits)))
    if bad:
        raise UserError(
            f"logits: {bad} of {logits.size} are not finite at position {position}; the weights are damaged or the "
            "precision overflows: verify the checkpoint, or try --precision fp32"
        )


def _softmax(scores: np.ndarray) -> np.ndarray:
    exponent = np.exp(scores - scores.max())
    return exponent / exponent.sum()
