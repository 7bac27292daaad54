"""One relay of each framework across a growth, in this process; `make relay` runs random ones, with layouts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.campaigns.relay import Runner
from tests.campaigns.relay_schedule import Schedule, Segment
from tests.mutation.catalogue import FAULTS
from tests.mutation.fault import planted


def test_a_relay_across_growth(tmp_path: Path) -> None:
    """Inside the envelope of the unswapped run; with moments that one framework does not resume it is not."""
    for name in ("mindspore", "torch"):
        pytest.importorskip(name)
    legs = ((Segment(3, "ms"), Segment(2, "pt", options=("train.recompute=full",))), (Segment(2), Segment(5, "ms")))
    runner, schedule = Runner(tmp_path, 1), Schedule("zero growth", legs)
    made = runner.relay(schedule)
    assert made.problems == [] and 0.0 < made.share < 1.0
    with planted(FAULTS["moments not resumed"], "ms"):
        assert any("share of its envelope" in problem for problem in runner.relay(schedule).problems)
