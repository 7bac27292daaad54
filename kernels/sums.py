"""Sums of records by the C++ operators of kernels/cpu, for core.parity.record.sums.Sums; both twins use them."""

from __future__ import annotations

from functools import cache

import numpy as np

from telechat_twins.core.parity.record.sums import Sums

SOURCES = ("registry.cc", "pool.cc", "sums.cc")


class CompiledSums(Sums):
    """Of float32 matrices, with the bits of the definitions in numpy."""

    def __init__(self, *flags: str) -> None:
        """``flags``: of the compiler, more than the usual. Raises kernels.cpu.build.BuildError without a compiler."""
        from telechat_twins.kernels.cpu.engine import NumpyEngine, usual_threads

        self._engine = NumpyEngine(*flags, sources=SOURCES)
        self._engine.set_threads(usual_threads())

    def serves(self, array: np.ndarray) -> bool:
        return bool(array.dtype == np.float32 and array.size and array.strides[1] == array.itemsize)

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
        given = [array, rows.astype(np.int64), starts, keys.view(np.int64), buckets.view(np.int8), signs]
        made: np.ndarray = self._engine.run(
            "record_sketch", given, [(np.dtype(np.float64), (len(starts) - 1, width + 5))], [], 1
        )
        return made

    def row_blocks(self, array: np.ndarray, width: int) -> np.ndarray:
        shape = (len(array), array.shape[1] // width)
        made: np.ndarray = self._engine.run("record_row_blocks", [array], [(np.dtype(np.float64), shape)], [width], 1)
        return made

    def checksums(self, array: np.ndarray, across: np.ndarray, down: np.ndarray) -> np.ndarray:
        given = [array, across.view(np.int64), down.view(np.int64)]
        made: np.ndarray = self._engine.run("record_checksum", given, [(np.dtype(np.int64), (len(array),))], [], 1)
        return made.view(np.uint64)

    def set_threads(self, threads: int) -> None:
        """Of one call; 0: as many as OMP_NUM_THREADS or the process's processors."""
        self._engine.set_threads(threads)


@cache
def open_sums() -> Sums | None:
    """The compiled sums; None without a compiler, where numpy adds up."""
    from telechat_twins.kernels.cpu.build import BuildError

    try:
        return CompiledSums()
    except BuildError:
        return None
