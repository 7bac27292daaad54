"""The two decoders as twins: names, precisions, recomputation, isolated documents, on large random weights.

Half precisions are judged by the ratio of the two backends' errors against a float64 run: both round the same operands,
so neither may be much worse than the other.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.backends import load
from telechat_twins.core.config import run_config_from_dict
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.model.params import parameter_table
from telechat_twins.core.parity.bounds import compare_tensors, relative_frobenius
from tests.support.frameworks import BACKENDS

CONFIG = replace(load_model_config("telechat2-tiny"), num_layers=2, vocab_size=307)
B, S = 2, 61


@cache
def weights() -> dict[str, np.ndarray]:
    return init_weights(CONFIG, 3, "strong")


def batch(isolated: bool = False) -> Batch:
    """With ``isolated``, three documents a row that start at different places in each row."""
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (B, S)).astype(np.int32)
    positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
    if not isolated:
        return Batch(ids, shift_labels(ids), positions)
    starts = np.array([[0, 17, 40], [0, 1, 30]])
    doc_ids = (np.arange(S)[None, :, None] >= starts[:, None, :]).sum(-1).astype(np.int32)
    restarted = positions - np.take_along_axis(starts, doc_ids - 1, 1)
    return Batch(ids, shift_labels(ids), restarted.astype(np.int32), doc_ids)


@cache
def run(backend: str, precision: str, isolated: bool = False) -> dict[str, Any]:
    return load(backend, "forward").run(CONFIG, weights().__getitem__, batch(isolated), precision, grads=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameter_names_and_shapes(backend: str) -> None:
    model = load(backend, "model")
    held = {name: tuple(p.shape) for name, p in model.named_weights(model.Decoder(CONFIG)).items()}
    assert held == {name: spec.shape for name, spec in parameter_table(CONFIG).items()}


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_is_close_to_float64(backend: str, isolated: bool) -> None:
    got, truth = run(backend, "fp32", isolated), run("pt", "fp64", isolated)
    assert relative_frobenius(got["logits"], truth["logits"]) <= 2e-6
    assert compare_tensors(got["grads"], truth["grads"]).worst() <= 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_isolated_documents_equal_separate_ones(backend: str) -> None:
    """A document inside a pack has the logits it has alone."""
    packed = batch(isolated=True)
    logits = run(backend, "fp32", True)["logits"]
    for row, first, last in ((0, 17, 40), (1, 30, S)):
        ids = packed.input_ids[row : row + 1, first:last]
        alone = Batch(ids, shift_labels(ids), np.arange(last - first, dtype=np.int32)[None])
        expected = load(backend, "forward").run(CONFIG, weights().__getitem__, alone)["logits"][0]
        assert relative_frobenius(logits[row, first:last], expected) <= 2e-6


@pytest.mark.parametrize("precision", ["bf16", "amp", "fp16"])
def test_half_precisions_round_alike(precision: str) -> None:
    truth = run("pt", "fp64")
    ms, pt = run("ms", precision), run("pt", precision)
    errors = {b: relative_frobenius(r["logits"], truth["logits"]) for b, r in (("ms", ms), ("pt", pt))}
    assert 0.7 <= errors["ms"] / errors["pt"] <= 1.4, errors
    names = list(truth["grads"])
    ratios = [
        relative_frobenius(ms["grads"][n], truth["grads"][n]) / relative_frobenius(pt["grads"][n], truth["grads"][n])
        for n in names
    ]
    assert 0.8 <= float(np.median(ratios)) <= 1.25, dict(zip(names, ratios, strict=True))
    assert max(ratios) <= 2.0, names[int(np.argmax(ratios))]
    # A float32 run in disguise would be thousands of times better than half precision can be.
    assert min(errors.values()) >= (1e-3 if precision != "fp16" else 2e-4), errors


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_changes_no_gradient(backend: str, mode: str, precision: str) -> None:
    """The same operators run on the same numbers, so the gradients are the same bits."""
    results = [_one_step(backend, precision, recompute) for recompute in ("none", mode)]
    assert results[0][0] == results[1][0]
    for name, weight in results[0][1].items():
        np.testing.assert_array_equal(weight, results[1][1][name], err_msg=name)


@pytest.mark.parametrize(("recompute", "runs"), [("none", 1), ("selective", 2), ("full", 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_recomputation_happens(backend: str, recompute: str, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ops = load(backend, "ops")
    attention = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args: calls.append(1) or attention(*args))
    _one_step(backend, "fp32", recompute)
    assert len(calls) == runs * CONFIG.num_layers


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up(backend: str) -> None:
    """Two micro-batches of one sequence give the step of one micro-batch of two, though their target counts differ."""
    whole = batch()
    whole = replace(whole, targets=np.where(np.arange(S)[None] < [[S], [20]], whole.targets, -100).astype(np.int32))
    losses, norms = [], []
    for size in (B, 1):
        trainer = _trainer(backend, "fp32", "none", size)
        losses.append(trainer.gradients(whole, whole.num_targets, 1.0))
        norms.append(trainer.grad_norm(1.0))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scale_cancels(backend: str) -> None:
    scaled, plain = _trainer(backend, "fp32", "none"), _trainer(backend, "fp32", "none")
    data = batch()
    assert scaled.gradients(data, data.num_targets, 1024.0) == plain.gradients(data, data.num_targets, 1.0)
    assert scaled.grad_norm(1024.0) == pytest.approx(plain.grad_norm(1.0), rel=1e-6)


def _trainer(backend: str, precision: str, recompute: str, micro_batch: int = B) -> Any:
    config = run_config_from_dict(
        {
            "model": CONFIG.to_dict(),
            "data": {"sources": [], "seq_len": S},
            "train": {
                "steps": 4,
                "global_batch": B,
                "micro_batch": micro_batch,
                "precision": precision,
                "recompute": recompute,
            },
            "optim": {"lr": 1e-2},
        }
    )
    trainer = load(backend, "train").Trainer(config)
    trainer.optimizer.load_masters(lambda name, box: weights()[name][box])
    return trainer


def _one_step(backend: str, precision: str, recompute: str) -> tuple[float, dict[str, np.ndarray]]:
    trainer, data = _trainer(backend, precision, recompute), batch()
    loss = trainer.gradients(data, data.num_targets, 1.0)
    trainer.update(1e-2, 1.0)
    return loss, {piece.name: piece.array.copy() for piece in trainer.weights()}
