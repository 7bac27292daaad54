"""Gradients of a step that are computed where they belong, in their buckets, and those that may not be."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from telechat_twins.kernels.pytorch import attention_in_cpp  # noqa: E402
from telechat_twins.kernels.pytorch import ops as kernels  # noqa: E402
from telechat_twins.kernels.pytorch import tiles as torch_tiles  # noqa: E402
from telechat_twins.kernels.pytorch.room import GradientPlace, take_place  # noqa: E402

pytestmark = pytest.mark.skipif(bool(attention_in_cpp.obstacle()), reason="needs a compiler")

IN, OUT = 40, 72


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype))


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    """The C++ operators for every processor's float32 products."""
    kernels.select({"linear": "cpp"})
    yield
    kernels.select({})


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return kernels.linear(x, weight, bias, x.dtype)


def placed(*weights: torch.nn.Parameter) -> list[GradientPlace]:
    """A place of each, filled with what must be written over."""
    return [GradientPlace(torch.full(weight.shape, torch.nan), weight) for weight in weights]


def test_the_first_gradient_is_made_in_its_place() -> None:
    x, weight, bias = torch.randn(9, IN), parameter(OUT, IN), parameter(OUT, seed=1)
    plain = torch.autograd.grad(linear(x, weight, bias).square().sum(), (weight, bias))
    places = placed(weight, bias)
    for place in places:
        place.offer()
    linear(x, weight, bias).square().sum().backward()
    for place, held, right in zip(places, (weight, bias), plain, strict=True):
        assert held.grad.data_ptr() == place._place.data_ptr(), "it was copied"
        assert torch.equal(place._place, right)


def test_an_offer_is_taken_once_and_can_be_withdrawn() -> None:
    weight = parameter(OUT, IN)
    (place,) = placed(weight)
    assert take_place(weight) is None, "nothing was offered"
    place.offer()
    assert take_place(weight) is not None and take_place(weight) is None
    place.offer()
    place.withdraw()
    assert take_place(weight) is None and take_place(parameter(2, 2)) is None


def test_a_weight_that_is_read_twice_has_the_sum_of_both_gradients() -> None:
    """As tied embeddings: the second gradient may not be written over the first."""
    x, weight = torch.randn(9, IN), parameter(IN, IN)
    (right,) = torch.autograd.grad(linear(linear(x, weight), weight).square().sum(), weight)
    (place,) = placed(weight)
    place.offer()
    linear(linear(x, weight), weight).square().sum().backward()
    assert torch.equal(weight.grad, right)


def test_a_place_of_another_dtype_is_never_taken() -> None:
    weight = parameter(OUT, IN, dtype=torch.bfloat16)
    (place,) = placed(weight)
    place.offer()
    assert take_place(weight) is None


def within(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor, more: torch.Tensor | float = 0.0) -> bool:
    """Whether got is a @ b + more of float64 matrices, up to 8 units in the last place of |a| @ |b|."""
    error = (got.detach().double() - (a @ b + more)).abs()
    return bool((error <= 8 * 2.0**-24 * (a.abs() @ b.abs() + 1.0)).all())


def test_layers_with_one_input_add_its_gradients() -> None:
    """Against float64: the outputs, the gradient of x, and of each weight and bias; x is computed again if asked."""
    x = parameter(14, IN, seed=1)
    weights = [parameter(out, IN, seed=out) for out in (OUT, 16, 33)]
    biases = [None, parameter(16, seed=5), parameter(33, seed=6)]
    asked: list[int] = []

    def again() -> torch.Tensor:
        asked.append(1)
        return x.detach()

    outs = kernels.linears(x, weights, biases, again)
    assert outs is not None
    grads = [parameter(*out.shape, seed=7).detach() for out in outs]
    torch.autograd.backward(outs, grads)
    assert asked == [1]
    wide, wide_grads = x.detach().double(), [dy.double() for dy in grads]
    wide_weights = [weight.detach().double() for weight in weights]
    assert within(x.grad, torch.cat(wide_grads, 1), torch.cat(wide_weights, 0))
    assert not within(x.grad, torch.cat(wide_grads[:2], 1), torch.cat(wide_weights[:2], 0)), "one is left out"
    for out, dy, w, weight, bias in zip(outs, wide_grads, wide_weights, weights, biases, strict=True):
        assert within(out, wide, w.T, 0.0 if bias is None else bias.detach().double())
        assert within(weight.grad, dy.T, wide)
        assert bias is None or within(bias.grad, dy.T, torch.ones(14, dtype=torch.float64))


def test_other_dtypes_and_frozen_layers() -> None:
    x = torch.randn(3, IN, requires_grad=True)
    frozen, trained = parameter(8, IN).requires_grad_(False), parameter(8, IN, seed=3)
    outs = kernels.linears(x, [frozen, trained], [None, None])
    assert outs is not None
    sum(out.sum() for out in outs).backward()
    assert frozen.grad is None and trained.grad is not None
    total = (frozen + trained.detach()).sum(0)
    assert float((x.grad - total).abs().max()) < 1e-5
    half = [weight.to(torch.bfloat16) for weight in (frozen, trained)]
    assert kernels.linears(x.to(torch.bfloat16), half, [None, None]) is None
    with torch.no_grad():
        assert kernels.linears(x, [frozen, trained], [None, None]) is None
    assert torch_tiles.serves(x)
