"""Initial weights: a slice equals the slice of the whole, and the numbers never change."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_tensor, init_weights
from telechat_twins.core.model.params import MATRIX, parameter_table

CONFIG = load_model_config("telechat2-tiny")
PINNED = [-0.0030766423, 0.0071278578, -0.037200201]
DIGEST = "f5358ec9a2111a47"


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_any_slice_is_the_slice_of_the_whole(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["layers.1.ffn.up.weight", "layers.0.attn.o.bias", "embed.weight", "norm.weight"]))
    scheme = data.draw(st.sampled_from(["normal", "strong"]))
    shape = parameter_table(CONFIG)[name].shape
    index = tuple(slice(*sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))) for n in shape)
    whole = init_tensor(name, CONFIG, 7, scheme=scheme)
    np.testing.assert_array_equal(init_tensor(name, CONFIG, 7, index, scheme), whole[index])


def test_numbers_are_pinned() -> None:
    """The same on every machine and release: a checkpoint made elsewhere can be checked from its seed alone."""
    made = init_tensor("layers.0.attn.q.weight", CONFIG, 1234)
    np.testing.assert_allclose(made[0, :3], PINNED, rtol=1e-6)
    rounded = np.round(made.astype(np.float64), 6).tobytes()
    assert hashlib.sha256(rounded).hexdigest()[:16] == DIGEST


def test_moments_and_independence() -> None:
    weights = init_weights(CONFIG, 1)
    for name, spec in parameter_table(CONFIG).items():
        if spec.kind == "norm":
            assert (weights[name] == 1).all()
        elif spec.kind == "bias":
            assert (weights[name] == 0).all()
        else:
            n = weights[name].size
            assert abs(weights[name].mean()) < 5 * 0.02 / n**0.5, name  # five standard errors
            assert abs(weights[name].std() / 0.02 - 1) < 5 / (2 * n) ** 0.5, name
    a, b = weights["layers.0.attn.k.weight"].ravel(), weights["layers.1.attn.k.weight"].ravel()
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / a.size**0.5
    assert not np.array_equal(a, init_tensor("layers.0.attn.k.weight", CONFIG, 2).ravel())


def test_matrix_like_weights_may_have_a_deviation_of_their_own() -> None:
    """They are the same normal numbers at another scale; embedding and head keep theirs to the bit."""
    own, plain = init_weights(replace(CONFIG, matrix_init_std=0.01), 1), init_weights(CONFIG, 1)
    for name, spec in parameter_table(CONFIG).items():
        if spec.mup_class == MATRIX:
            np.testing.assert_allclose(own[name], plain[name] / 2, rtol=1e-6)
        else:
            np.testing.assert_array_equal(own[name], plain[name])


def test_unknown_name_and_strides_are_refused() -> None:
    with pytest.raises(KeyError):
        init_tensor("layers.9.attn.q.weight", CONFIG, 1)
    with pytest.raises(ValueError, match="unit steps"):
        init_tensor("norm.weight", CONFIG, 1, (slice(0, 8, 2),))
