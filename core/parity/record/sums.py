"""Sums of matrices that a backend may compute faster than numpy, with the same bits.

core.parity.record defines them in numpy, which also serves where a trainer has none of these (no C++ compiler).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np


class Sums(ABC):
    """Over matrices [n, m]; raises nothing for arrays that it ``serves``."""

    @abstractmethod
    def serves(self, array: np.ndarray) -> bool:
        """Whether the others take this array."""

    @abstractmethod
    def sketch(
        self,
        array: np.ndarray,
        rows: np.ndarray,
        starts: np.ndarray,
        keys: np.ndarray,
        buckets: np.ndarray,
        signs: np.ndarray,
        width: int,
    ) -> np.ndarray:
        """float64 [chunks, K + 5]: K = ``width`` buckets, then nonfinite, norm2, sum, min and max of each chunk of
        rows, from ``starts[c]`` to ``starts[c + 1]``. ``rows`` int64 [n]: numbers in the tensor's matrix. ``keys``
        uint64 [3]: of the hashes of blocks, shifts and rows. ``buckets`` uint8 [m], ``signs`` float32 [m]: of the
        columns."""

    @abstractmethod
    def row_blocks(self, array: np.ndarray, width: int) -> np.ndarray:
        """float64 [n, m / width]: sums of ``width`` neighbouring columns, from the left; what is not finite is 0."""

    @abstractmethod
    def checksums(self, array: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
        """uint64 [n], modulo 2^64: the sum of each row's (bits + 1) * ``across`` [m], times its ``down`` [n]."""


_provided: list[Callable[[], Sums | None]] = []


def provide_sums(opened: Callable[[], Sums | None]) -> None:
    """A backend's sums for the recorders of this process, opened when a step is recorded."""
    _provided[:] = [opened]


def provided_sums() -> Sums | None:
    """Those of the backend that made this process's trainer; None without any."""
    return _provided[0]() if _provided else None
