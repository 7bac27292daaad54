"""Weights in the form that generation multiplies with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mindspore import Tensor

from telechat_twins.core.model.quantize import Int8Matrix
from telechat_twins.kernels.int8 import Int8
from telechat_twins.telechat_ms.model import Decoder, named_weights, submodule, to_tensor


def load_weights(model: Decoder, get: Callable[[str], np.ndarray | Int8Matrix]) -> None:
    """Fill every parameter from ``get(name)``, one tensor at a time. A matrix that comes in 8 bits takes its
    parameter's place."""
    for name, parameter in named_weights(model).items():
        found = get(name)
        if isinstance(found, Int8Matrix):
            layer = submodule(model, name.rpartition(".")[0])
            del layer.weight
            layer.weight = Int8(to_tensor(found.values), to_tensor(found.factors))
        else:
            parameter.set_data(to_tensor(found).astype(model.dtypes.weight))


def held_weight(model: Decoder, name: str) -> Tensor | Int8:
    """The parameter ``name``, or what took its place."""
    layer, _, kind = name.rpartition(".")
    return getattr(submodule(model, layer), kind)
