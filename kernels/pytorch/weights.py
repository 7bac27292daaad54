"""Matrices in the forms that generation multiplies with on PyTorch's CPU, and in 8 bits anywhere.

A step of decoding multiplies few rows with every matrix of the model. For that the C++ operator of kernels/cpu serves,
which reads a matrix once whatever the number of rows, and whose threads, unlike OpenMP's, neither spin for long nor
sleep between two layers. Where it cannot be compiled, oneDNN has an order of its own for a matrix, in which few rows
are faster. (PyTorch's own product of 8-bit weights reads beyond matrices of odd shapes and is not used.)
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
    """A matrix [out, in] in the order that oneDNN wants; nothing but ``linear`` can read it."""

    data: Tensor
    shape: tuple[int, ...]


class FewRows:
    """A matrix [out, in], whole or in 8 bits, with a call of the C++ operator made ready for it."""

    def __init__(self, weight: Tensor | Int8, dtype: torch.dtype) -> None:
        """``dtype`` of the rows that it will meet; a whole matrix has the same."""
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
        """x [..., in] times the matrix, plus bias [out], both of ``dtype``, summed in float32."""
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
        return FewRows(weight, compute) if fits and _compiled() else weight
    if weight.device.type != "cpu" or compute not in NAMES or weight.dtype != compute:
        return weight
    if _compiled():
        return FewRows(weight.detach(), compute)
    if not private.has_mkldnn_linear() or compute == torch.float16:
        return weight
    if compute == torch.bfloat16 and not private.mkldnn_bfloat16():
        return weight
    return Packed(private.mkldnn_reorder(weight.detach()), tuple(weight.shape))


def linear(x: Tensor, weight: Packed | Int8 | FewRows, bias: Tensor | None) -> Tensor:
    """x [..., in] times a matrix, plus bias [out] of the dtype of x, in that dtype, summed in float32."""
    if isinstance(weight, FewRows) and x.dtype == weight.dtype:
        return weight.linear(x, bias)
    if isinstance(weight, Packed):
        return private.mkldnn_linear(x, weight.data, bias)
    return _many_rows(x, weight.weight if isinstance(weight, FewRows) else weight, bias)


def _many_rows(x: Tensor, weight: Tensor | Int8, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Tensor):
        return torch_cpu.linear(x, weight, bias)
    values, factors = weight
    # Whole numbers up to 127 are exact in every dtype; the factors come after the product.
    out = F.linear(x, values.to(x.dtype)).to(factors.dtype) * factors
    return (out if bias is None else out + bias).to(x.dtype)


@cache
def _compiled() -> bool:
    """Whether the operators of kernels/cpu are there."""
    from telechat_twins.kernels.cpu.build import BuildError, load_plain

    try:
        load_plain()
    except BuildError:
        return False
    return True
