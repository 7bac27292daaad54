"""Observation of a model's sites (core.parity.record.sites) in training steps; nothing is in place otherwise."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache

import mindspore as ms
import numpy as np
from mindspore import Tensor
from mindspore import ops as mops

from telechat_twins.core.errors import UserError
from telechat_twins.core.parity.record.taps import Place, Taps, TensorOps
from telechat_twins.core.train.trainer import See
from telechat_twins.telechat_ms import autograd, model, ops
from telechat_twins.telechat_ms.model import Decoder
from telechat_twins.telechat_ms.tensor_parallel import RowParallel

PLACES = {
    "decoder": [Place(Decoder, "construct")],
    "block": [Place(model.DecoderBlock, "construct")],
    "norm": [Place(model.Norm, "construct")],
    "norm_after_sum": [Place(model.Norm, "after_sum")],
    "row_parallel": [Place(model.Linear, "construct"), Place(RowParallel, "construct")],
    "linears": [Place(ops, "linears")],
    "rope": [Place(ops, "rope_qk")],
}


def observed(stages: Sequence[Decoder], see: See) -> AbstractContextManager[None]:
    """While active, ``see`` receives every site's tensor and gradient of this rank's ``stages``, micro-batch by
    micro-batch: [b, s, n], heads flattened; 16-bit floats as float32, with the name of their own dtype."""
    if autograd.ENGINE != "recorded":
        raise UserError(
            f"MindSpore {ms.__version__} has no autograd engine that keeps a forward pass, and a pass that runs twice "
            "cannot be recorded; record with MindSpore 2.9 or 2.10"
        )
    values = _values_in_place if ms.get_context("device_target") == "CPU" else _values
    return Taps(stages, see, TensorOps(values, _dtype, _watch)).placed(PLACES)


def _values(x: Tensor) -> np.ndarray:
    # Only a conversion would become part of the backward pass.
    array: np.ndarray = (mops.stop_gradient(x).astype(ms.float32) if x.itemsize == 2 else x).asnumpy()
    return array


def _values_in_place(x: Tensor) -> np.ndarray:
    """As ``_values`` of a tensor of the CPU, on its own storage where that can be, while ``x`` lives: asnumpy copies
    half of what operators made. data_ptr waits for the operator that makes x."""
    if x.itemsize == 2 or not x.size or not x.is_contiguous():
        return _values(x)
    storage = (ctypes.c_char * (x.size * x.itemsize)).from_address(x.data_ptr())
    return np.frombuffer(storage, _dtype(x)).reshape(x.shape)


def _dtype(x: Tensor) -> str:
    return _name(x.dtype)


@cache
def _name(dtype: ms.Type) -> str:
    return str(dtype).lower()


def _watch(x: Tensor, hook: Callable[[Tensor | None], None]) -> None:
    with suppress(RuntimeError):  # of a tensor that takes no part in a backward pass
        x.register_hook(hook)
