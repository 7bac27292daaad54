"""Matrices in the forms that generation multiplies with on PyTorch: laid out for oneDNN, or in 8 bits.

On the CPU, oneDNN takes a matrix in its own order of blocks faster, above all for the few rows of a decoding step. It
has no product of floating-point rows and 8-bit weights; PyTorch's own, written for bfloat16 rows, serves those, and in
float32 and float16 the C++ operator of kernels/cpu where it can be compiled.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import torch_cpu
from kernels.int8 import Int8


class Packed(NamedTuple):
    """A matrix [out, in] in the order that oneDNN wants; nothing but ``linear`` can read it."""

    data: Tensor
    shape: tuple[int, ...]


Matrix = Tensor | Packed | Int8


def packed(weight: Tensor) -> Tensor | Packed:
    """``weight`` [out, in] for products with few rows, or as it is where there is no better order."""
    wanted = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16)
    if not wanted or not torch_cpu.one_dnn() or weight.dtype == torch.bfloat16 and not _fast_bf16():
        return weight
    return Packed(torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1), tuple(weight.shape))


def linear(x: Tensor, weight: Packed | Int8, bias: Tensor | None) -> Tensor:
    """x [..., in] times a matrix, plus bias [out] of the dtype of x, in that dtype, summed in float32."""
    if isinstance(weight, Packed):
        return torch.ops.mkldnn._linear_pointwise(x, weight.data, bias, "none", [], "")
    values, factors = weight
    if x.device.type == "cpu":
        rows = x.reshape(-1, x.shape[-1])
        cpp = _cpp()
        if cpp is not None and len(rows) <= cpp.FEW and x.dtype in (torch.float32, torch.float16):
            given = (None if t is None else t.numpy() for t in (rows.contiguous(), values, bias, factors))
            return torch.from_numpy(cpp.linear_rows(*given)).view(*x.shape[:-1], -1)
        if x.dtype == torch.bfloat16:
            product = torch._weight_int8pack_mm(rows, values, torch.ones_like(factors, dtype=x.dtype))
            return _finished(product, factors, bias, x)
    return _finished(F.linear(x, values.to(x.dtype)), factors, bias, x)


def _finished(product: Tensor, factors: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """The product with whole numbers times the factors of its outputs, and the bias, rounded once more."""
    out = product.to(factors.dtype) * factors.to(product.device)
    if bias is not None:
        out = out + bias
    return out.to(x.dtype).view(*x.shape[:-1], -1)


@cache
def _fast_bf16() -> bool:
    """Whether oneDNN has instructions for bfloat16 here; without, it would refuse to lay a matrix out."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def _cpp() -> ModuleType | None:
    from kernels.cpu import ops
    from kernels.cpu.build import BuildError, load_plain

    try:
        load_plain()
    except BuildError:
        return None
    return ops
