"""Sums of records by the C++ operators of kernels/cpu, for core.parity.record.sums.Sums; both twins use them."""

from __future__ import annotations

from functools import cache

import numpy as np

from telechat_twins.core.parity.record.sums import Given, Prepared, Sums
from telechat_twins.kernels.cpu.engine import NumpyEngine, describe_view, usual_threads

SOURCES = ("registry.cc", "pool.cc", "sums.cc")


class CompiledSums(Sums):
    """Of float32 matrices, with the bits of the definitions in numpy."""

    def __init__(self, *flags: str) -> None:
        """``flags``: of the compiler, more than the usual. Raises kernels.cpu.build.BuildError without a compiler."""
        self._engine = NumpyEngine(*flags, sources=SOURCES)
        self._engine.set_threads(usual_threads())

    def serves(self, array: np.ndarray) -> bool:
        return bool(array.dtype == np.float32 and array.size and array.strides[1] == array.itemsize)

    def prepare(self, given: Given) -> Prepared:
        made = np.empty((len(given.starts) - 1, given.width + 5))
        checksums = np.empty(len(made), np.uint64)
        call = self._engine.call("record_add", 7, 3, given.block)
        # The call keeps addresses; the closure keeps the arrays.
        held = [np.ascontiguousarray(x) for x in (*given[:5], given.across)]
        rows, starts, keys, buckets, signs, across = held
        for view, array, dtype in zip(
            (*call.inputs[1:7], *call.outputs[:2]),
            (rows, starts, keys, buckets, signs, across, made, checksums),
            ("int64", "int64", "int64", "int8", "float32", "int64", "float64", "int64"),
            strict=True,
        ):
            describe_view(view, array.ctypes.data, array.shape, dtype)
        matrix, blocked, first = call.inputs[0], call.outputs[2], made[0]
        describe_view(matrix, 0, (int(starts[-1]), len(buckets)), "float32")
        describe_view(blocked, 0, (0, 0), "float64")
        seen: list[object] = [None]  # shape and dtype of the last block sums

        def run(array: np.ndarray, blocks: np.ndarray | None) -> tuple[np.ndarray, int]:
            assert held is not None
            matrix.data = array.__array_interface__["data"][0]
            matrix.stride[0] = array.strides[0] // array.itemsize
            kind = None if blocks is None else (blocks.shape, blocks.dtype.name)
            if kind != seen[0]:
                describe_view(blocked, 0, *(kind or ((0, 0), "float64")))
                seen[0] = kind
            if blocks is not None:
                blocked.data = blocks.__array_interface__["data"][0]
            call.run()
            return first, int(checksums[0])

        return run

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
