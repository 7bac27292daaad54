"""Weight matrices prepared for inference: layouts for few rows on PyTorch's CPU, and int8 on every device.

A decoding step multiplies few rows by every matrix of the model. The C++ operator of kernels/cpu reads a matrix once
for any number of rows, and its threads, unlike OpenMP's, neither spin for long nor sleep between two layers. Where it
cannot be compiled, oneDNN reorders a matrix into a layout that is faster for few rows. (PyTorch's own product of int8
weights reads beyond matrices of odd shapes and is not used.)
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from telechat_twins.kernels.int8 import Int8
from telechat_twins.kernels.pytorch import cpu as torch_cpu
from telechat_twins.kernels.pytorch import private

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.int8: "int8"}


class Packed(NamedTuple):
    """A matrix [out, in] in oneDNN's layout, which only ``linear`` can read."""

    data: Tensor
    shape: tuple[int, ...]


class FewRows:
    """A matrix [out, in], dense or int8, with a prepared call of the C++ operator for few rows."""

    def __init__(self, weight: Tensor | Int8, dtype: torch.dtype) -> None:
        """``dtype``: that of the rows it is multiplied by, and of a dense matrix."""
        from telechat_twins.kernels.cpu.engine import Call, describe_view
        from telechat_twins.kernels.cpu.ops import FEW

        self.weight, self.dtype, self.shape = weight, dtype, tuple(weight.shape)
        self._most, self._name, self._describe = FEW, NAMES[dtype], describe_view
        values, factors = weight if isinstance(weight, Int8) else (weight, None)
        self._calls = {
            has_bias: Call("linear_rows", 4, 1, (factors is not None, has_bias)) for has_bias in (False, True)
        }
        for call in self._calls.values():
            describe_view(call.inputs[1], values.data_ptr(), self.shape, NAMES[values.dtype])
            if factors is not None:
                describe_view(call.inputs[2], factors.data_ptr(), self.shape[:1], "float32")

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] @ matrix^T + bias [out], both of ``dtype``, accumulated in float32."""
        outputs, columns = self.shape
        if x.numel() > self._most * columns:
            return _many_rows(x, self.weight, bias)
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], outputs))
        call = self._calls[bias is not None]
        self._describe(call.inputs[0], x.data_ptr(), (x.numel() // columns, columns), self._name)
        self._describe(call.outputs[0], out.data_ptr(), (x.numel() // columns, outputs), self._name)
        if bias is not None:
            self._describe(call.inputs[3], bias.data_ptr(), (outputs,), self._name)
        call.run()
        return out


Matrix: TypeAlias = Tensor | Packed | Int8 | FewRows


def prepared(weight: Tensor | Int8, compute: torch.dtype) -> Matrix:
    """``weight`` for products with rows of dtype ``compute``, without gradients."""
    if isinstance(weight, Int8):
        fits = weight.values.device.type == "cpu" and compute in NAMES
        return FewRows(weight, compute) if fits and compiled() else weight
    if weight.device.type != "cpu" or compute not in NAMES or weight.dtype != compute:
        return weight
    if compiled():
        return FewRows(weight.detach(), compute)
    if not private.has_mkldnn_linear() or compute == torch.float16:
        return weight
    if compute == torch.bfloat16 and not private.mkldnn_bfloat16():
        return weight
    return Packed(private.mkldnn_reorder(weight.detach()), tuple(weight.shape))


def linear(x: Tensor, weight: Packed | Int8 | FewRows, bias: Tensor | None) -> Tensor:
    """x [..., in] @ weight^T + bias [out], all in the dtype of x, accumulated in float32."""
    if isinstance(weight, FewRows) and x.dtype == weight.dtype:
        return weight.linear(x, bias)
    if isinstance(weight, Packed):
        return private.mkldnn_linear(x, weight.data, bias)
    return _many_rows(x, weight.weight if isinstance(weight, FewRows) else weight, bias)


def _many_rows(x: Tensor, weight: Tensor | Int8, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Tensor):
        return torch_cpu.linear(x, weight, bias)
    values, factors = weight
    # Integers up to 127 are exact in every dtype; the factor of an output channel multiplies its sum.
    out = F.linear(x, values.to(x.dtype)).to(factors.dtype) * factors
    return (out if bias is None else out + bias).to(x.dtype)


@cache
def compiled() -> bool:
    """Whether the operators of kernels/cpu can be compiled and loaded."""
    from telechat_twins.kernels.cpu.build import BuildError, load_plain

    try:
        load_plain()
    except BuildError:
        return False
    return True
