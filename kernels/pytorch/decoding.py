"""Steps of few tokens as one call of the C++ operators (kernels/cpu/decoding.py) on PyTorch's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.kernels.int8 import Int8
from telechat_twins.kernels.pytorch.ops import choices, default_device
from telechat_twins.kernels.pytorch.weights import NAMES, FewRows, Matrix, compiled

if TYPE_CHECKING:
    from telechat_twins.kernels.cpu.decoding import DecoderPrograms, Memory


def decoder_program(
    config: ModelConfig,
    dtypes: Sequence[torch.dtype],
    held: Callable[[str], Matrix],
    pages: Sequence[tuple[Tensor, Tensor]],
    adapters: Sequence[Mapping[str, tuple[Tensor, Tensor]]] = (),
) -> DecoderPrograms | None:
    """A decoder with its ``pages`` as one call; None where its kernels do not serve: elsewhere than on a CPU, in mixed
    precision or float64, with growth masks, or where a run selected a composite operator.

    ``dtypes``: of weights, products and stream; ``held``: the parameter of a logical name; ``adapters``: A and scale B
    by a linear's logical name.
    """
    if default_device() != "cpu" or not compiled():
        return None
    if any(choice.implementation == "composite" for choice in choices().values()):
        return None
    from telechat_twins.kernels.cpu import decoding as cpu_decoding
    from telechat_twins.kernels.cpu.build import load_plain

    names = [NAMES.get(dtype, "") for dtype in dtypes]
    if not cpu_decoding.serves(config, names):
        return None

    def matrix(name: str) -> cpu_decoding.Matrix:
        found = held(name)
        found = found.weight if isinstance(found, FewRows) else found
        parts = found if isinstance(found, Int8) else (found,)
        return cpu_decoding.Matrix(*map(_memory, parts))

    places = [(_memory(k), _memory(v)) for k, v in pages]
    low_rank = [{name: (_memory(a), _memory(b)) for name, (a, b) in pairs.items()} for pairs in adapters]
    return cpu_decoding.DecoderPrograms(load_plain(), config, names[0], matrix, places, low_rank)


def _memory(x: Tensor) -> Memory:
    from telechat_twins.kernels.cpu.decoding import Memory

    if not x.is_contiguous():
        raise ValueError(f"shape {tuple(x.shape)}: not contiguous")
    return Memory(x.data_ptr(), tuple(x.shape), NAMES[x.dtype], x)
