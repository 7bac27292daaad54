"""Weights in the form that generation multiplies with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from mindspore import nn

from telechat_twins.core.model.quantize import Int8Matrix
from telechat_twins.kernels.int8 import Int8
from telechat_twins.telechat_ms.model import Decoder, named_weights, to_tensor


def load_weights(model: Decoder, get: Callable[[str], np.ndarray | Int8Matrix]) -> None:
    """Fill every parameter from ``get(name)``, one tensor at a time. A matrix that comes in 8 bits takes its
    parameter's place."""
    for name, parameter in named_weights(model).items():
        found = get(name)
        if isinstance(found, Int8Matrix):
            layer = _layer(model, name)
            del layer.weight
            layer.weight = Int8(to_tensor(found.values), to_tensor(found.factors))
        else:
            parameter.set_data(to_tensor(found).astype(model.dtypes.weight))


def _layer(model: nn.Cell, name: str) -> nn.Cell:
    """The module that has the parameter ``name``."""
    found = model
    for part in name.split(".")[:-1]:
        found = found[part] if isinstance(found, nn.CellDict) else getattr(found, part)
    return found
