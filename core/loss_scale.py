"""The dynamic loss scale of fp16 training, as a state machine without a framework.

fp16 holds nothing below 6e-8, so small gradients would vanish; multiplying the loss by a large power of two lifts them,
and too large a power overflows. The scale therefore halves at every overflow (that step is dropped) and doubles after a
run of good steps. Powers of two only: multiplying and dividing by them is exact.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from core.errors import UserError


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

    def to_dict(self) -> dict[str, Any]:
        """The whole state as JSON values; ``from_dict`` restores it exactly (powers of two survive JSON)."""
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> DynamicLossScale:
        """Raises UserError when ``state`` does not hold exactly the fields of ``to_dict``."""
        names = {f.name for f in fields(cls)}
        if set(state) != names:
            raise UserError(
                f"trainer.json: loss_scale has {sorted(state)}, expected {sorted(names)}; the file is damaged"
            )
        return cls(**state)
