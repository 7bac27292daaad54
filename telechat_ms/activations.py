"""What a model computes on its way, seen from outside: the model file knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from mindspore import Tensor, nn

from telechat_twins.telechat_ms.model import Decoder, to_numpy

Seen = dict[str, np.ndarray]


@contextmanager
def observed(model: Decoder) -> Iterator[Seen]:
    """While active, each forward pass of a whole model leaves in the yielded mapping, as it computed them:

    ``embed`` [B, S, E], the stream before the first block, input multiplier included; of block i ``layers.i.attn`` and
    ``layers.i.ffn`` [B, S, E], what its branches add to the stream, and ``layers.i`` [B, S, E], the stream after it;
    ``logits`` [B, S, V], multiplied. A later pass overwrites them.
    """
    seen: Seen = {}

    def keep(name: str) -> Callable[[nn.Cell, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Cell, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if name == "layers.0":
                seen["embed"] = to_numpy(inputs[0]).copy()
            seen[name] = to_numpy(output).copy()

        return hook

    places: list[tuple[str, nn.Cell]] = [("logits", model)]
    for number, block in model.layers.items():
        places += [(f"layers.{number}.attn", block.attn), (f"layers.{number}.ffn", block.ffn)]
        places.append((f"layers.{number}", block))
    handles = [module.register_forward_hook(keep(name)) for name, module in places]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
