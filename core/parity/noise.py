"""Rounding noise: operators whose outputs are off by as much as another device's rounding might put them.

While ``noisy_operators`` is active, the entries of a backend's ``ops`` module give y + e x y in the place of y, with e
twice the unit roundoff of the precision (a unit in the last place) and x uniform in [-1, 1); matrix products read their
matrices likewise, so that the gradients of matrices are off by as much. x is a pure function of (seed, update, number
of the call in the update): a run with noise is as reproducible as one without. The model's files know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol, Self

import numpy as np

from telechat_twins.core import backends
from telechat_twins.core.parity.bounds import UNIT_ROUNDOFF

# Operators that compute: one output, or a tuple of them. What only moves values is not among them.
OPERATORS = (
    "add",
    "add_rms_norm",
    "attention",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "rms_norm",
    "rope_qk",
    "swiglu",
)


class Tensor(Protocol):
    """A tensor of a backend, as far as noise needs to know it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __add__(self, other: Self, /) -> Self: ...


Operator = Callable[..., Tensor | tuple[Tensor, ...]]


class NoiseSource:
    """The noise of one run: e x for each call of an operator, in the order of the calls.

    Philox with the key (seed, update) and the call as the high word of its counter.
    """

    def __init__(self, precision: str, seed: int) -> None:
        self.size, self.seed = 2.0 * UNIT_ROUNDOFF[precision], seed
        self._dtype = np.float64 if precision == "fp64" else np.float32
        self._update, self._call = 0, 0

    def begin(self, update: int) -> None:
        """The calls that follow belong to this update."""
        self._update, self._call = update, 0

    def draw(self, shape: tuple[int, ...]) -> np.ndarray:
        """e x of the next call: float32, in fp64 float64, of ``shape``."""
        self._call += 1
        bits = np.random.Philox(key=np.array([self.seed, self._update], np.uint64), counter=self._call << 192)
        x = np.random.Generator(bits).random(shape, self._dtype)
        found: np.ndarray = self._dtype(self.size) * (2 * x - 1)
        return found


@contextmanager
def noisy_operators(backend: str, source: NoiseSource) -> Iterator[None]:
    """While active, the operators of ``backend`` round as ``source`` says. Models must be built while it is."""
    ops, model = backends.load(backend, "ops"), backends.load(backend, "model")

    def off(y: Tensor) -> Tensor:
        noise = model.to_tensor(source.draw(tuple(y.shape)))
        moved: Tensor = model.masked(y, noise if backend == "ms" else noise.to(ops.device()))  # noise * y
        return y + moved

    def wrapped(name: str, real: Operator) -> Operator:
        def run(x: Tensor, *args: object, **options: object) -> Tensor | tuple[Tensor, ...]:
            if name == "linear":
                matrix: Tensor = args[0]  # type: ignore[assignment]
                args = off(matrix), *args[1:]
            out = real(x, *args, **options)
            return tuple(map(off, out)) if isinstance(out, tuple) else off(out)

        return run

    with ExitStack() as active:
        for name in OPERATORS:
            real = getattr(ops, name)
            active.callback(setattr, ops, name, real)
            setattr(ops, name, wrapped(name, real))
        yield
