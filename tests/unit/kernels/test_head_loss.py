"""The loss of the head by blocks of rows, frozen and trained, against its definition in float64, in both backends."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import numpy as np
import pytest

from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.head_rows import head_blocks, trained_by_rows
from tests.support.frameworks import BACKENDS

N, E, V, MULTIPLIER, FACTOR = 300, 16, 48, 0.5, 0.25
RNG = np.random.default_rng(0)
X, WEIGHT = (RNG.standard_normal(shape).astype(np.float32) for shape in ((N, E), (V, E)))
PADDING = np.where(np.arange(V) < V - 3, 0.0, -1e30).astype(np.float32)
TARGETS = np.where(RNG.random(N) < 0.2, IGNORE, RNG.integers(0, V - 3, N)).astype(np.int32)
TARGETS[0], TARGETS[128:256] = 5, IGNORE  # the second of the ``uneven`` blocks has none that counts
TOLERANCE = {"float32": 2e-6, "bfloat16": 1e-2}  # of bfloat16: logits and their gradients are rounded to 8 bits


class Case(NamedTuple):
    rows: int = N
    trained: bool = True
    dtype: str = "float32"
    padded: bool = True
    multiplier: float = MULTIPLIER


class Found(NamedTuple):
    loss: float
    dx: np.ndarray
    dweight: np.ndarray | None


def rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    import ml_dtypes

    return x.astype(np.float64) if dtype == "float32" else x.astype(ml_dtypes.bfloat16).astype(np.float64)


def definition(case: Case) -> Found:
    """The loss, and the gradients of FACTOR times it."""
    x, weight, targets = rounded(X[: case.rows], case.dtype), rounded(WEIGHT, case.dtype), TARGETS[: case.rows]
    rows = np.arange(case.rows)
    logits = MULTIPLIER * x @ weight.T + PADDING * case.padded
    largest = logits.max(1, keepdims=True)
    log_sum_exp = largest[:, 0] + np.log(np.exp(logits - largest).sum(1))
    counted = targets != IGNORE
    picked = np.where(counted, targets, 0)
    d = np.exp(logits - log_sum_exp[:, None])
    d[rows, picked] -= 1.0
    d[~counted] = 0.0
    scale = FACTOR * MULTIPLIER
    loss = float((log_sum_exp - logits[rows, picked])[counted].sum())
    return Found(loss, scale * d @ weight, scale * d.T @ x if case.trained else None)


def of_pt(case: Case) -> Found:
    torch = pytest.importorskip("torch")
    module = importlib.import_module("telechat_twins.kernels.pytorch.head_loss")
    dtype = getattr(torch, case.dtype)
    weight = torch.from_numpy(WEIGHT).to(dtype, copy=True).requires_grad_(case.trained)
    head = module.Head(weight, case.multiplier, torch.from_numpy(PADDING) if case.padded else None, 8)
    x = torch.from_numpy(X[: case.rows]).to(dtype, copy=True).requires_grad_()
    loss = module.head_loss(x[None], head, torch.from_numpy(TARGETS[: case.rows])[None])
    (loss * FACTOR).backward()
    assert x.grad.dtype == dtype and (weight.grad is None or weight.grad.dtype == dtype)
    return Found(loss.item(), x.grad.float().numpy(), weight.grad.float().numpy() if case.trained else None)


def of_ms(case: Case) -> Found:
    ms = pytest.importorskip("mindspore")
    module = importlib.import_module("telechat_twins.kernels.mindspore.head_loss")
    dtype = getattr(ms, case.dtype)
    weight = ms.Parameter(ms.Tensor(WEIGHT).astype(dtype), requires_grad=case.trained)
    head = module.Head(weight, case.multiplier, ms.Tensor(PADDING) if case.padded else None, 8)
    record = importlib.import_module("telechat_twins.telechat_ms.autograd").record
    targets, x = ms.Tensor(TARGETS[: case.rows])[None], ms.Tensor(X[: case.rows]).astype(dtype)
    recorded = record(lambda x: module.head_loss(x[None], head, targets), x, [weight] if case.trained else [])
    dx, (*dweights,) = recorded.backward(ms.Tensor(FACTOR, ms.float32))
    assert {one.dtype for one in (dx, *dweights)} == {dtype}
    dx, *dweights = (one.astype(ms.float32).asnumpy() for one in (dx, *dweights))
    return Found(float(recorded.output.asnumpy()), dx, dweights[0] if dweights else None)


RUN = {"pt": of_pt, "ms": of_ms}


def worst(found: Found, exact: Found) -> float:
    """The largest relative distance of the loss and of each gradient."""
    apart = [abs(found.loss - exact.loss) / exact.loss]
    for one, other in zip(found[1:], exact[1:], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            apart.append(float(np.linalg.norm(one - other) / np.linalg.norm(other)))
    return max(apart)


def uneven(rows: int, *_: object) -> list[slice]:
    return [slice(first, min(first + 128, rows)) for first in range(0, rows, 128)]


def module_of(backend: str) -> Any:
    package = {"pt": "pytorch", "ms": "mindspore"}[backend]
    return importlib.import_module(f"telechat_twins.kernels.{package}.head_loss")


CASES = {
    "frozen": Case(trained=False),
    "trained": Case(),
    "one row": Case(rows=1),
    "one block": Case(rows=128),
    "bfloat16": Case(dtype="bfloat16", padded=False),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradients_are_the_definition_s(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    exact, limit = definition(case), TOLERANCE[case.dtype]
    assert worst(RUN[backend](case), exact) < limit
    monkeypatch.setattr(module_of(backend), "head_blocks", uneven)
    assert worst(RUN[backend](case), exact) < limit
    assert worst(RUN[backend](case._replace(multiplier=1.0)), exact) > 10 * limit, "a fault: the multiplier is missed"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_that_is_left_out_of_the_weight_s_gradient_is_seen(
    backend: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, module = Case(dtype=dtype, padded=False), module_of(backend)
    monkeypatch.setattr(module, "head_blocks", uneven)
    where, name = (module, "_weight_gradient") if backend == "pt" else (_cpp(), "head_gradient")
    compute, calls = getattr(where, name), []

    def without_last(*args: Any) -> Any:
        calls.append(args)
        return args[-1] if len(calls) == len(uneven(N)) else compute(*args)

    monkeypatch.setattr(where, name, without_last)
    found, exact = RUN[backend](case), definition(case)
    assert worst(found._replace(dweight=exact.dweight), exact) < TOLERANCE[dtype]
    assert worst(found, exact) > 10 * TOLERANCE[dtype]


def _cpp() -> Any:
    return importlib.import_module("telechat_twins.kernels.cpu.ops")


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_served(backend: str) -> None:
    """A frozen head in float32 always; a trained one where blocks spare memory, in the dtypes that it is tested in."""
    framework, module = pytest.importorskip({"pt": "torch", "ms": "mindspore"}[backend]), module_of(backend)
    long = 1 << 21  # rows whose logits are large

    def serves(rows: int, weight: str, compute: str, trained: bool, padded: bool = False) -> bool:
        if backend == "pt":
            made = framework.zeros((V, E), dtype=getattr(framework, weight)).requires_grad_(trained)
        else:
            values = framework.Tensor(WEIGHT).astype(getattr(framework, weight))
            made = framework.Parameter(values, requires_grad=trained)
        padding = made[0] if padded else None
        return bool(module.serves(module.Head(made, 1.0, padding, 8), rows, getattr(framework, compute)))

    assert serves(1, "float32", "float32", trained=False)
    assert not serves(long, "bfloat16", "bfloat16", trained=False)
    assert serves(long, "float32", "float32", trained=True, padded=True)
    assert serves(long, "float32", "bfloat16", trained=True) and serves(long, "bfloat16", "bfloat16", trained=True)
    assert not serves(long, "bfloat16", "bfloat16", trained=True, padded=True)
    assert not serves(long, "float16", "float16", trained=True), "unscaled gradients leave its range"
    assert not serves(long, "float64", "float64", trained=True), "the judge of the others"
    assert not serves(1024, "float32", "float32", trained=True), "small logits"


def test_blocks_cover_every_row_once() -> None:
    for rows, vocab_size in ((1, 8), (128, 131072), (129, 131072), (1024, 8192)):
        for trained in (False, True):
            covered = [row for part in head_blocks(rows, vocab_size, 512, trained) for row in range(rows)[part]]
            assert covered == list(range(rows))
    assert len(head_blocks(1024, 8192, 8192)) == 4
    assert max(one.stop - one.start for one in head_blocks(1024, 8192, 1408)) == 1024 * 1408 // 8192, "as large as it"


def test_a_trained_head_has_blocks_where_they_spare_memory() -> None:
    assert trained_by_rows(8192, 8192, 512, 4)
    assert not trained_by_rows(1024, 8192, 512, 4), "32 MiB"
    assert not trained_by_rows(1024, 131072, 8192, 4), "the head's gradient is 8 times as large"
