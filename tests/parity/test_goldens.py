"""Both backends against numbers of the original public implementations: logits, losses, every gradient by name.

The limits come from float64: on these cases a float32 run of the released code itself lies about 1e-6 (relative
Frobenius) from its float64 run, in logits and in the worst gradient; a wrong formula lies above 1e-3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import telechat_twins.core.model.position
from telechat_twins.core.backends import load
from telechat_twins.core.model.batch import Batch
from telechat_twins.core.model.config import ModelConfig
from telechat_twins.core.parity.bounds import compare_tensors, relative_frobenius
from tests.support.frameworks import BACKENDS, golden_arrays, golden_batch, golden_source

LOGITS, LOSS, GRADIENT = 2e-6, 1e-6, 1e-5
TABLES = {"fp32table": "float32", "released": "float16"}
CASES = ("telechat2_gqa", "telechat2_mha")
NTK = (
    "base_eq_training_step1",
    "base_eq_training_step2",
    "base_half_training_step1",
    "base_half_training_step2",
    "base_double_training",
)
Get = Callable[[str], np.ndarray]


def judged(io: dict[str, np.ndarray], variant: str, name: str) -> np.ndarray:
    """The truth for a variant: float64 where it exists (float32 tables), else the released float32 run."""
    return io[f"{'fp64' if variant == 'fp32table' else variant}.{name}"]


def check_forward(
    backend: str, config: ModelConfig, get: Get, io: dict[str, np.ndarray], variant: str, batch: Batch, loss: str
) -> None:
    result = load(backend, "forward").run(config, get, batch)
    assert relative_frobenius(result["logits"], judged(io, variant, "logits")) <= LOGITS
    truth = float(judged(io, variant, loss))
    assert abs(result["loss"] - truth) <= LOSS * abs(truth), (loss, result["loss"], truth)


def check_gradients(
    backend: str, config: ModelConfig, get: Get, batch: Batch, pack: Callable[[Any], Any], truth: dict[str, np.ndarray]
) -> None:
    result = load(backend, "forward").run(config, get, batch, grads=True)
    comparison = compare_tensors(pack(result["grads"]), truth)
    assert comparison.same_names
    assert comparison.worst() <= GRADIENT, comparison


def open_case(case: str, variant: str = "fp32table") -> tuple[ModelConfig, Any, dict[str, np.ndarray]]:
    source = golden_source(f"{case}/weights.safetensors", f"{case}/config.json")
    return replace(source.config, table_dtype=TABLES[variant]), source, golden_arrays(f"{case}/io.safetensors")


@pytest.mark.parametrize("loss", ["loss_mean", "loss_ignore", "loss_masked"])
@pytest.mark.parametrize("variant", TABLES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_losses(backend: str, case: str, variant: str, loss: str) -> None:
    config, source, io = open_case(case, variant)
    check_forward(backend, config, source.tensor, io, variant, golden_batch(io, loss), loss)


@pytest.mark.parametrize(
    ("variant", "loss", "file"),
    [
        ("fp32table", "loss_mean", "grads_fp32table"),
        ("fp32table", "loss_masked", "grads_fp32table_masked_loss"),
        ("released", "loss_mean", "grads_released"),
    ],
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient(backend: str, case: str, variant: str, loss: str, file: str) -> None:
    config, source, io = open_case(case, variant)
    truth = golden_arrays(f"{case}/{file}.safetensors")
    check_gradients(backend, config, source.tensor, golden_batch(io, loss), source.export, truth)


def open_ntk(sub: str, variant: str = "fp32table") -> tuple[ModelConfig, Any, dict[str, np.ndarray]]:
    source = golden_source("telechat2_ntk/weights.safetensors", f"telechat2_ntk/{sub}/config.json")
    config = replace(source.config, table_dtype=TABLES[variant])
    return config, source, golden_arrays(f"telechat2_ntk/{sub}/io.safetensors")


@pytest.mark.parametrize("variant", TABLES)
@pytest.mark.parametrize("sub", NTK)
@pytest.mark.parametrize("backend", BACKENDS)
def test_longer_than_trained(backend: str, sub: str, variant: str) -> None:
    config, source, io = open_ntk(sub, variant)
    check_forward(backend, config, source.tensor, io, variant, golden_batch(io, "loss_mean"), "loss_mean")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_reproduces_the_formulas(backend: str, case: str) -> None:
    """The reference precision that other tolerances are taken from."""
    config, source, io = open_case(case)
    result = load(backend, "forward").run(config, source.tensor, golden_batch(io, "loss_mean"), "fp64")
    assert relative_frobenius(result["logits"], io["fp64.logits"]) <= 1e-13
    assert abs(result["loss"] - float(io["fp64.loss_mean"])) <= 1e-13


# Planted faults. Each is written as what it does to weights or batch, so both backends get the same one, and the
# comparison that must turn red is the one above.


def kv_taken_as_all_keys_then_all_values(config: ModelConfig, get: Get) -> Get:
    def faulty(name: str) -> np.ndarray:
        if ".attn.k." not in name and ".attn.v." not in name:
            return get(name)
        k, v = (get(name.replace(".attn.v.", ".attn.k.").replace(".k.", f".{x}.")) for x in "kv")
        heads = (config.num_kv_heads, config.head_dim, -1)
        stored = np.stack((k.reshape(heads), v.reshape(heads)), 1).reshape(-1, k.shape[1])  # [K_0; V_0; K_1; V_1; ...]
        return np.split(stored, 2)[".attn.v." in name]

    return faulty


def attention_output_bias_missed(config: ModelConfig, get: Get) -> Get:
    return lambda name: get(name) * (0 if name.endswith("attn.o.bias") else 1)


def ffn_output_bias_missed(config: ModelConfig, get: Get) -> Get:
    return lambda name: get(name) * (0 if name.endswith("down.bias") else 1)


def interleaved_rotation(config: ModelConfig, get: Get) -> Get:
    """Rotating neighbours (2i, 2i+1) is rotating halves of a head whose rows are reordered."""

    def faulty(name: str) -> np.ndarray:
        tensor = get(name)
        if name.split(".")[-2] not in ("q", "k"):
            return tensor
        pairs = tensor.reshape(-1, config.head_dim // 2, 2, tensor.shape[1])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)

    return faulty


def attention_scaled_by_1_over_d(config: ModelConfig, get: Get) -> Get:
    factor = np.float32(config.head_dim**-0.5)
    return lambda name: get(name) * (factor if name.endswith("attn.q.weight") else 1)


FAULTS = (
    kv_taken_as_all_keys_then_all_values,
    attention_output_bias_missed,
    ffn_output_bias_missed,
    interleaved_rotation,
    attention_scaled_by_1_over_d,
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fault_in_the_model_is_caught(backend: str, fault: Callable[[ModelConfig, Get], Get]) -> None:
    config, source, io = open_case("telechat2_gqa")
    faulty, batch = fault(config, source.tensor), golden_batch(io, "loss_mean")
    with pytest.raises(AssertionError):
        check_forward(backend, config, faulty, io, "fp32table", batch, "loss_mean")
    truth = golden_arrays("telechat2_gqa/grads_fp32table.safetensors")
    with pytest.raises(AssertionError):
        check_gradients(backend, config, faulty, batch, source.export, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lost_attention_scale_is_caught(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, source, io = open_ntk("base_eq_training_step1")
    monkeypatch.setattr(telechat_twins.core.model.position, "attention_scale", lambda config, seq_len: 1.0)
    with pytest.raises(AssertionError):
        check_forward(backend, config, source.tensor, io, "fp32table", golden_batch(io, "loss_mean"), "loss_mean")


@pytest.mark.parametrize("backend", BACKENDS)
def test_label_shift_off_by_one_is_caught(backend: str) -> None:
    config, source, io = open_case("telechat2_gqa")
    batch = golden_batch(io, "loss_mean")
    shifted = replace(batch, targets=np.roll(batch.targets, -1, 1))
    with pytest.raises(AssertionError):
        check_forward(backend, config, source.tensor, io, "fp32table", shifted, "loss_mean")
