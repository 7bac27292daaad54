"""Taps on a model's sites, the same for both backends: wrappers of methods and operators, in place while they observe.

Only the forward passes that a model chunk is called for are observed: what a backward pass computes again is not. The
micro-batches of a chunk come in order, so that its calls count them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from telechat_twins.core.train.trainer import See

T = TypeVar("T")  # a backend's tensor
Method = Callable[..., Any]
BEFORE = {"o": "core", "down": "act"}  # the site that such a layer reads


class Block(Protocol):
    """A backend's model.DecoderBlock."""

    attn_norm: Any
    attn: Any
    ffn_norm: Any
    ffn: Any


class Chunk(Protocol):
    """A backend's model.Decoder: the layers that a rank holds."""

    norm: Any
    last: bool

    @property
    def layers(self) -> Mapping[str, Block]: ...


class TensorOps(NamedTuple, Generic[T]):
    """What the taps need of a backend's tensors. ``values``: as numpy, perhaps on the same memory, 16-bit floats as
    float32. ``dtype``: its name. ``watch(x, hook)``: call ``hook`` with the gradient of x by all its consumers, if x
    takes part in a backward pass; with None where a consumer's backward gives x no gradient."""

    values: Callable[[T], np.ndarray]
    dtype: Callable[[T], str]
    watch: Callable[[T, Callable[[T | None], None]], None]


class Place(NamedTuple):
    """An attribute to wrap: of a class, or of the module of operators."""

    owner: Any
    name: str


class Taps(Generic[T]):
    """Wrappers that hand every site's tensor and gradient of ``stages`` to ``see``, [b, s, n] each."""

    def __init__(self, stages: Sequence[Chunk], see: See, tensors: TensorOps[T]) -> None:
        self._see, self._tensors = see, tensors
        self._micro, self._block = -1, ""  # of the present forward pass; -1 outside of one
        self._calls = {id(stage): 0 for stage in stages}
        self._names: dict[int, str] = {}  # site of each module by its id; a layer that is not there has None's
        for stage in stages:
            self._names[id(stage.norm)] = "norm"
            for number, block in stage.layers.items():
                at = f"layers.{number}"
                self._names |= {id(block): at}
                self._names |= {id(getattr(block, name)): f"{at}.{name}" for name in ("attn_norm", "ffn_norm")}
                self._names |= {id(getattr(block.attn, name)): f"{at}.attn.{name}" for name in "qkvo"}
                self._names |= {id(getattr(block.ffn, name)): f"{at}.ffn.{name}" for name in ("gate", "up", "down")}

    @contextmanager
    def placed(self, places: Mapping[str, Sequence[Place]]) -> Iterator[None]:
        """While active, the methods and functions at ``places`` (by the name of the wrapper here) are wrapped."""
        with ExitStack() as active:
            for wrapper, owners in places.items():
                for owner, name in owners:
                    before = getattr(owner, name)
                    active.callback(setattr, owner, name, before)
                    setattr(owner, name, getattr(self, wrapper)(before))
            yield

    def _tap(self, site: str, x: T) -> None:
        if self._micro < 0:
            return
        see, micro, tensors = self._see, self._micro, self._tensors

        def pass_on(tensor: T, gradient: bool) -> None:
            values = tensors.values(tensor)
            see(site, micro, values.reshape(*values.shape[:2], -1), tensors.dtype(tensor), gradient)

        def pass_gradient(gradient: T | None) -> None:
            # Without a gradient the record lacks the quantity, which a comparison reports by name.
            if gradient is not None:
                pass_on(gradient, True)

        pass_on(x, False)
        tensors.watch(x, pass_gradient)

    def decoder(self, run: Method) -> Method:
        """A chunk: its calls are counted; the last one's output is the logits."""

        def wrapped(stage: Chunk, x: T, *args: Any, **options: Any) -> T:
            micro = self._calls[id(stage)]
            self._calls[id(stage)], self._micro = micro + 1, micro if self._see.wants(micro) else -1
            try:
                out: T = run(stage, x, *args, **options)
                if stage.last:
                    self._tap("logits", out)
            finally:
                self._micro = -1
            return out

        return wrapped

    def block(self, run: Method) -> Method:
        """A decoder block; what the first one reads is the embedding's output."""

        def wrapped(block: Block, x: T, *args: Any) -> T:
            name = self._block = self._names[id(block)]
            if name == "layers.0":
                self._tap("embed", x)
            out: T = run(block, x, *args)
            self._tap(name, out)
            return out

        return wrapped

    def norm(self, run: Method) -> Method:
        def wrapped(norm: object, x: T) -> T:
            out: T = run(norm, x)
            self._tap(self._names[id(norm)], out)
            return out

        return wrapped

    def norm_after_sum(self, run: Method) -> Method:
        def wrapped(norm: object, x: T, residual: T) -> tuple[T, T]:
            normed, stream = run(norm, x, residual)
            self._tap(f"{self._block}.attn_sum", stream)
            self._tap(self._names[id(norm)], normed)
            return normed, stream

        return wrapped

    def row_parallel(self, run: Method) -> Method:
        """The layers ``o`` and ``down``, on one rank or on several; other linear layers pass."""

        def wrapped(layer: object, x: T, *more: Any) -> T:
            name = self._names.get(id(layer), "")
            group, _, last = name.rpartition(".")
            if last not in BEFORE:
                other: T = run(layer, x, *more)
                return other
            self._tap(f"{group}.{BEFORE[last]}", x)
            out: T = run(layer, x, *more)
            self._tap(name, out)
            return out

        return wrapped

    def linears(self, run: Method) -> Method:
        """The operator of several linear layers that read the same."""

        def wrapped(x: T, dropped: T | None, *layers: object, again: object = None) -> tuple[T, ...]:
            found: tuple[T, ...] = run(x, dropped, *layers, again=again)
            for layer, out in zip(layers, found, strict=True):
                self._tap(self._names[id(layer)], out)
            return found

        return wrapped

    def rope(self, run: Method) -> Method:
        """The rotation of queries and keys."""

        def wrapped(q: T, k: T, *tables: T) -> tuple[T, T]:
            q, k = run(q, k, *tables)
            self._tap(f"{self._block}.attn.rope_q", q)
            self._tap(f"{self._block}.attn.rope_k", k)
            return q, k

        return wrapped
