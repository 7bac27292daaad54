"""A matrix in 8-bit whole numbers, as either framework holds it."""

from __future__ import annotations

from typing import Any, NamedTuple


class Int8(NamedTuple):
    """values int8 [out, in] times factors float32 [out], one for each output (core.model.quantize)."""

    values: Any
    factors: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)
