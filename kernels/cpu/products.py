"""Matrix products that add into a matrix that is there, checked as those of kernels/cpu/ops.py are."""

from __future__ import annotations

from telechat_twins.kernels.cpu.checks import floats, need, product
from telechat_twins.kernels.cpu.engine import Array


def matmul_add(c: Array, a: Array, w: Array, turn_w: bool = False) -> Array:
    """Adds a [m, k] times w [n, k] transposed, or with ``turn_w`` w [k, n], to c [m, n], all float32, in place; returns
    c. ValueError for a c that is not contiguous."""
    e = floats(c=c, a=a, w=w)
    need("c", c, ("float32",), product(a, w, "float32", False, turn_w))
    if e.unit_stride(c) is not c:
        raise ValueError("c: not contiguous, and to be written to")
    e.run("matmul_add", (c, a, w), (), (turn_w,), 0)
    return c
