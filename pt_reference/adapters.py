"""Low-rank adapters in generation, chosen token by token (core.inference.adapters)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from telechat_twins.core.inference.adapters import ReadPair, used_adapters
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.model import Decoder, Linear
from telechat_twins.pt_reference.weights import to_tensor


class StepAdapters:
    """The adapters of the present step, ``used``: number and mask [1, N, 1] of its tokens, None for all of them.
    ``held``: of all adapters, the pairs of LinearAdapters by the linear's logical name."""

    def __init__(self, adapters: int, compute: torch.dtype) -> None:
        self.compute = compute
        self.held: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in range(adapters)]
        self.used: list[tuple[int, Tensor | None]] = []

    def place(self, owners: np.ndarray) -> None:
        """``owners`` int32 [N]: whose each token is."""
        self.used = [
            (number, None if mask is None else torch.from_numpy(mask).to(ops.device(), self.compute))
            for number, mask in used_adapters(owners)
        ]


class LinearAdapters:
    """All adapters of one linear layer: number -> A [r, in] and scale B [out, r]."""

    def __init__(self, pairs: Mapping[int, tuple[Tensor, Tensor]], step: StepAdapters) -> None:
        self.pairs, self.step = pairs, step

    def added(self, out: Tensor, x: Tensor) -> Tensor:
        """out [1, N, out] plus each token's own scale B A x; x [1, N, in]."""
        compute = self.step.compute
        for number, mask in self.step.used:
            if number in self.pairs:
                a, b = self.pairs[number]
                low = ops.linear(x, a, None, compute)  # [1, N, r]
                out = out + ops.linear(low if mask is None else low * mask, b, None, compute)
        return out


def apply_adapters(model: Decoder, adapters: Sequence[ReadPair]) -> StepAdapters:
    """Put adapters, numbered from 1, beside the linear layers of a model or of a part of one."""
    step = StepAdapters(len(adapters), model.dtypes.compute)
    for name in model.names:
        linear, _, kind = name.rpartition(".")
        if kind != "weight" or not name.startswith("layers."):
            continue
        found = {number: pair for number, read in enumerate(adapters, 1) if (pair := read(linear)) is not None}
        if found:
            layer = model.get_submodule(linear)
            assert isinstance(layer, Linear)
            pairs = {number: (_placed(pair.a, step), _placed(pair.b, step)) for number, pair in found.items()}
            layer.served = LinearAdapters(pairs, step)
            for number, placed in pairs.items():
                step.held[number - 1][linear] = placed
    return step


def _placed(array: np.ndarray, step: StepAdapters) -> Tensor:
    return to_tensor(array).to(ops.device(), step.compute)
