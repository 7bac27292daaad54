"""Gradients that MindSpore's public functions cannot give.

``Function`` is the class of operators with a gradient of their own. ``record`` keeps a forward pass for a later
backward pass, several of them at once and in any order, as a pipeline of micro-batches needs; ``ms.vjp`` cannot keep
two. Where a release of MindSpore lacks the private names, ``record`` is ``record_public``: public functions only, which
costs a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mindspore as ms
from mindspore import Parameter, Tensor, ops

from telechat_twins.kernels.mindspore.private import Context as Context
from telechat_twins.kernels.mindspore.private import Function as Function
from telechat_twins.kernels.mindspore.private import executor as _executor
from telechat_twins.kernels.mindspore.private import run_backward as _run_backward

ENGINE = "recomputed" if _run_backward is None else "recorded"

Run = Callable[[Tensor | None], Tensor]
Gradients = tuple[Tensor | None, list[Tensor]]


class Recorded:
    """A forward pass whose gradients can be asked for once. ``output`` is what it returned."""

    def __init__(self, output: Tensor, gradients: Callable[[Tensor], Gradients]) -> None:
        self.output = output
        self._gradients: Callable[[Tensor], Gradients] | None = gradients

    def backward(self, grad_output: Tensor) -> Gradients:
        """Gradients of sum(output * grad_output): of x (None where there was no x) and of each weight, in order.

        grad_output: shape and dtype of ``output``, ValueError otherwise. The graph is freed. RuntimeError when called
        twice, and naming the weight when one took no part (``record_public`` cannot tell and gives zeros).
        """
        if self._gradients is None:
            raise RuntimeError("this forward pass has had its backward pass, and its graph is gone")
        if grad_output.shape != self.output.shape or grad_output.dtype != self.output.dtype:
            raise ValueError(
                f"grad_output: {grad_output.dtype} {grad_output.shape} for an output that is "
                f"{self.output.dtype} {self.output.shape}"
            )
        gradients, self._gradients = self._gradients, None
        return gradients(grad_output)


def record_engine(run: Run, x: Tensor | None, weights: Sequence[Parameter]) -> Recorded:
    """``record`` by the autograd engine: the graph of ``run(x)`` stays in memory until its backward pass."""
    leaf = None
    if x is not None:
        leaf = ops.stop_gradient(x)  # another tensor on the same memory, so that x itself is left as it was
        leaf.requires_grad_(True)
    recording = _executor.grad_flag()
    _executor.set_grad_flag(True)
    try:
        output = run(leaf)
    finally:
        _executor.set_grad_flag(recording)
    wanted = (*(() if leaf is None else (leaf,)), *weights)

    def gradients(grad_output: Tensor) -> Gradients:
        found = _run_backward((output,), (grad_output,), False, False, wanted, True, accumulate_grad=False)
        for tensor, gradient in zip(wanted, found, strict=True):
            if gradient is None:
                name = "x" if tensor is leaf else getattr(tensor, "name", "a weight")
                raise RuntimeError(f"{name} took no part in this forward pass, so it has no gradient")
        return (None, list(found)) if leaf is None else (found[0], list(found[1:]))

    return Recorded(output, gradients)


def record_public(run: Run, x: Tensor | None, weights: Sequence[Parameter]) -> Recorded:
    """``record`` by public functions: keeps x, and runs ``run`` a second time, with gradients, in the backward pass."""
    if x is not None:
        x = ops.stop_gradient(x)
    weights = list(weights)

    def gradients(grad_output: Tensor) -> Gradients:
        # The sum itself is of no interest, but the CPU has none of 16-bit numbers.
        wide = ms.float64 if grad_output.dtype == ms.float64 else ms.float32
        factor = grad_output.astype(wide)
        if x is None:
            return None, list(ms.grad(lambda: (run(None).astype(wide) * factor).sum(), None, weights)())
        dx, found = ms.grad(lambda t: (run(t).astype(wide) * factor).sum(), 0, weights)(x)
        return dx, list(found)

    return Recorded(run(x), gradients)


def record(run: Run, x: Tensor | None, weights: Sequence[Parameter]) -> Recorded:
    """Run ``run(x)`` forward and keep what its gradients with respect to x and ``weights`` need.

    run: takes x (None where the inputs are no tensor to differentiate by) and returns one tensor; weights that it uses
    several times accumulate. Any number of recorded passes may be outstanding, and their backward passes come in any
    order. Outside of ``run`` nothing is recorded.
    """
    return (record_engine if ENGINE == "recorded" else record_public)(run, x, weights)


def recompute(run: Callable[..., Tensor], *inputs: object) -> Tensor:
    """``run(*inputs)``, of which only the inputs are kept: the backward pass runs it again.

    The engine differentiates with the recording of operators switched off (MindSpore 2.9.0), in which state
    ``ms.recompute`` finds nothing recorded by its second run; so it is switched on for that run.
    """

    def recorded(*again: object) -> Tensor:
        before = _executor.enable_grad()
        _executor.set_enable_grad(True)
        try:
            return run(*again)
        finally:
            _executor.set_enable_grad(before)

    return ms.recompute(recorded if ENGINE == "recorded" else run, *inputs, use_reentrant=False)
