"""A tensor as the numpy definition of a CANN operator sees it, and the checks that the definitions share."""

from __future__ import annotations

from typing import NamedTuple

from numpy import ndarray as Array

HALVES = ("float16", "bfloat16")
FLOATS = (*HALVES, "float32")


class Operand(NamedTuple):
    """``value``: floating numbers in float64, others as they are; ``dtype``: the name of the tensor's own dtype."""

    value: Array
    dtype: str


def floats(**operands: Operand) -> None:
    """TypeError naming the first operand that is not float16, bfloat16 or float32."""
    for name, operand in operands.items():
        if operand.dtype not in FLOATS:
            raise TypeError(f"{name}: {operand.dtype}; needs one of {', '.join(FLOATS)}")


def same_dtype(**operands: Operand) -> None:
    """TypeError naming the first operand whose dtype is not that of the first one."""
    (first, expected), *others = operands.items()
    for name, operand in others:
        if operand.dtype != expected.dtype:
            raise TypeError(f"{name}: {operand.dtype}; needs {expected.dtype}, the dtype of {first}")


def same_shape(**operands: Operand) -> None:
    """ValueError naming the first operand whose shape is not that of the first one."""
    (first, expected), *others = operands.items()
    for name, operand in others:
        wanted = expected.value.shape
        need(operand.value.shape == wanted, name, operand.value.shape, f"the shape of {first}, {wanted}")


def need(holds: bool, name: str, found: object, wanted: str) -> None:
    """ValueError "name: found; needs wanted" unless it ``holds``."""
    if not holds:
        raise ValueError(f"{name}: {found}; needs {wanted}")
