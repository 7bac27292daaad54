"""The dynamic loss scale as a state machine."""

import json
import math

import numpy as np
import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.train.loss_scale import DynamicLossScale, largest_magnitude, largest_scale


def test_halves_on_overflow_and_doubles_after_good_steps():
    scale = DynamicLossScale(scale=8.0, growth_interval=3)
    assert scale.overflow() and scale.scale == 4.0
    for _ in range(2):
        scale.good()
    assert scale.scale == 4.0
    scale.good()
    assert scale.scale == 8.0 and scale.good_steps == 0


def test_an_overflow_breaks_the_row_of_good_steps():
    scale = DynamicLossScale(scale=8.0, growth_interval=2)
    scale.good()
    scale.overflow()
    scale.good()
    assert scale.scale == 4.0
    scale.good()
    assert scale.scale == 8.0


def test_floor_and_ceiling():
    scale = DynamicLossScale(scale=2.0, growth_interval=1, max_scale=4.0)
    assert scale.overflow() and scale.scale == 1.0
    assert not scale.overflow()  # nothing left to halve: the caller must stop
    assert scale.scale == 1.0
    for _ in range(5):
        scale.good()
    assert scale.scale == 4.0


def test_state_survives_json():
    scale = DynamicLossScale(growth_interval=7)
    scale.overflow()
    scale.good()
    restored = DynamicLossScale.from_dict(json.loads(json.dumps(scale.to_dict())))
    assert restored == scale
    with pytest.raises(UserError, match="loss_scale"):
        DynamicLossScale.from_dict({"scale": 1.0})


@pytest.mark.parametrize(
    ("largest_at_1", "overflow_above", "expected"),
    [
        (1.0, 65504.0, 15),  # 2^15 is the last power below 65504
        (1e-6, 65504.0, 35),
        (1e5, 65504.0, -1),
        (1.0, 100.0, 6),  # something on the way overflows long before the gradients do
        (3e-4, 3.0, 13),
        (0.0, 65504.0, 40),  # all zero: any scale will do, and the search ends
        (1e-30, 65504.0, 40),
    ],
)
def test_the_search_finds_the_largest_scale(largest_at_1, overflow_above, expected):
    tried = []

    def attempt(scale):
        tried.append(scale)
        largest = scale * largest_at_1
        return largest if largest <= overflow_above else math.inf

    assert largest_scale(attempt) == 2.0**expected
    assert tried[-1] == 2.0**expected and len(tried) <= 9


def test_a_batch_without_finite_gradients_is_refused():
    with pytest.raises(UserError, match=r"not finite at any loss scale down to 2\^-24; use precision bf16 or fp32"):
        largest_scale(lambda scale: math.inf)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_as_infinite(bad):
    arrays = [np.ones(3), np.array([[0.0, bad]]), np.zeros((0, 2))]
    assert largest_magnitude(arrays) == math.inf
    assert largest_magnitude([np.array([-3.0, 2.0]), np.zeros(0)]) == 3.0 and largest_magnitude([]) == 0.0
