"""A tensor that backward passes compute again in place of keeping it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recomputed(Generic[T]):
    """``compute()`` for ``uses`` readers: computed at the first call, kept until the last.

    The readers are layers with the same input, whose backward passes follow one another, so that the value lives
    shortly. ``compute`` must return the bits that the forward pass had.
    """

    def __init__(self, compute: Callable[[], T], uses: int) -> None:
        self._compute, self._left = compute, uses
        self._value: list[T] = []

    def __call__(self) -> T:
        value = self._value[0] if self._value else self._compute()
        self._left -= 1
        self._value = [value] if self._left > 0 else []
        return value
