"""Faults of one operator in one layer, for `tele parity locate` to name: forward, and of the backward pass alone.

A fault is written once for both twins: functions of ``ops`` and methods of the model are replaced in this process. A
fault of the backward pass gives the right values and the gradients of a wrong function, right(constant(x)) + wrong(x) -
constant(wrong(x)).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from telechat_twins.core.backends import load

FORWARD = {"ms": "construct", "pt": "forward"}  # the method that a module computes in
Call = Callable[..., Any]
Wrong = Callable[..., Any]  # (framework, real function, *arguments)


class Framework:
    """The few functions on tensors that faults need, in either framework, and the block whose forward pass is under
    way (-1: none)."""

    def __init__(self, backend: str) -> None:
        self.backend, self.layer = backend, -1
        self.library: ModuleType = importlib.import_module({"ms": "mindspore", "pt": "torch"}[backend])
        self.kept: dict[int, Any] = {}  # by layer, for faults that use a buffer of before

    def constant(self, x: Any) -> Any:
        return self.library.ops.stop_gradient(x) if self.backend == "ms" else x.detach()

    def frozen(self, x: Any) -> Any:
        """x, whose gradient is zero."""
        return self.constant(x) + x * 0.0

    def rounded(self, x: Any, dtype: str = "bfloat16") -> Any:
        """x as if it had been held in ``dtype``."""
        narrow = getattr(self.library, dtype)
        return x.astype(narrow).astype(x.dtype) if self.backend == "ms" else x.to(narrow).to(x.dtype)

    def mean(self, x: Any, axis: int) -> Any:
        """With ``axis`` kept, of length 1."""
        return x.mean(axis, keep_dims=True) if self.backend == "ms" else x.mean(axis, keepdim=True)

    def sigmoid(self, x: Any) -> Any:
        return self.library.ops.sigmoid(x) if self.backend == "ms" else self.library.sigmoid(x)

    def joined(self, parts: Any, axis: int) -> Any:
        return self.library.ops.concat(tuple(parts), axis) if self.backend == "ms" else self.library.cat(parts, axis)

    def part(self, x: Any, axis: int, first: int, last: int) -> Any:
        axis %= x.ndim
        return x[tuple(slice(first, last) if i == axis else slice(None) for i in range(x.ndim))]

    def rolled(self, x: Any, axis: int, by: int = 1) -> Any:
        """x with the first ``by`` entries of ``axis`` moved to its end."""
        size = x.shape[axis]
        return self.joined([self.part(x, axis, by, size), self.part(x, axis, 0, by)], axis)

    def swapped(self, x: Any, axis: int) -> Any:
        """x with the two halves of ``axis`` swapped."""
        return self.rolled(x, axis, x.shape[axis] // 2)

    def without_last(self, x: Any, axis: int) -> Any:
        """x with the last entry of ``axis`` zero: a dropped remainder."""
        size = x.shape[axis]
        return self.joined([self.part(x, axis, 0, size - 1), self.part(x, axis, size - 1, size) * 0.0], axis)

    def before(self, x: Any) -> Any:
        """What was kept in the block before, x itself in the first: a stale buffer."""
        self.kept[self.layer] = x
        return self.kept.get(self.layer - 1, x)


@dataclass(frozen=True)
class Fault:
    """``operator``, ``site``: what must be named; the site's block is the layer. ``preset``: the model, ``case``: what
    else the run has (growth, lora, documents, padded). ``plant``: what to replace."""

    name: str
    operator: str
    site: str
    direction: str
    plant: Callable[[str], Iterator[tuple[Any, str, Any]]]
    preset: str = "telechat2-tiny"
    case: str = ""


CATALOGUE: dict[str, Fault] = {}


@contextmanager
def planted(fault: Fault | None, backend: str) -> Iterator[None]:
    """The process with the fault; without one as it is."""
    with ExitStack() as stack:
        for owner, name, value in fault.plant(backend) if fault is not None else ():
            stack.enter_context(_changed(owner, name, value))
        yield


@contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    real = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, real)


def _tracked(backend: str, framework: Framework) -> Iterator[tuple[Any, str, Any]]:
    """The changes that keep ``framework.layer``: the blocks of a stage run in order, once a pass."""
    model, method = load(backend, "model"), FORWARD[backend]
    block, decoder = (getattr(kind, method) for kind in (model.DecoderBlock, model.Decoder))

    def run_decoder(self: Any, *args: Any, **options: Any) -> Any:
        # A stage of a pipeline begins with a later block.
        framework.layer, framework.count = -1, min((int(n) for n, _ in self.layers.items()), default=0) - 1
        return decoder(self, *args, **options)

    def run_block(self: Any, *args: Any, **options: Any) -> Any:
        framework.count += 1
        framework.layer = framework.count
        try:
            return block(self, *args, **options)
        finally:
            framework.layer = -1

    yield model.Decoder, method, run_decoder
    yield model.DecoderBlock, method, run_block


def _backward_of(framework: Framework, right: Call, wrong: Call, *args: Any) -> Any:
    """The values of ``right`` with the gradients of ``wrong``."""
    true, false = right(*args), wrong(*args)
    if isinstance(true, tuple):
        pairs = zip(true, false, strict=True)
        return tuple(framework.constant(a) + (b - framework.constant(b)) for a, b in pairs)
    return framework.constant(true) + (false - framework.constant(false))


def _in_ops(function: str, wrong: Wrong, layer: int, backward: bool) -> Call:
    """A plant that replaces a function of ``ops`` in one block (-1: outside of the blocks)."""

    def plant(backend: str) -> Iterator[tuple[Any, str, Any]]:
        framework, ops = Framework(backend), load(backend, "ops")
        yield from _tracked(backend, framework)
        real = getattr(ops, function)

        def call(*args: Any) -> Any:
            # Every block runs it, and leaves what faults of stale buffers use.
            changed = wrong(framework, real, *args) if "before" in wrong.__code__.co_names else None
            if framework.layer != layer:
                return real(*args)
            if backward:
                return _backward_of(framework, real, lambda *again: wrong(framework, real, *again), *args)
            return wrong(framework, real, *args) if changed is None else changed

        yield ops, function, call

    return plant


def _in_linear(path: str, wrong: Wrong, layer: int, backward: bool) -> Call:
    """A plant that replaces the product of one linear layer: ``wrong(framework, real, x, weight, bias, compute)``."""

    def plant(backend: str) -> Iterator[tuple[Any, str, Any]]:
        framework, ops, model = Framework(backend), load(backend, "ops"), load(backend, "model")
        yield from _tracked(backend, framework)
        real, product, linears = ops.linear, model.Linear.product, ops.linears
        init, names = model.DecoderBlock.__init__, dict[int, str]()
        active = [False]

        def build(self: Any, *args: Any) -> None:
            init(self, *args)
            for part in ("attn", "ffn"):
                for name in "qkvo" if part == "attn" else ("gate", "up", "down"):
                    module = getattr(getattr(self, part), name)
                    if module is not None:
                        names[id(module)] = f"{part}.{name}"

        def run(self: Any, x: Any, dropped: Any, bias: Any, again: Any) -> Any:
            here = names.get(id(self), "head") == path
            active[0] = here and framework.layer == layer
            try:
                return product(self, x, dropped, bias, again)
            finally:
                active[0] = False

        def call(x: Any, weight: Any, bias: Any, compute: Any, again: Any = None) -> Any:
            if not active[0]:
                return real(x, weight, bias, compute, again)
            active[0] = False
            if backward:
                return _backward_of(
                    framework, real, lambda *again: wrong(framework, real, *again), x, weight, bias, compute
                )
            return wrong(framework, real, x, weight, bias, compute)

        yield model.DecoderBlock, "__init__", build
        yield model.Linear, "product", run
        yield ops, "linear", call
        if linears is not None:
            yield ops, "linears", lambda x, dropped, *layers, again=None: tuple(one(x, dropped) for one in layers)

    return plant


def _enter(name: str, operator: str, site: str, direction: str, plant: Call, preset: str, case: str) -> None:
    if name in CATALOGUE:
        raise ValueError(f"{name}: the name is taken")
    CATALOGUE[name] = Fault(name, operator, site, direction, plant, preset, case)


def operator_fault(
    name: str,
    function: str,
    operator: str,
    site: str,
    wrong: Wrong,
    *,
    backward: bool = False,
    preset: str = "telechat2-tiny",
    case: str = "",
) -> None:
    """Enter a fault of a function of ``ops``; ``site`` says in which block."""
    layer = int(site.split(".")[1]) if site.startswith("layers.") else -1
    direction = "backward" if backward else "forward"
    _enter(name, operator, site, direction, _in_ops(function, wrong, layer, backward), preset, case)


def linear_fault(
    name: str, site: str, wrong: Wrong, *, backward: bool = False, preset: str = "telechat2-tiny", case: str = ""
) -> None:
    """Enter a fault of one linear layer, named by its site."""
    layer = int(site.split(".")[1]) if site.startswith("layers.") else -1
    path = "head" if site == "logits" else site.split(".", 2)[2]
    direction = "backward" if backward else "forward"
    _enter(name, "linear", site, direction, _in_linear(path, wrong, layer, backward), preset, case)


def fault(
    name: str, operator: str, site: str, direction: str, plant: Call, preset: str = "telechat2-tiny", case: str = ""
) -> None:
    """Enter a fault that replaces something else."""
    _enter(name, operator, site, direction, plant, preset, case)
