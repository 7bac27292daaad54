"""SwiGLU and GELU, forward and backward, each one pass over memory, computed in float32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from telechat_twins.kernels.triton.launch import check, launch, rows_of, tiles_for


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))  # exp overflows to inf for very negative x, and 1 / inf = 0 is the limit


@triton.jit
def _gelu_slope(x):
    """2 u and its derivative, with gelu(x) = x * sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)."""
    square = x * x
    return 1.5957691216057308 * x * (1.0 + 0.044715 * square), 1.5957691216057308 * (1.0 + 0.134145 * square)


@triton.jit
def gated(gate_ptr, up_ptr, out_ptr, rows, columns, gate_stride, up_stride, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """silu(gate) * up, or with GELU gelu(gate), over [rows, columns]; out is contiguous."""
    blocks = tl.cdiv(columns, BLOCK)
    for task in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
        row = tl.cast(task // blocks, tl.int64)
        at = task % blocks * BLOCK + tl.arange(0, BLOCK)
        there = at < columns
        x = tl.load(gate_ptr + row * gate_stride + at, mask=there, other=0.0).to(tl.float32)
        if GELU:
            twice, _ = _gelu_slope(x)
            out = x * _sigmoid(twice)
        else:
            out = x * _sigmoid(x)
            out *= tl.load(up_ptr + row * up_stride + at, mask=there, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * columns + at, out.to(out_ptr.dtype.element_ty), mask=there)


@triton.jit
def gated_backward(
    grad_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    rows,
    columns,
    grad_stride,
    gate_stride,
    up_stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(columns, BLOCK)
    for task in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
        row = tl.cast(task // blocks, tl.int64)
        at = task % blocks * BLOCK + tl.arange(0, BLOCK)
        there = at < columns
        grad = tl.load(grad_ptr + row * grad_stride + at, mask=there, other=0.0).to(tl.float32)
        x = tl.load(gate_ptr + row * gate_stride + at, mask=there, other=0.0).to(tl.float32)
        if GELU:
            twice, slope = _gelu_slope(x)
            s = _sigmoid(twice)
            dgate = grad * (s + x * s * (1.0 - s) * slope)
        else:
            up = tl.load(up_ptr + row * up_stride + at, mask=there, other=0.0).to(tl.float32)
            s = _sigmoid(x)
            dgate = grad * up * s * (1.0 + x * (1.0 - s))
            tl.store(dup_ptr + row * columns + at, (grad * x * s).to(dup_ptr.dtype.element_ty), mask=there)
        tl.store(dgate_ptr + row * columns + at, dgate.to(dgate_ptr.dtype.element_ty), mask=there)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up in the dtype of gate; gate and up have one shape and may be the two halves of one projection.

    Raises TypeError or ValueError naming the wrong argument.
    """
    check("gate", gate)
    check("up", up, gate.shape, beside=gate)
    return _forward(gate, up)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup) in the dtypes of gate and up."""
    check("gate", gate)
    check("up", up, gate.shape, beside=gate)
    check("grad", grad, gate.shape, beside=gate)
    dgate, dup = _backward(grad, gate, up)
    assert dup is not None
    return dgate, dup


def gelu(x: Tensor) -> Tensor:
    """GELU, tanh form, in the dtype of x."""
    check("x", x)
    return _forward(x, None)


def gelu_backward(grad: Tensor, x: Tensor) -> Tensor:
    check("x", x)
    check("grad", grad, x.shape, beside=x)
    return _backward(grad, x, None)[0]


def _flat(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors as one row where all are contiguous, so that all blocks but one are full; else as rows."""
    if all(x.is_contiguous() for x in tensors):
        return [x.reshape(1, -1) for x in tensors]
    return [rows_of(x) for x in tensors]


def _forward(gate: Tensor, up: Tensor | None) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel() == 0:
        return out
    views = _flat([gate] if up is None else [gate, up])
    rows, columns = views[0].shape
    arguments = {
        "gate_ptr": views[0],
        "up_ptr": None if up is None else views[1],
        "out_ptr": out,
        "rows": rows,
        "columns": columns,
        "gate_stride": views[0].stride(0),
        "up_stride": 0 if up is None else views[1].stride(0),
    }
    tiles = tiles_for("pointwise", _widest(views))
    launch(gated, rows * triton.cdiv(columns, tiles.constants["BLOCK"]), tiles, arguments, GELU=up is None)
    return out


def _backward(grad: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = None if up is None else torch.empty(up.shape, dtype=up.dtype, device=gate.device)
    if dgate.numel() == 0:
        return dgate, dup
    views = _flat([grad, gate] if up is None else [grad, gate, up])
    rows, columns = views[0].shape
    arguments = {
        "grad_ptr": views[0],
        "gate_ptr": views[1],
        "up_ptr": None if up is None else views[2],
        "dgate_ptr": dgate,
        "dup_ptr": dup,
        "rows": rows,
        "columns": columns,
        "grad_stride": views[0].stride(0),
        "gate_stride": views[1].stride(0),
        "up_stride": 0 if up is None else views[2].stride(0),
    }
    tiles = tiles_for("pointwise", _widest(views))
    work = rows * triton.cdiv(columns, tiles.constants["BLOCK"])
    launch(gated_backward, work, tiles, arguments, GELU=up is None)
    return dgate, dup


def _widest(tensors: list[Tensor]) -> Tensor:
    return max(tensors, key=lambda t: t.element_size())
