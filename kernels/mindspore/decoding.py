"""Steps of few tokens as one call of the C++ operators (kernels/cpu/decoding.py) on MindSpore's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import mindspore as ms
from mindspore import Tensor

from telechat_twins.core.model.config import ModelConfig
from telechat_twins.kernels.cpu.decoding import DecoderPrograms, Matrix, Memory, serves
from telechat_twins.kernels.cpu.engine import engine_of
from telechat_twins.kernels.int8 import Int8
from telechat_twins.kernels.mindspore.ops import choices


def decoder_program(
    config: ModelConfig,
    dtypes: Sequence[ms.Type],
    held: Callable[[str], Tensor | Int8],
    pages: Sequence[tuple[Tensor, Tensor]],
    adapters: Sequence[Mapping[str, tuple[Tensor, Tensor]]] = (),
) -> DecoderPrograms | None:
    """A decoder with its ``pages`` as one call; None where its kernels do not serve: elsewhere than on a CPU, in mixed
    precision or float64, with growth masks, or where a run selected a composite operator.

    ``dtypes``: of weights, products and stream; ``held``: the parameter of a logical name; ``adapters``: A and scale B
    by a linear's logical name.
    """
    names = [str(dtype).lower() for dtype in dtypes]
    if ms.get_context("device_target") != "CPU" or not serves(config, names):
        return None
    if any(choice.implementation not in ("cpp", "amx") for choice in choices().values()):
        return None
    from telechat_twins.kernels.cpu.build import extension_library

    def matrix(name: str) -> Matrix:
        found = held(name)
        return Matrix(*map(_memory, found)) if isinstance(found, Int8) else Matrix(_memory(found))

    places = [(_memory(k), _memory(v)) for k, v in pages]
    low_rank = [{name: (_memory(a), _memory(b)) for name, (a, b) in pairs.items()} for pairs in adapters]
    return DecoderPrograms(extension_library(), config, names[0], matrix, places, low_rank)


def _memory(x: Tensor) -> Memory:
    """The memory of a contiguous tensor, where it stays as long as the tensor lives and nothing is assigned to it.

    A tensor made of numpy's memory moves when an operator first reads it; one does so here.
    """
    if not x.is_contiguous():
        raise ValueError(f"shape {tuple(x.shape)}: not contiguous")
    engine = engine_of(x)
    engine.run("placed", (x,), (), (), 1)
    return Memory(x.data_ptr(), tuple(x.shape), engine.name_of(x), x)
