"""The memory campaign's judgement, and a short run of each twin's forward and backward passes."""

from __future__ import annotations

import argparse

import pytest

from tests.campaigns import memory


def rows(step_bytes: float, start: int = 0) -> list[dict[str, int]]:
    """Samples of a process that grows by ``step_bytes`` a step, and by ``start`` in its first quarter."""
    steps = range(100, 4001, 100)
    return [
        {"step": s, "anonymous": int(1e8 + step_bytes * s + start * min(1, s / 1000)), "malloc": 5, "objects": 7}
        for s in steps
    ]


def test_what_grows_to_the_end_breaks_the_promise() -> None:
    assert memory.verdict("ms", rows(0, start=50 << 20))["kept"]
    leaking = memory.verdict("ms", rows(2 * memory.ALLOWED))
    assert not leaking["kept"] and leaking["bytes_a_step"]["anonymous"] == pytest.approx(2 * memory.ALLOWED, rel=0.01)


@pytest.mark.parametrize("backend", memory.BACKENDS)
def test_a_step_keeps_next_to_nothing(backend: str) -> None:
    """Measured 20 to 140 bytes and 20 to 1,660 so early in a run, 4 and 0 over 3,000 steps; 1,770 and 6,200 before
    MindSpore's operators were chosen. An arena of malloc that grows once looks like a leak of pages, so a run that
    breaks the limits is repeated: a leak breaks them again."""
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    assert keeps_little(backend) or keeps_little(backend)


def keeps_little(backend: str) -> bool:
    given = {"steps": 400, "seed": 0, "backend": [backend], "part": "gradients", "precision": "fp32"}
    (found,) = memory.campaign(argparse.Namespace(**given))
    return found["bytes_a_step"]["malloc"] < 500 and found["bytes_a_step"]["anonymous"] < 1500
