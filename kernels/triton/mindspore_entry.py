"""Triton operators on MindSpore tensors on Ascend. Not run on device: a test checks the launches.

The operator is called on torch tensors without data, which records its launches; these are repeated with MindSpore's
tensors, whose ``data_ptr`` and dtype names triton-ascend accepts (MindSpore registers its dtypes with an installed
triton). triton-ascend 3.2.0 takes device and stream from torch_npu, so torch and torch_npu must be installed beside
MindSpore, and both streams are synchronised: suitable for operators that CANN lacks, not for small ones.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import torch
from mindspore import Tensor, mint

from telechat_twins.core.model.visibility import KeyRanges
from telechat_twins.kernels.pytorch.private import storage_key
from telechat_twins.kernels.triton import ops
from telechat_twins.kernels.triton.blocks import Target
from telechat_twins.kernels.triton.launch import Launch, programs_of, recording

TYPES = {
    ms.float32: torch.float32,
    ms.float16: torch.float16,
    ms.bfloat16: torch.bfloat16,
    ms.int32: torch.int32,
    ms.int64: torch.int64,
}
BACK = {there: here for here, there in TYPES.items()}
# Operators whose results are written by their kernels alone; the others end with an operator of the framework.
OPERATORS = (
    "rms_norm",
    "add_rms_norm",
    "layer_norm",
    "rope_qk",
    "rope_qk_backward",
    "swiglu",
    "swiglu_backward",
    "gelu",
    "gelu_backward",
    "attention",
    "attention_backward",
    "attention_delta",
    "merge_blocks",
    "cross_entropy_forward",
    "cross_entropy_backward",
    "adamw",
)


def call(operator: str, *arguments: Any, **options: Any) -> Any:
    """``kernels.triton.ops.<operator>`` on MindSpore tensors, with its arguments and results.

    ``key_ranges`` holds a MindSpore tensor; dtypes are MindSpore's. Raises ValueError for an operator not in OPERATORS,
    TypeError for an unsupported dtype, and the operator's own errors.
    """
    import torch_npu  # noqa: F401  triton-ascend launches through it
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(torch.npu.current_device())
    target = Target("ascend", properties["num_vectorcore"], properties["num_aicore"])
    result, launches = prepare(operator, target, *arguments, **options)
    ms.runtime.synchronize()
    for launch in launches:
        launch.kernel[(programs_of(launch.work, launch.tiles),)](**launch.arguments, **launch.constants)
    torch.npu.synchronize()
    return result


def prepare(operator: str, target: Target, *arguments: Any, **options: Any) -> tuple[Any, list[Launch]]:
    """The results of ``call``, uninitialised, and its launches with MindSpore's tensors as arguments."""
    if operator not in OPERATORS:
        raise ValueError(f"operator: got {operator!r}, needs one of {', '.join(OPERATORS)}")
    known: dict[int, Tensor] = {}
    empty = [_without_data(x, known) for x in arguments]
    named = {name: _without_data(x, known) for name, x in options.items()}
    with recording(target) as recorded:
        shapes = getattr(ops, operator)(*empty, **named)
    result = _with_data(shapes, known)  # first, so that what is returned has the shape it is returned in
    launches = [
        launch._replace(arguments={name: _with_data(x, known) for name, x in launch.arguments.items()})
        for launch in recorded
    ]
    return result, launches


def _without_data(x: Any, known: dict[int, Tensor]) -> Any:
    """A torch tensor without data in place of a MindSpore tensor, registered by its storage, which its views share."""
    if isinstance(x, KeyRanges):
        return x._replace(ranges=_without_data(x.ranges, known))
    if isinstance(x, ms.Type):
        return _torch_type(x)
    if not isinstance(x, Tensor):
        return x
    if not x.is_contiguous():
        x = x.contiguous()
    stand_in = torch.empty(x.shape, dtype=_torch_type(x.dtype), device="meta")
    known[storage_key(stand_in)] = x
    known.setdefault(-len(known), stand_in)  # keeps the storage alive, and thereby its key unique
    return stand_in


def _with_data(x: Any, known: dict[int, Tensor]) -> Any:
    if isinstance(x, tuple):
        return tuple(_with_data(part, known) for part in x)
    if not isinstance(x, torch.Tensor):
        return x
    if storage_key(x) not in known:
        known[storage_key(x)] = mint.empty(tuple(x.shape), dtype=BACK[x.dtype])
        known.setdefault(-len(known), x)
    return known[storage_key(x)]


def _torch_type(dtype: ms.Type) -> torch.dtype:
    if dtype not in TYPES:
        raise TypeError(f"dtype: got {dtype}, needs {' or '.join(str(known) for known in TYPES)}")
    return TYPES[dtype]
