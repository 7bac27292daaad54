"""Private PyTorch and Triton names that this project uses.

tests/unit/kernels/test_private_names.py fails when a release renames them or changes their signature.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor


def has_mkldnn_linear() -> bool:
    """Whether this PyTorch offers oneDNN's product of dense float32 matrices."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def mkldnn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] @ weight [out, in]^T + bias [out]; ``weight`` dense, or reordered for oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def mkldnn_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this processor."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def mkldnn_reorder(weight: Tensor) -> Tensor:
    """``weight`` [out, in] in the memory order that oneDNN prefers for one row; only ``mkldnn_linear`` can read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, 1)


def storage_key(x: Tensor) -> int:
    """Identifier shared by all views of one storage, also on device "meta"; valid while the storage is alive."""
    return x.untyped_storage()._cdata


def foreach_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each tensor, in few kernels."""
    return list(torch._foreach_norm(tensors))


def foreach_scale(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply every tensor by ``factor``, in place, in few kernels."""
    torch._foreach_mul_(tensors, factor)


def triton_ir() -> ModuleType:
    """The bindings of the installed triton (or triton-ascend) to MLIR: contexts and dialects."""
    from triton._C.libtriton import ir

    return ir
