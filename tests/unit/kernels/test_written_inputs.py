"""C++ operators that write over an input: over the tensor itself, never over a copy of it, and over no leaf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from telechat_twins.kernels.cpu import build, ops, products

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler; composite operators serve then")


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


GRAD, GATE, UP = random(3, 5, 8)
PAGES, ROWS = random(3, 4, 2, 8), random(1, 3, 2, 8)


def loss(logits: np.ndarray) -> Any:
    return ops.cross_entropy_backward(logits, np.arange(5), 0, 8, GRAD[:, 0].copy(), np.ones(1, np.float32))


def adapter(**into: np.ndarray) -> Any:
    return products.adapted_backward(
        random(5, 6), GATE, random(5, 2), random(6, 8), random(2, 8), random(6, 2), 2.0, **into
    )


def attend(k_pages: np.ndarray, v_pages: np.ndarray) -> Any:
    placed = (np.array(x, np.int32) for x in ([4, 5, 6], [0, 3], [3], [[1, 2]]))
    return ops.paged_attention(*np.split(random(1, 3, 6, 8), 3, 2), k_pages, v_pages, *placed, 0)


# What is written to, by the name of the argument, and a call that does.
WRITERS: dict[str, tuple[np.ndarray, Callable[[np.ndarray], Any]]] = {
    "gate": (GATE, lambda x: ops.swiglu_backward(GRAD, x, UP.copy(), in_place=True)),
    "up": (UP, lambda x: ops.swiglu_backward(GRAD, GATE.copy(), x, in_place=True)),
    "logits": (GATE, loss),
    "c": (GATE, lambda x: products.matmul_add(x, random(5, 6), random(6, 8))),
    "dx": (GATE, lambda x: adapter(dx=x)),
    "dread": (GATE, lambda x: adapter(dread=x)),
    "pages": (PAGES, lambda x: ops.store_rows(x, ROWS[0], np.arange(5, 8))),
    "k_pages": (PAGES, lambda x: attend(x, PAGES.copy())),
    "v_pages": (PAGES, lambda x: attend(PAGES.copy(), x)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_an_input_is_written_or_refused(name: str) -> None:
    """Some columns of a wider tensor: rows are apart, though the elements of a row are not."""
    before, call = WRITERS[name]
    written = before.copy()
    call(written)
    assert not np.array_equal(written, before)
    with pytest.raises(ValueError, match=f"^{name}: not contiguous"):
        call(np.concatenate([before, before], -1)[..., : before.shape[-1]])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_gradients_over_gate_and_up_have_the_same_bits(dtype: type) -> None:
    """Of a few elements, and of more than the caches hold, which are written past them."""
    for rows in (1, 3, 2100):
        grad, gate, up = (x.astype(dtype) for x in random(3, rows, 1009))
        apart, over = ops.swiglu_backward(grad, gate, up), (gate.copy(), up.copy())
        written = ops.swiglu_backward(grad, *over, in_place=True)
        assert written[0] is over[0] and written[1] is over[1]
        for a, b in zip(apart, over, strict=True):
            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def test_mindspore_writes_over_what_it_computed_and_over_no_leaf() -> None:
    ms = pytest.importorskip("mindspore")
    from telechat_twins.kernels.mindspore import ops as kernels
    from telechat_twins.telechat_ms.autograd import record

    expected = ops.swiglu_backward(GRAD, GATE, UP)

    def after(inner: bool) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Gate and up after a backward pass, and their gradients."""
        weights = [ms.Parameter(ms.Tensor(x), name=name) for x, name in ((GATE, "gate"), (UP, "up"))]
        held: list[Any] = []

        def run(_: Any) -> Any:
            held.extend(kernels.add(weight, ms.Tensor(0 * UP)) if inner else weight for weight in weights)
            return kernels.swiglu(*held, ms.float32)

        gradients = record(run, None, weights).backward(ms.Tensor(GRAD))[1]
        assert all(np.array_equal(w.asnumpy(), x) for w, x in zip(weights, (GATE, UP), strict=True))
        return [x.asnumpy() for x in held], [x.asnumpy() for x in gradients]

    for inner, left in ((False, (GATE, UP)), (True, expected)):
        held, gradients = after(inner)
        for got, wanted in zip((*held, *gradients), (*left, *expected), strict=True):
            np.testing.assert_array_equal(got, wanted)
