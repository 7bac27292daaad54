"""fp16 gradients of a single batch, whose unscaled values underflow: found at the largest loss scale, given without it.

The head is 1e-4 of its usual size, so that everything below it gets gradients near 1e-7, where fp16 has one or two
digits. Limits are those of docs/parity.md for fp16, against PyTorch in float64.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from telechat_twins.convert.source import weight_reader
from telechat_twins.core.backends import load
from telechat_twins.core.checkpoint.read import whole, write_checkpoint
from telechat_twins.core.commands import forward
from telechat_twins.core.config import OptimConfig
from telechat_twins.core.errors import UserError
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.parallel.layout import Layout
from telechat_twins.core.parity.bounds import compare_tensors, tolerances
from telechat_twins.core.parity.worker import Task, run_alone, write_batch
from telechat_twins.core.train import loss_scale
from tests.support.frameworks import BACKENDS

CONFIG = replace(load_model_config("telechat2-tiny"), num_layers=2, vocab_size=64)
LIMIT = tolerances("fp16", CONFIG.num_layers)["gradient"].ceiling
IDS = np.random.default_rng(5).integers(0, 64, (2, 40)).astype(np.int32)
BATCH = Batch(IDS, shift_labels(IDS), np.broadcast_to(np.arange(40, dtype=np.int32), IDS.shape).copy())


@cache
def weights() -> dict[str, np.ndarray]:
    held = init_weights(CONFIG, 3, "strong")
    return held | {"head.weight": held["head.weight"] * np.float32(1e-4)}


def run(backend: str, precision: str) -> dict[str, Any]:
    return load(backend, "forward").run(CONFIG, weights().__getitem__, BATCH, precision, True)


@cache
def exact() -> dict[str, np.ndarray]:
    return run("pt", "fp64")["grads"]


@pytest.fixture
def model(tmp_path):
    """(folder of the checkpoint, inputs file)."""
    written = [whole(name, array) for name, array in weights().items()]
    write_checkpoint(tmp_path / "model", 0, model={"config": CONFIG.to_dict()}, weights=written)
    save_file({"input_ids": IDS, "labels": IDS}, tmp_path / "f.safetensors")
    return tmp_path / "model", tmp_path / "f.safetensors"


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_underflow_are_found_with_a_scale(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(backend, "fp16")
    assert compare_tensors(result["grads"], exact()).worst() < LIMIT
    assert result["loss_scale"] > 2**10 and float(result["loss_scale"]).hex().startswith("0x1.0000000000000p")
    largest = max(np.abs(gradient).max() for gradient in result["grads"].values()) * result["loss_scale"]
    assert 65504 / 4 < largest <= 65504  # twice the scale would overflow (or do so before the last digit is rounded)
    # What the test is about: without the scale the same model is far off.
    monkeypatch.setattr(loss_scale, "largest_scale", lambda attempt: attempt(1.0) and 1.0)
    assert compare_tensors(run(backend, "fp16")["grads"], exact()).worst() > 5 * LIMIT


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layout_scales_likewise(backend: str, tmp_path) -> None:
    """Two micro-batches of one rank; the update that follows is one of the gradients without the scale."""
    task = Task(
        name="one rank",
        model=CONFIG,
        layout=Layout(),
        batch=write_batch(tmp_path / "batch.safetensors", BATCH),
        precision="fp16",
        steps=1,
        optim=OptimConfig(lr=1.0, eps=1.0, clip_grad=0.0, weight_decay=0.0),
    )
    written = [whole(name, array) for name, array in weights().items()]
    write_checkpoint(tmp_path / "model", 0, model={"config": CONFIG.to_dict()}, weights=written)
    outcome = run_alone(backend, replace(task, weights=str(tmp_path / "model")), tmp_path / "task", weight_reader)
    assert compare_tensors(outcome.gradients, exact()).worst() < LIMIT and not outcome.problems
    assert outcome.loss_scale > 2**10
    assert outcome.norms[0] == pytest.approx(np.sqrt(sum(np.sum(g**2) for g in exact().values())), rel=LIMIT)
    # AdamW's first update is g / (|g| + eps), here nearly g itself: a scale left in would be seen as such.
    name = "layers.0.ffn_norm.weight"
    change = weights()[name].astype(np.float64) - outcome.weights[name]
    assert np.linalg.norm(change) < 2 * np.linalg.norm(exact()[name]) + 1e-6


def test_a_loss_that_overflows_is_stated(model, tmp_path, capsys) -> None:
    """Without gradients the result is written all the same; with them there is none."""
    far = {name: array * np.float32(1e4 if "ffn" in name else 1) for name, array in weights().items()}
    written = [whole(name, array) for name, array in far.items()]
    write_checkpoint(tmp_path / "far", 0, model={"config": CONFIG.to_dict()}, weights=written)
    parser = argparse.ArgumentParser()
    forward.add_arguments(parser)
    words = ["--backend", "pt", "--checkpoint", tmp_path / "far", "--inputs", model[1], "--out", tmp_path / "g"]
    words = [*map(str, words), "--precision", "fp16"]
    assert forward.run(parser.parse_args(words)) == 0
    assert "warning: the loss is nan; --precision fp16 may overflow" in capsys.readouterr().err
    with pytest.raises(UserError, match="precision fp16: the loss or its gradients are not finite at any loss scale"):
        forward.run(parser.parse_args([*words, "--grads"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_command_states_the_scale(backend: str, model, tmp_path, capsys) -> None:
    parser = argparse.ArgumentParser()
    forward.add_arguments(parser)
    words = ["--backend", backend, "--checkpoint", model[0], "--inputs", model[1], "--out", tmp_path / "g"]
    args = parser.parse_args([*map(str, words), "--grads", "--precision", "fp16"])
    assert forward.run(args) == 0
    assert "gradients computed with loss scale 2^" in capsys.readouterr().err
    found = {name[5:]: value for name, value in load_file(tmp_path / "g").items() if name.startswith("grad.")}
    assert compare_tensors(found, exact()).worst() < LIMIT
