"""Products of as few rows as thin.cc and one block of linear.cc take: against float64, and row by row."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from telechat_twins.kernels.cpu import build, engine, ops

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
ROWS = (1, 5, 12, 23, 143, 384, 385)  # the last is matmul.cc's
SHAPES = ((64, 96), (100, 130), (33, 700), (512, 512))  # outputs, k: whole strips and depths, and parts of them


@pytest.fixture(autouse=True)
def multiply_adds() -> Iterator[None]:
    """Without matrix tiles, which take over float32 products where there are any; all threads afterwards."""
    plain = engine.engine_of(np.zeros(1, np.float32))
    plain.refuse_split(True)
    yield
    plain.refuse_split(False)
    plain.set_threads(engine.usual_threads())


def operands(rows: int, outputs: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(rows + outputs)
    shapes = ((rows, k), (outputs, k), (outputs,))
    x, w, bias = (random.standard_normal(shape, dtype=np.float32) for shape in shapes)
    return x, w, bias


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_float32(rows: int, shape: tuple[int, int]) -> None:
    x, w, bias = operands(rows, *shape)
    exact = x.astype(np.float64) @ w.T.astype(np.float64) + bias
    sizes = np.abs(x).astype(np.float64) @ np.abs(w).T + np.abs(bias)  # what rounding is relative to
    assert (np.abs(ops.matmul(x, w, bias) - exact) <= 1e-6 * sizes).all()
    assert (np.abs(ops.matmul(x, w) - (exact - bias)) <= 1e-6 * sizes).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_bfloat16(rows: int, shape: tuple[int, int]) -> None:
    x, w = (array.astype(ml_dtypes.bfloat16) for array in operands(rows, *shape)[:2])
    wide, matrix = x.astype(np.float64), w.astype(np.float64)
    made = ops.matmul_bf16(x, w, np.dtype(np.float32))
    assert (np.abs(made - wide @ matrix.T) <= 1e-6 * (np.abs(wide) @ np.abs(matrix).T)).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_depends_on_nothing_else(threads: int) -> None:
    """Neither on the other rows, nor on their number, nor on the threads."""
    plain = engine.engine_of(np.zeros(1, np.float32))
    for outputs, k in SHAPES:
        x, w, bias = operands(143, outputs, k)
        narrow = [array.astype(ml_dtypes.bfloat16) for array in (x, w)]
        plain.set_threads(threads)
        whole, half = ops.matmul(x, w, bias), ops.matmul_bf16(*narrow, np.dtype(np.float32))
        plain.set_threads(1)
        for first, last in ((0, 1), (11, 24), (130, 143)):
            np.testing.assert_array_equal(ops.matmul(x[first:last], w, bias), whole[first:last])
            part = ops.matmul_bf16(np.ascontiguousarray(narrow[0][first:last]), narrow[1], np.dtype(np.float32))
            np.testing.assert_array_equal(part, half[first:last])
