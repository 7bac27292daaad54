"""Eight AdamW steps of the original implementation, step by step: loss, gradient norm, learning rate, final weights.

Limits are those the golden was stored with, taken from its float32 run against its float64 run.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.backends import load
from telechat_twins.core.config import run_config_from_dict
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.core.train.recipe import clip_factor, learning_rate
from tests.support.frameworks import BACKENDS, GOLDENS, golden_arrays, golden_source

CASES = ("telechat2_gqa", "teleflm")
GQA = "telechat2_gqa"


def run_trace(backend: str, case: str = GQA, table_dtype: str = "float32", **optim: Any) -> dict[str, Any]:
    """Train on the golden's batches with the production Trainer, schedule and clipping."""
    meta = json.loads((GOLDENS / "optimizer_trace" / case / "meta.json").read_text())["optimizer"]
    batches = golden_arrays(f"optimizer_trace/{case}/io.safetensors")["batches"].astype(np.int32)
    source = golden_source(f"{case}/weights.safetensors", f"{case}/config.json")
    steps, micro_batch, seq_len = batches.shape
    config = run_config_from_dict(
        {
            "model": {**source.config.to_dict(), "table_dtype": table_dtype},
            "data": {"sources": [], "seq_len": seq_len},
            "train": {"steps": steps, "global_batch": micro_batch, "micro_batch": micro_batch},
            "optim": {
                "lr": meta["peak"],
                "min_lr": meta["floor"],
                "warmup_steps": 2,
                "beta1": meta["betas"][0],
                "beta2": meta["betas"][1],
                "eps": meta["eps"],
                "weight_decay": meta["weight_decay"],
                "clip_grad": 1.0,
                **optim,
            },
        }
    )
    trainer = load(backend, "train").Trainer(config)
    trainer.optimizer.load_masters(lambda name, box: source.tensor(name)[box])
    rows: dict[str, list[float]] = {"loss": [], "grad_norm": [], "lr": []}
    positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), (micro_batch, seq_len))
    for step, ids in enumerate(batches):
        batch = Batch(ids, shift_labels(ids), positions)
        lr = learning_rate(config.optim, steps, step)
        rows["loss"].append(trainer.gradients(batch, batch.num_targets, 1.0))
        rows["grad_norm"].append(trainer.grad_norm(1.0))
        rows["lr"].append(lr)
        trainer.update(lr, clip_factor(rows["grad_norm"][-1], config.optim.clip_grad))
    assert trainer.step == steps
    weights = source.export({piece.name: piece.array for piece in trainer.weights()})
    return {**rows, "weights": weights, "trainer": trainer}


def check_trace(got: dict[str, Any], case: str = GQA, variant: str = "fp32table") -> None:
    """Against the float64 trace (float32 tables) or the released float32 one; final weights are stored as float32."""
    io = golden_arrays(f"optimizer_trace/{case}/io.safetensors")
    tolerance = json.loads((GOLDENS / "optimizer_trace" / case / "meta.json").read_text())["tolerance"]
    truth = "fp64" if variant == "fp32table" else variant
    np.testing.assert_allclose(got["lr"], io["lr"], rtol=tolerance["lr_rel"])
    np.testing.assert_allclose(got["loss"], io[f"{truth}.loss"], rtol=0, atol=tolerance["loss_abs"])
    np.testing.assert_allclose(got["grad_norm"], io[f"{truth}.grad_norm"], rtol=tolerance["grad_norm_rel"])
    if variant == "fp32table":
        final = golden_arrays(f"optimizer_trace/{case}/final_weights.safetensors")
        assert set(got["weights"]) == set(final)
        for name, weight in got["weights"].items():
            error = np.abs(weight - final[name])
            assert error.max() <= tolerance["final_weight_abs_max"], name
            assert error.mean() <= tolerance["final_weight_mean_abs_per_tensor"], name
            assert relative_frobenius(weight, final[name]) <= 1e-4, name


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_optimizer_trace(backend: str, case: str) -> None:
    check_trace(run_trace(backend, case), case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_weights_and_masters_are_one_storage(backend: str) -> None:
    """Every weight lies inside the masters, also after updates: there is no second copy of the model."""
    trainer = run_trace(backend)["trainer"]
    model = importlib.import_module(type(trainer.stages[0]).__module__)
    masters = [(x.data_ptr(), x.data_ptr() + 4 * int(np.prod(x.shape))) for x in trainer.optimizer.masters]
    for name, weight in model.named_weights(trainer.stages[0]).items():
        first = weight.data_ptr()
        assert any(low <= first and first + 4 * int(np.prod(weight.shape)) <= high for low, high in masters), name


def test_weights_apart_from_their_masters_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    optim = pytest.importorskip("telechat_twins.telechat_ms.optim")
    real = optim.AdamW._tie

    def untied(self: Any, number: int) -> None:
        real(self, number)
        for segment in self.gradients.buckets[number].segments:
            weight = self.weights[segment.name]
            weight.set_data(weight + 0.0)

    monkeypatch.setattr(optim.AdamW, "_tie", untied)
    with pytest.raises(AssertionError):
        check_trace(run_trace("ms"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_optimizer_trace_with_released_tables(backend: str) -> None:
    check_trace(run_trace(backend, table_dtype="float16"), variant="released")


@pytest.mark.parametrize("fault", [{"weight_decay": 0.0}, {"clip_grad": 0.0}, {"beta2": 0.999}, {"warmup_steps": 1}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_recipe_is_caught(backend: str, fault: dict[str, float]) -> None:
    with pytest.raises(AssertionError):
        check_trace(run_trace(backend, **fault))
