"""Memory of large results on the CPU, such that the place of a freed one fits the next of its size."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

from telechat_twins.core.launch.memory import ask_large_pages

_LEAST = 1 << 17  # bytes; smaller ones are PyTorch's
_LINE = 64  # bytes of a cache line
_TRIM, _MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor on the CPU that begins at a cache line. PyTorch's profiler does not count a large one.

    PyTorch asks the C library for aligned memory. For that glibc (malloc.c, _int_memalign) takes a place longer than
    the tensor by up to 96 bytes and gives back what it does not use. The place of a freed tensor is therefore too short
    for the next one of its size and stays empty between tensors that wait for the backward pass: a quarter of what a
    step of adapters held. Here the start is moved inside memory of any alignment. The second line makes the place long
    enough for PyTorch's own tensors too.
    """
    size = math.prod(shape)
    held = size * dtype.itemsize
    if held < _LEAST:
        return torch.empty(shape, dtype=dtype, device="cpu")
    raw = np.empty(held + 2 * _LINE, np.uint8)
    start = -raw.__array_interface__["data"][0] % _LINE
    return torch.frombuffer(raw, dtype=dtype, count=size, offset=start).resize_(shape)


def zeros(size: int, dtype: torch.dtype, device: torch.device | None) -> Tensor:
    """A vector of zeros that lasts as long as the training; on the CPU on large pages where the system has some."""
    made = torch.empty(size, dtype=dtype, device=device)
    if made.device.type == "cpu":
        ask_large_pages(made.data_ptr(), made.nbytes)
    return made.zero_()


class GradientPlace:
    """Where the first gradient of a weight in a step belongs, for operators that can write it there: no copy then.

    Only one gradient may ``take`` the place after an ``offer``. Where a weight has several in one backward pass, the
    others are made elsewhere, and autograd adds them all in a tensor of its own.
    """

    def __init__(self, place: Tensor, weight: Tensor) -> None:
        """``weight`` finds the place from now on, by ``take_place``."""
        self._place, self._offered = place, False
        self._fits = (place.dtype, place.device, place.stride()) == (weight.dtype, weight.device, weight.stride())
        weight.gradient_place = self  # type: ignore[attr-defined]

    def offer(self) -> None:
        self._offered = self._fits

    def withdraw(self) -> None:
        self._offered = False

    def take(self) -> Tensor | None:
        offered, self._offered = self._offered, False
        return self._place.detach() if offered else None  # a tensor of its own, which autograd keeps as the gradient


def take_place(weight: Tensor) -> Tensor | None:
    """Where to write a whole gradient of ``weight``; None: elsewhere."""
    found: GradientPlace | None = getattr(weight, "gradient_place", None)
    return None if found is None else found.take()


def keep_freed() -> bool:
    """Have the C library keep the memory that is freed, for the next results of this process; false where it is not
    glibc. For training, whose steps need the same memory each time.

    Without it glibc takes what is larger than 32 MiB of the system and returns it when it is freed, and gives back the
    free end of its heap: the system then zeroes the pages of most large results anew, which took a fourteenth of the
    processor time of a step of one layer at 8,192 tokens.
    """
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    return change is not None and all(change(option, value) == 1 for option, value in ((_MMAP_MAX, 0), (_TRIM, -1)))
