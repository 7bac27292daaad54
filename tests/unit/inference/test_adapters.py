"""Adapters of generation without a framework: what a rank holds of them, and whose each token is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from telechat_twins.core.inference.adapters import Pair, pair_reader, used_adapters
from telechat_twins.core.inference.pages import first_name
from telechat_twins.core.parallel.layout import Coord, parse_layout
from telechat_twins.core.parallel.sharding import chunk_table
from tests.support.adapters import deltas, golden_model, modules, random_adapter

ROW_PARALLEL = ("o", "down")


def summed(ranks: int, change: Callable[[str, Pair], Pair] = lambda linear, pair: pair) -> float:
    """How far W x of all tensor ranks' adapters together is from B A x of the whole, at most."""
    source = golden_model("telechat2_gqa")
    adapter = random_adapter(source, modules(source.config))
    layout = parse_layout(f"tp{ranks}")
    worst = 0.0
    for name, delta in deltas(adapter).items():
        linear = name.removesuffix(".weight")
        parts = []
        for rank in range(ranks):
            table = chunk_table(source.config, layout, Coord(tp=rank, pp=0, dp=0, cp=0))
            boxes = {held: shard.index for held, shard in table.items()}
            pair = pair_reader(adapter, boxes)(linear)
            assert pair is not None
            pair = change(linear, pair)
            found = np.zeros_like(delta)
            rows, columns = boxes[name]
            found[rows, columns] = pair.b.astype(np.float64) @ pair.a.astype(np.float64)
            parts.append(found)
        worst = max(worst, float(np.abs(np.sum(parts, 0) - delta).max()))
    return worst


def test_the_parts_of_all_ranks_are_the_adapter() -> None:
    assert summed(1) < 1e-6 and summed(2) < 1e-6

    def unscaled(linear: str, pair: Pair) -> Pair:
        return Pair(pair.a, pair.b / np.float32(3.0))

    def reversed_rows(linear: str, pair: Pair) -> Pair:
        return pair if linear.endswith(ROW_PARALLEL) else Pair(pair.a, pair.b[::-1])

    assert summed(2, unscaled) > 0.1 and summed(2, reversed_rows) > 0.1


def test_tokens_and_their_adapters() -> None:
    assert used_adapters(np.array([0, 0], np.int32)) == []
    assert used_adapters(np.array([2, 2], np.int32)) == [(2, None)]
    (first, mask), (second, other) = used_adapters(np.array([3, 0, 1, 3], np.int32))
    assert (first, second) == (1, 3) and mask is not None and other is not None
    np.testing.assert_array_equal(mask[0, :, 0], [0, 0, 1, 0])
    np.testing.assert_array_equal(other[0, :, 0], [1, 0, 0, 1])


@pytest.mark.parametrize("salt", ["", "a", "tenant/1"])
def test_no_salt_stands_for_another_adapter(salt: str) -> None:
    names = {first_name(salt, adapter) for adapter in range(300)}
    assert len(names) == 300 and first_name(salt, 1) not in {first_name(f"{n}", 0) for n in range(300)}
    assert (first_name(salt) == b"") == (salt == "")
