"""Runs with rounding noise in both twins: a few steps, near the run without noise; a wrong port leaves the envelope."""

from __future__ import annotations

from pathlib import Path

import pytest

from telechat_twins.core.backends import load
from telechat_twins.core.parity.envelope import FLOOR, MARGIN, config_digest, measure, noisy_rows
from telechat_twins.core.parity.noise import OPERATORS
from tests.campaigns.drift import recipe
from tests.mutation.catalogue import FAULTS
from tests.mutation.fault import planted
from tests.support.frameworks import BACKENDS


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_envelope(backend: str, tmp_path: Path) -> None:
    """Noise is small, and gone afterwards; the other twin is inside, a port with another eps is not."""
    for name in ("mindspore", "torch"):
        pytest.importorskip(name)
    config, ops = recipe(tmp_path, 2, 6e-3), load(backend, "ops")
    before = [getattr(ops, name) for name in OPERATORS]
    envelope = measure(backend, config, 3, 7)  # the second step of a single noisy run can be near the centre by chance
    assert [getattr(ops, name) for name in OPERATORS] == before
    assert envelope.steps == [1, 2] and envelope.config == config_digest(config)
    assert all(0.0 < limit < 1e-3 for values in envelope.limits.values() for limit in values)
    once, again, last = (noisy_rows(backend, config, seed) for seed in (7, 8, 9))
    pairs = [pair for rows in (once, again, last) for pair in zip(rows, envelope.centre["grad_norm"], strict=True)]
    apart = [abs(a["grad_norm"] / b - 1) for a, b in pairs]
    assert envelope.limits["grad_norm"] == [pytest.approx(max(FLOOR * 2.0**-24, MARGIN * max(apart)), rel=1e-12)] * 2
    assert [row["grad_norm"] for row in once] != [row["grad_norm"] for row in again]
    other = noisy_rows("pt" if backend == "ms" else "ms", config, None)
    assert [bound for bound in envelope.bounds(other) if not bound.holds] == []
    with planted(FAULTS["eps of another release"], backend):
        wrong = noisy_rows(backend, config, None)
    assert [bound.key for bound in envelope.bounds(wrong) if not bound.holds]
