"""Operands of the numpy definitions of CANN operators, and the checks that the definitions share."""

from __future__ import annotations

from typing import NamedTuple

from numpy import ndarray as Array

HALVES = ("float16", "bfloat16")
FLOATS = (*HALVES, "float32")


class Operand(NamedTuple):
    """``value``: floating-point elements as float64, others unchanged; ``dtype``: name of the tensor's dtype."""

    value: Array
    dtype: str


def floats(**operands: Operand) -> None:
    """Raises TypeError naming the first operand that is not float16, bfloat16 or float32."""
    for name, operand in operands.items():
        if operand.dtype not in FLOATS:
            raise TypeError(f"{name}: {operand.dtype}; needs one of {', '.join(FLOATS)}")


def same_dtype(**operands: Operand) -> None:
    """Raises TypeError naming the first operand whose dtype differs from that of the first one."""
    (first, expected), *others = operands.items()
    for name, operand in others:
        if operand.dtype != expected.dtype:
            raise TypeError(f"{name}: {operand.dtype}; needs {expected.dtype}, the dtype of {first}")


def same_shape(**operands: Operand) -> None:
    """Raises ValueError naming the first operand whose shape differs from that of the first one."""
    (first, expected), *others = operands.items()
    for name, operand in others:
        wanted = expected.value.shape
        need(operand.value.shape == wanted, name, operand.value.shape, f"the shape of {first}, {wanted}")


def need(holds: bool, name: str, found: object, wanted: str) -> None:
    """Raises ValueError "name: found; needs wanted" unless ``holds``."""
    if not holds:
        raise ValueError(f"{name}: {found}; needs {wanted}")
