"""Rounding of float64 results to the dtype that weights are stored in: once, to nearest even."""

from __future__ import annotations

import numpy as np


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64 ``values`` in ``dtype``; what is beyond its range becomes infinite.

    ml_dtypes takes float64 to bfloat16 by way of float32: rounded to nearest twice, a value just beside the middle of
    two bfloat16 numbers goes to the wrong one. Here the first of the two roundings is to odd (what is cut off leaves
    its mark in the last bit), after which the second is as if it were the only one (Boldo and Melquiond, 2008).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype.name != "bfloat16":
            return values.astype(dtype)
        single = values.astype(np.float32)
        bits = single.view(np.uint32)
        wide = single.astype(np.float64)
        inexact = np.isfinite(values) & (wide != values)
        # One step back to the number below in magnitude, where rounding went up; then its last bit is set.
        bits -= (inexact & (np.abs(wide) > np.abs(values))).astype(np.uint32)
        bits |= inexact.astype(np.uint32)
        return single.astype(dtype)
