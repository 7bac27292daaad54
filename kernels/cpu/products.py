"""Products added to a matrix, and layers with low-rank adapters, checked as the operators of kernels/cpu/ops.py are."""

from __future__ import annotations

from telechat_twins.kernels.cpu.checks import either, floats, need, product, written
from telechat_twins.kernels.cpu.engine import Array


def matmul_add(c: Array, a: Array, w: Array) -> None:
    """c [m, n] += a [m, k] @ w [k, n], in place; all float32. ValueError for a c that is not contiguous."""
    e = floats(c=c, a=a, w=w)
    need("c", c, ("float32",), product(a, w, "float32", False, True))
    written(c=c)
    e.run("matmul_add", (c, a, w), (), (), 0)


def adapted(
    x: Array, read: Array, w: Array, bias: Array | None, a: Array, b: Array, scale: float
) -> tuple[Array, Array]:
    """(x [m, k] w [n, k]^T + bias [n] + low b [n, r]^T, low), where low [m, r] = scale * read [m, k] a [r, k]^T; all
    float32."""
    e = floats(x=x, read=read, w=w, bias=bias, a=a, b=b)
    f32, (m, n), r = e.dtypes["float32"], product(x, w, "float32", False, False), a.shape[0]
    product(read, a, "float32", False, False)
    need("read", read, ("float32",), x.shape)
    need("b", b, ("float32",), (n, r))
    if bias is not None:
        need("bias", bias, ("float32",), (n,))
    outputs = ((f32, (m, n)), (f32, (m, r)))
    return e.run("adapted", (x, read, w, either(bias, x), a, b), outputs, (scale, bias is not None), 0)


def adapted_backward(
    dy: Array,
    read: Array,
    low: Array,
    w: Array,
    a: Array,
    b: Array,
    scale: float,
    dx: Array | None = None,
    dread: Array | None = None,
    add: bool = True,
) -> tuple[Array, Array]:
    """Gradients of ``adapted``: (da [r, k], db [n, r]) from dy [m, n] and what it returned, ``low`` [m, r].

    dy w is added to dx [m, k] in place, scale * dy b a to dread [m, k]; without ``add`` both are written. They may be
    one array; None: not wanted. All float32. ValueError for one that is not contiguous.
    """
    e = floats(dx=dx, dread=dread, dy=dy, read=read, low=low, w=w, a=a, b=b)
    (m, r), n = product(read, a, "float32", False, False), b.shape[0]
    need("b", b, ("float32",), (n, r))
    need("low", low, ("float32",), (m, r))
    need("dy", dy, ("float32",), (m, n))
    need("w", w, ("float32",), (n, a.shape[1]))
    for name, into in (("dx", dx), ("dread", dread)):
        if into is not None:
            need(name, into, ("float32",), read.shape)
            written(**{name: into})
    f32, what = e.dtypes["float32"], 2 if add else 1
    scalars = (scale, 0 if dx is None else what, 0 if dread is None else 3 if dread is dx else what)
    inputs = (either(dx, read), either(dread, read), dy, read, low, w, a, b)
    return e.run("adapted_backward", inputs, ((f32, tuple(a.shape)), (f32, (n, r))), scalars, 0)
