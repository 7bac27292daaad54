"""Weights in 8 bits: the rule, its bound, and what it is applied to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_tensor
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.model.quantize import Int8Matrix, quantize, quantizing

FLOATS = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)


@settings(max_examples=200, deadline=None)
@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=FLOATS))
def test_every_weight_is_within_half_a_factor(weight):
    values, factors = quantize(weight)
    assert values.dtype == np.int8 and factors.dtype == np.float32 and factors.shape == weight.shape[:1]
    assert abs(values.astype(int)).max() <= 127
    error = np.abs(values.astype(np.float64) * factors.astype(np.float64)[:, None] - weight)
    # A hair more where the factor itself was rounded: 127 of its units in the last place.
    assert (error <= 0.5 * factors.astype(np.float64)[:, None] * (1 + 1e-4)).all()


def test_zero_stays_zero_and_the_largest_is_met():
    weight = np.float32([[0.0, 0.0], [0.5, -2.0], [1e-30, 0.0]])
    values, factors = quantize(weight)
    assert values.tolist() == [[0, 0], [32, -127], [127, 0]]
    np.testing.assert_allclose(factors, [0.0, 2 / 127, 1e-30 / 127], rtol=1e-6)


def test_signs_are_treated_alike_and_rows_by_themselves():
    weight = np.random.default_rng(0).normal(size=(7, 33)).astype(np.float32)
    one, other = quantize(weight), quantize(-weight)
    np.testing.assert_array_equal(one.values, -other.values)
    scaled = quantize(weight * np.float32(2.0) ** np.arange(7, dtype=np.float32)[:, None])
    np.testing.assert_array_equal(one.values, scaled.values)


@pytest.mark.parametrize("preset", ["telechat2-tiny", "teleflm-tiny", "flm-tiny"])
def test_only_matrices_of_linear_layers_are_quantised(preset):
    config = load_model_config(preset)
    get = quantizing(config, lambda name: init_tensor(name, config, 1))
    for name, spec in parameter_table(config).items():
        found = get(name)
        wanted = name.endswith(".weight") and name != "embed.weight" and "norm" not in name
        assert isinstance(found, Int8Matrix) == wanted, name
        assert (found.values if wanted else found).shape == spec.shape
