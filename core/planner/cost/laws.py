"""Scaling laws: how many tokens, and which size, a budget of floating-point operations C = 6 N D buys.

N parameters, D tokens. A parametric law L = E + A / N^a + B / D^b is minimised under the budget in closed form:
    N = (a A / (b B))^(1 / (a + b)) (C / 6)^(b / (a + b)),  D = C / (6 N)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Law:
    """A compute-optimal rule: ``size`` gives the parameters for C FLOPs; ``loss`` of N and D, where the law has one."""

    name: str
    source: str
    size: Callable[[float], float]
    loss: Callable[[float, float], float] | None = None

    def optimum(self, flops: float) -> tuple[float, float]:
        """(parameters, tokens) for a budget of ``flops``."""
        size = self.size(flops)
        return size, flops / (6.0 * size)


def parametric(name: str, source: str, E: float, A: float, B: float, a: float, b: float) -> Law:
    """The law L = E + A / N^a + B / D^b."""
    factor = (a * A / (b * B)) ** (1.0 / (a + b))
    return Law(
        name,
        source,
        lambda flops: factor * (flops / 6.0) ** (b / (a + b)),
        lambda size, tokens: E + A / size**a + B / tokens**b,
    )


# Hoffmann et al. print rounded coefficients; Besiroglu et al. refitted the same runs.
LAWS: tuple[Law, ...] = (
    Law("20 tokens a parameter", "Hoffmann et al., arXiv 2203.15556, table 3", lambda flops: (flops / 120.0) ** 0.5),
    parametric("Chinchilla", "Hoffmann et al., arXiv 2203.15556, approach 3", 1.69, 406.4, 410.7, 0.34, 0.28),
    parametric("Chinchilla, refitted", "Besiroglu et al., arXiv 2404.10102", 1.8172, 482.01, 2085.43, 0.3478, 0.3658),
)


def budget(flops: float) -> list[dict[str, float | str | None]]:
    """The optimum of each law for ``flops``: parameters, tokens, and the loss where the law has one."""
    rows: list[dict[str, float | str | None]] = []
    for law in LAWS:
        size, tokens = law.optimum(flops)
        loss = None if law.loss is None else law.loss(size, tokens)
        rows.append({"law": law.name, "source": law.source, "parameters": size, "tokens": tokens, "loss": loss})
    return rows
