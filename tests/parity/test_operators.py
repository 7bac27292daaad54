"""Each operator of each backend against its numpy definition: output and every input gradient, over awkward shapes.

The limit is not a chosen number: it is what float32 rounding costs the definition itself on the same inputs
(float32 against float64), times a factor for another order of summation, and never below a few units in the last place.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.config import KERNEL_OPERATORS
from telechat_twins.core.model.batch import IGNORE
from telechat_twins.core.model.visibility import causal_blocks
from telechat_twins.core.parity.bounds import relative_frobenius
from telechat_twins.kernels import reference
from tests.support.frameworks import BACKENDS, differentiate

FACTOR = 6.0
FLOOR = 6 * 2.0**-24  # units in the last place of float32
# The exponential of MindSpore's own CPU kernels is a polynomial: measured 5e-6 relative at worst and 7e-7 in the norm
# over softmax and silu inputs of this size. Composite operators have it, the C++ ones their own.
COMPOSITE_FLOOR = {"pt": FLOOR, "ms": 20 * 2.0**-24}
MADE = ("fused", "composite")


@dataclass
class Case:
    """``arrays`` are differentiated; ``call`` runs a backend's operator, ``define`` definition and backward."""

    arrays: list[np.ndarray]
    out_shape: tuple[int, ...]
    call: Callable[..., Any]
    define: Callable[..., tuple[np.ndarray, list[np.ndarray]]]


def rms_norm_case(rng: np.random.Generator, shape: tuple[int, ...]) -> Case:
    arrays = [rng.normal(size=shape), rng.uniform(0.6, 1.4, shape[-1])]

    def define(grad: np.ndarray, x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        eps = x.dtype.type(1e-5)
        return reference.rms_norm(x, w, eps), list(reference.rms_norm_backward(grad, x, w, eps))

    return Case(arrays, shape, lambda ops, t, x, w: ops.rms_norm(x, w, 1e-5, t, t), define)


def swiglu_case(rng: np.random.Generator, shape: tuple[int, ...]) -> Case:
    def define(grad: np.ndarray, g: np.ndarray, u: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        return reference.swiglu(g, u), list(reference.swiglu_backward(grad, g, u))

    arrays = [4 * rng.normal(size=shape), rng.normal(size=shape)]
    return Case(arrays, shape, lambda ops, t, g, u: ops.swiglu(g, u, t), define)


def rope_case(rng: np.random.Generator, shape: tuple[int, ...], as_k: bool = False) -> Case:
    B, S, H, D = shape
    angle = rng.uniform(0, 6, (1, S, 1, D // 2))

    def tables(dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        return (1.07 * np.cos(angle)).astype(dtype), (1.07 * np.sin(angle)).astype(dtype)

    def define(grad: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        cos, sin = tables(x.dtype)
        return reference.rope(x, cos, sin), [reference.rope_backward(grad, cos, sin)]

    def call(ops: Any, t: Any, x: Any) -> Any:
        """As q beside one constant key head, or as k beside a constant query."""
        tables32 = [_like(ops, a) for a in tables(np.float32)]
        other = _like(ops, np.ones((B, S, 1, D), np.float32))
        return ops.rope_qk(other, x, *tables32)[1] if as_k else ops.rope_qk(x, other, *tables32)[0]

    return Case([rng.normal(size=shape)], shape, call, define)


def attention_case(
    rng: np.random.Generator, B: int, S: int, T: int, H: int, K: int, D: int, documents: bool = False
) -> Case:
    arrays = [rng.normal(size=(B, S, H, D)), rng.normal(size=(B, T, K, D)), rng.normal(size=(B, T, K, D))]
    doc_ids = np.sort(rng.integers(0, 4, (B, T)), 1) if documents else None
    visible = np.concatenate(
        [np.broadcast_to(_padded(b, T), (B, b.last - b.first, T)) for b in causal_blocks(S, T, doc_ids)], 1
    )

    def define(grad: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        out, log_sum_exp = reference.attention(q, k, v, visible)
        return out, list(reference.attention_backward(grad, q, k, v, visible, out, log_sum_exp))

    def call(ops: Any, t: Any, q: Any, k: Any, v: Any) -> Any:
        return ops.attention(q, k, v, ops.attention_blocks(S, T, doc_ids))

    return Case(arrays, (B, S, H, D), call, define)


def cross_entropy_case(rng: np.random.Generator, B: int, S: int, V: int, spread: float = 3.0) -> Case:
    targets = rng.integers(0, V, (B, S)).astype(np.int32)
    targets.reshape(-1)[:: max(B * S // 3, 2)] = IGNORE

    def define(grad: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        flat, wanted = logits.reshape(-1, V), targets.reshape(-1)
        gradient = grad * reference.cross_entropy_backward(flat, wanted)
        return np.asarray(reference.cross_entropy(flat, wanted)), [gradient.reshape(logits.shape)]

    return Case(
        [spread * rng.normal(size=(B, S, V))], (), lambda ops, t, x: ops.cross_entropy(x, _like(ops, targets)), define
    )


def linear_case(rng: np.random.Generator, shape: tuple[int, ...], num_out: int) -> Case:
    arrays = [rng.normal(size=shape), rng.normal(size=(num_out, shape[-1])), rng.normal(size=num_out)]

    def define(grad: np.ndarray, x: np.ndarray, w: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        flat = grad.reshape(-1, num_out)
        return x @ w.T + b, [grad @ w, flat.T @ x.reshape(-1, x.shape[-1]), flat.sum(0)]

    return Case(arrays, (*shape[:-1], num_out), lambda ops, t, x, w, b: ops.linear(x, w, b, t), define)


CASES: dict[str, Callable[[np.random.Generator], Case]] = {
    "rms_norm/row": lambda r: rms_norm_case(r, (1, 1, 7)),
    "rms_norm/prime": lambda r: rms_norm_case(r, (2, 13, 131)),
    "swiglu/one": lambda r: swiglu_case(r, (1, 1, 1)),
    "swiglu/prime": lambda r: swiglu_case(r, (2, 13, 37)),
    "rope/one": lambda r: rope_case(r, (1, 1, 1, 2)),
    "rope/odd half": lambda r: rope_case(r, (2, 11, 3, 6)),
    "rope/keys": lambda r: rope_case(r, (2, 11, 3, 6), as_k=True),
    "linear/prime": lambda r: linear_case(r, (2, 13, 37), 29),
    "attention/one": lambda r: attention_case(r, 1, 1, 1, 1, 1, 2),
    "attention/gqa": lambda r: attention_case(r, 2, 37, 37, 8, 4, 6),
    "attention/mqa": lambda r: attention_case(r, 1, 19, 19, 6, 1, 10),
    "attention/cached chunk": lambda r: attention_case(r, 1, 5, 23, 4, 2, 8),
    "attention/cached step": lambda r: attention_case(r, 2, 1, 23, 4, 2, 8),
    "attention/documents": lambda r: attention_case(r, 3, 29, 29, 4, 2, 8, documents=True),
    "attention/several blocks": lambda r: attention_case(r, 1, 1030, 1030, 2, 1, 4),
    "cross_entropy/prime": lambda r: cross_entropy_case(r, 2, 13, 151),
    "cross_entropy/extreme": lambda r: cross_entropy_case(r, 1, 7, 31, spread=1e4),
}


def judge(backend: str, case: Case, seed: int = 0, floor: float = FLOOR) -> list[tuple[str, float, float]]:
    """(what, error, limit) of the output and of every gradient; the error of the backend's float32 run.

    A gradient that is exactly zero by definition (attention over one key) is a difference of equal numbers in float32:
    what is left of it is held against the gradient that came in.
    """
    rng = np.random.default_rng(seed)
    narrow = [a.astype(np.float32) for a in case.arrays]
    wide = [a.astype(np.float64) for a in narrow]
    grad = rng.normal(size=case.out_shape).astype(np.float32)
    truth_out, truth_grads = case.define(grad.astype(np.float64), *wide)
    plain_out, plain_grads = case.define(grad, *narrow)
    out, grads = differentiate(backend, case.call, narrow, grad)
    rows = []
    names = ["output", *(f"gradient {i}" for i in range(len(grads)))]
    for name, got, plain, truth in zip(
        names, [out, *grads], [plain_out, *plain_grads], [truth_out, *truth_grads], strict=True
    ):
        if truth.any():
            limit = max(FACTOR * relative_frobenius(plain, truth), floor)
            rows.append((name, relative_frobenius(got, truth), limit))
        else:
            rows.append((name, float(np.linalg.norm(got) / np.linalg.norm(grad)), floor))
    return rows


@pytest.fixture(params=MADE)
def made(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every operator by the best implementation of this machine, and by the frameworks' plain operators."""
    tables = [importlib.import_module(f"telechat_twins.kernels.{name}.ops") for name in ("mindspore", "pytorch")]
    if request.param == "composite":
        for table in tables:
            table.select({name: "composite" for name in KERNEL_OPERATORS})
    yield request.param
    for table in tables:
        table.select()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_operator_equals_its_definition(made: str, name: str, backend: str) -> None:
    case = CASES[name](np.random.default_rng(7))
    floor = FLOOR if made == "fused" else COMPOSITE_FLOOR[backend]
    broken = [row for row in judge(backend, case, floor=floor) if not row[1] <= row[2]]
    assert not broken, f"{name} on {backend}, {made}: {broken}"


def test_length_one_attention_spoils_no_later_gradient(made: str) -> None:
    """MindSpore 2.9.0: one softmax gradient over an axis of length 1 spoils all later ones; ours never asks for it."""
    for name in ("attention/one", "attention/gqa"):
        rows = judge("ms", CASES[name](np.random.default_rng(7)), floor=COMPOSITE_FLOOR["ms"])
        assert all(error <= limit for _, error, limit in rows), (name, rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_swapped_half_is_caught(backend: str) -> None:
    case = rope_case(np.random.default_rng(7), (2, 11, 3, 6))
    right = case.call

    def wrong(ops: Any, t: Any, x: Any) -> Any:
        return right(ops, t, -x)

    case.call = wrong
    assert any(error > limit for _, error, limit in judge(backend, case))


def _padded(block: Any, num_keys: int) -> np.ndarray:
    """A block's visibility over all keys: those past the block's last row are hidden."""
    rows = block.last - block.first
    out = np.zeros((1 if block.visible is None else len(block.visible), rows, num_keys), bool)
    out[:, :, : block.keys] = True if block.visible is None else block.visible
    return out


def _like(ops: Any, array: np.ndarray) -> Any:
    """A constant on the backend that ``ops`` belongs to."""
    if "pt_reference" in ops.__name__:
        import torch

        return torch.from_numpy(array)
    import mindspore as ms

    return ms.Tensor(array)
