"""Sketches against their definition, their error bars over 1,000 trials, and single wrong elements."""

from __future__ import annotations

import math

import numpy as np
import pytest

from telechat_twins.core.parity.compare.blocks import worst_block
from telechat_twins.core.parity.record import sketch
from telechat_twins.core.parity.record.blocks import (
    SMALLEST,
    Grid,
    coarser,
    fine_grid,
    fitting_grids,
    grid_of,
    grid_with,
)
from telechat_twins.core.parity.record.fold import fitted
from telechat_twins.core.parity.record.format import quantity
from telechat_twins.core.parity.record.sketch import (
    BUCKETS,
    Projection,
    Statistics,
    distance,
    matrix_shape,
    merged,
    mixed,
)
from telechat_twins.core.parity.record.tally import Tally
from telechat_twins.core.parity.record.window import Windows
from telechat_twins.kernels.sums import open_sums

TRIALS = 1000


def defined(values: np.ndarray, projection: Projection) -> np.ndarray:
    """The sketch element by element, as docs/records.md defines it."""
    rows, columns = matrix_shape(values.shape)
    A, K = values.reshape(rows, columns).astype(np.float64), projection.buckets
    if rows * columns <= K:
        return np.pad(A.reshape(-1), (0, K - A.size))
    found = np.zeros(K)

    def hashed(axis: str, counter: int) -> int:
        return int(mixed(projection._key(axis), np.array([counter]))[0])

    def sign(number: int) -> int:
        return 1 - 2 * (number >> 63)

    across = [hashed("columns", j) for j in range(columns)]
    for i in range(rows):
        factor = hashed("blocks", i // 128)
        place = (i * (factor % 128 | 1) + (factor >> 32)) % 128
        shift, down = hashed("shifts", i // 128 * 32 + place // 4) >> 32, sign(hashed("rows", i))
        for j in range(columns):
            found[(shift + (across[j] >> 32)) % K] += down * sign(across[j]) * A[i, j]
    return found


@pytest.mark.parametrize("shape", [(), (5,), (700,), (261, 7), (33, 40), (3, 50, 8)])
@pytest.mark.parametrize("buckets", [256, 32])
def test_a_sketch_is_its_definition_and_adds_up_over_slices(shape, buckets):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    projection = Projection("layers.0.attn.q", shape, buckets, seed=3)
    whole = projection.box(values, (0,) * values.ndim)
    np.testing.assert_allclose(whole.sketch, defined(values, projection), rtol=0, atol=1e-12 * math.sqrt(values.size))
    wide = values.astype(np.float64)
    assert (whole.count, whole.nonfinite, whole.min, whole.max) == (values.size, 0, values.min(), values.max())
    np.testing.assert_allclose([whole.norm2, whole.sum], [(wide**2).sum(), wide.sum()], rtol=1e-12, atol=1e-12)
    if not shape:
        return
    axis = len(shape) - 1
    for cut in {1, shape[axis] // 2, shape[0] // 3} - {0}:
        for along in {0, axis}:
            parts = np.split(values, [cut], axis=along) if cut < shape[along] else [values]
            starts = [tuple(cut if i == along and n else 0 for i in range(len(shape))) for n in range(len(parts))]
            joined = merged((projection.box(p, s) for p, s in zip(parts, starts, strict=True)), buckets)
            np.testing.assert_allclose(joined.sketch, whole.sketch, rtol=0, atol=1e-11)
            assert (joined.count, joined.min, joined.max) == (whole.count, whole.min, whole.max)


def test_rows_may_come_in_any_order_and_on_any_number_of_threads(monkeypatch):
    random = np.random.default_rng(1)
    values = random.standard_normal((2000, 600)).astype(np.float32)
    projection, rows = Projection("embed", values.shape), np.arange(2000)
    straight = projection.slice(values, rows, 0)
    monkeypatch.setattr(sketch, "threads", lambda: 1)
    alone = projection.slice(values, rows, 0)
    np.testing.assert_array_equal(alone.sketch, straight.sketch)
    assert alone.norm2 == straight.norm2
    order = random.permutation(2000)
    np.testing.assert_allclose(projection.slice(values[order], rows[order], 0).sketch, straight.sketch, atol=1e-10)


def test_values_that_are_not_finite_are_counted_and_left_out():
    values = np.ones((300, 20), np.float32)
    values[3, 4], values[200, 0], values[299, 19] = np.nan, np.inf, -np.inf
    found = Projection("x", values.shape).box(values, (0, 0))
    finite = np.where(np.isfinite(values), values, 0)
    same = Projection("x", values.shape).box(finite, (0, 0))
    assert (found.count, found.nonfinite, found.norm2, found.min, found.max) == (6000, 3, 5997.0, 1.0, 1.0)
    np.testing.assert_array_equal(found.sketch, same.sketch)
    assert Projection("x", (2,)).box(np.array([np.nan, 1e200]), (0,)).nonfinite == 2
    huge = Projection("x", (400,)).box(np.full(400, 1e149), (0,))
    assert huge.nonfinite == 0 and math.isfinite(huge.norm2)


def differences(shape: tuple[int, int], random: np.random.Generator) -> dict[str, np.ndarray]:
    """Kinds of differences that faults and roundings make."""
    rows, columns = shape
    row, column, few, block = (np.zeros(shape) for _ in range(4))
    row[random.integers(rows)] = random.standard_normal(columns)
    column[:, random.integers(columns)] = random.standard_normal(rows)
    few.reshape(-1)[random.choice(few.size, 10, replace=False)] = random.standard_normal(10)
    at = random.integers(rows // 2), random.integers(columns // 2)
    block[at[0] : at[0] + rows // 4, at[1] : at[1] + columns // 4] = 1.0
    return {
        "rounding": random.standard_normal(shape),
        "rank one": np.outer(random.standard_normal(rows), random.standard_normal(columns)),
        "a constant": np.ones(shape),
        "one row": row,
        "one column": column,
        "ten elements": few,
        "a block": block,
    }


@pytest.mark.parametrize("buckets", [256, 32])
def test_error_bars_hold_in_99_percent_of_trials(buckets):
    shape, outside = (64, 48), dict.fromkeys(differences((64, 48), np.random.default_rng(0)), 0)
    random = np.random.default_rng(2)
    for trial in range(TRIALS):
        projection = Projection(f"layers.{trial}", shape, buckets)
        for kind, apart in differences(shape, random).items():  # sketches are linear: what they differ from is the same
            found = distance(projection.box(apart, (0, 0)).sketch, np.zeros(buckets), shape)
            outside[kind] += not found.low <= np.linalg.norm(apart) <= found.high
    assert max(outside.values()) <= TRIALS // 100, outside


def test_a_single_wrong_element_is_seen_through_the_roundings_of_another_backend():
    """A relative error of 1e-3 in one element of a gradient, against roundings of 2e-7 everywhere, in a matrix of the
    size of the tiny models'; seen means further apart in any statistic than roundings ever were."""
    random, seen = np.random.default_rng(4), 0
    shape = (128, 192)
    for trial in range(TRIALS // 2):
        projection = Projection(f"layers.{trial}.attn.q.weight", shape)
        gradient = random.standard_normal(shape)
        other, third = (gradient * (1 + 2e-7 * random.standard_normal(shape)) for _ in range(2))
        place = tuple(random.integers(n) for n in shape)
        third[place] *= 1 + 1e-3
        first, equal, wrong = (projection.box(g, (0, 0)) for g in (gradient, other, third))
        seen += signature(first, wrong) > 1.5 * signature(first, equal)
    assert seen >= 0.95 * (TRIALS // 2), seen


def test_block_sums_add_up_over_slices():
    """Of boxes that begin and end inside blocks, with rows in any order; what is not finite is left out."""
    random = np.random.default_rng(6)
    values = random.standard_normal((40, 90)).astype(np.float32)
    values[3, 5] = np.inf
    finite = np.where(np.isfinite(values), values, 0.0).astype(np.float64)
    for size in (4, 64, 2048):
        grid = Grid(*{4: (1, 4), 64: (4, 16), 2048: (64, 32)}[size], (40, 90))
        rows, columns = grid.blocks
        expected = np.zeros((rows * grid.height, columns * grid.width))
        expected[:40, :90] = finite
        expected = expected.reshape(rows, grid.height, columns, grid.width).sum((1, 3))
        order, found = random.permutation(40), np.zeros(grid.blocks)
        for part in (order[:17], order[17:]):
            for first, last in ((0, 33), (33, 90)):
                grid.add(found, values[part, first:last], part, first)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
        assert grid_with(grid.shape, grid.blocks).blocks == grid.blocks
    finest, wanted = grid_of((1000, 300), 4), grid_of((1000, 300), 64)
    sums = np.zeros(finest.blocks)
    finest.add(sums, np.ones((1000, 300)), np.arange(1000), 0)
    while sums.shape != wanted.blocks:
        sums = coarser(sums, (1000, 300))
    assert sums.sum() == 300_000 and sums[0, 0] == 64


@pytest.mark.parametrize("rows", ["alike", "of many sizes"])
def test_a_single_wrong_element_breaks_the_limit_of_its_block(rows):
    """An error of 1e-3 of an element of itself, among the roundings of another backend: 20 u of the size that its row
    and its column have. Right gradients stay within half of their limit."""
    random, shape = np.random.default_rng(7), (512, 256)
    sizes = np.exp(random.standard_normal((512, 1)) * (1.5 if rows != "alike" else 0.0))
    gradient = sizes * random.standard_normal(shape)
    exact, one, other = (
        gradient + 20 * 2.0**-24 * sizes * random.standard_normal(shape) * (side > 0) for side in range(3)
    )
    grid = grid_of(shape, SMALLEST)

    def sums(values):
        found = np.zeros(grid.blocks)
        grid.add(found, values, np.arange(512), 0)
        return found

    held = {"reference": sums(exact), "a": sums(one), "b": sums(other)}
    error, limit = worst_block(held, "a", "reference", "b", 1e-5)
    assert error < limit / 2
    seen = 0
    for _ in range(TRIALS // 10):
        i, j = (int(random.integers(n)) for n in shape)
        wrong = held["a"].copy()
        wrong[i // grid.height, j // grid.width] += 1e-3 * gradient[i, j]
        error, limit = worst_block(held | {"a": wrong}, "a", "reference", "b", 1e-5)
        seen += error > limit
    assert seen >= 0.95 * (TRIALS // 10), seen


@pytest.mark.parametrize("size", [64, 1408, 4096])
def test_a_single_wrong_element_of_a_vector_is_seen(size):
    """Gradients of biases and gains, some channels far larger than the others and rounded as much worse; elements
    above a fiftieth of the root mean square."""
    random, shape = np.random.default_rng(8), (1, size)
    scale = np.exp(0.5 * random.standard_normal(shape))
    scale[0, ::32] *= 5
    gradient = scale * random.standard_normal(shape)
    sides = {name: gradient + 10 * 2.0**-24 * scale * random.standard_normal(shape) for name in "ab"}
    grid = fine_grid(shape)
    sums = {name: x.reshape(grid.blocks[1], -1).sum(1)[None] for name, x in (sides | {"reference": gradient}).items()}
    large = np.flatnonzero(np.abs(gradient[0]) > np.sqrt(np.mean(gradient**2)) / 50)
    for third in ("b", None):
        judge = "reference" if third else "b"
        error, limit = worst_block(sums, "a", judge, third, 1e-5)
        assert error < limit
        seen = 0
        for _ in range(TRIALS // 10):
            wrong, at = sums["a"].copy(), int(random.choice(large))
            wrong[0, at // grid.width] += 1e-3 * gradient[0, at]
            error, limit = worst_block(sums | {"a": wrong}, "a", judge, third, 1e-5)
            seen += error > limit
        assert seen >= 0.95 * (TRIALS // 10), (third, seen)


def test_sides_that_round_alike_show_an_element_that_their_distance_from_the_reference_hides():
    """Two sides are equal but for roundings of a few elements, one of which is a large part of a block's small sum."""
    random, shape = np.random.default_rng(9), (256, 512)
    gradient = random.standard_normal(shape)
    gradient[7, 4:8] = 1.0, -0.9999, 0.5, -0.5
    rounded = gradient + 40 * 2.0**-24 * random.standard_normal(shape)
    other = rounded.copy()
    other[7, 4] += 2.0**-24
    other[::50, ::40] *= 1 + 2.0**-24
    sides = {"a": rounded, "b": other, "reference": gradient}
    sums = {name: x.reshape(256, 128, 4).sum(2) for name, x in sides.items()}
    share = 32 * 2.0**-24
    assert np.greater(*worst_block(sums, "a", "b", None, share)), "a rounding is an error beside the block's small sum"
    assert np.less(*worst_block(sums, "a", "b", None, share, usual=True))
    hidden = 0
    for _ in range(TRIALS // 10):
        at = tuple(random.integers(n) for n in shape)
        wrong = sums["a"].copy()
        wrong[at[0], at[1] // 4] += 1e-3 * math.copysign(max(abs(gradient[at]), 1e-2), gradient[at])
        changed = sums | {"a": wrong}
        assert np.greater(*worst_block(changed, "a", "b", None, share, usual=True)), at
        hidden += not np.greater(*worst_block(changed, "a", "reference", "b", share))
    assert hidden > 0


def test_small_tensors_and_vectors_have_fine_blocks_where_there_is_room():
    shapes = {"bias": (1, 8192), "gain": (1, 512), "q": (512, 512), "small": (32, 64)}
    fine = {"bias": (1, 2048), "gain": (1, 512), "small": (32, 64)}
    found = {room: fitting_grids(shapes, room) for room in (1 << 20, 1 << 16, 1 << 12)}
    held = {room: {name: grid.blocks for name, grid in grids.items()} for room, grids in found.items()}
    assert held[1 << 20] == fine | {"q": (512, 128)} and held[1 << 16] == fine | {"q": (256, 32)}
    assert held[1 << 12] == {"q": (32, 32)}, "no room: large matrices first"
    made = []
    for name, grid in found[1 << 20].items():
        statistics = Projection(name, shapes[name]).empty()
        made.append(quantity("gradient", name, 1, shapes[name], "float32", statistics, np.zeros(grid.blocks)))
    for room in (1 << 16, 1 << 12):
        again = {q.name: q.blocks.shape for q in fitted(made, room) if q.blocks is not None}
        assert again == held[room]


def test_small_gradients_have_small_blocks_first():
    shapes = {"embed": (1024, 64), "gate": (256, 64), "q": (64, 64), "head": (1024, 64)}
    shapes = {name: (rows, 2 * columns) for name, (rows, columns) in shapes.items()}
    eighth = sum(rows * columns // 8 * 4 for rows, columns in shapes.values())
    for room, fine in ((eighth, ()), (eighth + 64 * 128, ("q",)), (eighth + 320 * 128, ("q", "gate"))):
        found = fitting_grids(shapes, room)
        assert {name for name, grid in found.items() if grid.width == 4} == set(fine), room


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "numpy"])
def test_block_sums_of_single_rows_are_those_of_float64_rounded_once(compiled):
    sums = open_sums() if compiled else None
    if compiled and sums is None:
        pytest.skip("no C++ compiler")
    shape, random = (200, 64), np.random.default_rng(10)
    values = random.standard_normal(shape).astype(np.float32)
    values[3, 5] = np.inf
    grid = Grid(1, 4, shape)
    windows, tally = Windows(256, grids={"w": grid}, sums=sums), Tally(1)
    tally.windows = windows
    for first, last in ((0, 16), (16, 64)):  # of two ranks that hold whole blocks
        tally.add_box("gradient", "w", shape, values[:, first:last], (0, first))
    blocks, exact = tally.entries["gradient:w@1"].blocks, np.zeros(grid.blocks)
    grid.add(exact, values, np.arange(200), 0)
    assert blocks is not None and blocks.dtype == np.float32
    np.testing.assert_array_equal(blocks, exact.astype(np.float32))
    uneven = Tally(1, windows)  # a block in two parts is added in float64
    for first, last in ((0, 8), (8, 18), (18, 64)):
        uneven.add_box("gradient", "w", shape, values[:, first:last], (0, first))
    blocks = uneven.entries["gradient:w@1"].blocks
    assert blocks is not None and blocks.dtype == np.float64
    np.testing.assert_allclose(blocks, exact, rtol=0, atol=1e-6)


def signature(a: Statistics, b: Statistics) -> float:
    """The largest difference of a bucket, or of an extreme."""
    return float(np.abs(a.sketch - b.sketch).max())


def test_sketches_of_another_size_are_not_compared():
    with pytest.raises(ValueError, match="cannot be compared"):
        distance(np.zeros(BUCKETS), np.zeros(32), (1000,))
    with pytest.raises(ValueError, match="power of two"):
        Projection("x", (3,), 48)
    with pytest.raises(ValueError, match="not inside"):
        Projection("x", (3, 4)).box(np.zeros((2, 2)), (2, 0))
