"""The Triton kernels on a GPU, against the definitions in float64 and PyTorch's own operators. Not timed here:
`python -m telechat_twins.kernels.triton.bench` is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from telechat_twins.core.model.visibility import KeyRanges

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip(
        "no GPU: tests/unit/kernels/test_triton.py runs the kernels under Triton's interpreter", allow_module_level=True
    )
pytest.importorskip("triton", reason="triton is not installed; the CUDA build of PyTorch brings it")

from telechat_twins.kernels.triton import ops  # noqa: E402
from tests.support import triton_cases as cases  # noqa: E402
from tests.support.triton_cases import ATTENTION_LIMITS, LIMITS, Case  # noqa: E402

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The GPU's exponential is good to 2 units of float32, and float32 products go through three tf32 ones.
WIDER = 4.0


def within(found: dict[str, float], limit: float) -> None:
    assert found and all(error <= WIDER * limit for error in found.values()), found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spaced", [False, True])
def test_rows(dtype: Any, spaced: bool) -> None:
    case, limit = Case(dtype, "cuda", spaced=spaced), LIMITS[dtype]
    for shape in ((1, 8), (3, 5, 101), (257, 1024), (300, 3072), (33, 8192), (7, 12288), (5, 20000)):
        for masked in (False, True):
            within(cases.rms_norm(ops, case, shape, masked), limit)
            within(cases.add_rms_norm(ops, case, shape, masked), limit)
            within(cases.layer_norm(ops, case, shape, masked), limit)
        within(cases.swiglu(ops, case, shape), limit)
        within(cases.gelu(ops, case, shape), limit)
    within(cases.swiglu(ops, case, (5, 7), scale=1e4), limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("xpos", [False, True])
def test_rope(dtype: Any, xpos: bool) -> None:
    for sizes in ((1, 1, 1, 1, 2), (2, 37, 7, 1, 80), (2, 129, 32, 8, 128)):
        within(cases.rope(ops, Case(dtype, "cuda"), *sizes, xpos), LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["causal", "full", "documents", "ragged", "empty", "nothing"])
@pytest.mark.parametrize("D", [8, 64, 80, 128, 256])
def test_attention(dtype: Any, kind: str, D: int) -> None:
    for B, S, T, H, K in ((1, 1, 300, 8, 1), (2, 257, 257, 4, 2), (1, 131, 263, 2, 2)):
        if kind == "causal" or S == T or kind in ("full", "ragged", "empty", "nothing"):
            within(cases.attention(ops, Case(dtype, "cuda"), (B, S, T, H, K, D), kind), ATTENTION_LIMITS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_ring(dtype: Any) -> None:
    within(cases.ring(ops, Case(dtype, "cuda"), (2, 301, 4, 2, 64)), ATTENTION_LIMITS[dtype])
    wrong = cases.ring(ops, Case(dtype, "cuda"), (2, 301, 4, 2, 64), own_lse=True)
    assert min(wrong["dq"], wrong["dk"], wrong["dv"]) > 10 * ATTENTION_LIMITS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_embedding_and_optimizer(dtype: Any) -> None:
    case = Case(dtype, "cuda")
    checks: list[Callable[[], dict[str, float]]] = [
        lambda: cases.cross_entropy(ops, case, 1, 1),
        lambda: cases.cross_entropy(ops, case, 257, 50003, z_loss=1e-3),
        lambda: cases.cross_entropy(ops, case, 63, 8192, first=8192, real=8000),
        lambda: cases.cross_entropy(ops, case, 33, 4099, scale=1e4),
    ]
    for check in checks:
        within(check(), 2 * LIMITS[dtype])
    within(cases.embedding(ops, case, 1001, 1000, 300), LIMITS[torch.float32])
    within(cases.embedding(ops, case, 1001, 64, 3, same=True), LIMITS[torch.float32])
    for scale_tensor in (False, True):
        within(cases.adamw(ops, case, 100003, 3, scale_tensor), LIMITS[torch.float32])


def test_gradients_have_the_same_bits_every_time() -> None:
    rng = np.random.default_rng(0)
    case = Case(torch.bfloat16, "cuda")
    q, k = cases.draw(case, rng, 1, 2048, 8, 64), cases.draw(case, rng, 1, 2048, 2, 64)
    seen = cases.on_device(cases.ranges("causal", 1, 2048, 2048), 2048, case)
    x, weight = cases.draw(case, rng, 4096, 2048), cases.draw(case, rng, 2048)
    ids = torch.tensor(rng.integers(0, 50, size=4096), device="cuda")

    def once() -> list[Any]:
        out, lse = ops.attention(q, k, k, seen)
        _, rstd = ops.rms_norm(x, weight, 1e-5)
        return [
            out,
            lse,
            *ops.attention_backward(q, q, k, k, seen, out, lse),
            *ops.rms_norm_backward(x, x, weight, rstd),
            ops.embedding_backward(x, ids, 50),
        ]

    for first, second in zip(once(), once(), strict=True):
        assert torch.equal(first, second)


def test_attention_of_a_long_sequence_agrees_with_pytorch_and_needs_no_more_memory() -> None:
    """16384 positions, 8 heads: beside inputs and outputs only the log-sum-exp and delta, far below 64 MB."""
    S, H, D = 16384, 8, 64
    q, k, v, grad = (torch.randn(1, S, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    ranges = torch.arange(1, S + 1, device="cuda", dtype=torch.int32)
    seen = KeyRanges(torch.stack((torch.zeros_like(ranges), ranges), -1)[None], S, "causal")  # type: ignore[arg-type]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = ops.attention(q, k, v, seen)
    gradients = ops.attention_backward(grad, q, k, v, seen, out, lse)
    torch.cuda.synchronize()
    outputs = sum(x.numel() * x.element_size() for x in (out, *gradients))
    assert torch.cuda.max_memory_allocated() - before - outputs < 64e6
    heads = [x.transpose(1, 2).float().requires_grad_() for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    expected.backward(grad.transpose(1, 2).float())
    for got, true in zip((out, *gradients), (expected, *(x.grad for x in heads)), strict=True):
        apart = (got.float() - true.detach().transpose(1, 2)).norm() / true.norm()
        assert apart < 1e-2, apart
