"""Weights by name: from and to numpy, held still in training, or in the form that generation multiplies with; and the
helpers of tensors that are no operators. ``model`` is a Decoder here, and model.py imports this file."""

from __future__ import annotations

from collections.abc import Callable, Collection

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from telechat_twins.core.model.quantize import Int8Matrix
from telechat_twins.kernels.int8 import Int8


def to_tensor(array: np.ndarray) -> Tensor:
    """numpy to MindSpore without loss."""
    return Tensor(np.ascontiguousarray(array))


def to_numpy(tensor: Tensor) -> np.ndarray:
    """MindSpore to numpy, a copy: a backward pass may write over logits. bfloat16 becomes float32 (exact)."""
    return np.array((tensor.astype(ms.float32) if tensor.dtype == ms.bfloat16 else tensor).asnumpy())


def empty_parameter(shape: tuple[int, ...], dtype: ms.Type) -> Parameter:
    """An uninitialised parameter; its name comes from its place in the model."""
    return Parameter(ms.mint.empty(shape, dtype=dtype))


def multiplied(x: Tensor, factor: float) -> Tensor:
    """x * factor, with the factor in float32 or wider and one rounding to the dtype of x, as PyTorch multiplies."""
    if factor == 1.0:
        return x
    if x.dtype in (ms.bfloat16, ms.float16):  # a factor in the dtype of x would be rounded before the product is
        return (x.astype(ms.float32) * Tensor(factor, ms.float32)).astype(x.dtype)
    return x * Tensor(factor, x.dtype)


def kept(x: Tensor, factor: float, keep: Tensor) -> Tensor:
    """x * factor where ``keep`` (bool, of x's shape) holds, and 0 elsewhere, also for what is infinite or NaN there.
    One rounding to the dtype of x, as PyTorch multiplies."""
    if x.dtype in (ms.bfloat16, ms.float16):
        return ops.where(keep, x.astype(ms.float32) * Tensor(factor, ms.float32), 0.0).astype(x.dtype)
    return ops.where(keep, x * Tensor(factor, x.dtype), 0.0)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [..., n] times a growth mask [n] in the dtype of x."""
    return x if mask is None else x * mask.astype(x.dtype)


def submodule(model: nn.Cell, path: str) -> nn.Cell:
    """The cell at a dotted path: layers.3.attn.q."""
    found = model
    for part in path.split("."):
        found = found[part] if isinstance(found, nn.CellDict) else getattr(found, part)
    return found


def named_weights(model: nn.Cell) -> dict[str, Parameter]:
    """Parameters by logical name, in the order of the table that the model was built from."""
    held = dict(model.parameters_and_names())
    return {name: held[name] for name in model.names}


def load_weights(model: nn.Cell, get: Callable[[str], np.ndarray | Int8Matrix]) -> None:
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


def held_weight(model: nn.Cell, name: str) -> Tensor | Int8:
    """The parameter ``name``, or what took its place."""
    layer, _, kind = name.rpartition(".")
    return getattr(submodule(model, layer), kind)


def freeze(model: nn.Cell, trainable: Collection[str]) -> None:
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
        parameter.requires_grad = False


def _operand_dtype(module: nn.Cell) -> ms.Type | None:
    """The dtype of the operands of a linear layer's product; None for a module that is none."""
    return getattr(module, "compute", None)
