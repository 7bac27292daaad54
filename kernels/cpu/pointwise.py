"""Element-wise sums and casts, checked as the operators of kernels/cpu/ops.py are, which exports them."""

from __future__ import annotations

from telechat_twins.kernels.cpu.checks import channels, floats, same_shape
from telechat_twins.kernels.cpu.engine import Array, DType


def add(x: Array, y: Array) -> Array:
    """x + y of one shape, in the dtype of x."""
    e = floats(x=x, y=y)
    same_shape(x=x, y=y)
    return e.run("add", (x, y), ((x.dtype, x.shape),), (), 0)


def add_bias(x: Array, bias: Array) -> Array:
    """x [..., E] with bias [E] added, in place; returns x."""
    e = floats(x=x, bias=bias)
    channels(x, bias=bias)
    e.run("add_bias", (x, bias), (), (), 0)
    return x


def cast(x: Array, dtype: DType) -> Array:
    """x in ``dtype``, one of checks.FLOATING; x itself where it has it."""
    e = floats(x=x)
    return x if x.dtype == dtype else e.run("cast", (x,), ((dtype, x.shape),), (), 0)
