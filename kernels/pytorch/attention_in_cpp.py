"""Attention on PyTorch's CPU by the C++ operators of kernels/cpu, called by address: "cpp" of the operator attention.

Names, shapes and results are those of kernels/pytorch/composite.py; statistics and sums are float32 for float32,
bfloat16 and float16, and other dtypes are not served. Arguments are those that kernels/pytorch/checks.py has passed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from typing import cast

import torch
from torch import Tensor

from telechat_twins.core.model.visibility import KeyRanges
from telechat_twins.kernels.pytorch.composite import merge_blocks
from telechat_twins.kernels.pytorch.room import empty

__all__ = ["merge_blocks"]  # and the functions below

NAMES = {getattr(torch, name): name for name in ("float32", "bfloat16", "float16", "int8", "int32", "int64", "float64")}
SERVED = (torch.float32, torch.bfloat16, torch.float16)


@cache
def obstacle() -> str:
    """Why the operators cannot be compiled or loaded here, a clause; empty if they can."""
    from telechat_twins.kernels.cpu.build import BuildError, load_plain

    try:
        load_plain()
    except BuildError as error:
        return str(error)
    return ""


def attention(
    q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges, scale: float | None = None, out_f32: bool = False
) -> tuple[Tensor, Tensor]:
    B, S, H, D = q.shape
    out = empty((B, S, H, D), torch.float32 if out_f32 else q.dtype)
    log_sum_exp = q.new_empty((B, H, S), dtype=torch.float32)
    inputs = (*map(unit_stride, (q, k, v)), _ranges(key_ranges))
    run("attention", inputs, (out, log_sum_exp), (D**-0.5 if scale is None else scale,))
    return out, log_sum_exp


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_ranges: KeyRanges,
    out: Tensor | None,
    log_sum_exp: Tensor,
    scale: float | None = None,
    delta: Tensor | None = None,
    out_f32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    B, S, H, D = q.shape
    grad = unit_stride(grad)
    if delta is None:
        assert out is not None
        delta = q.new_empty((B, H, S), dtype=torch.float32)
        run("attention_delta", (grad, unit_stride(out)), (delta,), ())
    dq, dk, dv = (empty(x.shape, torch.float32 if out_f32 else x.dtype) for x in (q, k, v))
    wide = (log_sum_exp.to(torch.float32).contiguous(), delta.to(torch.float32).contiguous())
    inputs = (grad, *map(unit_stride, (q, k, v)), _ranges(key_ranges), *wide)
    run("attention_backward", inputs, (dq, dk, dv), (D**-0.5 if scale is None else scale,))
    return dq, dk, dv


def _ranges(key_ranges: KeyRanges) -> Tensor:
    """The ranges, which ``place_ranges`` made a tensor."""
    return cast(Tensor, key_ranges.ranges).contiguous()


def unit_stride(x: Tensor) -> Tensor:
    """x, or a copy whose last axis is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def run(name: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], scalars: Sequence[float]) -> None:
    """Run a kernel on tensors that may be strided except along the last axis; outputs are contiguous.

    A kernel is mostly called with the shapes of its last call, so each thread keeps its calls: then only addresses and
    scalars are set.
    """
    prepared = _prepared.__dict__.get(name)
    if prepared is None:
        prepared = _prepared.__dict__[name] = _Prepared(name, len(inputs), len(outputs), len(scalars))
    prepared.run(inputs, outputs, scalars)


class _Prepared:
    """A kernel's call, and the dtypes, shapes and strides that its views have."""

    def __init__(self, name: str, inputs: int, outputs: int, scalars: int) -> None:
        from telechat_twins.kernels.cpu.engine import Call

        self.call, self.codes, self.counts = Call(name, inputs, outputs, [0.0] * scalars), _codes(), (inputs, outputs)
        self.views = [*self.call.inputs[:inputs], *self.call.outputs[:outputs]]
        self.forms: list[object] = [None] * len(self.views)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], scalars: Sequence[float]) -> None:
        if (len(inputs), len(outputs)) != self.counts:
            raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs for {self.counts}")
        for i, x in enumerate((*inputs, *outputs)):
            view, form = self.views[i], (x.dtype, x.shape, x.stride())
            if form != self.forms[i]:
                view.ndim, view.dtype = x.ndim, self.codes[x.dtype]
                view.shape[: x.ndim], view.stride[: x.ndim] = x.shape, x.stride()
                self.forms[i] = form
            view.data = x.data_ptr()
        self.call.set(scalars)
        self.call.run()


_prepared = threading.local()  # of each thread, by the kernel's name


@cache
def _codes() -> dict[torch.dtype, int]:
    from telechat_twins.kernels.cpu.engine import NAMES as codes

    return {dtype: codes.index(name) for dtype, name in NAMES.items()}
