"""Inputs of linear layers that the backward pass computes again: the bits of those that were kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.model.recomputed import Recomputed
from tests.support.frameworks import BACKENDS, differentiate


def layer(way: str, calls: list[str]) -> Callable[..., Any]:
    """swiglu and two products of its output; ``way``: kept, again, or wrong, an input that differs."""

    def call(ops: Any, dtype: Any, gate: Any, up: Any, first: Any, second: Any) -> Any:
        def compute() -> Any:
            calls.append("computed")
            return ops.swiglu(gate, up if way == "again" else gate, dtype)

        x = ops.swiglu(gate, up, dtype)
        again = None if way == "kept" else Recomputed(compute, 2)
        return ops.linear(x, first, None, dtype, again) + ops.linear(x, second, None, dtype, again)

    return call


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradients_are_those_of_a_kept_input(backend: str) -> None:
    rng = np.random.default_rng(0)
    shapes = (3, 40, 24), (3, 40, 24), (16, 24), (16, 24)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    grad = rng.normal(size=(3, 40, 16)).astype(np.float32)
    calls: list[str] = []
    kept, again, wrong = (differentiate(backend, layer(w, calls), arrays, grad) for w in ("kept", "again", "wrong"))
    assert calls == ["computed"] * 2, "once for both products"
    for a, b in zip([kept[0], *kept[1]], [again[0], *again[1]], strict=True):
        np.testing.assert_array_equal(a, b)
    assert [np.array_equal(a, b) for a, b in zip(kept[1], wrong[1], strict=True)] == [True, True, False, False]
