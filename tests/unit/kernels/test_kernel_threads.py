"""How many threads the C++ operators take: the processors, whatever a framework does to the environment."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from telechat_twins.kernels.cpu.engine import usual_threads
from tests.house import ROOT

# How many threads MindSpore's own, which launches operators, has become.
PROGRAM = """
import os, pathlib
import numpy as np, mindspore as ms
from telechat_twins.kernels.cpu import ops

x, w = ms.Tensor(np.ones((1024, 1024), np.float32)), ms.Tensor(np.ones((1024, 1024), np.float32))
for _ in range(20):
    ops.matmul(x, w, None).asnumpy()
names = [(t / "comm").read_text().strip() for t in pathlib.Path("/proc/self/task").iterdir()]
print(max(names.count(name) for name in set(names) if name.startswith("launch")))
"""


def test_the_variable_counts_as_it_was_when_python_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert usual_threads() == 3
    for text in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert usual_threads() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize("asked", ["", "1"])
def test_mindspore_gets_the_threads_that_were_asked_for(asked: str) -> None:
    """It sets OMP_NUM_THREADS to 1 in its own process where it finds none; a worker bears its maker's name."""
    pytest.importorskip("mindspore")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor")
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env |= {"OMP_NUM_THREADS": asked} if asked else {}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout.split()[-1]) > 1) == (not asked)
