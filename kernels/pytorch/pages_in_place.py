"""Paged attention on PyTorch's CPU by the C++ operator, which reads keys and values where they lie in the pages.

Time and memory are linear in the sum of the sequences' lengths: nothing is gathered or padded to the longest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from telechat_twins.core.inference.runner import Step
from telechat_twins.kernels.pytorch.weights import NAMES, compiled

if TYPE_CHECKING:
    from telechat_twins.kernels.cpu.engine import Call

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def reads_pages(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the operator serves pages of ``dtype`` on ``device``: it must be possible to compile it there."""
    return device.type == "cpu" and dtype in _FLOATS and compiled()


class PagesInPlace:
    """Addressing of one step and a prepared call of the operator, made once for all layers."""

    def __init__(self, step: Step) -> None:
        from telechat_twins.kernels.cpu.engine import Call, describe_view

        self._describe = describe_view
        # Kept: the call refers to their memory.
        arrays = (step.slots, step.starts, step.lengths, step.tables)
        self._arrays = [np.ascontiguousarray(array, np.int32) for array in arrays]
        self._tokens, self._singles = len(step.ids), step.singles
        self._calls: dict[int, Call] = {}  # by head dim, on which the scale of the scores depends
        self._make = Call

    def attention(self, q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        """kernels.reference.paged_attention: stores k and v [1, N, K, D] in pages [P, size, K, D], then attends with
        q [1, N, H, D] -> [1, N, H, D]. Raises ValueError or TypeError for shapes or dtypes that do not match."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        self._check(q, k, v, k_pages, v_pages)
        call, out = self._call(q.shape[-1]), torch.empty_like(q)
        for number, x in enumerate((q, k, v, k_pages, v_pages)):
            self._describe(call.inputs[number], x.data_ptr(), x.shape, NAMES[x.dtype])
        self._describe(call.outputs[0], out.data_ptr(), out.shape, NAMES[out.dtype])
        call.run()
        return out

    def _check(self, q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
        """Refuse what the kernel, which checks nothing, would read or write beyond."""
        (_, N, H, D), (_, _, K, _) = q.shape, k_pages.shape
        if (q.shape[0], N) != (1, self._tokens) or K == 0 or H % K:
            raise ValueError(f"q: shape {tuple(q.shape)}, needs [1, {self._tokens}, H, D], H a multiple of {K}")
        for name, x, shape in (("k", k, (1, N, K, D)), ("v", v, (1, N, K, D)), ("v_pages", v_pages, k_pages.shape)):
            if tuple(x.shape) != tuple(shape):
                raise ValueError(f"{name}: shape {tuple(x.shape)}, needs {tuple(shape)}")
        for name, x in (("k", k), ("v", v), ("k_pages", k_pages), ("v_pages", v_pages)):
            if x.dtype != q.dtype:
                raise TypeError(f"{name}: {x.dtype}, needs the dtype of q, {q.dtype}")
            if not x.is_contiguous() or x.shape[-1] != D:
                raise ValueError(f"{name}: shape {tuple(x.shape)}, needs contiguous rows of {D}")

    def _call(self, head_dim: int) -> Call:
        if head_dim not in self._calls:
            call = self._make("paged_attention", 9, 1, (head_dim**-0.5, self._singles))
            for number, array in enumerate(self._arrays, 5):
                self._describe(call.inputs[number], array.ctypes.data, array.shape, "int32")
            self._calls[head_dim] = call
        return self._calls[head_dim]
