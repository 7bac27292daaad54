"""Drift envelopes: the rule, what is inside and outside, the file and what is refused, the noise's numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.parity.bounds import UNIT_ROUNDOFF
from telechat_twins.core.parity.envelope import (
    FLOOR,
    MARGIN,
    WINDOW,
    Envelope,
    limits_of,
    read_envelope,
    write_envelope,
)
from telechat_twins.core.parity.noise import NoiseSource
from telechat_twins.core.train.metrics import Row

STEPS = 20
CENTRE = [4.0 - 0.1 * t for t in range(STEPS)]
GROWING = [1e-5 * 2**t for t in range(STEPS)]


def envelope() -> Envelope:
    deviations = {"loss": [GROWING, [0.5 * x for x in GROWING]], "grad_norm": [[1e-3] * STEPS] * 2}
    return Envelope(
        precision="fp32", backend="pt", runs=2, seed=1, noise=2.0**-23, config="c" * 64,
        steps=list(range(1, STEPS + 1)), centre={"loss": CENTRE, "grad_norm": [1.0] * STEPS},
        limits=limits_of(deviations, "fp32"),
    )  # fmt: skip


def rows(*far: float) -> list[Row]:
    return [
        {"step": n + 1, "loss": loss * (1 + x), "grad_norm": 1.0}
        for n, (loss, x) in enumerate(zip(CENTRE, far, strict=True))
    ]


def test_the_rule() -> None:
    """The largest of all runs within a window, times the margin; never below sums in another order."""
    limits = envelope().limits["loss"]
    assert limits[0] == MARGIN * GROWING[WINDOW] and limits[-1] == MARGIN * GROWING[-1]
    for precision, sums in (("bf16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        quiet = limits_of({"loss": [[0.0] * 3]}, precision)["loss"]
        assert quiet == [FLOOR * UNIT_ROUNDOFF[sums]] * 3
    assert limits_of({"loss": [[0.0, math.nan, 0.0]]}, "fp32")["loss"] == [math.inf] * 3


def test_inside_and_outside() -> None:
    """A distance that is within the limits late is beyond them early; the step is named."""
    made = envelope()
    late = [0.0] * (STEPS - 1) + [0.5]
    early = [0.5] + [0.0] * (STEPS - 1)
    assert all(bound.holds for bound in made.bounds(rows(*late)))
    broken = [bound for bound in made.bounds(rows(*early)) if not bound.holds]
    assert [bound.key for bound in broken] == ["envelope.loss"] and "at step 1;" in broken[0].source
    # Measured from another run than the centre.
    assert all(bound.holds for bound in made.bounds(rows(*early), rows(*early)))
    assert [b.key for b in made.bounds(rows(*late)[1:]) if not b.holds] == ["envelope.steps"]
    nan = rows(*late)
    nan[3]["loss"] = None
    assert [b.key for b in made.bounds(nan) if not b.holds] == ["envelope.loss"]


def test_the_file(tmp_path: Path) -> None:
    """Comes back as it was, a step without a number and a limit that judges nothing included."""
    made = envelope()
    centre = {**made.centre, "loss": [math.nan, *CENTRE[1:]]}
    limits = {**made.limits, "loss": [math.inf, *made.limits["loss"][1:]]}
    path = tmp_path / "envelope.json"
    write_envelope(replace(made, centre=centre, limits=limits), path)
    found = read_envelope(path)
    assert math.isnan(found.centre["loss"][0]) and math.isinf(found.limits["loss"][0])
    assert replace(found, centre=made.centre, limits=made.limits) == made
    tree = json.loads(path.read_text())
    assert tree["loss"]["low"][1] == -tree["loss"]["high"][1] and tree["rule"].startswith("limit[t]")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "format 'other' version 1"),
        ({"version": 2}, "needs tele-envelope version 1"),
        ({"centre": {"loss": [1.0]}}, "not an envelope"),
        ({"loss": {"high": [1.0]}}, "columns of different lengths"),
        ({"loss": {"high": [0.0] * STEPS}}, "limits must be above 0"),
        ({"steps": []}, "columns of different lengths"),
        ({"runs": "many"}, "not an envelope"),
    ],
)
def test_files_that_are_refused(change: dict[str, object], says: str, tmp_path: Path) -> None:
    path = tmp_path / "envelope.json"
    path.write_text(json.dumps({**envelope().to_dict(), **change}))
    with pytest.raises(UserError, match=says):
        read_envelope(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=r"envelope\.json"):
        read_envelope(path)


def test_noise_is_a_function_of_seed_update_and_call() -> None:
    """Of a unit in the last place at most, without a mean."""

    def draws(seed: int, update: int) -> list[np.ndarray]:
        source = NoiseSource("fp32", seed)
        source.begin(update)
        return [source.draw((100, 70)) for _ in range(2)]

    first, second = draws(1, 5)
    again = draws(1, 5)
    assert np.array_equal(first, again[0]) and np.array_equal(second, again[1])
    others = [second, draws(1, 6)[0], draws(2, 5)[0]]
    assert all(abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05 for other in others)
    assert first.dtype == np.float32 and np.abs(first).max() <= 2.0**-23
    assert abs(first.mean()) < 2.0**-23 / 50 and np.abs(first).mean() == pytest.approx(2.0**-24, rel=0.05)
    assert NoiseSource("fp64", 1).draw((3,)).dtype == np.float64
