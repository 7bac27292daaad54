"""Sums of records by the C++ operators of kernels/cpu, for core.parity.record.sums.Sums; both twins use them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Literal

import numpy as np

from telechat_twins.core.parity.record.sums import Given, Prepared, Sums
from telechat_twins.kernels.cpu.build import load_plain
from telechat_twins.kernels.cpu.engine import Call, describe_view, usual_threads

SOURCES = ("registry.cc", "pool.cc", "sums.cc")
# Of sums.cc's Matrix, in its order; "keys" are four.
_FIELDS = (
    *("data", "stride", "columns", "rows", "in_turn", "runs", "run_count", "many", "buckets", "signs", "across"),
    *("keys", "", "", "", "height", "width", "first", "fresh", "blocks", "narrow", "blocks_stride", "num_buckets"),
)
_AT = {name: place for place, name in enumerate(_FIELDS)}


class CompiledSums(Sums):
    """Of float32 matrices, with the bits of the definitions in numpy."""

    def __init__(self, *flags: str, library: Callable[[], ctypes.CDLL] | None = None) -> None:
        """``library``: one of all operators, with its threads; without it one of the sums alone, with the usual number
        of threads, compiled with ``flags``, more than the usual. Raises kernels.cpu.build.BuildError without a
        compiler."""
        self._library = load_plain(*flags, sources=SOURCES) if library is None else library()
        if library is None:
            self.set_threads(usual_threads())

    def serves(self, array: np.ndarray) -> bool:
        return bool(array.dtype == np.float32 and array.size and array.strides[1] == array.itemsize)

    def prepare(self, places: Sequence[Given]) -> Prepared:
        made = np.empty((len(places), places[0].width + 5))
        checksums, table = np.empty(len(places), np.uint64), np.empty((len(places), len(_FIELDS)), np.int64)
        # The table keeps addresses; the closure keeps the arrays.
        held = [_fill(row, given) for row, given in zip(table, places, strict=True)]
        call = Call("record_add", 1, 2, (), self._library)
        describe_view(call.inputs[0], _address(table), table.shape, "int64")
        for view, array, dtype in zip(call.outputs, (made, checksums), ("float64", "int64"), strict=True):
            describe_view(view, _address(array), array.shape, dtype)
        data, stride, blocked, narrow, blocks_stride = (
            table[:, _AT[name]] for name in ("data", "stride", "blocks", "narrow", "blocks_stride")
        )

        def run(arrays: Sequence[np.ndarray], blocks: Sequence[np.ndarray | None]) -> tuple[np.ndarray, np.ndarray]:
            assert held
            for i, (array, sums) in enumerate(zip(arrays, blocks, strict=True)):
                data[i], stride[i], blocked[i] = _address(array), array.strides[0] >> 2, 0
                if sums is not None:
                    blocked[i], narrow[i], blocks_stride[i] = _address(sums), sums.itemsize == 4, sums.shape[1]
            call.run()
            return made, checksums

        return run

    def set_threads(self, threads: int) -> None:
        """Of one call; 0: as many as OMP_NUM_THREADS or the process's processors."""
        self._library.tele_set_threads(threads)


def _fill(row: np.ndarray, given: Given) -> list[np.ndarray]:
    """Set what of a row of the table stays the same from call to call; returns the arrays that it has addresses of."""
    held = {name: np.ascontiguousarray(getattr(given, name)) for name in ("rows", "runs", "buckets", "signs")}
    if len(given.across):
        held["across"] = np.ascontiguousarray(given.across)
    height, width, first, fresh = given.block
    numbers = {"columns": len(given.buckets), "in_turn": len(given.rows) == 1, "run_count": len(given.runs) - 1}
    numbers |= {"many": given.many, "num_buckets": given.width}
    numbers |= {"height": height, "width": width, "first": first, "fresh": fresh}
    row[:] = 0
    for name, number in (numbers | {name: _address(array) for name, array in held.items()}).items():
        row[_AT[name]] = number
    row[_AT["keys"] : _AT["keys"] + len(given.keys)] = given.keys.view(np.int64)
    return list(held.values())


def _address(array: np.ndarray) -> int:
    found: int = array.__array_interface__["data"][0]
    return found


@cache
def open_sums(steps: Literal["", "mindspore", "torch"] = "") -> Sums | None:
    """The compiled sums; None without a compiler, where numpy adds up.

    ``steps``: the framework of a step whose own operators are those of kernels/cpu, which the sums then share a library
    with: idle threads of another one would hold processors that they need.
    """
    from telechat_twins.kernels.cpu.build import BuildError, extension_library, load_plain

    shared = {"mindspore": [extension_library], "torch": [load_plain], "": []}[steps]
    for library in (*shared, None):
        with suppress(BuildError):
            return CompiledSums(library=library)
    return None
