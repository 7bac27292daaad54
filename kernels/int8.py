"""Weight matrices in int8 with a scale per output channel, for tensors of either framework.

On a CPU the operators of kernels/cpu multiply them in integers: rows are rounded to 8 bits as well, GROUP columns
with a common scale (kernels.reference.quantized_rows). Elsewhere the rows stay as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

GROUP = 128  # kGroup in kernels/cpu/rows_int8.h
LEAST = 2.0**-100  # magnitude of a group below which it counts as zeros


class Int8(NamedTuple):
    """W[o, i] = values[o, i] * factors[o]: int8 [out, in] and float32 [out] (core.model.quantize)."""

    values: Any
    factors: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)
