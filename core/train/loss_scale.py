"""Loss scales of fp16: a state machine for training, and a search for a single batch. Independent of the framework.

fp16 holds nothing below 6e-8, so small gradients would vanish; multiplying the loss by a large power of two lifts them,
and too large a power overflows. In training the scale therefore halves at every overflow (that step is dropped) and
doubles after a run of good steps. A single batch has no next step: its gradients are computed again until the largest
scale is found. Powers of two only: multiplying and dividing by them is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields

import numpy as np

from telechat_twins.core.errors import UserError
from telechat_twins.core.types import JsonObject

_FP16_MAX = 65504.0
_SMALLEST, _FIRST, _LARGEST = -24, 16, 40  # exponents of the scales that a search tries


@dataclass
class DynamicLossScale:
    """``scale`` is what to multiply the loss by now; call ``overflow`` or ``good`` once after each step."""

    scale: float = 2.0**16
    growth_interval: int = 1000
    min_scale: float = 1.0
    max_scale: float = 2.0**24
    good_steps: int = 0

    def overflow(self) -> bool:
        """A gradient was not finite: halve. False when the scale is already at its floor, i.e. scaling cannot help."""
        self.good_steps = 0
        if self.scale <= self.min_scale:
            return False
        self.scale = max(self.min_scale, self.scale / 2)
        return True

    def good(self) -> None:
        """All gradients were finite: count, and double after ``growth_interval`` such steps in a row."""
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.good_steps = 0
            self.scale = min(self.max_scale, self.scale * 2)

    def to_dict(self) -> JsonObject:
        """The whole state as JSON values; ``from_dict`` restores it exactly (powers of two survive JSON)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: JsonObject) -> DynamicLossScale:
        """Raises UserError when ``state`` does not hold exactly the fields of ``to_dict``."""
        names = {f.name for f in fields(cls)}
        if set(state) != names:
            raise UserError(
                f"trainer.json: loss_scale has {sorted(state)}, expected {sorted(names)}; the file is damaged"
            )
        return cls(**state)


def largest_scale(attempt: Callable[[float], float]) -> float:
    """The largest power of two, 2^-24 to 2^40, at which the fp16 gradients of one batch are finite.

    ``attempt(scale)`` computes loss and gradients with the loss multiplied by ``scale`` and returns
    ``largest_magnitude`` of the scaled gradients, the same on all ranks. The last call is at the returned scale, so
    that what it left is the result. Gradients grow with the scale, so a finite attempt bounds what can follow it; but
    numbers on the way to them may overflow earlier, hence the bisection. UserError when no scale will do.
    """
    finite: int | None = None
    below, above = _SMALLEST - 1, _LARGEST + 1  # the scale is in between; neither end is it, but for a finite one below
    last = exponent = _FIRST
    while True:
        last, largest, found = exponent, attempt(2.0**exponent), finite is not None
        if math.isfinite(largest):
            finite = below = exponent
            if largest > 0:
                above = min(above, exponent + math.floor(math.log2(_FP16_MAX / largest)) + 1)
        else:
            above = exponent
        if above - below <= 1:
            break
        # From the first finite attempt as far as the gradients themselves allow; mostly nothing else overflows.
        exponent = above - 1 if finite is not None and not found else (above + below) // 2
    if finite is None:
        raise UserError(
            f"precision fp16: the loss or its gradients are not finite at any loss scale down to 2^{_SMALLEST}; "
            "use precision bf16 or fp32"
        )
    if last != finite:
        attempt(2.0**finite)
    return 2.0**finite


def largest_magnitude(gradients: Iterable[np.ndarray]) -> float:
    """The largest absolute value; infinity where any is not finite."""
    largest = max((float(np.abs(gradient).max(initial=0.0)) for gradient in gradients), default=0.0, key=_nan_last)
    return largest if math.isfinite(largest) else math.inf


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def gradients_of_batch(compute: Callable[[float], dict[str, np.ndarray]], precision: str, wanted: bool) -> JsonObject:
    """``grads`` by name if ``wanted``, and with fp16 the ``loss_scale`` that they were computed with.

    ``compute(scale)`` runs the batch and returns the gradients of scale * loss in float32 or wider.
    """
    if not wanted or precision != "fp16":
        found = compute(1.0)
        return {"grads": found} if wanted else {}
    held: dict[str, np.ndarray] = {}

    def attempt(scale: float) -> float:
        held.update(compute(scale))
        return largest_magnitude(held.values())

    scale = largest_scale(attempt)
    return {"grads": {name: gradient / np.float32(scale) for name, gradient in held.items()}, "loss_scale": scale}
