"""Weights by name: from and to numpy, held still in training, or in the form that generation multiplies with; and the
helpers of tensors that are no operators. ``model`` is a Decoder here, and model.py imports this file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from telechat_twins.core.model.quantize import Int8Matrix
from telechat_twins.kernels.int8 import Int8
from telechat_twins.kernels.pytorch.weights import Matrix, prepared
from telechat_twins.pt_reference import ops


def to_tensor(array: np.ndarray) -> Tensor:
    """numpy to torch without loss; bfloat16 travels as its bits because numpy has no such type of its own."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """torch to numpy; 16-bit floats become float32 (exact). What a backward pass may still write over is copied."""
    held = tensor.detach().cpu()
    if held.dtype in (torch.bfloat16, torch.float16):
        return held.float().numpy()
    return np.array(held) if tensor.grad_fn is not None and tensor.device.type == "cpu" else held.numpy()


def empty_parameter(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """An uninitialised parameter; its name comes from its place in the model."""
    return nn.Parameter(torch.empty(shape, dtype=dtype))


def multiplied(x: Tensor, factor: float) -> Tensor:
    """x * factor, with the factor in float32 or wider and one rounding to the dtype of x."""
    return x if factor == 1.0 else x * factor


def kept(x: Tensor, factor: float, keep: Tensor) -> Tensor:
    """x * factor where ``keep`` (bool, of x's shape) holds, and 0 elsewhere, also for what is infinite or NaN there.
    One rounding to the dtype of x."""
    return torch.where(keep, x * factor, 0.0)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [..., n] times a growth mask [n] in the dtype of x."""
    return x if mask is None else x * mask.to(x.dtype)


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path: layers.3.attn.q."""
    return model.get_submodule(path)


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters by logical name, in the order of the table that the model was built from."""
    held = dict(model.named_parameters())
    return {name: held[name] for name in cast(list[str], model.names)}


def load_weights(model: nn.Module, get: Callable[[str], np.ndarray | Int8Matrix]) -> None:
    """Fill every parameter from ``get(name)``, one tensor at a time. A matrix that comes in 8 bits takes its
    parameter's place, and so does one in another form that is multiplied faster; no gradient goes through these."""
    for name, parameter in named_weights(model).items():
        found = get(name)
        layer = submodule(model, name.rpartition(".")[0])
        held: Tensor | Int8 = parameter
        if isinstance(found, Int8Matrix):
            held = Int8(*(to_tensor(part).to(ops.device()) for part in found))
        else:
            with torch.no_grad():
                parameter.copy_(to_tensor(found))
        compute = _operand_dtype(layer)
        if compute is not None and parameter.ndim == 2:
            matrix = prepared(held, compute)
            if matrix is not parameter:
                del layer.weight
                layer.weight = matrix


def held_weight(model: nn.Module, name: str) -> Matrix:
    """The parameter ``name``, or what took its place."""
    layer, _, kind = name.rpartition(".")
    return getattr(submodule(model, layer), kind)


def freeze(model: nn.Module, trainable: Collection[str]) -> None:
    """Make constants of the parameters that are not named. Where matrix products would round a frozen matrix to their
    operands' dtype each time, it is held in that dtype."""
    for name, parameter in named_weights(model).items():
        if name in trainable:
            continue
        layer, _, kind = name.rpartition(".")
        module = submodule(model, layer)
        compute = _operand_dtype(module)
        if compute is not None and parameter.ndim == 2 and parameter.dtype != compute:
            parameter = empty_parameter(tuple(parameter.shape), compute)
            setattr(module, kind, parameter)
        parameter.requires_grad_(False)


def _operand_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the operands of a linear layer's product; None for a module that is none."""
    return getattr(module, "compute", None)
