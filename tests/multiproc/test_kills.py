"""A sample of the campaign of kills (tests.campaigns.kills): the moments and victims that once broke a promise."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.campaigns.killed_commands import data_trials, save_trials
from tests.campaigns.killed_runs import RunTrials, Work, unreadable
from tests.campaigns.killing import leftovers, orphans, start
from tests.campaigns.kills import SHARES, shares, summary


def test_a_run_killed_while_it_starts_and_while_it_saves(tmp_path: Path) -> None:
    """No orphans, nothing unreadable; brought to its end, the bits of a run that was left alone."""
    pytest.importorskip("torch")
    plan = [("saving", "all", "-9"), ("spawning", "launcher", "-9")]
    runs = RunTrials("pt", Work(tmp_path), random.Random(1))
    found = list(runs.chain(2, plan, "single"))
    assert [(trial.faults, trial.how) for trial in found] == [([], "-9")] * 2, summary(found)


def test_saves_and_a_data_set_killed_on_the_way(tmp_path: Path) -> None:
    found = [*save_trials(2, random.Random(2), tmp_path), *data_trials(1, random.Random(3), tmp_path / "data")]
    assert len(found) == 3 and not any(trial.faults for trial in found), summary(found)


def test_the_campaign_sees_what_it_looks_for(tmp_path: Path) -> None:
    """A process left behind, a checkpoint that cannot be read, files that nobody finished."""
    process = start(["data", "--help"], tmp_path / "log")
    process.wait(60)
    assert orphans(str(tmp_path / "nothing"), []) == []
    for name in ("step-00000001", ".old-tele-step-00000002"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000001" / "status_0.part").touch()
    assert [fault.partition(":")[0] for fault in unreadable(tmp_path)] == ["unreadable"]
    assert leftovers(tmp_path) == ["leftover: .old-tele-step-00000002", "leftover: step-00000001/status_0.part"]
    assert sum(shares(300, list(SHARES)).values()) == 300 and sum(shares(6, ["pt", "data"]).values()) == 6
