"""Observation of a model's sites (core.parity.record.sites) in training steps; nothing is in place otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from telechat_twins.core.parity.record.taps import Place, Taps, TensorOps
from telechat_twins.core.train.trainer import See
from telechat_twins.pt_reference import model, ops
from telechat_twins.pt_reference.model import Decoder
from telechat_twins.pt_reference.tensor_parallel import RowParallel

PLACES = {
    "decoder": [Place(Decoder, "forward")],
    "block": [Place(model.DecoderBlock, "forward")],
    "norm": [Place(model.Norm, "forward")],
    "norm_after_sum": [Place(model.Norm, "after_sum")],
    "row_parallel": [Place(model.Linear, "forward"), Place(RowParallel, "forward")],
    "linears": [Place(ops, "linears")],
    "rope": [Place(ops, "rope_qk")],
}


def observed(stages: Sequence[Decoder], see: See) -> AbstractContextManager[None]:
    """While active, ``see`` receives every site's tensor and gradient of this rank's ``stages``, micro-batch by
    micro-batch: [b, s, n], heads flattened; 16-bit floats as float32, with the name of their own dtype."""
    return Taps(stages, see, TensorOps(_values, _dtype, _watch)).placed(PLACES)


def _values(x: Tensor) -> np.ndarray:
    held = x.detach().cpu()
    array: np.ndarray = (held.float() if held.itemsize == 2 else held).numpy()
    return array


def _dtype(x: Tensor) -> str:
    return _name(x.dtype)


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _watch(x: Tensor, hook: Callable[[Tensor | None], None]) -> None:
    if x.requires_grad:
        x.register_hook(hook)
