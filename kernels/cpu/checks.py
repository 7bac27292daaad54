"""Argument checks of the CPU operators: dtypes and shapes, which the kernels do not check.

Each raises TypeError or ValueError naming the argument, its value and what it must be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from telechat_twins.kernels.cpu.engine import Array, Engine, engine_of

FLOATING = ("float32", "bfloat16", "float16")
INTEGER = ("int32", "int64")


def product(a: Array, w: Array, dtype: str, turn_a: bool, turn_w: bool) -> tuple[int, int]:
    """(m, n) of a matrix product."""
    for name, x in (("a", a), ("w", w)):
        need(name, x, (dtype,), None)
        if len(x.shape) != 2:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, needs two axes")
    (m, k), (n, inner) = a.shape[:: -1 if turn_a else 1], w.shape[:: -1 if turn_w else 1]
    if k != inner:
        raise ValueError(f"w: inner length {inner}, needs {k}, that of a")
    return m, n


def either(x: Array | None, other: Array) -> Array:
    """x, or ``other`` as a placeholder of an absent argument, which the kernel does not read."""
    return other if x is None else x


def size_of(x: Array) -> int:
    size = 1
    for n in x.shape:
        size *= n
    return size


def floats(**tensors: Array | None) -> Engine:
    """The engine of these floating-point tensors; absent ones are None."""
    engine: Engine | None = None
    for name, x in tensors.items():
        if x is None:
            continue
        if not hasattr(x, "dtype") or not hasattr(x, "shape"):
            raise TypeError(f"{name}: {type(x).__name__}, needs a tensor")
        if engine is None:
            engine = engine_of(x)
        if engine.name_of(x) not in FLOATING:
            raise TypeError(f"{name}: {engine.name_of(x)}, needs one of {', '.join(FLOATING)}")
    if engine is None:
        raise TypeError(f"{', '.join(tensors)}: None, needs a tensor")
    return engine


def written(**tensors: Array) -> None:
    """Check of tensors that a kernel writes to: it would write to a copy of one that is not contiguous."""
    for name, x in tensors.items():
        if not (x.flags["C_CONTIGUOUS"] if isinstance(x, np.ndarray) else x.is_contiguous()):
            raise ValueError(f"{name}: not contiguous, needs a contiguous tensor to be written to")


def need(name: str, x: Array, dtypes: Sequence[str], shape: Sequence[int] | None) -> None:
    """Check of dtype and, unless None, shape."""
    found = engine_of(x).name_of(x)
    if found not in dtypes:
        raise TypeError(f"{name}: {found}, needs {' or '.join(dtypes)}")
    if shape is not None and tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: shape {tuple(x.shape)}, needs {tuple(shape)}")


def same_shape(**tensors: Array | None) -> None:
    (first, reference), *others = [(name, x) for name, x in tensors.items() if x is not None]
    for name, x in others:
        if tuple(x.shape) != tuple(reference.shape):
            raise ValueError(f"{name}: shape {tuple(x.shape)}, needs that of {first}, {tuple(reference.shape)}")


def same(**tensors: Array) -> None:
    same_shape(**tensors)
    (first, reference), *others = tensors.items()
    for name, x in others:
        if x.dtype != reference.dtype:
            raise TypeError(f"{name}: {x.dtype}, needs the dtype of {first}, {reference.dtype}")


def channels(x: Array, **vectors: Array | None) -> None:
    if not x.shape:
        raise ValueError("x: a scalar, needs at least one axis")
    for name, vector in vectors.items():
        if vector is not None and tuple(vector.shape) != tuple(x.shape[-1:]):
            raise ValueError(f"{name}: shape {tuple(vector.shape)}, needs {tuple(x.shape[-1:])}, the channels of x")


def attends(q: Array, k: Array, v: Array, ranges: Array) -> Engine:
    e = floats(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if len(x.shape) != 4:
            raise ValueError(f"{name}: shape {tuple(x.shape)}, needs [B, length, heads, D]")
    (B, S, H, D), (_, T, K, _) = q.shape, k.shape
    if tuple(k.shape) != (B, T, K, D):
        raise ValueError(f"k: shape {tuple(k.shape)}, needs batch and head dim of q, {tuple(q.shape)}")
    same(k=k, v=v)
    if K == 0 or H % K:
        raise ValueError(f"k: {K} kv heads, needs a divisor of the {H} heads of q")
    need("ranges", ranges, ("int32",), None)
    if tuple(ranges.shape) not in ((B, S, 2), (1, S, 2)):
        raise ValueError(f"ranges: shape {tuple(ranges.shape)}, needs [{B} or 1, {S}, 2]")
    return e


def loss(logits: Array, targets: Array, first: int, real: int) -> Engine:
    e = floats(logits=logits)
    if len(logits.shape) != 2:
        raise ValueError(f"logits: shape {tuple(logits.shape)}, needs [N, C]")
    need("targets", targets, INTEGER, (logits.shape[0],))
    if not 0 <= real <= logits.shape[1]:
        raise ValueError(f"real: {real}, needs 0 to the {logits.shape[1]} columns of logits")
    if first < 0:
        raise ValueError(f"first: {first}, needs 0 or more, the first column's index in the vocabulary")
    return e
