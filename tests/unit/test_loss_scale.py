"""The dynamic loss scale as a state machine."""

import json

import pytest

from core.errors import UserError
from core.loss_scale import DynamicLossScale


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
