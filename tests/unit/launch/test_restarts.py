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
    ("resume", "before", "after", "then", "says"),
    [
        (None, (0, 0), (0, 0), "auto", "from the beginning, since there is no checkpoint"),
        ("auto", (0, 0), (0, 0), "auto", "from the beginning, since there is no checkpoint"),
        ("auto", (7, 3), (7, 3), "auto", "from the checkpoint of step 7"),
        ("other", (0, 0), (0, 0), "other", "from other"),
        ("other", (0, 0), (2, 1), "auto", "from the checkpoint of step 2"),
        # Put back to a step of its own: the later one that it held before is not gone on from.
        ("run/step-00000050", (100, 9), (100, 9), "run/step-00000050", "from run/step-00000050"),
        ("run/step-00000050", (100, 9), (60, 10), "auto", "from the checkpoint of step 60"),
        ("run/step-00000050", (100, 9), (100, 11), "auto", "from the checkpoint of step 100"),
    ],
)
def test_where_a_restart_goes_on(
    resume: str | None,
    before: tuple[int, int],
    after: tuple[int, int],
    then: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the run's own checkpoint once it has saved one; before that, from what the first start was given."""
    monkeypatch.setattr(restarts, "FIRST_PAUSE_S", 0.01)
    given: list[str | None] = []

    def start(resume: str | None) -> int:
        given.append(resume)
        return 1 if len(given) == 1 else 0

    assert launch_with_restarts(start, 1, resume, tmp_path / "logs", lambda: after if given else before) == 0
    assert given == [resume, then]
    assert f", {says} (the launch ended with code 1)" in capsys.readouterr().err
