"""AdamW's updates in `tele parity compare`: rounding that small gradients magnify holds, faults far below it do not."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from telechat_twins.core.parity.compare.records import Measured, compare_records
from telechat_twins.core.parity.compare.updates import gain, parts_along
from telechat_twins.core.parity.record.format import Record
from telechat_twins.core.parity.record.sketch import BUCKETS
from tests.support.record_pairs import record

NAME, SHAPE, UNIT = "layers.7.ffn.up.weight", (1024, 384), 2.0**-24
LR, DECAY, EPS, BETA1, BETA2 = 1e-3, 0.1, 1e-8, 0.9, 0.95


def updated(gradient: np.ndarray, weight: np.ndarray, lr: float = LR, decay: float = DECAY) -> np.ndarray:
    """The weight after AdamW's first update, in float64."""
    return weight * (1 - lr * decay) - lr * gradient / (np.abs(gradient) + EPS)


@functools.cache
def one_step(side: int, lr: float = LR, decay: float = DECAY) -> Record:
    """A matrix's first step, its gradient of the sizes of a model of 30 million elements whose norm is clipped to 1:
    of other sizes in every row and column. ``side``: 0 the float64 run, others have float32's roundings."""
    exact, rounding = np.random.default_rng(0), np.random.default_rng([1, side])
    scale = 2e-5 * np.exp(0.5 * exact.standard_normal((SHAPE[0], 1))) * np.exp(0.5 * exact.standard_normal(SHAPE[1]))
    weight = (0.02 * exact.standard_normal(SHAPE)).astype(np.float32).astype(np.float64)
    gradient = scale * exact.standard_normal(SHAPE)
    if side:
        gradient = gradient + 40 * UNIT * scale * rounding.standard_normal(SHAPE)
    after = updated(gradient, weight, lr, decay)
    held = {"weight_before": weight, "gradient": gradient, "weight_after": after}
    held |= {"moment1": (1 - BETA1) * gradient, "moment2": (1 - BETA2) * gradient**2}
    if side:
        held = {kind: x.astype(np.float32) for kind, x in held.items()}
    return record({f"{kind}:{NAME}@1": x for kind, x in held.items()}, precision="fp32" if side else "fp64")


def judged(a: Record, b: Record, reference: Record | None) -> Measured:
    found = compare_records(a, b, reference)
    assert [row.kind for row in found.quantities if not row.holds] in ([], ["weight_after"])
    return next(row for row in found.quantities if row.kind == "weight_after")


@pytest.fixture(scope="module")
def sides() -> list[Record]:
    return [one_step(side) for side in range(3)]


def test_rounding_that_small_gradients_magnify_holds(sides: list[Record]) -> None:
    """The smooth part of the update's error is far above a gradient's ceiling, 160 u for four blocks: a limit without
    the moments is broken by equal runs."""
    exact, a, b = sides
    row = judged(a, b, exact)
    old = 1.5 * (160 * math.sqrt(2) * UNIT + 2 * UNIT * 0.02 / LR)
    smooth = row.shares["smooth part"] * smooth_limit(row)
    assert smooth > old, (smooth, old)
    assert row.holds and row.shares["smooth part"] < 0.5 and max(row.shares.values()) < 0.7, row
    assert judged(a, b, None).holds and judged(a, exact, None).holds


def smooth_limit(row: Measured) -> float:
    assert row.measure == "smooth part"
    return row.limit


@pytest.mark.parametrize(
    ("fault", "measure"),
    [
        ({"lr": LR * 1.001}, "along the update"),
        ({"lr": LR * (1 - 1e-4)}, "along the update"),
        ({"decay": DECAY * 1.03}, "along the weights"),
    ],
)
@pytest.mark.parametrize("how", ["reference", "alone", "float64"])
def test_a_wrong_factor_of_the_update_shows_below_the_rounding(
    sides: list[Record], fault: dict[str, float], measure: str, how: str
) -> None:
    exact, _, b = sides
    wrong = one_step(1, **fault)
    row = judged(wrong, exact if how == "float64" else b, exact if how == "reference" else None)
    assert not row.holds and row.measure == measure and row.side == ("apart" if how == "alone" else "a"), row


@pytest.mark.parametrize(("elements", "ratio"), [(64, 1e-3), (500, 1e-4), (500, 1e-2), (2816, 1e-4), (2816, 1e-3)])
def test_the_gain_bounds_what_is_simulated(elements: int, ratio: float) -> None:
    """Medians of buckets of so many normal gradients with an error of 1e-6."""
    random, error = np.random.default_rng(3), 1e-6
    x, z = (random.standard_normal((BUCKETS, elements)) for _ in range(2))
    one, other = ((g / (np.abs(g) + ratio)) for g in (x, x + error * z))
    sums = np.abs(((other - one) * random.choice([-1.0, 1.0], x.shape)).sum(1))
    smooth = np.median(sums) / 0.6745 / math.sqrt(elements) / error
    assert smooth < 1.1 * gain(ratio, 3.0, elements) < 12 * max(1.0, smooth)
    assert gain(ratio, 40.0, elements) > gain(ratio, 3.0, elements)


def test_parts_along_a_direction_leave_outliers_out() -> None:
    random = np.random.default_rng(4)
    noise, direction = random.standard_normal((2, 100, BUCKETS))
    noise[:, 7] = 1e4  # an element whose update has the other sign
    counts = np.full(100, 10**6)
    value, chance = parts_along(noise, direction, counts)
    assert (value < chance / 2).all(), "eight deviations"
    value, chance = parts_along(noise + 2 * direction, direction, counts)
    np.testing.assert_allclose(value, 2 * np.linalg.norm(direction, axis=1), rtol=0.2)
    assert (value > 3 * chance).all()
    nothing = parts_along(np.zeros((1, BUCKETS)), np.zeros((1, BUCKETS)), counts[:1])
    assert [x.tolist() for x in nothing] == [[0.0], [0.0]]
