"""Which heads meet under Ulysses: each rank's query heads beside the kv heads that they share, in both backends.

No process is started: the exchange is replaced by one that keeps what it is given, of which rank r receives the r-th of
``size`` equal parts. With fewer kv heads than ranks, two orders of repetition agree at 2 ranks and differ from 4 on.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import pytest

from telechat_twins.core.backends import load
from tests.support.frameworks import BACKENDS

if TYPE_CHECKING:
    import mindspore
    import torch

B, S, D = 2, 3, 4

Tensor: TypeAlias = "torch.Tensor | mindspore.Tensor"


def parts(
    backend: str, monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, size: int
) -> list[list[np.ndarray]]:
    """For each rank the numbers of the q, k and v heads that it attends with."""
    ulysses, model = load(backend, "ulysses"), load(backend, "model")
    given: list[np.ndarray] = []

    def keep(x: Tensor, group: object, split: int, concat: int) -> Tensor:
        assert (split, concat) == (ulysses.HEADS, ulysses.SEQUENCE)
        given.append(model.to_numpy(x))
        return x

    monkeypatch.setattr(ulysses, "swap_heads", keep)

    def numbered(count: int) -> Tensor:
        array = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None], (B, S, count, D)).copy()
        return tensor(backend, array)

    ulysses.positions_for_heads(numbered(heads), numbered(kv_heads), numbered(kv_heads), SimpleNamespace(size=size))
    return [[np.split(x, size, axis=2)[rank][0, 0, :, 0].astype(int) for x in given] for rank in range(size)]


def tensor(backend: str, array: np.ndarray) -> Tensor:
    if backend == "pt":
        import torch

        return torch.from_numpy(array)
    import mindspore

    return mindspore.Tensor(array)


def meets_its_own(shares: list[list[np.ndarray]], heads: int, kv_heads: int) -> bool:
    """Whether on every rank query head j meets kv head j // (H / K), and k and v agree."""
    for q, k, v in shares:
        met = np.repeat(k, len(q) // len(k))
        if not (np.array_equal(met, q // (heads // kv_heads)) and np.array_equal(k, v)):
            return False
    return True


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(8, 2, 4), (8, 2, 8), (12, 3, 6), (8, 4, 8), (8, 1, 4), (8, 8, 4), (8, 4, 2)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_query_heads_meet_their_kv_head(backend, heads, kv_heads, size, monkeypatch) -> None:
    shares = parts(backend, monkeypatch, heads, kv_heads, size)
    assert sorted(np.concatenate([q for q, _, _ in shares])) == list(range(heads))
    assert meets_its_own(shares, heads, kv_heads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_kv_heads_repeated_in_the_other_order_are_seen(backend, monkeypatch) -> None:
    """Planted: kv heads 0 1 0 1 in the place of 0 0 1 1."""

    def tiled(x: Tensor, group: SimpleNamespace) -> Tensor:
        array = load(backend, "model").to_numpy(x)
        return tensor(backend, np.tile(array, (1, 1, group.size // array.shape[2], 1)))

    monkeypatch.setattr(load(backend, "ulysses"), "_enough_heads", tiled)
    assert not meets_its_own(parts(backend, monkeypatch, 8, 2, 4), 8, 2)
