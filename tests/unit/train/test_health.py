"""The policy on non-finite numbers and spikes."""

import json
import math

import pytest

from telechat_twins.core.config import HealthConfig
from telechat_twins.core.train.health import Health


def feed(health, norms):
    return [health.judge(1.0, n).action for n in norms]


@pytest.mark.parametrize("policy", ["stop", "skip", "warn"])
def test_a_spike_gets_the_policy(policy):
    health = Health(HealthConfig(spike_factor=5.0, spike_policy=policy, window=10))
    assert feed(health, [1.0, 1.1, 0.9, 4.0]) == ["go"] * 4
    verdict = health.judge(1.0, 5.5)
    assert verdict.action == policy
    assert "5.5" in verdict.reason and "median" in verdict.reason


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_non_finite_numbers_stop_whatever_the_policy(loss, norm):
    verdict = Health(HealthConfig(spike_policy="warn")).judge(loss, norm)
    assert verdict.action == "stop"
    assert "nan" in verdict.reason or "inf" in verdict.reason


def test_no_spike_before_there_is_a_median():
    health = Health(HealthConfig(spike_factor=2.0, spike_policy="stop", window=50))
    assert health.observations_needed == 10
    assert feed(health, [1.0] * 9 + [100.0]) == ["go"] * 10  # nine norms seen when the tenth came
    assert feed(health, [100.0]) == ["stop"]


def test_a_lasting_change_of_level_is_accepted():
    health = Health(HealthConfig(spike_factor=3.0, spike_policy="skip", window=6))
    feed(health, [1.0] * 6)
    assert feed(health, [10.0] * 5)[-1] == "go"


def test_the_window_survives_json_bit_for_bit():
    config = HealthConfig(spike_factor=2.0, spike_policy="stop", window=5)
    first, second = Health(config), Health(config)
    norms = [0.1 + i / 3 for i in range(7)]
    feed(first, norms)
    second.load(json.loads(json.dumps(first.to_dict())))
    assert second.to_dict() == first.to_dict()
    assert first.judge(1.0, 2 * norms[4]) == second.judge(1.0, 2 * norms[4])
    assert first.judge(1.0, 99.0) == second.judge(1.0, 99.0)


def test_a_non_finite_norm_does_not_enter_the_window():
    health = Health(HealthConfig(window=5))
    health.judge(1.0, math.inf)
    health.judge(math.nan, 1.0)
    assert health.to_dict() == {"grad_norms": []}
