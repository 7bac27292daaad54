"""AdamW with decoupled decay on flat fp32 masters.

All decayed parameters lie in one flat buffer and all others in a second, so that an update is a handful of operators
whatever the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, ops

from core.config import OptimConfig
from core.params import ParamSpec
from telechat_ms.ops import total


class _Flat:
    """One group of parameters as flat vectors: master, m, v, and the gradient while there is one."""

    def __init__(self, specs: Mapping[str, ParamSpec], weight_decay: float, dtype: ms.Type) -> None:
        self.specs, self.weight_decay, self.dtype = dict(specs), weight_decay, dtype
        size = sum(spec.size for spec in specs.values())
        zeros = ms.mint.zeros(size, dtype=dtype)
        self.master, self.m, self.v = (Parameter(zeros.copy(), name=name) for name in ("master", "m", "v"))
        self.gradient: Tensor | None = None

    def parts(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor of the parameter's own shape) for each piece of a flat vector."""
        for (name, spec), piece in zip(
            self.specs.items(), ops.split(flat, [s.size for s in self.specs.values()]), strict=True
        ):
            yield name, piece.reshape(spec.shape)

    def fill(self, vector: Parameter, get: Callable[[str], np.ndarray]) -> None:
        """Set a flat vector from one array a parameter."""
        flat = np.empty(vector.shape, str(self.dtype).lower())
        start = 0
        for name, spec in self.specs.items():
            flat[start : start + spec.size] = get(name).reshape(-1)
            start += spec.size
        vector.set_data(Tensor(flat))


class AdamW:
    """Owns the masters, their gradients and m, v. The model's weights are copies that ``step`` refreshes."""

    def __init__(
        self, weights: Mapping[str, Parameter], specs: Mapping[str, ParamSpec], config: OptimConfig, dtype: ms.Type
    ) -> None:
        self.weights, self.config, self.step_count = dict(weights), config, 0
        decayed = {n: s for n, s in specs.items() if s.decays}
        plain = {n: s for n, s in specs.items() if not s.decays}
        self._order = {name: i for i, name in enumerate(self.weights)}
        self._groups = [_Flat(decayed, config.weight_decay, dtype), _Flat(plain, 0.0, dtype)]
        self._adam = ops.Adam()

    def accumulate(self, gradients: tuple[Tensor, ...]) -> None:
        """Add one backward pass's gradients, in the order of ``weights``, to the flat accumulators."""
        for group in self._groups:
            flat = ops.concat([ops.cast(gradients[self._order[n]], group.dtype).reshape(-1) for n in group.specs])
            group.gradient = flat if group.gradient is None else group.gradient + flat

    def grad_norm(self) -> float:
        """L2 norm over all accumulated gradients; the parts are summed in float64, each parameter once."""
        squares = [total(g * g) for group in self._groups for _, g in group.parts(group.gradient)]
        return math.sqrt(sum(float(s.asnumpy()) for s in squares))

    def step(self, lr: float, grad_scale: float) -> None:
        """One update with gradients times ``grad_scale``; the accumulators are empty afterwards.

        ops.Adam computes lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps). With eps * sqrt(1 - b2^t) in place of
        eps that is the bias-corrected lr * m_hat / (sqrt(v_hat) + eps).
        """
        self.step_count += 1
        config = self.config
        beta1_power, beta2_power = config.beta1**self.step_count, config.beta2**self.step_count
        eps = config.eps * math.sqrt(1.0 - beta2_power)
        for group in self._groups:
            if group.weight_decay:
                group.master.set_data(group.master * Tensor(1.0 - lr * group.weight_decay, group.dtype))
            scalars = (beta1_power, beta2_power, lr, config.beta1, config.beta2, eps)
            gradient = group.gradient * Tensor(grad_scale, group.dtype)
            self._adam(group.master, group.m, group.v, *(Tensor(s, group.dtype) for s in scalars), gradient)
        self.discard()
        self._refresh()

    def discard(self) -> None:
        for group in self._groups:
            group.gradient = None

    def load_masters(self, get: Callable[[str], np.ndarray]) -> None:
        """Masters from ``get(name)``, and from them the weights of the model."""
        for group in self._groups:
            group.fill(group.master, get)
        self._refresh()

    def load_state(self, get: Callable[[str], np.ndarray], step_count: int) -> None:
        """m and v from ``get("m.<name>")`` and ``get("v.<name>")``."""
        self.step_count = step_count
        for group in self._groups:
            group.fill(group.m, lambda name: get(f"m.{name}"))
            group.fill(group.v, lambda name: get(f"v.{name}"))

    def export_masters(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self._export([g.master for g in self._groups], "")

    def export_state(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self._export([g.m for g in self._groups], "m.")
        yield from self._export([g.v for g in self._groups], "v.")

    def _export(self, vectors: list[Parameter], prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        held = {n: t for group, flat in zip(self._groups, vectors, strict=True) for n, t in group.parts(flat)}
        for name in self.weights:
            yield prefix + name, held[name].asnumpy()

    def _refresh(self) -> None:
        for group in self._groups:
            for name, value in group.parts(group.master):
                weight = self.weights[name]
                weight.set_data(ops.cast(value, weight.dtype).contiguous())
