"""Activations of a whole model, recorded by forward hooks; the model files are not involved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

Seen = dict[str, np.ndarray]
Hook = Callable[[Any, tuple[Any, ...], Any], None]  # (module, inputs, output), all of the framework


class Handle(Protocol):
    def remove(self) -> None: ...


class Module(Protocol):
    """A torch.nn.Module or a mindspore.nn.Cell."""

    def register_forward_hook(self, hook: Hook, /) -> Handle: ...


class Block(Module, Protocol):
    @property
    def attn(self) -> Module: ...

    @property
    def ffn(self) -> Module: ...


class Decoder(Module, Protocol):
    """A backend's model.Decoder on one rank, all of its layers."""

    @property
    def layers(self) -> Mapping[str, Block]: ...


@contextmanager
def observed(model: Decoder, to_numpy: Callable[[Any], np.ndarray]) -> Iterator[Seen]:
    """While active, each forward pass leaves its activations in the yielded mapping, as the model computed them:

    ``embed`` [B, S, E], the stream before the first block, input multiplier included; of block i ``layers.i.attn`` and
    ``layers.i.ffn`` [B, S, E], what its branches add to the stream, and ``layers.i`` [B, S, E], the stream after it;
    ``logits`` [B, S, V], multiplied. A later pass overwrites them. ``to_numpy`` is the backend's, of model.py.
    """
    seen: Seen = {}

    def keep(name: str) -> Hook:
        def hook(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if name == "layers.0":
                seen["embed"] = to_numpy(inputs[0]).copy()
            seen[name] = to_numpy(output).copy()

        return hook

    places: list[tuple[str, Module]] = [("logits", model)]
    for number, block in model.layers.items():
        places += [(f"layers.{number}.attn", block.attn), (f"layers.{number}.ffn", block.ffn)]
        places.append((f"layers.{number}", block))
    handles = [module.register_forward_hook(keep(name)) for name, module in places]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
