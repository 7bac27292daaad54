"""Threads of the C++ operators: as many as there are processors, whatever a framework does to the environment, and in
MindSpore launched by the one that launches its own operators."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from telechat_twins.kernels.cpu.engine import usual_threads
from tests.house import ROOT

# How many of 20 sums follow the product that they read, without runtime.launch_blocking(), and how many threads
# MindSpore's own, which launches operators, has become. (Launched from a queue of its own, as a custom operator is by
# default, 1 of 20 followed.)
PROGRAM = """
import pathlib
import numpy as np, mindspore as ms
from telechat_twins.kernels.cpu import ops

w, right = ms.Tensor(np.full((1024, 1024), 1 / 1024, np.float32)), 0
for number in range(20):
    y = ops.matmul(ms.Tensor(np.full((1024, 1024), number, np.float32)), w, None)
    right += bool((abs((y + y).asnumpy() - 2 * number) < 1e-3).all())
names = [(t / "comm").read_text().strip() for t in pathlib.Path("/proc/self/task").iterdir()]
print(right, max(names.count(name) for name in set(names) if name.startswith("backend")))
"""


def test_the_variable_counts_as_it_was_when_python_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert usual_threads() == 3
    for text in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert usual_threads() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("asked", ["", "1"])
def test_mindspore_gets_the_threads_that_were_asked_for_and_waits_for_them(asked: str) -> None:
    """It sets OMP_NUM_THREADS to 1 in its own process where it finds none; a worker bears its maker's name."""
    pytest.importorskip("mindspore")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env |= {"OMP_NUM_THREADS": asked} if asked else {}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    )
    right, threads = map(int, done.stdout.split()[-2:])
    assert right == 20
    assert (threads > 1) == (not asked)
