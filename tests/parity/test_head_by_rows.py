"""A training pass whose loss is computed by blocks of rows of a trained head: gradients by name, in both twins."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

from telechat_twins.core import backends
from telechat_twins.core.config import RunConfig, run_config_from_dict
from telechat_twins.core.model.batch import IGNORE, Batch, shift_labels
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.parity.bounds import relative_frobenius
from tests.support.frameworks import BACKENDS

PACKAGE = {"ms": ("telechat_ms", "mindspore"), "pt": ("pt_reference", "pytorch")}
# Untied; tied, with a multiplier of the logits; a vocabulary with rows of padding.
MODELS: dict[str, dict[str, Any]] = {
    "telechat2": {"preset": "telechat2-tiny"},
    "teleflm": {"preset": "teleflm-tiny", "tied_embeddings": True},
    "padded": {"preset": "telechat2-tiny", "vocab_tokens": 500},
}
SEED, SEQ_LEN = 5, 20
Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def trainers() -> dict[str, type]:
    pytest.importorskip("mindspore")
    pytest.importorskip("torch")
    return {name: backends.load(name, "train").Trainer for name in BACKENDS}


def run_config(model: str, precision: str) -> RunConfig:
    return run_config_from_dict(
        {
            "model": MODELS[model],
            "data": {"sources": [], "seq_len": SEQ_LEN},
            "train": {"steps": 9, "global_batch": 2, "micro_batch": 1, "seed": SEED, "precision": precision},
            "optim": {"lr": 1e-3},
        }
    )


def some_batch(weights: np.ndarray | None = None) -> Batch:
    """Rows of 20 targets, of which the second block of 7 has none that counts."""
    ids = np.random.default_rng(1).integers(0, 400, (2, SEQ_LEN)).astype(np.int32)
    targets = shift_labels(ids)
    targets[:, 7:14] = IGNORE
    return Batch(ids, targets, np.tile(np.arange(SEQ_LEN, dtype=np.int32), (2, 1)), weights=weights)


def computed(trainer: Any, model: str, batch: Batch) -> Weights:
    config = load_model_config(MODELS[model])
    held = {name: array.astype(np.float64) for name, array in init_weights(config, SEED, "strong").items()}
    trainer.load_weights(lambda name, box: held[name][box])
    trainer.optimizer.load_masters(lambda name, box: held[name][box])
    trainer.gradients(batch, batch.num_targets, 1.0)
    return {piece.name: np.array(piece.array) for piece in trainer.optimizer.export_gradients()}


def by_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks of 7 rows for every trained head; the rows of each loss that is computed so."""
    twin, kernels = PACKAGE[backend]
    module = importlib.import_module(f"telechat_twins.kernels.{kernels}.head_loss")
    ops = importlib.import_module(f"telechat_twins.{twin}.ops")
    monkeypatch.setattr(module, "trained_by_rows", lambda *_: True)
    monkeypatch.setattr(module, "head_blocks", lambda n, *_: [slice(i, min(i + 7, n)) for i in range(0, n, 7)])
    whole, rows = module.head_loss, []

    def counted(x: Any, head: Any, targets: Any) -> Any:
        rows.append(int(np.prod(targets.shape)))
        return whole(x, head, targets)

    monkeypatch.setattr(ops, "head_loss", counted)
    return rows


def apart(found: Weights, exact: Weights) -> dict[str, float]:
    assert sorted(found) == sorted(exact)
    return {name: relative_frobenius(found[name], exact[name]) for name in exact}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_gradient_is_that_of_whole_logits(
    trainers: dict[str, type], backend: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against a float64 pass, as near as float32 with whole logits."""
    batch = some_batch()
    exact = computed(trainers["pt"](run_config(model, "fp64")), model, batch)
    whole = apart(computed(trainers[backend](run_config(model, "fp32")), model, batch), exact)
    rows = by_rows(backend, monkeypatch)
    blocks = apart(computed(trainers[backend](run_config(model, "fp32")), model, batch), exact)
    assert rows == [SEQ_LEN] * 2
    for name, distance in blocks.items():
        assert distance <= max(2.0 * whole[name], 1e-6), name


@pytest.mark.parametrize("precision", ["bf16", "amp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_is_as_near_as_with_whole_logits(
    trainers: dict[str, type], backend: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = some_batch()
    exact = computed(trainers["pt"](run_config("telechat2", "fp64")), "telechat2", batch)
    whole = apart(computed(trainers[backend](run_config("telechat2", precision)), "telechat2", batch), exact)
    rows = by_rows(backend, monkeypatch)
    blocks = apart(computed(trainers[backend](run_config("telechat2", precision)), "telechat2", batch), exact)
    assert rows == [SEQ_LEN] * 2
    for name, distance in blocks.items():
        assert distance <= 1.5 * whole[name], name


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_wanted_exist(trainers: dict[str, type], backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighted losses, and logits that are observed, are not computed by blocks; neither is fp16."""
    rows = by_rows(backend, monkeypatch)
    trainer = trainers[backend](run_config("telechat2", "fp32"))
    computed(trainer, "telechat2", some_batch(np.ones((2, SEQ_LEN), np.float32)))
    trainer.observe = lambda pieces, loss_scale: nullcontext()
    computed(trainer, "telechat2", some_batch())
    computed(trainers[backend](run_config("telechat2", "fp16")), "telechat2", some_batch())
    assert rows == []
    trainer.observe = None
    computed(trainer, "telechat2", some_batch())
    assert rows == [SEQ_LEN] * 2
