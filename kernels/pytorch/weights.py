"""Weight matrices prepared for inference: layouts for few rows on PyTorch's CPU, and int8 on every device.

A decoding step multiplies few rows by every matrix of the model. The C++ operator of kernels/cpu reads a matrix once
for any number of rows, and its threads, unlike OpenMP's, neither spin for long nor sleep between two layers. Where it
cannot be compiled, oneDNN reorders a matrix into a layout that is faster for few rows. (PyTorch's own product of int8
weights reads beyond matrices of odd shapes and is not used.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from telechat_twins.kernels.int8 import Int8
from telechat_twins.kernels.pytorch import private
from telechat_twins.kernels.pytorch import tiles as torch_tiles

if TYPE_CHECKING:
    from telechat_twins.kernels.cpu.engine import View

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
        self._calls = {
            has_bias: Call("linear_rows", 4, 1, (isinstance(weight, Int8), has_bias)) for has_bias in (False, True)
        }
        self._rows = {False: -1, True: -1}  # of the last call, without and with a bias
        self._several: dict[tuple[int, ...], _Several] = {}  # by the other matrices, and by which biases there are
        for call in self._calls.values():
            self.describe(call.inputs[1], call.inputs[2])

    def describe(self, matrix: View, scales: View) -> None:
        """Set the views to this matrix and, in int8, to its factors."""
        values, factors = self.weight if isinstance(self.weight, Int8) else (self.weight, None)
        self._describe(matrix, values.data_ptr(), self.shape, NAMES[values.dtype])
        if factors is not None:
            self._describe(scales, factors.data_ptr(), self.shape[:1], "float32")

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., in] @ matrix^T + bias [out], both of ``dtype``, accumulated in float32."""
        outputs, columns = self.shape
        # int8: the operator rounds the rows, and a row must not depend on how many others there are.
        if x.numel() > self._most * columns and not isinstance(self.weight, Int8):
            return _many_rows(x, self.weight, bias)
        x = x.contiguous()
        out = x.new_empty((*x.shape[:-1], outputs))
        call, rows = self._calls[bias is not None], x.numel() // columns
        if self._rows[bias is not None] != rows:  # else the views are those of the last call but for addresses
            self._rows[bias is not None] = rows
            self._describe(call.inputs[0], 0, (rows, columns), self._name)
            self._describe(call.outputs[0], 0, (rows, outputs), self._name)
            self._describe(call.inputs[3], 0, (outputs,), self._name)
        call.inputs[0].data, call.outputs[0].data = x.data_ptr(), out.data_ptr()
        if bias is not None:
            call.inputs[3].data = bias.data_ptr()
        call.run()
        return out

    def several(
        self, x: Tensor, others: tuple[FewRows, ...], biases: tuple[Tensor | None, ...]
    ) -> tuple[Tensor, ...] | None:
        """``linear`` of one x with this matrix and one or two more in a call; None where that is not faster."""
        matrices, columns = (self, *others), self.shape[1]
        if x.numel() > self._most * columns or any(matrix.dtype != x.dtype for matrix in matrices):
            return None
        key = (*map(id, others), *(bias is not None for bias in biases))
        if key not in self._several:
            self._several[key] = _Several(matrices, biases)
        return self._several[key].run(x.contiguous(), biases)


class _Several:
    """A prepared call for ``matrices``, which it keeps, of rows that all of them are multiplied with."""

    def __init__(self, matrices: tuple[FewRows, ...], biases: tuple[Tensor | None, ...]) -> None:
        from telechat_twins.kernels.cpu.engine import Call, describe_view

        self._matrices, self._describe, self._rows, self._name = matrices, describe_view, -1, NAMES[matrices[0].dtype]
        count = len(matrices)
        scalars: list[bool] = []
        for matrix, bias in zip(matrices, biases, strict=True):
            scalars += (isinstance(matrix.weight, Int8), bias is not None)
        self._call = Call(f"linear_rows_{count}", 1 + 3 * count, count, scalars)
        for number, matrix in enumerate(matrices):
            matrix.describe(self._call.inputs[1 + 3 * number], self._call.inputs[2 + 3 * number])

    def run(self, x: Tensor, biases: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        call, columns = self._call, x.shape[-1]
        rows = x.numel() // columns
        made = tuple(x.new_empty((*x.shape[:-1], matrix.shape[0])) for matrix in self._matrices)
        if rows != self._rows:
            self._rows = rows
            self._describe(call.inputs[0], 0, (rows, columns), self._name)
            for number, matrix in enumerate(self._matrices):
                self._describe(call.outputs[number], 0, (rows, matrix.shape[0]), self._name)
                self._describe(call.inputs[3 + 3 * number], 0, matrix.shape[:1], self._name)
        call.inputs[0].data = x.data_ptr()
        for number, (out, bias) in enumerate(zip(made, biases, strict=True)):
            call.outputs[number].data = out.data_ptr()
            if bias is not None:
                call.inputs[3 + 3 * number].data = bias.data_ptr()
        call.run()
        return made


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


def several(x: Tensor, matrices: Sequence[Matrix], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...] | None:
    """``linear`` of one x with two or three matrices in one call; None where there is none for them."""
    first, *others = matrices
    rest = tuple(matrix for matrix in others if isinstance(matrix, FewRows))
    if not isinstance(first, FewRows) or len(rest) != len(others) or not 1 <= len(rest) <= 2:
        return None
    return first.several(x.to(first.dtype), rest, tuple(b if b is None else b.to(first.dtype) for b in biases))


def _many_rows(x: Tensor, weight: Tensor | Int8, bias: Tensor | None) -> Tensor:
    if isinstance(weight, Tensor):
        return torch_tiles.linear(x, weight, bias)
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
