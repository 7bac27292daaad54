"""Training cost as papers state it: floating-point operations in zettaFLOPs (1e21), as a range, and by language.

The method is that of FLM-101B's report (arXiv 2309.03852, section 4), after Narayanan et al. (arXiv 2104.04473):
    F = 72 l h^2 T (1 + s / (6 h) + V / (12 l h))
for l layers of width h, T tokens in sequences of s, a vocabulary of V. Recomputing all activations costs 4/3 of it. The
report prints the middle of that range and half its width where a model's recipe is not known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ZETTA = 1e21
RECOMPUTING = 4.0 / 3.0


@dataclass(frozen=True)
class Trained:
    """A model's shape as the formula takes it, and its tokens. ``recomputed``: None where it is not known."""

    layers: int
    width: int
    tokens: float
    seq_len: int
    vocabulary: int
    recomputed: bool | None = None


@dataclass(frozen=True)
class Cost:
    """FLOPs: ``low`` without recomputation, ``high`` with all; equal where it is known."""

    low: float
    high: float

    @property
    def middle(self) -> float:
        return 0.5 * (self.low + self.high)

    @property
    def half_width(self) -> float:
        return 0.5 * (self.high - self.low)


def cost(trained: Trained) -> Cost:
    """The range of a training's FLOPs."""
    l, h = trained.layers, trained.width  # noqa: E741  (the formula's letters)
    share = 1.0 + trained.seq_len / (6.0 * h) + trained.vocabulary / (12.0 * l * h)
    plain = 72.0 * l * h * h * trained.tokens * share
    low = plain * RECOMPUTING if trained.recomputed else plain
    high = plain if trained.recomputed is False else plain * RECOMPUTING
    return Cost(low, high)


def by_language(flops: float, shares: Mapping[str, float]) -> dict[str, float]:
    """A cost divided by the shares of a training's data, which need not add up to 1."""
    whole = sum(shares.values())
    return {language: flops * share / whole for language, share in shares.items()}
