"""Threads of a rank."""

from __future__ import annotations

import os

import pytest

from telechat_twins.telechat_ms.mesh import _threads


def test_a_rank_has_the_threads_asked_for_or_its_share_of_the_cores_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [_threads(ranks) for ranks in (1, 2, 4, 8)] == [6, 3, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [_threads(ranks) for ranks in (1, 8)] == [2, 2]
    for text, threads in (("", 2), ("0", 2), ("many", 2), ("4,1", 4)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert _threads(3) == threads, text
