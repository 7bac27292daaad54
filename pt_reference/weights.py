"""Weights in the form that generation multiplies with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from telechat_twins.core.model.quantize import Int8Matrix
from telechat_twins.kernels.int8 import Int8
from telechat_twins.kernels.pytorch.weights import Matrix, prepared
from telechat_twins.pt_reference import ops
from telechat_twins.pt_reference.model import Decoder, Linear, named_weights, submodule, to_tensor


def load_weights(model: Decoder, get: Callable[[str], np.ndarray | Int8Matrix]) -> None:
    """Fill every parameter from ``get(name)``, one tensor at a time. A matrix that comes in 8 bits takes its
    parameter's place, and so does one in another form that is multiplied faster; no gradient goes through these."""
    for name, parameter in named_weights(model).items():
        found = get(name)
        layer = submodule(model, name.rpartition(".")[0])
        held: torch.Tensor | Int8 = parameter
        if isinstance(found, Int8Matrix):
            held = Int8(*(to_tensor(part).to(ops.device()) for part in found))
        else:
            with torch.no_grad():
                parameter.copy_(to_tensor(found))
        if isinstance(layer, Linear) and parameter.ndim == 2:
            matrix = prepared(held, layer.compute)
            if matrix is not parameter:
                del layer.weight
                layer.weight = matrix


def held_weight(model: Decoder, name: str) -> Matrix:
    """The parameter ``name``, or what took its place."""
    layer, _, kind = name.rpartition(".")
    return getattr(submodule(model, layer), kind)
