"""Attention over pages on three ranks, one after another in one process, by every implementation that this machine has,
against the definition on all pages; limits as in test_paged_attention.py. tests/multiproc/test_ring_generation.py has
the messages between real ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.backends import load
from telechat_twins.core.inference.ring_pages import pages_of_rank, rank_step
from telechat_twins.core.inference.runner import Step
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels import reference
from tests.parity.test_paged_attention import SERVED, UNIT, choose, inputs, step_of  # noqa: F401
from tests.support.cpu_attention_checks import PAGED
from tests.support.cpu_kernel_limits import FACTOR, UNITS
from tests.support.frameworks import BACKENDS

RANKS = 3
CASES = [case for case in PAGED if case[3] < 128 and max(keys for _, keys in case[4]) < 1000]


class Tensors:
    """The way between numpy and a backend."""

    def __init__(self, backend: str, dtype: str) -> None:
        self.framework = pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
        self.ops, self.ring = load(backend, "ops"), load(backend, "ring_pages")
        self.backend, self.dtype = backend, getattr(self.framework, dtype)

    def tensor(self, x: np.ndarray, dtype: Any = None) -> Any:
        if self.backend == "ms":
            return self.framework.Tensor(x).astype(dtype or self.dtype)
        return self.framework.from_numpy(np.array(x)).to(self.ops.device(), dtype or self.dtype)

    def numpy(self, x: Any) -> np.ndarray:
        return x.asnumpy() if self.backend == "ms" else x.cpu().numpy()


def run(backend: str, step: Step, arrays: list[np.ndarray], dtype: str) -> np.ndarray:
    """Attention [N, H, D] of q, k, v, k_pages, v_pages, float64, whose pages are dealt out to RANKS."""
    t = Tensors(backend, dtype)
    q, k, v, *whole = arrays
    num_pages, size = whole[0].shape[:2]
    owner = (step.slots // size - 1) % RANKS
    steps, placed, rooms, queries = [], [], [], []
    for rank in range(RANKS):
        own, tokens = rank_step(step, RANKS, rank, size), np.flatnonzero(owner == rank)
        mine = [np.zeros((pages_of_rank(num_pages, RANKS), *room.shape[1:])) for room in whole]
        for room, part in zip(whole, mine, strict=True):
            held = room[1 + rank :: RANKS]
            part[1 : 1 + len(held)] = held
        mine = [t.tensor(part, t.ops.page_dtype(t.dtype)) for part in mine]
        places = t.ring.place_step(own, size, t.dtype)
        if len(tokens):
            for room, x in zip(mine, (k, v), strict=True):
                t.ops.store_rows(room, t.tensor(x[0, tokens]), places.rows)
        padded = np.zeros((1, len(own.ids), *q.shape[2:]))
        padded[0, : len(tokens)] = q[0, tokens]
        steps.append(own), placed.append(places), rooms.append(mine), queries.append(t.tensor(padded))
    out = np.full(q.shape[1:], np.nan)
    for origin in range(RANKS):
        found = [
            t.ring.meet(queries[origin], *rooms[rank], placed[rank].hops[(rank - origin) % RANKS])
            for rank in range(RANKS)
        ]
        rows = t.numpy(t.ring.merged(t.framework.stack(found) if backend == "pt" else t.framework.ops.stack(found)))
        assert np.isfinite(rows).all()
        out[owner == origin] = rows[0, : len(steps[origin].slots)]
    return out


def error(backend: str, case: Any, dtype: str) -> tuple[float, float]:
    """The error of a case and its limit."""
    size, H, K, D, sequences = case
    step, pages = step_of(size, sequences, 3)
    arrays = inputs(step, pages, size, H, K, D, dtype)
    places = step.slots, step.starts, step.lengths, step.tables
    truth = reference.paged_attention(*(a.copy() for a in arrays), *places)[0]
    plain = reference.paged_attention(*(a.astype(np.float32) for a in arrays), *places)[0]
    found = run(backend, step, arrays, dtype)
    # What the ranks find and merge is float32 or wider; in 16 bits products are rounded by some implementations.
    cost = 2 * UNITS * UNIT["float64"] if dtype == "float64" else FACTOR * relative_frobenius(plain, truth)
    return relative_frobenius(found, truth), max(cost, UNITS * UNIT[dtype])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"page{case[0]}-{len(case[4])}sequences")
@pytest.mark.parametrize(("backend", "implementation"), SERVED)
def test_a_ring_over_pages_is_the_definition(
    choose: Callable[[str, str], None],  # noqa: F811
    backend: str,
    implementation: str,
    case: Any,
    dtype: str,
) -> None:
    choose(backend, implementation)
    found, limit = error(backend, case, dtype)
    assert found <= limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_merge_without_the_log_sum_exp_is_seen(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    ops = load(backend, "ops")
    monkeypatch.setattr(ops, "merge_blocks", lambda out, lse, more, more_lse: ((out + more) * 0.5, lse))
    found, limit = error(backend, PAGED[1], "float32")
    assert found > 100 * limit
