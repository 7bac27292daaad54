"""The forms of a matrix that generation multiplies with in PyTorch, against float64: all that this machine can make."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from telechat_twins.core.model.quantize import quantize
from telechat_twins.core.parity.bounds import relative_frobenius

torch = pytest.importorskip("torch")

from telechat_twins.kernels.int8 import Int8  # noqa: E402
from telechat_twins.kernels.pytorch import weights as torch_weights  # noqa: E402
from telechat_twins.kernels.reference import quantized_rows  # noqa: E402

# A few units in the last place of the sums' float32, and of the result's own type; twice that where a product in
# bfloat16 is rounded before it meets its factors. Of the product, the factors and the bias as they are before they are
# added: what a bias nearly cancels, no form can give back.
LIMITS = {torch.float32: 8 * 2.0**-24, torch.float16: 2 * 2.0**-11, torch.bfloat16: 3 * 2.0**-8}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def made(dtype: Any, whole: bool, outputs: int, columns: int) -> tuple[Any, np.ndarray]:
    """A matrix of ``dtype`` or in 8 bits, and its float64 values."""
    weight = np.random.default_rng(outputs).normal(size=(outputs, columns)).astype(np.float32)
    if whole:
        held = torch.from_numpy(weight).to(dtype)
        return held, held.double().numpy()
    values, factors = quantize(weight)
    return Int8(torch.from_numpy(values), torch.from_numpy(factors)), values * factors.astype(np.float64)[:, None]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", LIMITS)
def test_every_form_is_a_product(monkeypatch: pytest.MonkeyPatch, dtype: Any, whole: bool, compiled: bool) -> None:
    monkeypatch.setattr(torch_weights, "compiled", lambda: compiled)
    for rows, outputs, columns in ((1, 1, 1), (1, 33, 17), (5, 64, 128), (32, 100, 96), (33, 70, 64), (200, 31, 48)):
        weight, exact = made(dtype, whole, outputs, columns)
        form = torch_weights.prepared(weight, dtype)
        assert isinstance(form, torch_weights.FewRows) == compiled and tuple(form.shape) == (outputs, columns)
        x = torch.randn(2, rows, columns).to(dtype)[1:]
        for bias in (None, torch.randn(outputs).to(dtype)):
            if isinstance(form, torch.Tensor):
                got = torch.nn.functional.linear(x, form, bias)
            else:
                got = torch_weights.linear(x, form, bias)
            wide = x.double().numpy()
            if compiled and not whole:  # multiplied in integers: the rows are rounded, too
                wide = quantized_rows(wide)
            product, added = wide @ exact.T, np.zeros(1) if bias is None else bias.double().numpy()
            assert got.dtype == dtype and got.shape == (1, rows, outputs)
            if compiled and rows <= 32:  # several matrices in one call give the bits of single calls
                for pair in zip(torch_weights.several(x, (form, form), (bias, None)), (bias, None), strict=True):
                    assert torch.equal(pair[0], torch_weights.linear(x, form, pair[1]))
            error = np.linalg.norm(got.double().numpy() - (product + added))
            assert error <= LIMITS[dtype] * np.linalg.norm(abs(product) + abs(added))


def test_what_has_no_better_form_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = torch.ones(3, 4, dtype=torch.float64)
    assert torch_weights.prepared(wide, torch.float64) is wide
    single = torch.ones(3, 4)
    assert torch_weights.prepared(single, torch.bfloat16) is single  # weights in float32, products in bfloat16
    monkeypatch.setattr(torch_weights, "compiled", lambda: False)
    half = single.half()
    assert torch_weights.prepared(half, torch.float16) is half
    assert isinstance(torch_weights.prepared(single, torch.float32), torch_weights.Packed)


def test_rows_that_are_not_contiguous_are_read_right() -> None:
    weight, exact = made(torch.float32, True, 20, 24)
    form = torch_weights.prepared(weight, torch.float32)
    x = torch.randn(24, 6).t()
    assert relative_frobenius(torch_weights.linear(x, form, None).numpy(), x.numpy() @ exact.T) <= 1e-6
