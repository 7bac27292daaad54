"""A short form of tests/campaigns/hostile_requests.py, and that it finds what it is there for."""

from __future__ import annotations

import math
import os

from tests.campaigns.hostile_requests import GENERATORS, campaign, fault_of, hostile
from tests.support.serve_support import running


def test_hostile_requests_are_refused():
    with running(body=4 << 20, max_running=8, max_queue=152) as server:
        found = campaign(server.port, os.getpid(), 60, seed=1, within=math.inf)
    assert found["wrong"] == []
    assert set(found["kinds"].values()) == {60 // len(GENERATORS)}
    assert "none" not in found["statuses"] and found["statuses"]["400"] > 30


def test_requests_follow_from_the_seed():
    assert (
        [hostile(n, 5) for n in range(20)] == [hostile(n, 5) for n in range(20)] != [hostile(n, 6) for n in range(20)]
    )


def test_a_server_that_fails_is_found(monkeypatch):
    monkeypatch.setattr("telechat_twins.core.serve.intake.json_object", lambda *_: {}["a defect"])
    with running() as server:
        said = [fault_of(hostile(n, 0), server.port)[0] for n in range(2 * len(GENERATORS))]
    assert any(line and line.startswith("status 500") for line in said)
