"""Threads of a rank, and of MindSpore in it."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace

import pytest

from telechat_twins.core.bench.worker import bench_config
from telechat_twins.kernels.mindspore import ops as kernels
from telechat_twins.kernels.mindspore import settings
from telechat_twins.telechat_ms import train
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


@pytest.mark.parametrize(
    ("precision", "linear", "threads"), [("fp32", "cpp", [1]), ("fp32", "composite", []), ("fp64", "auto", [])]
)
def test_training_keeps_mindspore_to_one_thread_where_cpp_multiplies(
    monkeypatch: pytest.MonkeyPatch, precision: str, linear: str, threads: list[int]
) -> None:
    kept: list[int] = []
    monkeypatch.setattr(train, "keep_threads", kept.append)
    options = {"model": "telechat2-tiny", "seq_len": 32, "micro_batch": 1, "micro_batches": 1, "precision": precision}
    config = bench_config(options)
    try:
        train.Trainer(dataclasses.replace(config, kernels=dataclasses.replace(config.kernels, linear=linear)))
    finally:
        kernels.select()
    assert kept == threads


def test_threads_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """MindSpore refuses a second number, of a program that has set its own as well."""
    asked: list[int] = []

    def threads_num(threads: int) -> None:
        asked.append(threads)
        if len(asked) > 1:
            raise RuntimeError("The 'threads_num' can not be set repeatedly.")

    tuning = SimpleNamespace(op_tuning=SimpleNamespace(threads_num=threads_num))
    monkeypatch.setattr(settings, "_kept", [])
    monkeypatch.setattr(settings.mindspore, "device_context", SimpleNamespace(cpu=tuning))
    settings.keep_threads(1)
    settings.keep_threads(2)
    assert asked == [1]
    settings._kept.clear()
    settings.keep_threads(3)
    assert asked == [1, 3]
