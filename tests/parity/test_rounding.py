"""Where the twins round in 16 bits: the same values in, the same bits out, at every place outside a matrix product.

Matrix products sum in an order of their own; the multipliers, the growth mask and the division of the loss do not, so
they are held to the bit against numpy with one rounding (ml_dtypes, to nearest even).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from telechat_twins.core.backends import load
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.model.init import init_weights
from tests.support.frameworks import BACKENDS
from tests.support.growing import TINY

TYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
# 0.05 is FLM-101B's output multiplier and 0.025 that of Tele-FLM-1T: neither is a number of 8 or 11 bits.
FACTORS = (0.05, 0.025, 1 / 3, 0.03125)


def once(x: np.ndarray, factor: float, dtype: np.dtype) -> np.ndarray:
    return (x.astype(np.float32) * np.float32(factor)).astype(dtype).astype(np.float32)


def batch() -> Batch:
    ids = np.random.default_rng(3).integers(0, TINY.vocab_size, (2, 8)).astype(np.int32)
    return Batch(ids, shift_labels(ids), np.broadcast_to(np.arange(8, dtype=np.int32), ids.shape))


def tensor(backend: str, array: np.ndarray) -> Any:
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    return load(backend, "model").to_tensor(array)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("factor", FACTORS)
def test_a_multiplier_rounds_once(backend: str, precision: str, factor: float) -> None:
    dtype = TYPES[precision]
    x = np.random.default_rng(0).normal(size=4096).astype(dtype)
    model = load(backend, "model")
    found = model.to_numpy(model.multiplied(tensor(backend, x), factor))
    np.testing.assert_array_equal(found.astype(np.float32), once(x, factor, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("factor", FACTORS)
def test_logits_are_multiplied_in_the_compute_dtype(backend: str, precision: str, factor: float) -> None:
    """As in TeleChat-52B's released code: the head's output, rounded, times the multiplier, rounded."""
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    plain = replace(TINY, logit_mult=1.0)
    weights = init_weights(plain, 1)
    logits = [
        load(backend, "forward").run(config, weights.__getitem__, batch(), precision)["logits"]
        for config in (plain, replace(plain, logit_mult=factor))
    ]
    np.testing.assert_array_equal(logits[1], once(logits[0], factor, TYPES[precision]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_targets", [3, 7, 49, 4097])
def test_the_loss_is_divided_and_not_multiplied_by_a_rounded_reciprocal(backend: str, num_targets: int) -> None:
    forward = load(backend, "forward")
    logits = np.random.default_rng(4).normal(size=(2, 8, TINY.vocab_size)).astype(np.float32)
    total, mean = (
        np.float32(load(backend, "model").to_numpy(forward.batch_loss(tensor(backend, logits.copy()), batch(), count)))
        for count in (1, num_targets)
    )
    assert mean == total / np.float32(num_targets)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
@pytest.mark.parametrize("implementation", ["fused", "composite"])
def test_a_norm_rounds_where_the_released_one_does(
    backend: str, precision: str, norm: str, implementation: str, request: pytest.FixtureRequest
) -> None:
    """TeleChat2's RMS norm rounds before its weight, torch.nn.LayerNorm (FLM-101B) after weight and bias.

    Statistics in float32 may tip a value that lies at a rounding boundary: fewer than 1 in 500 of them. Rounding at the
    other place changes a quarter of all values.
    """
    pytest.importorskip({"ms": "mindspore", "pt": "torch"}[backend])
    ops, dtype = load(backend, "ops"), TYPES[precision]
    if implementation == "composite":
        request.addfinalizer(ops.kernels.select)
        ops.kernels.select({norm: "composite"})
    rng = np.random.default_rng(5)
    x, weight, bias = (rng.normal(size=size).astype(dtype) for size in ((1, 256, 192), 192, 192))
    exact = x.astype(np.float64) - (x.astype(np.float64).mean(-1, keepdims=True) if norm == "layer_norm" else 0.0)
    exact /= np.sqrt(np.mean(exact**2, -1, keepdims=True) + 1e-5)
    if norm == "layer_norm":
        expected = (exact * weight.astype(np.float64) + bias.astype(np.float64)).astype(dtype)
    else:
        expected = (exact.astype(dtype).astype(np.float32) * weight.astype(np.float32)).astype(dtype)
    given = [tensor(backend, array) for array in ((x, weight, bias) if norm == "layer_norm" else (x, weight))]
    stat = load(backend, "model").Dtypes(precision).stat
    found = getattr(ops, norm)(*given, 1e-5, stat, given[0].dtype)
    changed = load(backend, "model").to_numpy(found).astype(np.float32) != expected.astype(np.float32)
    assert changed.mean() < 1 / 500
