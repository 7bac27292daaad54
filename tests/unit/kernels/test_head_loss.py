"""The loss of a frozen head by blocks of rows against its definition in float64, in both backends."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from telechat_twins.core.model.batch import IGNORE, head_blocks
from tests.support.frameworks import BACKENDS

N, E, V, MULTIPLIER, FACTOR = 300, 16, 48, 0.5, 0.25
RNG = np.random.default_rng(0)
X, WEIGHT = (RNG.standard_normal(shape).astype(np.float32) for shape in ((N, E), (V, E)))
PADDING = np.where(np.arange(V) < V - 3, 0.0, -1e30).astype(np.float32)
TARGETS = np.where(RNG.random(N) < 0.2, IGNORE, RNG.integers(0, V - 3, N)).astype(np.int32)


def definition() -> tuple[float, np.ndarray]:
    """The loss, and the gradient [N, E] of FACTOR times it."""
    x, weight, rows = X.astype(np.float64), WEIGHT.astype(np.float64), np.arange(N)
    logits = MULTIPLIER * x @ weight.T + PADDING
    largest = logits.max(1, keepdims=True)
    log_sum_exp = largest[:, 0] + np.log(np.exp(logits - largest).sum(1))
    counted = TARGETS != IGNORE
    picked = np.where(counted, TARGETS, 0)
    d = np.exp(logits - log_sum_exp[:, None])
    d[rows, picked] -= 1.0
    d[~counted] = 0.0
    return float((log_sum_exp - logits[rows, picked])[counted].sum()), FACTOR * MULTIPLIER * d @ weight


def of_pt() -> tuple[float, np.ndarray]:
    torch = pytest.importorskip("torch")
    module = importlib.import_module("telechat_twins.kernels.pytorch.head_loss")
    head = module.FrozenHead(torch.from_numpy(WEIGHT), MULTIPLIER, torch.from_numpy(PADDING), 8)
    assert module.serves(head)
    x = torch.from_numpy(X).clone().requires_grad_()
    loss = module.frozen_head_loss(x[None], head, torch.from_numpy(TARGETS)[None])
    (loss * FACTOR).backward()
    return loss.item(), x.grad.numpy()


def of_ms() -> tuple[float, np.ndarray]:
    ms = pytest.importorskip("mindspore")
    module = importlib.import_module("telechat_twins.kernels.mindspore.head_loss")
    weight = ms.Parameter(ms.Tensor(WEIGHT), requires_grad=False)
    head = module.FrozenHead(weight, MULTIPLIER, ms.Tensor(PADDING), 8)
    assert module.serves(head)
    record = importlib.import_module("telechat_twins.telechat_ms.autograd").record
    targets = ms.Tensor(TARGETS)[None]
    recorded = record(lambda x: module.frozen_head_loss(x[None], head, targets), ms.Tensor(X), [])
    gradient, _ = recorded.backward(ms.Tensor(FACTOR, ms.float32))
    return float(recorded.output.asnumpy()), gradient.asnumpy()


def worst(found: tuple[float, np.ndarray], exact: tuple[float, np.ndarray]) -> float:
    loss, gradient = exact
    apart = np.linalg.norm(found[1] - gradient) / np.linalg.norm(gradient)
    return max(abs(found[0] - loss) / loss, float(apart))


def uneven(rows: int, *_: int) -> list[slice]:
    return [slice(first, min(first + 128, rows)) for first in range(0, rows, 128)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradient_are_the_definition_s(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, exact = {"pt": of_pt, "ms": of_ms}[backend], definition()
    assert worst(run(), exact) < 2e-6
    package = {"pt": "pytorch", "ms": "mindspore"}[backend]
    module = importlib.import_module(f"telechat_twins.kernels.{package}.head_loss")
    monkeypatch.setattr(module, "head_blocks", uneven)
    assert worst(run(), exact) < 2e-6
    monkeypatch.setattr(f"{__name__}.MULTIPLIER", 1.0)  # a fault: the multiplier is missed
    assert worst(run(), exact) > 1e-2


def test_blocks_cover_every_row_once() -> None:
    for rows, vocab_size in ((1, 8), (128, 131072), (129, 131072), (1024, 8192)):
        covered = [row for part in head_blocks(rows, vocab_size, 512) for row in range(rows)[part]]
        assert covered == list(range(rows))
    assert len(head_blocks(1024, 8192, 8192)) == 4
    assert max(one.stop - one.start for one in head_blocks(1024, 8192, 1408)) == 1024 * 1408 // 8192, "as large as it"
