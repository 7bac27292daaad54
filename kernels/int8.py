"""Weight matrices in int8 with a scale per output channel, for tensors of either framework."""

from __future__ import annotations

from typing import Any, NamedTuple


class Int8(NamedTuple):
    """W[o, i] = values[o, i] * factors[o]: int8 [out, in] and float32 [out] (core.model.quantize)."""

    values: Any
    factors: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)
