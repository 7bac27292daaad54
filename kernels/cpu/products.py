"""Matrix products that add into a matrix that is there, checked as those of kernels/cpu/ops.py are."""

from __future__ import annotations

import numpy as np

from telechat_twins.kernels.cpu.checks import either, floats, need, product
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


def low_rank(y: Array, x: Array, a: Array, b: Array, scale: float) -> Array:
    """Adds scale * x [m, k] a [r, k]^T b [n, r]^T to y [m, n], all float32, in place; returns scale * x a^T [m, r].

    ValueError for a y that is not contiguous.
    """
    e = floats(y=y, x=x, a=a, b=b)
    _in_place("y", y)
    (m, r), n = product(x, a, "float32", False, False), b.shape[0]
    need("b", b, ("float32",), (n, r))
    need("y", y, ("float32",), (m, n))
    return e.run("low_rank", (y, x, a, b), ((e.dtypes["float32"], (m, r)),), (scale,), 0)


def low_rank_backward(
    dx: Array | None, dy: Array, x: Array, low: Array, a: Array, b: Array, scale: float, add: bool = True
) -> tuple[Array, Array]:
    """Gradients of ``low_rank``: (da [r, k], db [n, r]) from dy [m, n] and what it returned, ``low`` [m, r].

    What x adds to its gradient, scale * dy b a, is added to dx [m, k] in place, or written there without ``add``; a dx
    of None is not wanted. All float32.
    """
    e = floats(dx=dx, dy=dy, x=x, low=low, a=a, b=b)
    (m, r), n = product(x, a, "float32", False, False), b.shape[0]
    need("b", b, ("float32",), (n, r))
    need("low", low, ("float32",), (m, r))
    need("dy", dy, ("float32",), (m, n))
    if dx is not None:
        need("dx", dx, ("float32",), x.shape)
        _in_place("dx", dx)
    f32 = e.dtypes["float32"]
    what = 0 if dx is None else 2 if add else 1
    outputs = ((f32, tuple(a.shape)), (f32, (n, r)))
    return e.run("low_rank_backward", (either(dx, x), dy, x, low, a, b), outputs, (scale, what), 0)


def _in_place(name: str, x: Array) -> None:
    contiguous = x.flags["C_CONTIGUOUS"] if isinstance(x, np.ndarray) else x.is_contiguous()
    if not contiguous:
        raise ValueError(f"{name}: not contiguous, and to be written to")
