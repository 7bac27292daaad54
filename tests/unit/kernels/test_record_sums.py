"""The compiled sums of records against numpy's definitions: the same bits, on every path and number of threads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core.parity.record.blocks import Grid
from telechat_twins.core.parity.record.sketch import Projection, Statistics
from telechat_twins.core.parity.record.tally import Tally
from telechat_twins.core.parity.record.window import Rows, Window, Windows, checksum, numbers_of
from telechat_twins.kernels.cpu.build import BuildError
from telechat_twins.kernels.sums import CompiledSums

# Rows and columns of a tensor; rows and first column of the part that is added.
PARTS = {
    "a block and more": ((300, 1100), np.arange(300), 0),
    "one column": ((5000, 1), np.arange(5000), 0),
    "a few rows of a slice": ((700, 40), np.arange(260, 290), 7),
    "rows in any order": ((700, 33), np.random.default_rng(1).permutation(700)[:500], 3),
    "many chunks": ((1400, 700), np.arange(1400), 0),
    "a vector": ((1, 5000), np.arange(1), 0),
    "more tiles than are kept": ((140_000, 2), np.arange(140_000), 0),
}


@pytest.fixture(scope="module", params=["", "-march=x86-64"])
def compiled(request: pytest.FixtureRequest) -> CompiledSums:
    flags = [request.param] if request.param else []
    if flags and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the processor's own path is this one")
    try:
        return CompiledSums(*flags)
    except BuildError as error:
        pytest.skip(str(error))


def values_of(shape: tuple[int, int], rows: np.ndarray, column: int, wrong: bool) -> np.ndarray:
    random = np.random.default_rng(0)
    values = (random.standard_normal(shape) * np.exp(3 * random.standard_normal(shape))).astype(np.float32)
    if wrong:
        values[rows[0], -1], values[rows[-1], column] = np.nan, -np.inf
    return values[rows, column:]


def added(projection: Projection, values: np.ndarray, rows: np.ndarray, column: int, sums: CompiledSums) -> Statistics:
    turn: Rows = range(rows[0], rows[-1] + 1) if (np.diff(rows) == 1).all() else rows
    return Window(projection, turn, column, values.shape[1], sums=sums).add(values)[0]


def same(a: Statistics, b: Statistics) -> bool:
    return np.array_equal(a.sketch, b.sketch) and vars(a) | {"sketch": 0} == vars(b) | {"sketch": 0}


@pytest.mark.parametrize("part", PARTS)
def test_sketches_have_the_bits_of_numpy(compiled: CompiledSums, part: str) -> None:
    shape, rows, column = PARTS[part]
    for buckets, wrong in ((256, False), (256, True), (64, False)):
        values, projection = values_of(shape, rows, column, wrong), Projection("layers.0.attn.q", shape, buckets)
        expected = projection.slice(values, rows, column)
        for threads in (1, 3):
            compiled.set_threads(threads)
            found = added(projection, values, rows, column, compiled)
            assert same(found, expected), (buckets, wrong, threads)
        assert expected.nonfinite == (2 if wrong else 0)
    wrong_sign = added(Projection("layers.0.attn.k", shape, 64), values, rows, column, compiled)
    assert not same(wrong_sign, expected)
    wide = np.repeat(values, 2, axis=0)[::2]  # rows with a stride
    assert same(added(projection, wide, rows, column, compiled), expected)


@pytest.mark.parametrize("grid", [Grid(1, 4, (300, 1100)), Grid(4, 16, (300, 1100)), Grid(1, 1, (300, 1100))])
@pytest.mark.parametrize("column", [0, 16])
def test_block_sums_and_checksums_have_the_bits_of_numpy(compiled: CompiledSums, grid: Grid, column: int) -> None:
    values, projection = values_of(grid.shape, np.arange(300), 0, True)[:, :1072], Projection("w", grid.shape)
    order: list[Rows] = [range(300), np.arange(300), np.random.default_rng(2).permutation(300)]
    for rows in order:
        for threads in (1, 3):
            compiled.set_threads(threads)
            one, other = np.zeros(grid.blocks), np.zeros(grid.blocks)
            window = Window(projection, rows, column, 1072, checked=True, grid=grid)
            expected, check = window.add(values, one)
            found, again = dataclasses.replace(window, sums=compiled).add(values, other)
            np.testing.assert_array_equal(one, other)
            assert np.isfinite(one).all() and one.any()
            assert same(found, expected) and again == check == checksum("w", values, numbers_of(rows), column)
    changed = values.copy()
    changed[17, 5] = np.nextafter(changed[17, 5], np.float32(9))
    assert dataclasses.replace(window, sums=compiled).add(changed)[1] != check


@pytest.mark.parametrize("height", [1, 2])
def test_block_sums_of_a_whole_tensor_need_no_zeros(compiled: CompiledSums, height: int) -> None:
    grid, values = Grid(height, 8, (300, 1104)), values_of((300, 1104), np.arange(300), 0, True)
    plain = Window(Projection("w", grid.shape), range(300), 0, 1104, grid=grid)
    window, expected = dataclasses.replace(plain, sums=compiled), np.zeros(grid.blocks)
    plain.add(values, expected)
    room = window.new_blocks(values)
    if height == 1:
        room[:] = np.nan  # what was in the memory before
    else:
        assert not room.any()
    window.add(values, room)
    np.testing.assert_array_equal(room, expected.astype(room.dtype))
    part = dataclasses.replace(window, rows=range(299))
    for first, array in ((part, values[:299]), (window, values.astype(np.float64))):  # other parts or numpy add to them
        assert not first.new_blocks(array).any()


@pytest.mark.parametrize("threads", [1, 3])
def test_sums_of_several_tensors_in_one_call_are_those_of_each(compiled: CompiledSums, threads: int) -> None:
    compiled.set_threads(threads)
    shapes = {"a": (300, 1104), "b": (1, 5000), "c": (700, 40), "d": (140_000, 2), "e": (2, 3)}
    windows = Windows(grids={"a": Grid(1, 8, shapes["a"]), "c": Grid(4, 8, shapes["c"])}, sums=compiled)
    plain = dataclasses.replace(windows, sums=None, _held={}, _together={})
    for kind in ("gradient", "weight_before", "gradient"):
        together, each = Tally(1, windows), Tally(1, plain)
        boxes = [
            (kind, name, shape, values_of(shape, np.arange(shape[0]), 0, name == "c"), (0, 0), "")
            for name, shape in shapes.items()
        ]
        boxes[0] = (*boxes[0][:3], boxes[0][3][:130], (0, 0), "")  # its other rows follow
        boxes.append((kind, "a", shapes["a"], values_of(shapes["a"], np.arange(130, 300), 0, False), (130, 0), ""))
        together.add_boxes(boxes)
        for _, name, shape, array, offset, _ in boxes:
            each.add_box(kind, name, shape, array, offset)
        assert together.checksums == each.checksums and (len(each.checksums) == len(shapes)) == (kind != "gradient")
        assert together.entries.keys() == each.entries.keys() and len(each.entries) == len(shapes)
        for key, entry in each.entries.items():
            found = together.entries[key]
            assert same(found.statistics, entry.statistics), key
            assert (found.blocks is None) == (entry.blocks is None)
            if entry.blocks is not None:
                np.testing.assert_array_equal(found.blocks, entry.blocks.astype(found.blocks.dtype))
    assert len(windows._together) == 2  # with blocks, and with checksums


def test_blocks_that_a_slice_cuts_are_left_to_numpy(compiled: CompiledSums) -> None:
    grid, values = Grid(1, 8, (300, 1100)), values_of((300, 1100), np.arange(300), 0, False)[:, :1084]
    window, one, other = (
        Window(Projection("w", grid.shape), range(300), 4, 1084, grid=grid),
        np.zeros(grid.blocks),
        np.zeros(grid.blocks),
    )
    expected, _ = window.add(values, one)
    found, _ = dataclasses.replace(window, sums=compiled).add(values, other)
    assert same(found, expected) and one.any()
    np.testing.assert_array_equal(one, other)


def test_other_types_are_left_to_numpy(compiled: CompiledSums) -> None:
    values = np.ones((40, 50), np.float32)
    assert compiled.serves(values) and not compiled.serves(values.astype(np.float64))
    assert not compiled.serves(values.T) and not compiled.serves(values[:0])
