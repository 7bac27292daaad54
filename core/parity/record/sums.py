"""Sums of matrices that a backend may compute faster than numpy, with the same bits.

core.parity.record defines them in numpy, which also serves where a trainer has none of these (no C++ compiler).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np


class Given(NamedTuple):
    """Where matrices [n, m] lie in a tensor's matrix, and the hash of their sketch.

    ``rows`` int64: numbers of the rows, [n], or of the first, [1], where they count on. ``runs`` int64 [runs + 1]:
    where rows of another block of the hash begin, and n; ``many`` of these are a chunk. ``keys`` uint64 [4]: of the
    hashes of blocks, shifts and rows, and of the checksum's rows. ``buckets`` uint8 [m], ``signs`` float32 [m]: of the
    columns; ``width`` is K. ``across`` uint64 [m]: the checksum's factors of the columns, [0] without a checksum.
    ``block``: height and width of a block, number of the first one in a row, and whether float32 block sums are written
    in place of added to what is there.
    """

    rows: np.ndarray
    runs: np.ndarray
    many: int
    keys: np.ndarray
    buckets: np.ndarray
    signs: np.ndarray
    width: int
    across: np.ndarray
    block: tuple[int, int, int, bool]


# Of matrices [n, m] at places that were prepared together, and for each of block sums [R, C], float64 or float32, to
# which its own are added, or None: float64 [matrices, K + 5] (K buckets, then nonfinite, norm2, sum, min and max) and
# uint64 [matrices], the checksums; both only until the next call. Two matrices of a call have no block in common.
Prepared: TypeAlias = Callable[[Sequence[np.ndarray], "Sequence[np.ndarray | None]"], tuple[np.ndarray, np.ndarray]]


class Sums(ABC):
    """Over matrices [n, m]; raises nothing for arrays that it ``serves``."""

    @abstractmethod
    def serves(self, array: np.ndarray) -> bool:
        """Whether what ``prepare`` gives takes this array."""

    @abstractmethod
    def prepare(self, places: Sequence[Given]) -> Prepared:
        """The sums of matrices at these places, of equal K."""


_provided: list[Callable[[], Sums | None]] = []


def provide_sums(opened: Callable[[], Sums | None]) -> None:
    """A backend's sums for the recorders of this process, opened when a step is recorded."""
    _provided[:] = [opened]


def provided_sums() -> Sums | None:
    """Those of the backend that made this process's trainer; None without any."""
    return _provided[0]() if _provided else None
