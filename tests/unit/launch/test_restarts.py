"""Restarts of a launch: how often, after which pause, and when not."""

from __future__ import annotations

from pathlib import Path

import pytest

from telechat_twins.core.launch import restarts
from telechat_twins.core.launch.restarts import LONGEST_PAUSE_S, Restarts, launch_with_restarts


def test_the_pause_doubles_until_the_run_has_moved() -> None:
    reached, pauses, said = iter([0, 0, 0, 6, 6, 6]), list[float](), list[str]()
    policy = Restarts(4, lambda: next(reached), 2.0, said.append, pauses.append)
    starts: list[int] = []
    assert policy.run(lambda attempt: starts.append(attempt) or 1) == 1
    assert starts == [0, 1, 2, 3, 4]
    assert pauses == [2.0, 4.0, 2.0, 4.0], "a later checkpoint sets the pause back, not the count"
    assert said[-1] == "tele: 4 restarts are used up; the latest checkpoint is of step 6"
    long = Restarts(9, lambda: 0, 100.0, said.append, pauses.append)
    long.run(lambda attempt: 1)
    assert max(pauses) == LONGEST_PAUSE_S


def test_ctrl_c_in_the_pause_ends_it() -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    assert Restarts(3, lambda: 0, 1.0, lambda text: None, interrupted).run(lambda attempt: 1) == 130


@pytest.mark.parametrize(
    ("resume", "saved", "then"), [(None, 0, "auto"), ("auto", 0, "auto"), ("other", 0, "other"), ("other", 2, "auto")]
)
def test_where_a_restart_goes_on(
    resume: str | None, saved: int, then: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the run's own checkpoint once it has one; before that, from what the first start was given."""
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.01)
    given: list[str | None] = []

    def start(resume: str | None) -> int:
        given.append(resume)
        return 1 if len(given) == 1 else 0

    assert launch_with_restarts(start, 1, resume, tmp_path / "logs", lambda: saved) == 0
    assert given == [resume, then]
