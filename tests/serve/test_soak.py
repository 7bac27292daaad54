"""The short form of tests/support/serve_soak.py, and that it finds what it is there for."""

from __future__ import annotations

import os
import random

import pytest

from telechat_twins.core.inference.runner import Step
from tests.support.engine_support import Replier
from tests.support.frameworks import BACKENDS
from tests.support.serve_soak import bad_request, fuzz, refused, server, soak, state
from tests.support.serve_support import running


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_requests_and_nonsense(backend):
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    with server(backend) as (port, pid):
        found = soak(port, pid, 160)
        assert found["wrong"] == []
        assert set(found["kinds"]) == {"good", "leaves", "wrong"} and found["seconds"]["p99"] < 30
        nonsense = fuzz(port, 250)
        assert nonsense["wrong"] == []
        end = state(port, pid)
        assert end["fds"] <= found["before"]["fds"] + 1
        assert end["threads"] <= found["before"]["threads"] + 4  # the pool that encodes prompts may still grow
        assert end["megabytes"] < found["before"]["megabytes"] + 60


class Mixing(Replier):
    """Answers that depend on who else is served."""

    def run(self, step: Step):
        self.company = len(step.lengths)
        return super().run(step)

    def answer(self, prefix, lengths):
        logits = super().answer(prefix, lengths)
        logits[40] += 100.0 * (self.company > 2)
        return logits


def test_an_answer_changed_by_company_is_found():
    with running(runner=Mixing(lambda question: "fine"), max_running=16, max_queue=64) as made:
        found = soak(made.port, os.getpid(), 80)
        assert any("in company" in line for line in found["wrong"])


def test_a_refusal_that_is_none_is_found(monkeypatch):
    with running() as made:
        assert fuzz(made.port, 40)["wrong"] == []
        monkeypatch.setattr("telechat_twins.core.serve.app.check_key", lambda *_: {}["a defect"])
        said = [refused(made.port, *bad_request(random.Random(n))) for n in range(20)]
        assert any(line and "status 500" in line for line in said)
