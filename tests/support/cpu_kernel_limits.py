"""Error limits of the checks of the C++ operators.

A finding is (what, error, limit) with relative Frobenius norms. The limit is the float32 rounding error of the
definition on the same inputs, times a factor for another order of summation, and at least a few units in the last
place; in 16 bits it is the rounding of the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from telechat_twins.core.parity.bounds import relative_frobenius

F32 = np.dtype(np.float32)
HALF = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
UNIT = {F32: 2.0**-24, HALF["bfloat16"]: 2.0**-9, HALF["float16"]: 2.0**-12}
FACTOR, UNITS = 8.0, 6.0
Finding = tuple[str, float, float]
# Channels: one, fewer than a vector, a vector, one more, primes, several vectors and a tail.
WIDTHS = (1, 3, 16, 17, 131, 512, 1009)


def judged(what: str, got: Any, define: Callable[[type], Any], dtype: np.dtype = F32) -> Finding:
    """``define(float type)`` is the definition on inputs of that type."""
    truth, plain = (np.asarray(define(kind)) for kind in (np.float64, np.float32))
    assert np.isfinite(np.asarray(got, np.float64)).all() or not np.isfinite(truth).all(), f"{what}: not finite"
    if not truth.any():
        return what, float(np.linalg.norm(np.asarray(got, np.float64))), UNITS * UNIT[F32]
    limit = max(FACTOR * relative_frobenius(plain, truth), UNITS * UNIT[dtype])
    return what, relative_frobenius(np.asarray(got, np.float64), truth), limit
