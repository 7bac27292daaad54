"""Launches of all shipped configurations, recorded by calling each operator on tensors without data.

Exactly the launches of the operators for the supported sizes, dtypes and flags are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from telechat_twins.core.model.visibility import KeyRanges
from telechat_twins.kernels.adamw import AdamWStep
from telechat_twins.kernels.triton import ops
from telechat_twins.kernels.triton.blocks import Target
from telechat_twins.kernels.triton.launch import Launch, recording

FLOAT = torch.float32
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HIDDEN = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # tiles depend on the next power of two
HEAD_DIMS = (64, 80, 96, 128, 256)
HEADS = (8, 32, 64)
TYPE_NAMES = {FLOAT: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
_ROWS, _COLUMNS = 4096, 16384


def launches(target: Target) -> list[Launch]:
    """One launch per distinct kernel, signature and set of constants, in the order of the operators."""
    found: dict[tuple, Launch] = {}
    for call in _calls():
        with recording(target) as recorded:
            call()
        for launch in recorded:
            key = (launch.kernel.__name__, *types(launch).items(), *sorted(launch.constants.items()))
            found.setdefault(key, launch)
    return list(found.values())


def types(launch: Launch) -> dict[str, str]:
    """Argument -> Triton's name of its type; "none" for an absent argument."""
    return {name: _type(value) for name, value in launch.arguments.items()}


def dtypes_of(launch: Launch) -> str:
    """Dtypes of the tensors in the order of the arguments, without consecutive repetitions."""
    names = [name[1:] for name in types(launch).values() if name.startswith("*")]
    return "/".join(name for i, name in enumerate(names) if i == 0 or name != names[i - 1])


def _type(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, Tensor):
        return "*" + TYPE_NAMES[value.dtype]
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    return "fp32"


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _calls() -> Iterator[Callable[[], object]]:
    for dtype in DTYPES:
        yield from _norms(dtype)
        yield from _pointwise(dtype)
        yield from _ropes(dtype)
        yield from _attentions(dtype)
        yield from _losses(dtype)


def _norms(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    rstd = _empty(FLOAT, _ROWS)
    for E in HIDDEN:
        x, wide = _empty(dtype, _ROWS, E), _empty(FLOAT, _ROWS, E)
        for mask, w in ((None, _empty(dtype, E)), (_empty(FLOAT, E), _empty(FLOAT, E))):
            yield partial(ops.rms_norm, x, w, 1e-5, None, mask)
            yield partial(ops.rms_norm_backward, x, x, w, rstd, mask)
            yield partial(ops.layer_norm, x, w, w, 1e-5, None, mask)
            yield partial(ops.layer_norm_backward, x, x, w, rstd, rstd, mask)
            for stream in (x, wide):
                yield partial(ops.add_rms_norm, x, stream, w, 1e-5, dtype, mask)
                yield partial(ops.add_rms_norm_backward, x, stream, stream, w, rstd, mask)


def _pointwise(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    x, count = _empty(dtype, _ROWS, _COLUMNS), _ROWS * _COLUMNS
    yield partial(ops.swiglu, x, x)
    yield partial(ops.swiglu_backward, x, x, x)
    yield partial(ops.gelu, x)
    yield partial(ops.gelu_backward, x, x)
    master, grad = _empty(FLOAT, count), _empty(dtype, count)
    for copy in (None, *(_empty(kind, count) for kind in DTYPES)):
        for scale in (None, _empty(FLOAT, 1)):
            step = AdamWStep(1, 1e-3, 0.9, 0.95, 1e-8, 0.1)
            yield partial(ops.adamw, master, grad, master, master, step, copy=copy, device_scale=scale)


def _ropes(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    S = 512
    for D in HEAD_DIMS:
        for H in HEADS:
            q, k = _empty(dtype, 2, S, H, D), _empty(dtype, 2, S, 8, D)
            table = _empty(FLOAT, 1, S, 1, D // 2)
            for scale in (None, table) if D == 128 else (None,):
                yield partial(ops.rope_qk, q, k, table, table, scale, scale)
                yield partial(ops.rope_qk_backward, q, k, table, table, scale, scale)


def _attentions(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    B, S, H, K = 2, 512, 16, 8
    seen = KeyRanges(_empty(torch.int32, B, S, 2), S, "documents")  # type: ignore[arg-type]
    lse = _empty(FLOAT, B, H, S)
    for D in HEAD_DIMS:
        q, k, wide = _empty(dtype, B, S, H, D), _empty(dtype, B, S, K, D), _empty(FLOAT, B, S, H, D)
        for out_f32 in (False, True):
            yield partial(ops.attention, q, k, k, seen, None, out_f32)
            for out in (q, wide):
                yield partial(ops.attention_backward, q, q, k, k, seen, out, lse, out_f32=out_f32)
        yield partial(ops.merge_blocks, wide, lse, wide, lse)


def _losses(dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    lse = _empty(FLOAT, _ROWS)
    for index in (torch.int32, torch.int64):
        targets = _empty(index, _ROWS)
        for C in (64, 1024, 131072):
            logits = _empty(dtype, _ROWS, C)
            yield partial(ops.cross_entropy_forward, logits, targets, 0, C)
            for factor in (1.0, _empty(FLOAT, 1)):
                yield partial(ops.cross_entropy_backward, logits, targets, 0, C, lse, factor)
        for E in (64, 512, 4096):
            yield partial(ops.embedding_backward, _empty(dtype, _ROWS, E), targets, 1000)
