"""Launch of Triton kernels on torch tensors: target, argument checks, and recording of launches for lowering.

torch_npu is not imported here: Ascend's tensors have device type "npu". Ascend and GPU: not run on device.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, TypeAlias

import torch
import triton
from torch import Tensor

from telechat_twins.kernels.triton.blocks import INTERPRETER, Target, Tiles, choose

Argument: TypeAlias = Tensor | int | float | None

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)


@triton.jit
def _nothing():
    pass


INTERPRETED = not isinstance(_nothing, triton.JITFunction)


class Launch(NamedTuple):
    """A recorded launch: ``work`` tasks, runtime ``arguments`` by name, compile-time ``constants``."""

    kernel: triton.JITFunction
    work: int
    arguments: dict[str, Argument]
    constants: dict[str, int | str]
    tiles: Tiles


class Recorder(NamedTuple):
    """The launches recorded for a target."""

    target: Target
    launches: list[Launch]


_recorders: list[Recorder] = []


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """Context in which launches are recorded for ``target`` instead of run; operators take tensors on "meta"."""
    recorder = Recorder(target, [])
    _recorders.append(recorder)
    try:
        yield recorder.launches
    finally:
        _recorders.remove(recorder)


def target_of(x: Tensor) -> Target:
    """The target of the device of ``x``. Raises RuntimeError for a device without Triton kernels."""
    if _recorders:
        return _recorders[-1].target
    if x.device.type == "cpu" and INTERPRETED:
        return INTERPRETER
    if x.device.type in ("cuda", "npu"):
        return _device_target(x.device.type, x.device.index or 0)
    raise RuntimeError(
        f"device: Triton kernels got tensors on {x.device} and need cuda or npu, "
        "or the CPU with TRITON_INTERPRET=1 set before the first import of triton"
    )


@functools.cache
def _device_target(kind: str, index: int) -> Target:
    if kind == "cuda":
        cores = torch.cuda.get_device_properties(index).multi_processor_count
        return Target("gpu", cores, cores)
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return Target("ascend", properties["num_vectorcore"], properties["num_aicore"])


def tiles_for(operator: str, x: Tensor, **sizes: int) -> Tiles:
    """Tiles of ``operator`` for the dtype and device of ``x``."""
    return choose(operator, x.element_size(), sizes, target_of(x))


def launch(
    kernel: triton.JITFunction,
    work: int,
    tiles: Tiles,
    arguments: Mapping[str, Argument],
    **constants: int | str,
) -> None:
    """Run ``kernel`` over ``work`` tasks, which the programs take in turn; no launch for 0 tasks."""
    if work == 0:
        return
    known = {**tiles.constants, **constants}
    if _recorders:
        _recorders[-1].launches.append(Launch(kernel, work, dict(arguments), known, tiles))
        return
    programs = programs_of(work, tiles)
    first = next(value for value in arguments.values() if isinstance(value, Tensor))
    if first.device.type == "cuda":
        here = torch.cuda.device(first.device)
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    else:
        here, options = nullcontext(), {}
    with here:
        kernel[(programs,)](**arguments, **known, **options)


def programs_of(work: int, tiles: Tiles) -> int:
    """Number of programs that ``launch`` starts."""
    return min(work, tiles.max_programs) if tiles.max_programs else work


def rows_of(x: Tensor) -> Tensor:
    """x [..., E] as [N, E] with contiguous channels: a view where possible, else a copy."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def heads_of(x: Tensor) -> Tensor:
    """x [B, S, H, D] with contiguous channels: x itself, or a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check(
    name: str,
    value: object,
    shape: Sequence[int | None] | None = None,
    dtypes: Sequence[torch.dtype] = FLOATS,
    beside: Tensor | None = None,
) -> None:
    """Check that ``value`` is a tensor of one of ``dtypes``, of ``shape`` (None: any length), on the device of
    ``beside``. Raises TypeError for type and dtype, ValueError for shape and device, naming ``name``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, needs a torch tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {value.dtype}, needs {' or '.join(str(d) for d in dtypes)}")
    if shape is not None:
        fits = len(shape) == value.ndim and all(n is None or n == m for n, m in zip(shape, value.shape, strict=True))
        if not fits:
            needs = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(f"{name}: got shape {tuple(value.shape)}, needs ({needs})")
    if beside is not None and value.device != beside.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, needs one on {beside.device}")


def check_last_axis(name: str, x: Tensor) -> None:
    """Check of a float tensor with at least one axis and one channel."""
    check(name, x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, needs at least one channel on its last axis")
