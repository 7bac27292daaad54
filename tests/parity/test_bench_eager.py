"""The released code's composition computes what the twin computes: same weights, same loss, same gradients.

Limits: float32 with another order of sums through two layers; 2e-6 of the loss and 2e-5 of a gradient are ten times
what was measured.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from telechat_twins.core.bench.worker import bench_config, random_batch
from telechat_twins.core.model.batch import Batch, shift_labels
from telechat_twins.core.model.config import load_model_config
from telechat_twins.core.model.init import init_weights
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels.bench.eager import EagerModel, EagerTrainer, released_tensor
from telechat_twins.pt_reference import forward

CONFIG = dataclasses.replace(load_model_config("telechat2-tiny"), num_layers=2, vocab_size=512)


def test_loss_and_gradients_are_the_twins() -> None:
    weights = init_weights(CONFIG, 3, "strong")
    ids = np.random.default_rng(4).integers(0, CONFIG.vocab_size, (2, 48)).astype(np.int32)
    positions = np.broadcast_to(np.arange(48, dtype=np.int32), ids.shape)
    twin = forward.run(CONFIG, weights.__getitem__, Batch(ids, shift_labels(ids, None), positions), grads=True)
    model = EagerModel(CONFIG)
    model.load(weights.__getitem__)
    assert sum(p.numel() for p in model.parameters()) == sum(w.size for w in weights.values())
    rows = torch.from_numpy(ids).long()
    loss = model.loss(rows, rows)
    loss.backward()
    assert abs(loss.item() / twin["loss"] - 1) < 2e-6
    for name, parameter in model.named_parameters():
        expected = released_tensor(name, CONFIG, twin["grads"].__getitem__)
        assert relative_frobenius(parameter.grad.numpy(), expected) < 2e-5, name
    with torch.no_grad():  # a swapped order of keys and values is seen
        weight = model.h[0].self_attention.key_value.weight
        weight.copy_(torch.roll(weight, CONFIG.head_dim, 0))
        assert abs(model.loss(rows, rows).item() / twin["loss"] - 1) > 1e-4


def test_a_step_trains() -> None:
    options = {"model": "telechat2-tiny", "seq_len": 16, "micro_batch": 1, "micro_batches": 2, "precision": "fp32"}
    config = bench_config(options)
    trainer, batch = EagerTrainer(config), random_batch(config, 0)
    losses = []
    for _ in range(3):
        losses.append(trainer.gradients(batch, batch.num_targets, 1.0))
        trainer.update(1e-2, min(1.0, 1.0 / trainer.grad_norm(1.0)))
    assert losses[2] < losses[1] < losses[0] and losses[0] == pytest.approx(np.log(config.model.vocab_size), rel=0.05)
