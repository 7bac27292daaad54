"""Rotary tables against the released numbers, and the scaling rule against the released table."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from telechat_twins.core.errors import UserError
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.position import (
    RotaryRows,
    attention_scale,
    ntk_alpha,
    rope_tables,
    scaled_base,
    xpos_scales,
)
from tests.support.frameworks import GOLDENS, golden_arrays, golden_config


def test_scaling_equals_the_released_functions() -> None:
    """120 and more lengths, exact powers of two included, for four pairs of training and base length."""
    preset = load_model_config("telechat2-115b")
    for table in json.loads((GOLDENS / "telechat2_ntk/ntk_table.json").read_text())["tables"]:
        config = replace(preset, training_seqlen=table["training_seqlen"], base_seqlen=table["base_seqlen"])
        for row in table["rows"]:
            S = row["seq_len"]
            assert ntk_alpha(S, config.training_seqlen, config.base_seqlen) == row["alpha"], row
            assert scaled_base(config, S) == pytest.approx(row["base"], rel=1e-12), row
            assert attention_scale(config, S) == pytest.approx(row["mscale"], rel=1e-12), row


def test_the_52b_grows_its_base_by_a_rule_of_its_own() -> None:
    """The released table: theta times alpha, no exponent, no amplitude."""
    config = load_model_config("telechat-52b")
    for row in json.loads((GOLDENS / "telechat52b_like/rotary_ntk.json").read_text())["rows"]:
        S = row["seq_len"]
        assert ntk_alpha(S, config.training_seqlen, config.base_seqlen) == row["alpha"], row
        assert (scaled_base(config, S), attention_scale(config, S)) == (row["theta"], 1.0), row
        frequency = rope_tables(config, np.array([1]), S, np.float64)[1][0, 1]  # sine of position 1, second pair
        assert np.arcsin(frequency) == pytest.approx(row["theta"] ** (-2 / config.head_dim), rel=1e-12)


def test_yarn_equals_the_papers_formulas() -> None:
    """In float64 to rounding, in float32 to its own; lookups for cached steps are the same rows."""
    config = load_model_config("telechat3-36b")
    positions = np.array([0, 1, 777, 8191, 8192, 32767])
    dim, base = config.head_dim, config.rope_theta
    channel = np.arange(dim // 2)
    turns = config.base_seqlen / (2 * np.pi * base ** (2 * channel / dim))  # within the first 8192 positions
    low, high = np.flatnonzero(turns <= 32)[0] - 1, np.flatnonzero(turns < 1)[0]  # rounded outwards
    frequency = base ** (-2 * channel / dim)
    frequency = frequency / 4 + np.clip((high - channel) / (high - low), 0, 1) * (frequency - frequency / 4)
    scale = 0.07 * np.log(4) + 1
    for dtype, limit in ((np.float64, 1e-10), (np.float32, 4e-3)):
        cos, sin = rope_tables(config, positions, 9, dtype)
        assert np.abs(cos - scale * np.cos(positions[:, None] * frequency)).max() < limit
        assert np.abs(sin - scale * np.sin(positions[:, None] * frequency)).max() < limit
    rows = RotaryRows(config).rows(positions, np.full(len(positions), 40000))
    assert all(map(np.array_equal, rows, rope_tables(config, positions, 40000)))
    with pytest.raises(UserError, match="yarn_slow: 32 must be below yarn_fast 32"):
        replace(config, yarn_slow=32.0)
    with pytest.raises(UserError, match="rope_theta: 1 must be above 1"):
        replace(config, rope_theta=1.0)


@pytest.mark.parametrize(
    "case",
    [
        "telechat2_gqa",
        "telechat2_mha",
        "telechat2_ntk/base_eq_training_step1",
        "telechat2_ntk/base_half_training_step2",
    ],
)
@pytest.mark.parametrize(("variant", "dtype"), [("fp32table", "float32"), ("released", "float16")])
def test_tables_equal_the_released_ones(case: str, variant: str, dtype: str) -> None:
    """float16 tables exactly; float32 tables within two units in the last place: the release's cosine is float32."""
    config = replace(golden_config(f"{case}/config.json"), table_dtype=dtype)
    io = golden_arrays(f"{case}/io.safetensors")
    S = io["input_ids"].shape[1]
    for ours, name in zip(rope_tables(config, np.arange(S), S), ("cos", "sin"), strict=True):
        theirs = io[f"{variant}.{name}"]
        both_halves = np.concatenate((ours, ours), -1)
        if dtype == "float16":
            np.testing.assert_array_equal(both_halves, theirs)
        else:
            np.testing.assert_allclose(both_halves, theirs, rtol=0, atol=2 * 2.0**-23)


def test_scaling_starts_beyond_the_trained_length() -> None:
    config = load_model_config("telechat2-tiny")
    trained = config.training_seqlen
    assert scaled_base(config, trained) == config.rope_theta and attention_scale(config, trained) == 1.0
    assert scaled_base(config, trained + 1) > config.rope_theta and attention_scale(config, trained + 1) > 1.0


def test_float64_tables_are_float64_throughout() -> None:
    config = load_model_config("telechat2-tiny")
    cos, _ = rope_tables(config, np.array([100]), 100, np.float64)
    exact = np.cos(100.0 * 10000.0 ** (-np.arange(0, 32, 2) / 32))
    assert cos.dtype == np.float64
    np.testing.assert_allclose(cos[0], exact, rtol=0, atol=1e-13)


def test_only_ntk_follows_the_length() -> None:
    config = replace(load_model_config("telechat2-tiny"), position="rope")
    assert scaled_base(config, 4 * config.training_seqlen) == config.rope_theta
    assert attention_scale(config, 4 * config.training_seqlen) == 1.0
    assert xpos_scales(config, np.arange(3)) is None


@pytest.mark.parametrize("length", [7, 96, 256])
def test_xpos_products_equal_those_of_the_released_centring(length: int) -> None:
    """The released ladder counts from -ceil(K / 2) of the K keys at hand; only differences of positions can matter."""
    config = load_model_config("flm-tiny")
    d = config.head_dim
    zeta = (np.arange(0, d, 2) + 0.4 * d) / (1.4 * d)
    ladder = np.arange((-length) // 2, (-length) // 2 + length)[:, None] / config.xpos_scale_base
    scale_q, scale_k = xpos_scales(config, np.arange(length), np.float64)
    released = (zeta**ladder)[:, None] * (zeta**-ladder)[None]
    np.testing.assert_allclose(scale_q[:, None] * scale_k[None], released, rtol=1e-13)
    # A position's scale is the same whatever comes after it: a cached key stays right.
    np.testing.assert_array_equal(scale_k[:5], xpos_scales(config, np.arange(5), np.float64)[1])


def test_xpos_scales_stay_within_float16_over_the_trained_length() -> None:
    config = load_model_config("flm-101b")
    for scale in xpos_scales(config, np.arange(config.max_seqlen)):
        assert scale.min() > 0.05 and scale.max() < 20.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "changes", [{}, {"table_dtype": "float16"}, {"position": "rope"}, {"position": "xpos", "max_seqlen": 2048}]
)
def test_rows_of_single_positions_are_those_of_whole_tables(changes, dtype):
    config = load_model_config({"preset": "telechat2-tiny", **changes})
    kept = RotaryRows(config, dtype)
    rng = np.random.default_rng(0)
    for count in (1, 40, 7):  # the kept tables grow meanwhile
        positions = rng.integers(0, 300 * count, count)
        lengths = rng.choice([10, 256, 257, 600, 1100, 5000], count)
        rows = kept.rows(positions, lengths)
        for at, (position, length) in enumerate(zip(positions, lengths, strict=True)):
            place = np.array([position])
            expected = *rope_tables(config, place, int(length), dtype), *(xpos_scales(config, place, dtype) or ())
            assert len(rows) == len(expected) and rows[0].dtype == dtype
            for got, table in zip(rows, expected, strict=True):
                np.testing.assert_array_equal(got[at], table[0])
    assert kept.scaling(600) == (scaled_base(config, 600), attention_scale(config, 600))
